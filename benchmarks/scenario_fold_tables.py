"""Tables of what networks are worth on all labelled images, fold by fold (scenario_folds.py)."""

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


def folds_over_hand_made(arms: Arms) -> str:
    """Each arm less hand-made features on all labelled images."""
    return _differences(arms, "folds_less_hand_made", "less hand-made [95 %]")


def folds_by_modality(arms: Arms) -> str:
    """Each arm less ours on all labelled images."""
    return _differences(arms, "folds_less_ours", "less ours [95 %]")


def folds_by_modality_usual(arms: Arms) -> str:
    """The same of the usual probe."""
    return _differences(arms, "folds_standard_less_ours", "usual probe, less ours [95 %]")


def folds_over_without_start(arms: Arms) -> str:
    """Each arm less ours from random weights, on all labelled images."""
    return _differences(arms, "folds_less_without_start", "less without_start [95 %]")


def folds_over_without_start_usual(arms: Arms) -> str:
    """The same of the usual probe."""
    head = "usual probe, less without_start [95 %]"
    return _differences(arms, "folds_standard_less_without_start", head)


def folds_lost(arms: Arms) -> str:
    """How the probe on all labelled images changed once sites had left."""
    return _differences(arms, "change", "probe, end less before [95 %]")


def folds_lost_usual(arms: Arms) -> str:
    """How the usual probe on all labelled images changed once sites had left."""
    return _differences(arms, "change_standard", "usual probe, end less before [95 %]")


def folds_share(arms: Arms) -> str:
    """That change less .3 of FedAvg's."""
    return _differences(arms, "change_less_share", "probe, less .3 of no_memory_fast's [95 %]")


def folds_share_usual(arms: Arms) -> str:
    """That change of the usual probe less .3 of FedAvg's."""
    head = "usual probe, less .3 of no_memory_fast's [95 %]"
    return _differences(arms, "change_less_share_standard", head)


def _differences(arms: Arms, which: str, head: str) -> str:
    found = {name: arm["folds"] for name, arm in arms.items() if "folds" in arm}
    return differences_of(found, which, head, MEAN)
