"""The tables of the study in Markdown, from benchmarks/scenarios.json alone.

A page has a table between two marks,

    <!-- table SCENARIO STEPS KIND ARM ... -->
    <!-- end -->

KIND is one of KINDS; `table tuning val tries ARM ...` shows what was tried for competitors, and
`table ours STEPS KIND SCENARIO ...` ours, a row a scenario.
Run: python benchmarks/scenario_tables.py PAGE.md ... writes the tables anew; so a page cannot say
another figure than the study's.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import scenario_fold_tables
from scenario_cells import (
    Arm,
    Arms,
    by_arm_and_modality,
    difference,
    differences_of,
    figures,
    markdown,
    seeds_of,
    with_spread,
)
from scenario_compare import MEAN
from scenario_leaving import change, forgotten, lost, lost_usual

from core.checkpoint import read_json, write_atomically
from core.errors import UserError

RESULTS: Final = Path(__file__).resolve().with_name("scenarios.json")
TRIED: Final = RESULTS.with_name("competitors.json")
TABLE: Final = re.compile(r"<!-- table (.+?) -->\n.*?<!-- end -->", re.DOTALL)


def probe(arms: Arms) -> str:
    """AUROC of the probe, and the mean's difference to ours."""
    return by_arm_and_modality(arms, "end", "less_ours")


def standard(arms: Arms) -> str:
    """The same of class and mean patch tokens, not mirrored."""
    return by_arm_and_modality(arms, "end_standard", "less_ours_standard")


def votes(arms: Arms) -> str:
    """Accuracy of a vote of neighbours."""
    return by_arm_and_modality(arms, "end", "", figure="knn_accuracy")


def means(arms: Arms) -> str:
    """Means over the modalities, with the intervals of their difference to ours."""
    rows = []
    for name, arm in arms.items():
        cells = []
        for moment, less in (("end", "less_ours"), ("end_standard", "less_ours_standard")):
            cells += [with_spread(figures(arm, moment).get(MEAN, ())), difference(arm, less)]
        vote = with_spread(figures(arm, "end", "knn_accuracy").get(MEAN, ()))
        tuned = all(job["tuned"] for job in seeds_of(arm))
        rows.append([name if tuned else f"{name} (not tuned)", *cells, vote])
    less = "less ours [95 %]"
    return markdown(["arm", "probe", less, "usual probe", less, "vote"], rows)


def early(arms: Arms) -> str:
    """The probe that also reads the tokens before the first block, beside the one that does not.

    Arms of which a seed lacks it are left out.
    """
    rows = [
        [
            name,
            with_spread(figures(arm, "end")[MEAN]),
            with_spread(figures(arm, "end_early")[MEAN]),
            difference(arm, "early_less_probe"),
            difference(arm, "early_less_hand_made"),
        ]
        for name, arm in arms.items()
        if figures(arm, "end_early") and "early_less_probe" in arm
    ]
    heads = ["arm", "probe", "with earlier tokens", "less the probe [95 %]"]
    return markdown([*heads, "less hand-made [95 %]"], rows)


def by_modality(arms: Arms) -> str:
    """Each arm less ours in every modality."""
    return differences_of(arms, "less_ours", "less ours [95 %]")


def over_hand_made(arms: Arms) -> str:
    """Each arm less hand-made features in every modality, and in their mean."""
    return differences_of(arms, "less_hand_made", "less hand-made [95 %]", MEAN)


def over_no_memory(arms: Arms) -> str:
    """Ours from random weights less FedAvg without a memory from the same."""
    return differences_of(arms, "less_no_memory", "less no_memory_without_start [95 %]", MEAN)


def over_extreme(arms: Arms) -> str:
    """Each arm, or scenario, less the same where every modality is at one site, with all images."""
    return differences_of(arms, "less_extreme", "less `extreme` [95 %]", MEAN)


def growth(arms: Arms) -> str:
    """How much a start's AUROC grows when it learns from phantoms for twice as many steps."""
    return differences_of(arms, "per_doubling", "for twice as many steps [95 %]", MEAN)


def width_growth(arms: Arms) -> str:
    """How much a start's AUROC grows when its network has twice as many weights."""
    return differences_of(arms, "per_weights_doubling", "for twice as many weights [95 %]", MEAN)


def data_growth(arms: Arms) -> str:
    """How much an arm's AUROC grows when each site has twice as many patients."""
    return differences_of(arms, "per_data_doubling", "for twice as many patients [95 %]", MEAN)


def noticed(arms: Arms) -> str:
    """What the coordinator noticed, summed over seeds."""
    rows = []
    for name, arm in arms.items():
        jobs = seeds_of(arm)
        counts = [str(sum(job[key] for job in jobs)) for key in ("outliers", "rejected")]
        held = sorted({site for job in jobs for site in job["held"]})
        if any(count != "0" for count in counts) or held:
            rows.append([name, *counts, ", ".join(held) or "none"])
    return markdown(["arm", "reports of an odd site", "updates rejected", "held back"], rows)


def cpu(arms: Arms) -> str:
    """CPU seconds: a step of a site, one measurement of all modalities, a job, all jobs."""
    rows = []
    for name, arm in arms.items():
        jobs = seeds_of(arm)
        train, measuring = (sum(j[k] for j in jobs) for k in ("cpu_train", "cpu_measure"))
        steps, count = (sum(j[k] for j in jobs) for k in ("site_steps", "measurements"))
        a_step = f"{train / steps:.3f}" if steps else ""
        whole = train + measuring
        cells = [f"{measuring / count:.0f}", f"{whole / len(jobs):.0f}", f"{whole:.0f}"]
        rows.append([name, str(len(jobs)), a_step, *cells])
    return markdown(["arm", "jobs", "a step and site", "a measurement", "a job", "all"], rows)


def tries(arms: Arms) -> str:
    """Mean AUROC on val of each try, of either network; the chosen one is bold."""
    rows = []
    for name, arm in arms.items():
        chosen = {k: v for k, v in arm["chosen"].items() if k != "measured"}
        for row in arm["tries"]:
            best = row["values"] == chosen
            cells = [
                f"**{row['val'][n]:.4f}**" if best and n == arm["chosen"]["measured"]
                else f"{row['val'][n]:.4f}"
                for n in ("student", "teacher")
            ]  # fmt: skip
            rows.append([name, json.dumps(row["values"]).strip("{}").replace('"', ""), *cells])
    return markdown(["arm", "values", "student", "teacher"], rows)


KINDS: Final[Mapping[str, Callable[[Arms], str]]] = {
    "means": means, "probe": probe, "standard": standard, "votes": votes, "early": early,
    "by_modality": by_modality, "over_hand_made": over_hand_made, "growth": growth,
    "width_growth": width_growth, "data_growth": data_growth, "over_extreme": over_extreme,
    "over_no_memory": over_no_memory, "change": change, "forgotten": forgotten, "lost": lost,
    "lost_usual": lost_usual, "noticed": noticed, "cpu": cpu,
    **scenario_fold_tables.TABLES,
}  # fmt: skip


def filled(page: str, results: Mapping[str, Any]) -> str:
    """A page with its tables written anew.

    Raises:
        UserError: a mark names what `results` has not.
    """

    def table(match: re.Match[str]) -> str:
        words = match[1].split()
        try:
            scenario, steps, kind, *arms = words
            rows = results[scenario][steps]
            text = (KINDS | {"tries": tries})[kind]({arm: rows[arm] for arm in arms or rows})
        except (KeyError, ValueError) as error:
            raise UserError(
                f"table '{match[1]}': expected SCENARIO STEPS KIND ARM ..., each in scenarios.json "
                f"and KIND of {', '.join(KINDS)}; not found: {error}. Run scenarios.py for it, "
                "or take the table out"
            ) from error
        return f"<!-- table {match[1]} -->\n{text}\n<!-- end -->"

    return TABLE.sub(table, page)


def all_results() -> dict[str, Any]:
    """What tables are made of: the study's results, ours by scenario, and its tuning."""
    tuning: dict[str, Any] = {}
    if TRIED.exists():
        tried = read_json(TRIED)
        tuning = {
            arm: {"tries": rows, "chosen": tried["chosen"][arm]}
            for arm, rows in tried["tries"].items()
        }
    results = read_json(RESULTS)["results"]
    ours: dict[str, dict[str, Arm]] = {}
    for scenario, lengths in results.items():
        for steps, arms in lengths.items():
            if "ours" in arms:
                ours.setdefault(steps, {})[scenario] = arms["ours"]
    return {**results, "ours": ours, "tuning": {"val": tuning}}


def main() -> None:
    results = all_results()
    for name in sys.argv[1:]:
        page = Path(name)
        write_atomically(page, filled(page.read_text(), results).encode())


if __name__ == "__main__":
    main()
