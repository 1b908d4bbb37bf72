"""What a coordinator can learn from what a site sends: without privacy, and in record mode.

Two attacks on real images and our own network, by a coordinator that keeps to the protocol:
  inversion   of an answer: can an image be read from it? Recovered by least squares (inversion.py);
              likeness in decibels to the best of the views that went in, after the best brightness
              and contrast, beside that of a plain grey picture: no higher than that, and nothing
              was read. Median and range over images of four modalities. Writes a picture of pairs.
  membership  of an image in a study: was it trained on? Area under the curve by two scores of
              membership.py, .5 is a coin, with a 95 % interval; both trainings see the same images
              equally often

DATA holds the 64 px npz files (ct*, cxr*, ...).

Run: OMP_NUM_THREADS=1 python benchmarks/attacks.py --data DATA [--out DIR] [--only inversion]
     [--studies 8]   (about eight minutes of one core)
"""

import argparse
import json
from pathlib import Path
from typing import Any

import inversion
import membership
import numpy as np
from real_images import PLAIN_VIT, RECIPE

from core.config import Recipe, load_recipe, recipe_from_json
from core.import_npz import read_npz
from core.privacy.accounting import noise_for
from core.private_round import private_round
from core.site_round import site_round

ROOT = Path(__file__).resolve().parents[1]
POOL, ROUNDS, STEPS = 64, 10, 20
"""Images of the membership studies, half of them in each; 50 passes over these."""
EPSILON, DELTA = 8.0, 1e-3


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """The recipe with some values replaced, by section."""
    table = recipe.model_dump(mode="json")
    for section, values in sections.items():
        table[section] |= values
    return recipe_from_json(json.dumps(table), "benchmark")


def run_inversion(data: Path, out: Path | None) -> None:
    """Print the table of inversions, and write the picture."""
    whole = changed(load_recipe(RECIPE), model=PLAIN_VIT)
    federation = {"rounds": 1, "local_steps": 1, "prototypes_per_modality": 0}
    recipe = changed(whole, federation=federation, evaluation={"every_rounds": 0})
    round_of = changed(recipe, federation={**federation, "rounds": 20, "local_steps": 20})
    patch_px = int(recipe.model.options["patch_size"])
    print("\n| the coordinator sees | likeness, dB | of plain grey, dB |\n|---|---:|---:|")
    pictures = []
    for name, (of, images, attack) in inversion.rows(recipe, recipe, round_of).items():
        found = []
        for case in inversion.cases(data, of, images):
            gradient, seen = attack(case)
            image = inversion.recover(gradient, patch_px)
            found.append(inversion.likeness(image, seen, case.modality))
        reached, plain = (np.array([fit[i] for fit in found]) for i in range(2))
        spread = f"{np.median(reached):.1f} ({reached.min():.1f} to {reached.max():.1f})"
        print(f"| {name} | {spread} | {np.median(plain):.1f} |", flush=True)
        pictures.append([fit[2:] for fit in found[:: inversion.IMAGES]])
    if out:
        out.mkdir(parents=True, exist_ok=True)
        inversion.sheet(out / "inversion.png", pictures)
        print(f"\n{out / 'inversion.png'}: what went in beside what was recovered, a line a row")


def run_membership(data: Path, studies: int) -> None:
    """Print the table of membership inference, without privacy and in record mode."""
    plain = changed(
        load_recipe(ROOT / "configs" / "smoke.toml"),
        model={"options": {"patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}},
        federation={"rounds": ROUNDS, "local_steps": STEPS, "prototypes_per_modality": 0},
        optim={"batch_size": 8, "learning_rate": 0.064, "ema_momentum": 0.95},
        evaluation={"every_rounds": 0},
    )
    rate = 8 / (POOL / 2)
    sigma = noise_for(EPSILON, DELTA, rate, ROUNDS * STEPS)
    private = changed(
        plain,
        loss={"koleo_weight": 0.0},
        privacy={
            "mode": "record",
            "delta": DELTA,
            "noise_multiplier": sigma,
            "sampling_rate": rate,
            "expected_patients": 8,
            "memory": "random",
        },
    )
    (path,) = data.glob("derm_ham*")
    pool = membership.pool_of(read_npz(path), POOL)

    def openly(study: int) -> membership.Round:
        return lambda received, shards, kept, first: site_round(
            plain, received, shards, kept, site=f"s{study}", first_step=first, device="cpu"
        )

    def privately(study: int) -> membership.Round:
        return lambda received, shards, kept, first: private_round(
            private,
            received,
            shards,
            kept,
            site=f"s{study}",
            declared={"dermatology": 1},
            first_step=first,
            device="cpu",
        )

    print("\n| training | by the loss | by the direction of the updates |\n|---|---:|---:|")
    for name, recipe, a_round in (
        ("without privacy", plain, openly),
        (f"record, epsilon {EPSILON:g} (noise {sigma:.2f})", private, privately),
    ):
        scores = membership.attack(recipe, pool, studies, a_round)
        cells = [membership.auc(scores.member, s) for s in (scores.loss, scores.direction)]
        text = " | ".join(f"{a:.3f} ({low:.3f} to {high:.3f})" for a, low, high in cells)
        print(f"| {name} | {text} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=("inversion", "membership"))
    parser.add_argument("--studies", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.only != "membership":
        run_inversion(arguments.data, arguments.out)
    if arguments.only != "inversion":
        run_membership(arguments.data, arguments.studies)


if __name__ == "__main__":
    main()
