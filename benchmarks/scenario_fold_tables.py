"""Tables of what networks are worth on all labelled images, fold by fold (scenario_folds.py)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from scenario_cells import Arms, difference, differences_of, figures, markdown, with_spread
from scenario_compare import MEAN


def folds(arms: Arms) -> str:
    """The probe on all labelled images by five folds, and on those that no network saw."""
    rows = []
    for name, arm in arms.items():
        if found := arm.get("folds"):
            cells = []
            for moment in ("folds", "folds_standard", "unseen"):
                cells += [
                    with_spread(figures(found, moment)[MEAN]),
                    *(difference(found, f"{moment}_less_{other}") for other in ("ours", "init")),
                ]
            rows.append([name, *cells])
    less = ["less ours [95 %]", "less init [95 %]"]
    return markdown(["arm", "probe", *less, "usual probe", *less, "unseen", *less], rows)


def _differences(arms: Arms, which: str, head: str) -> str:
    """A row an arm that has such differences."""
    found = {name: arm["folds"] for name, arm in arms.items() if "folds" in arm}
    return differences_of(found, which, f"{head} [95 %]", MEAN)


_LOST: Final = "end less before"
_SHARE: Final = "less .3 of no_memory_fast's"
TABLES: Final[Mapping[str, Callable[[Arms], str]]] = {
    "folds": folds,
    **{
        name: partial(_differences, which=which, head=head)
        for name, which, head in (
            ("folds_over_hand_made", "folds_less_hand_made", "less hand-made"),
            ("folds_by_modality", "folds_less_ours", "less ours"),
            ("folds_by_modality_usual", "folds_standard_less_ours", "usual probe, less ours"),
            ("folds_over_without_start", "folds_less_without_start", "less without_start"),
            (
                "folds_over_without_start_usual",
                "folds_standard_less_without_start",
                "usual probe, less without_start",
            ),
            ("folds_lost", "change", f"probe, {_LOST}"),
            ("folds_lost_usual", "change_standard", f"usual probe, {_LOST}"),
            ("folds_share", "change_less_share", f"probe, {_SHARE}"),
            ("folds_share_usual", "change_less_share_standard", f"usual probe, {_SHARE}"),
        )
    },
}
"""Kind -> table: what each arm's probe has more than another's, or at the end than before sites
left, or than a share of what FedAvg's lost."""
