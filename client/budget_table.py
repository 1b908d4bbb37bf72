"""The figures of `fedmermed-site budget`, and how they are shown."""

import math
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client.site import SiteConfig
from client.spending import FILE
from core.config import Recipe
from core.privacy.budget import epsilon_by_round, noise_to_signal, trainable_weights, utility
from core.privacy.ledger import Ledger
from core.privacy.sampling import Patients
from core.sites import open_site


@dataclass(frozen=True)
class OfSite:
    """What a site has spent, and what its policy allows, at the policy's delta."""

    delta: float
    spent: float
    """Epsilon of all studies before."""
    with_spent_by_round: dict[int, float]
    """Epsilon of these and of the study."""
    ceiling: float | None
    rounds_left: int | None
    """Of this recipe, under the ceiling; None: there is none."""


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
    """Of the study alone, at the recipe's delta."""
    site: OfSite | None
    utility: str
    remarks: tuple[str, ...]


def find(
    recipe: Recipe, site: SiteConfig | None, *, patients: int | None, weights: int | None
) -> Budget:
    """Work out the budget of a recipe of mode 'record'.

    Args:
        recipe: The study's.
        site: Whose patients, ledger and ceiling count; None: nobody's.
        patients: How many, instead of the site's.
        weights: How many learn, instead of the recipe's.
    """
    privacy = recipe.privacy
    if patients is None:
        patients = (
            _patients(site) if site else round(privacy.expected_patients / privacy.sampling_rate)
        )
    in_step = patients * privacy.sampling_rate
    weights = weights or trainable_weights(recipe)
    ratio = noise_to_signal(privacy.noise_multiplier, weights, in_step)
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
        epsilon_by_round=epsilon_by_round(recipe, privacy.delta),
        site=_of_site(recipe, site) if site else None,
        utility=utility(ratio),
        remarks=tuple(_remarks(recipe, patients, in_step)),
    )


def _of_site(recipe: Recipe, site: SiteConfig) -> OfSite:
    ledger, delta, ceiling = (
        Ledger(site.state_path / FILE),
        site.policy.delta,
        site.policy.max_epsilon,
    )
    return OfSite(
        delta=delta,
        spent=ledger.epsilon(delta),
        with_spent_by_round=epsilon_by_round(recipe, delta, ledger.events()),
        ceiling=ceiling,
        rounds_left=None if ceiling is None else ledger.rounds_left(recipe, 1, delta, ceiling),
    )


def show(found: Budget, console: Console) -> None:
    """Print it; every epsilon is rounded up."""
    facts = Table(box=None, pad_edge=False, show_header=False)
    for name, value in _facts(found):
        facts.add_row(name, value)
    console.print(facts)
    by_round = Table(box=SIMPLE_HEAD, pad_edge=False)
    by_round.add_column("after round", justify="right")
    by_round.add_column(f"epsilon of the study\nat delta {found.delta:g}", justify="right")
    if found.site:
        heading = f"and of all before\nat delta {found.site.delta:g}"
        by_round.add_column(heading, justify="right")
    for number, epsilon in found.epsilon_by_round.items():
        together = [_up(found.site.with_spent_by_round[number])] if found.site else []
        by_round.add_row(f"{number:,}", _up(epsilon), *together)
    console.print(by_round)
    for text in (found.utility, *found.remarks):
        console.print(escape(text), soft_wrap=True, highlight=False)


def _facts(found: Budget) -> list[tuple[str, str]]:
    facts = [
        ("unit", found.unit),
        ("noise multiplier", f"{found.noise_multiplier:g}"),
        ("sampling rate", f"{found.sampling_rate:g}"),
        ("steps", f"{found.local_steps:,} a round, {found.rounds:,} rounds"),
        ("releases of prototypes", f"{found.prototype_releases:,}"),
        ("patients to train on", f"{found.patients:,}, about {found.patients_a_step:,.0f} a step"),
        ("weights that learn", f"{found.weights:,}"),
        ("noise to signal of a step", f"{found.noise_to_signal:,.3f}"),
    ]
    if (site := found.site) is None:
        return facts
    at = f"at delta {site.delta:g}"
    ceiling = "none: policy.max_epsilon" if site.ceiling is None else f"{site.ceiling:g} {at}"
    facts += [("epsilon spent before", f"{_up(site.spent)} {at}"), ("ceiling", ceiling)]
    if site.rounds_left is not None:
        facts.append(("rounds left under it", f"{site.rounds_left:,} of {found.rounds:,}"))
    return facts


def _up(value: float) -> str:
    return f"{math.ceil(value * 100) / 100:.2f}" if math.isfinite(value) else "unbounded"


def _patients(site: SiteConfig) -> int:
    return len(Patients([shard for path in site.shard_paths for shard in open_site(path)]))


def _remarks(recipe: Recipe, patients: int, in_step: float) -> list[str]:
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
