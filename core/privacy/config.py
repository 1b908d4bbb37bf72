"""What a recipe says of differential privacy, and which combinations are proven."""

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from core.strict import Count, Positive, Strict

if TYPE_CHECKING:
    from core.config import Recipe

Rate = Annotated[float, Field(gt=0, le=1)]
Delta = Annotated[float, Field(gt=0, le=0.1)]


class PrivacyConfig(Strict):
    """Differential privacy of a study.

    none: none. record: each site trains with DP-SGD, so that what it sends hides whether one
    patient is in its data; nobody else need be trusted. site: the server adds noise, so that the
    model hides whether one site took part; the server, which sees raw updates, is trusted.
    """

    mode: Literal["none", "record", "site"] = "none"
    delta: Delta = 1e-5
    """The probability with which epsilon may fail: below one over the number of units."""
    noise_multiplier: Positive = 1.0
    """Deviation of the noise on the sum of gradients (record) or updates (site), in clips."""
    clip_norm: Positive = 1.0
    """Longest gradient of a patient (record) or update of a site (site)."""
    prototype_noise: Positive = 10.0
    """Deviation of the noise on the sums of prototypes; that on their counts is twice as large."""

    sampling_rate: Rate = 0.05
    """Record: the chance of each patient to be in a step; the same at every site."""
    expected_patients: Count = 256
    """Record: what the sum of gradients is divided by, whatever the number in the step."""
    images_per_patient: Count = 2
    """Record: most images of a patient in a step."""
    memory: Literal["phantoms", "random"] = "phantoms"
    """Record: the public anchors that stand in for the memory bank: synthetic images as the
    received teacher embeds them, or fixed random unit vectors."""
    gradients: Literal["vmap", "loop"] = "vmap"
    """Record: patients at a time, or one by one: slower in general, with a third of the memory."""
    chunk: Count = 16
    """Record: patients at a time under vmap."""
    trainable: Literal["all", "last_blocks", "bias"] = "all"
    """Record: what learns beside the head: everything; the last blocks and the final norm; or
    biases and norms. The fewer weights, the less noise."""
    trainable_blocks: Count = 1
    """Record: how many last blocks."""
    prototype_releases: Annotated[int, Field(ge=0)] = 0
    """Record: rounds, evenly spread, in which prototypes leave."""

    sites: Annotated[int, Field(ge=0)] = 0
    """Site: what the sum of updates is divided by, whoever answers."""

    @model_validator(mode="after")
    def _number_of_sites_is_fixed(self) -> Self:
        if self.mode == "site" and not self.sites:
            raise ValueError("mode 'site' divides by a fixed number of sites: set 'sites'")
        return self


def refuse_unproven(recipe: "Recipe") -> None:
    """Hold that the recipe combines only parts whose privacy is proven together.

    Raises:
        ValueError: it does not; the text names part and reason.
    """
    for refused, text in {"none": _none, "record": _record, "site": _site}[recipe.privacy.mode](
        recipe
    ):
        if refused:
            raise ValueError(f"privacy.mode = '{recipe.privacy.mode}' {text}")


def _none(recipe: "Recipe") -> list[tuple[bool, str]]:
    default = PrivacyConfig()
    what = ", ".join(n for n, value in recipe.privacy if value != getattr(default, n))
    return [(bool(what), f"has no use for {what}: set mode to 'record' or 'site', or leave out")]


def _record(recipe: "Recipe") -> list[tuple[bool, str]]:
    return [
        (
            recipe.loss.koleo_weight > 0,
            "needs loss.koleo_weight = 0: KoLeo compares a patient with the others of the batch, "
            "so that one clip does not bound what a patient changes",
        ),
        (
            recipe.loss.description_weight > 0,
            "needs loss.description_weight = 0: what is usual at a site, from which descriptions "
            "count, is learnt from its patients without noise",
        ),
        (
            recipe.evaluation.every_rounds > 0,
            "needs evaluation.every_rounds = 0: figures on a site's own labels leave without noise",
        ),
        (
            recipe.memory.at_round_start == "refilled",
            "needs memory.at_round_start = 'kept': refilling embeds patients, and the memory is "
            "privacy.memory here",
        ),
        (
            recipe.model.drop_path > 0,
            "needs model.drop_path = 0: dropped paths under per-patient gradients are not tested",
        ),
        (
            recipe.model.checkpointing,
            "needs model.checkpointing = false: blocks computed anew under per-patient gradients "
            "are not tested; privacy.chunk bounds the memory of a step",
        ),
        (
            recipe.optim.accumulate > 1,
            "needs optim.accumulate = 1: a step takes patients, privacy.chunk at a time",
        ),
        (
            recipe.optim.precision == "bf16",
            "needs optim.precision = 'fp32' or 'auto', which is fp32 here: how bf16 rounds a "
            "patient's values may hang on who else is computed with it",
        ),
        (
            recipe.federation.transport == "delta8",
            "needs federation.transport = 'float32' or 'delta16': in delta8 what rounding took "
            "from earlier rounds comes later, and that of a round before privacy was switched on "
            "had no noise",
        ),
        (
            recipe.privacy.prototype_releases > recipe.federation.rounds,
            "has more prototype_releases than rounds",
        ),
        (
            recipe.privacy.prototype_releases > 0 and not recipe.federation.prototypes_per_modality,
            "releases prototypes that federation.prototypes_per_modality = 0 switches off",
        ),
    ]


def _site(recipe: "Recipe") -> list[tuple[bool, str]]:
    federation = recipe.federation
    return [
        (
            federation.teacher != "rebuild",
            "needs federation.teacher = 'rebuild': averaged teachers would be a second release",
        ),
        (
            federation.robust != "none",
            "needs federation.robust = 'none': bounds taken from the round's other updates let one "
            "site change what others count for",
        ),
        (
            federation.quarantine_after > 0,
            "needs federation.quarantine_after = 0: who is left out would depend on other sites",
        ),
        (
            federation.min_sites > recipe.privacy.sites,
            "has more federation.min_sites than privacy.sites",
        ),
        (
            recipe.privacy.delta * recipe.privacy.sites >= 1,
            "needs privacy.delta below 1 / privacy.sites: with it, all that one of the sites sent "
            "could be released as it is",
        ),
    ]
