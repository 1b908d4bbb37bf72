"""`fedmermed-site budget`: what a study would cost in privacy, before anything is trained."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

from core.errors import UserError

if TYPE_CHECKING:
    from client.site import SiteConfig
    from core.config import Recipe

WEIGHTS_WITHOUT_RECIPE: Final = 300_000
"""Of a head and few more, about what can learn under privacy."""


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
    from client.budget_table import find, show
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
