"""The arms of benchmarks/scenarios.py, and the search for the values that each needs.

  ours               the recipe
  init, random       the start, untrained; random weights
  init_1600, init_25600
                     starts that learned from phantoms for as many steps, untrained
  init_narrow, init_wide
                     init_1600 with blocks half and twice as wide
  pixels, hand_made  no network: the image shrunk to 16 x 16; histograms of oriented gradients, that
                     thumbnail and the colours' histograms
  local, pooled      each site alone; all images on one machine, as many views a step
  frozen             ours with a teacher that stays as it began, measured on the student
  long_rounds, short_rounds
                     ours with as many steps, in rounds of 10 times (two rounds at least) and of
                     half as many steps
  flat_weight_decay, no_local_views, warm_student, no_warmup, large_memory
                     ours with one value of the recipe changed, see OTHER_VALUES
  low_rate           ours with the lower of the learning rates that the others try
  refilled, unweighted, rebuild, random_anchors, without_description,
  description_alone, without_memory, without_start
                     ours with one part taken out or replaced
  no_memory          a teacher, cosine between embeddings of two views, KoLeo; nothing else
  init_wide_6400     the recipe's start with blocks twice as wide, untrained
  ours_25600, no_memory_25600, ours_wide
                     ours and no_memory from the longer start, ours from the wide one, with the
                     values that they have without
  local_without_start, no_memory_without_start
                     local and no_memory from random weights, with the same values
  no_memory_fast, no_memory_teacher
                     no_memory with the learning rate of ours, and measured on its teacher
  dino, mae, fedema  DINO, a masked autoencoder, FedEMA: each from its paper, see its module
  fedprox            ours with FedProx' pull to the global weights
and, in `leaving` and `alone`, from the round on after a site has left:
  anchor             the student keeps near the received teacher on the site's own images
  slow_teacher       the teacher moves a tenth as fast
  server_momentum    the global weights move slowly
  rehearsal          the coordinator trains on phantoms of the lost modalities, as one more site
  decay              a smaller learning rate

Tuned values come from benchmarks/competitors.json if it was made with the same recipe, else they
are the first of each list below; the tables say so. Tuning uses a seed of its own and sees nothing
of the test split. Every tuned arm has the same number of tries, TRIES. Ours has none here: its
values are the recipe's, which was chosen on images that are not in the test split either. A
competitor may be measured on its student or on the student's moving average, whichever does better
on val.

Run: python benchmarks/competitors.py --data DIR --tune [--out runs/scenarios] [--jobs 2]
     [--arms dino mae ...] [--steps N] [--recipe FILE] [--device cuda]
It resumes after a kill, adds to benchmarks/competitors.json (with another recipe or device, to
OUT/competitors.json) and prints a table.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from competitor_dino import dino
from competitor_fedema import byol, divergence_aware
from competitor_mae import masked_autoencoder
from competitor_step import arm_of
from federation_loop import Arm
from our_arms import (
    ServerMomentum,
    anchor,
    description_alone,
    fedprox,
    frozen,
    ours,
    random_anchors,
    scaled,
    unweighted,
    with_recipe,
    without_memory,
    without_network,
    without_start,
)

from core.checkpoint import read_json, write_json
from core.errors import UserError
from core.evaluation.baselines import HAND_MADE, PIXELS
from core.evaluation.protocol import FeatureSource

CHOSEN: Final = Path(__file__).with_suffix(".json")
TUNING_SEED: Final = 1000
TRIES: Final = 4
Values = dict[str, float]

RATES: Final = (1.0, 0.333)
"""Factors on the recipe's learning rate."""
GRIDS: Final[Mapping[str, Mapping[str, Sequence[float]]]] = {
    "no_memory": {"rate": RATES, "koleo": (0.02, 0.1)},
    "dino": {"rate": RATES, "temperature": (0.04, 0.07)},
    "mae": {"rate": RATES, "depth": (1, 2)},
    "fedema": {"rate": RATES, "tau": (0.7, 0.35)},
    "fedprox": {"rate": RATES, "weight": (0.01, 0.1)},
    "anchor": {"weight": (1.0, 0.3, 3.0, 10.0)},
    "server_momentum": {"momentum": (0.5, 0.7, 0.8, 0.9)},
    "decay": {"factor": (0.3, 0.03, 0.1, 0.5)},
}
"""The values that are tried; each arm has TRIES of them in all."""
DINO_PROTOTYPES: Final = 512

WITHOUT_NETWORK: Final[Mapping[str, FeatureSource]] = {"pixels": PIXELS, "hand_made": HAND_MADE}
"""Arms that are the same for every seed and need no start."""
STARTS: Final[Mapping[str, int]] = {
    "init_1600": 1600, "init_25600": 25600, "ours_25600": 25600, "no_memory_25600": 25600,
    "init_narrow": 1600, "init_wide": 1600, "init_wide_6400": 6400, "ours_wide": 6400,
}  # fmt: skip
"""Arms whose start learned from phantoms for so many steps, whatever the recipe says."""
WIDTHS_ALONE: Final[Mapping[str, float]] = {"init_narrow": 0.5, "init_1600": 1, "init_wide": 2}
"""Starts that differ in their width alone."""
WIDTHS: Final[Mapping[str, float]] = {**WIDTHS_ALONE, "init_wide_6400": 2, "ours_wide": 2}
"""Factors on the width of the blocks and the number of their heads."""
STARTS_ALONE: Final = tuple(name for name in STARTS if name.startswith("init_"))
LENGTHS: Final = ("init", *(name for name in STARTS_ALONE if WIDTHS.get(name, 1) == 1))
"""Starts that differ in their steps alone."""
UNTRAINED: Final = ("init", "random", *STARTS_ALONE, *WITHOUT_NETWORK)
LOCAL: Final = ("local", "local_without_start")
"""Arms in which each site is alone."""
TUNED_AS: Final[Mapping[str, str]] = {
    "no_memory_25600": "no_memory", "no_memory_without_start": "no_memory",
}  # fmt: skip
"""Arms that take another's values: a search of their own would cost another start."""
ROUND_LENGTHS: Final[Mapping[str, float]] = {"long_rounds": 10, "short_rounds": 0.5}
"""Factors on the recipe's local steps."""
FORGETTING: Final = ("anchor", "slow_teacher", "server_momentum", "rehearsal", "decay")
"""Arms that are ours until somebody has left."""
STUDENT_OR_TEACHER: Final = ("no_memory", "dino", "mae", "fedema")
"""Arms that are measured on whichever does better on val; the others release a teacher."""
NETWORKS: Final = ("student", "teacher")
OTHER_VALUES: Final[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
    "flat_weight_decay": {"optim": {"weight_decay": (0.04, 0.04)}},
    "no_local_views": {"views": {"local_views": 0}},
    "warm_student": {"loss": {"student_temperature": 0.2}},
    "no_warmup": {"optim": {"warmup": 0.0}},
    "large_memory": {"memory": {"entries_per_modality": 1024}},
    "refilled": {"memory": {"at_round_start": "refilled"}},
    "rebuild": {"federation": {"teacher": "rebuild"}},
    "without_description": {"loss": {"description_weight": 0.0}},
}
"""What the recipe's value is held against, an arm each."""

ARMS: Final[Mapping[str, Callable[..., Arm]]] = {
    "ours": ours,
    "init": ours,
    **dict.fromkeys((*STARTS_ALONE, "ours_25600", "ours_wide"), ours),
    "random": lambda: without_start(ours()),
    "pixels": without_network,
    "hand_made": without_network,
    "local": ours,
    "pooled": ours,
    "frozen": frozen,
    "long_rounds": ours,
    "short_rounds": ours,
    **{name: partial(with_recipe, **values) for name, values in OTHER_VALUES.items()},
    "unweighted": unweighted,
    "low_rate": lambda: scaled("optim", "learning_rate", RATES[1]),
    "random_anchors": random_anchors,
    "description_alone": description_alone,
    "without_memory": lambda: without_memory(described=True),
    **dict.fromkeys(("without_start", "local_without_start"), lambda: without_start(ours())),
    **dict.fromkeys(("no_memory", "no_memory_25600"), partial(without_memory, described=False)),
    "no_memory_without_start": lambda rate, koleo: without_start(
        without_memory(described=False, rate=rate, koleo=koleo)
    ),
    "no_memory_fast": lambda: replace(without_memory(described=False), measured="student"),
    "no_memory_teacher": lambda: without_memory(described=False),
    "dino": lambda rate, temperature: arm_of(
        dino(prototypes=DINO_PROTOTYPES, temperature=temperature), rate=rate
    ),
    "mae": lambda rate, depth: arm_of(
        masked_autoencoder(depth=int(depth)), rate=rate, local_like_global=True
    ),
    "fedema": lambda rate, tau: arm_of(byol(), rate=rate, round_of=divergence_aware(tau)),
    "fedprox": fedprox,
    "anchor": anchor,
    "slow_teacher": lambda: Arm(recipe=_slow_teacher),
    "server_momentum": lambda momentum: Arm(merge=ServerMomentum(momentum)),
    "rehearsal": ours,
    "decay": lambda factor: scaled("optim", "learning_rate", factor),
}


def make_arm(name: str, values: Mapping[str, Any]) -> Arm:
    """The arm with its tuned values; `measured` among them says which network is the result."""
    numbers = {key: value for key, value in values.items() if key != "measured"}
    arm = ARMS[name](**numbers)
    return replace(arm, measured=values.get("measured", arm.measured))


def _slow_teacher(recipe: Any) -> Any:
    slow = 1 - (1 - recipe.optim.ema_momentum) / 10
    return with_recipe(optim={"ema_momentum": slow}).recipe(recipe)


def tries(name: str) -> list[Values]:
    """All values of an arm that are tried, the usual ones first."""
    grid = GRIDS[name]
    return [dict(zip(grid, row, strict=True)) for row in itertools.product(*grid.values())]


def chosen_values(name: str, recipe_sha256: str, file: Path) -> tuple[Values, bool]:
    """An arm's values, and whether they need no tuning or had it with this recipe."""
    name = TUNED_AS.get(name, name)
    if name not in GRIDS:
        return {}, True
    if file.exists():
        found = read_json(file)
        if found["recipe_sha256"] == recipe_sha256 and name in found["chosen"]:
            return dict(found["chosen"][name]), True
    return tries(name)[0], False


def best(arm: str, rows: Iterable[tuple[Values, Mapping[str, float]]]) -> dict[str, Any]:
    """Values with the highest mean AUROC on val, and the network that had it.

    Args:
        arm: whose.
        rows: values and "student" or "teacher" -> AUROC; of equals the first wins.
    """
    networks = NETWORKS if arm in STUDENT_OR_TEACHER else ("teacher",)
    found = [(values, name, figures[name]) for values, figures in rows for name in networks]
    values, name, _ = max(found, key=lambda row: row[2])
    return {**values, "measured": name}


def main() -> None:
    from scenario_jobs import Study, results_of, run_jobs, tuning_job

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory of npz files")
    parser.add_argument("--tune", action="store_true", required=True, help="run the tries")
    parser.add_argument("--out", type=Path, default=Path("runs/scenarios"))
    parser.add_argument("--arms", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--steps", type=int, help="of a site; the recipe's without it")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--recipe", type=Path, help="another than configs/seven_sites.toml")
    parser.add_argument("--device", default="cpu", help="a torch device; with one of them --jobs 1")
    arguments = parser.parse_args()
    study = Study(arguments.data, arguments.out.resolve(), arguments.recipe, arguments.device)
    jobs = {
        (arm, number): tuning_job(study, arm, values, arguments.steps)
        for arm in arguments.arms
        for number, values in enumerate(tries(arm))
    }
    run_jobs(study, list(jobs.values()), arguments.jobs)
    table: dict[str, Any] = {"recipe_sha256": study.recipe_sha256, "chosen": {}, "tries": {}}
    file = study.tried
    if file.exists() and (before := read_json(file))["recipe_sha256"] == study.recipe_sha256:
        table = before
    print("| arm | values | student | teacher | CPU s |\n|---|---|---|---|---|")
    for arm in arguments.arms:
        rows = []
        for number, values in enumerate(tries(arm)):
            result = results_of(study, jobs[arm, number])
            if result is None:
                raise UserError(f"try {number} of arm '{arm}' has no result; run this again")
            rows.append((values, result["val"]))
            told = " | ".join(f"{result['val'].get(n, float('nan')):.4f}" for n in NETWORKS)
            print(f"| {arm} | {json.dumps(values)} | {told} | {result['cpu_train']:.0f} |")
        table["tries"][arm] = [{"values": v, "val": figures} for v, figures in rows]
        table["chosen"][arm] = best(arm, rows)
        print(f"| **{arm}** | **{json.dumps(table['chosen'][arm])}** | | | |")
    write_json(file, table)


if __name__ == "__main__":
    main()
