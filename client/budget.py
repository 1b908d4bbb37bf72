"""`fedmermed-site budget`: what a study would cost in privacy, before anything is trained."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from core.errors import UserError

if TYPE_CHECKING:
    from client.site import SiteConfig
    from core.config import Recipe

WEIGHTS_WITHOUT_RECIPE = 300_000
"""Of a head and few more, about what can learn under privacy."""


@dataclass(frozen=True)
class Budget:
    """All that is told."""

    unit: str
    delta: float
    noise_multiplier: float
    sampling_rate: float
    local_steps: int
    rounds: int
    prototype_releases: int
    patients: int
    patients_a_step: float
    weights: int
    noise_to_signal: float
    epsilon_by_round: dict[int, float]
    """Of the study alone."""
    spent: float | None
    """By this site before, all studies; None: no site file was given."""
    with_spent_by_round: dict[int, float] | None
    ceiling: float | None
    """Of the site's policy."""
    rounds_left: int | None
    """Of this recipe, under the ceiling; None: there is none."""
    utility: str
    remarks: tuple[str, ...]


def budget(
    site_file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[SITE.toml]",
            help="Counts this site's patients, and what its ledger holds, against its ceiling.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="The study's recipe; without it, the site file's.")
    ] = None,
    patients: Annotated[
        int | None,
        typer.Option(min=1, show_default="the site's, or a recipe's step over its rate"),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(
            min=0, show_default="that of the recipe's noise", help="Find the noise that keeps it."
        ),
    ] = None,
    delta: Annotated[float | None, typer.Option(show_default="the recipe's, or 1e-5")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, show_default="the recipe's")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, show_default="the recipe's", help="Of a round.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(show_default="the recipe's, or .05", help="Chance of a patient in a step."),
    ] = None,
    weights: Annotated[
        int | None, typer.Option(min=1, show_default="the recipe's", help="That learn.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """What would a study with differential privacy of patients cost, and what is left?

    Prints noise, epsilon by round, and what noise does to learning. Trains nothing, sends nothing,
    charges nothing. Give a recipe, or numbers, or a recipe and other numbers.
    """
    from client.site import load_site

    site = load_site(site_file) if site_file else None
    study = _recipe(site, recipe)
    changed = _changed(
        study,
        patients,
        federation={"rounds": rounds, "local_steps": steps},
        privacy={"delta": delta, "sampling_rate": rate},
    )
    if epsilon is not None:
        from core.privacy.budget import with_epsilon

        changed = with_epsilon(changed, epsilon)
    elif study.privacy.mode != "record":
        raise UserError(
            f"recipe '{study.name}' has privacy.mode '{study.privacy.mode}', so no noise of its "
            "own to account for; give --epsilon to find the noise that it would take"
        )
    given = recipe or (site and site.coordinator.recipe)
    weights = weights or (None if given else WEIGHTS_WITHOUT_RECIPE)
    found = find(changed, site, patients=patients, weights=weights)
    if json_output:
        typer.echo(json.dumps(asdict(found), indent=1))
    else:
        show(found, Console())


def find(
    recipe: "Recipe", site: "SiteConfig | None", *, patients: int | None, weights: int | None
) -> Budget:
    """Work out the budget of a recipe of mode 'record'.

    Args:
        recipe: The study's.
        site: Whose patients, ledger and ceiling count; None: nobody's.
        patients: How many, instead of the site's.
        weights: How many learn, instead of the recipe's.
    """
    from core.privacy.budget import epsilon_by_round, noise_to_signal, trainable_weights, utility
    from core.privacy.ledger import Ledger

    privacy = recipe.privacy
    if patients is None:
        patients = (
            _patients(site) if site else round(privacy.expected_patients / privacy.sampling_rate)
        )
    in_step = patients * privacy.sampling_rate
    weights = weights or trainable_weights(recipe)
    ratio = noise_to_signal(privacy.noise_multiplier, weights, in_step)
    ledger = Ledger(site.state_path / "ledger.jsonl") if site else None
    ceiling = site.policy.max_epsilon if site else None
    spent = ledger.events() if ledger else []
    left = None
    if ledger and ceiling is not None:
        left = ledger.rounds_left(recipe, 1, privacy.delta, ceiling)
    return Budget(
        unit="patient, added or removed",
        delta=privacy.delta,
        noise_multiplier=privacy.noise_multiplier,
        sampling_rate=privacy.sampling_rate,
        local_steps=recipe.federation.local_steps,
        rounds=recipe.federation.rounds,
        prototype_releases=privacy.prototype_releases,
        patients=patients,
        patients_a_step=in_step,
        weights=weights,
        noise_to_signal=ratio,
        epsilon_by_round=epsilon_by_round(recipe),
        spent=ledger.epsilon(privacy.delta) if ledger else None,
        with_spent_by_round=epsilon_by_round(recipe, spent) if spent else None,
        ceiling=ceiling,
        rounds_left=left,
        utility=utility(ratio),
        remarks=tuple(_remarks(recipe, patients, in_step)),
    )


def show(found: Budget, console: Console) -> None:
    """Print it; every epsilon is rounded up."""
    facts = Table(box=None, pad_edge=False, show_header=False)
    for name, value in _facts(found):
        facts.add_row(name, value)
    console.print(facts)
    by_round = Table(box=SIMPLE_HEAD, pad_edge=False)
    by_round.add_column("after round", justify="right")
    by_round.add_column("epsilon of the study", justify="right")
    if found.with_spent_by_round:
        by_round.add_column("and of all before", justify="right")
    for number, epsilon in found.epsilon_by_round.items():
        before = found.with_spent_by_round
        by_round.add_row(f"{number:,}", _up(epsilon), *([_up(before[number])] if before else []))
    console.print(by_round)
    for text in (found.utility, *found.remarks):
        console.print(escape(text), soft_wrap=True, highlight=False)


def _facts(found: Budget) -> list[tuple[str, str]]:
    facts = [
        ("unit", found.unit),
        ("delta", f"{found.delta:g}"),
        ("noise multiplier", f"{found.noise_multiplier:g}"),
        ("sampling rate", f"{found.sampling_rate:g}"),
        ("steps", f"{found.local_steps:,} a round, {found.rounds:,} rounds"),
        ("releases of prototypes", f"{found.prototype_releases:,}"),
        (
            "patients to train on",
            f"{found.patients:,}, about {found.patients_a_step:,.0f} in a step",
        ),
        ("weights that learn", f"{found.weights:,}"),
        ("noise to signal of a step", f"{found.noise_to_signal:.2g}"),
    ]
    if found.spent is not None:
        facts.append(("epsilon spent by this site", _up(found.spent)))
        ceiling = "none: policy.max_epsilon" if found.ceiling is None else f"{found.ceiling:g}"
        facts.append(("ceiling of its policy", ceiling))
    if found.rounds_left is not None:
        facts.append(("rounds left under it", f"{found.rounds_left:,} of {found.rounds:,}"))
    return facts


def _up(value: float) -> str:
    return f"{math.ceil(value * 100) / 100:.2f}" if math.isfinite(value) else "unbounded"


def _recipe(site: "SiteConfig | None", given: Path | None) -> "Recipe":
    from core.config import Recipe, load_recipe

    if given is not None:
        return load_recipe(given)
    if site is not None and site.coordinator.recipe is not None:
        return load_recipe(Path(site.coordinator.recipe))
    return Recipe()


def _changed(study: "Recipe", patients: int | None, **given: dict[str, Any]) -> "Recipe":
    """The recipe in mode 'record', with the numbers given by section; None is not given."""
    from core.config import recipe_from_json
    from core.privacy.budget import record_recipe

    table: dict[str, Any] = record_recipe(study).model_dump(mode="json")
    for section, values in given.items():
        table[section] |= {key: value for key, value in values.items() if value is not None}
    if patients is not None and study.privacy.mode != "record":
        in_step = patients * table["privacy"]["sampling_rate"]
        table["privacy"]["expected_patients"] = max(1, round(in_step))
    return recipe_from_json(json.dumps(table), f"plan from recipe '{study.name}'")


def _patients(site: "SiteConfig") -> int:
    from core.privacy.sampling import Patients
    from core.sites import open_site

    return len(Patients([shard for path in site.shard_paths for shard in open_site(path)]))


def _remarks(recipe: "Recipe", patients: int, in_step: float) -> list[str]:
    remarks = []
    privacy = recipe.privacy
    if privacy.delta * patients > 1:
        remarks.append(
            f"Delta {privacy.delta:g} is more than one over the number of patients: such a "
            f"guarantee lets a patient be told outright; take at most {0.1 / patients:.1g}."
        )
    if not 0.5 <= in_step / privacy.expected_patients <= 2:
        remarks.append(
            f"The recipe divides by {privacy.expected_patients:,} patients a step, and about "
            f"{in_step:,.0f} would be in one: what they add counts "
            f"{in_step / privacy.expected_patients:.2g} times. Privacy is not affected."
        )
    return remarks
