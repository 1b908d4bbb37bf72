"""What a site's privacy office allows; no recipe and no coordinator overrides it.

**Guarantees**, by the policy as the site file holds it when a message comes:
    - Nothing is trained or measured outside the hours; the refusal says when they begin again.
    - No message of a run with another bundle than the allowed ones is answered, nor one whose
      bundle is not known.
    - A study is refused that has more rounds, another privacy mode than one that is asked for, no
      record privacy where epsilon is bounded, or a modality that is not allowed or has too few
      images or patients.
    - With record privacy no number of images or patients is in a refusal, and a modality whose
      public number is not declared is refused. Where it is asked for, nothing is measured.
    - A reply that was trained under an earlier policy is held against this one before it is sent.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field

from client.hours import check_window, opens_at
from core.config import Recipe
from core.errors import UserError
from core.modalities import MODALITIES
from core.privacy.config import Delta
from core.strict import Count, Positive, Strict

SHA256: Final = r"^[0-9a-f]{64}$"


def _known(name: str) -> str:
    if name not in MODALITIES:
        raise ValueError(f"must be one of {', '.join(MODALITIES)}")
    return name


class Refusal(UserError):
    """Work that the site will not do; its text holds no path and may be sent to the coordinator."""


class PolicyRefusal(Refusal):
    """Work that the site's policy does not allow."""


class NotNow(PolicyRefusal):
    """Work that the policy does not allow now, and will by itself later."""


class Policy(Strict):
    """What the site agrees to; what is not allowed here is refused."""

    allowed_modalities: tuple[Annotated[str, AfterValidator(_known)], ...] = MODALITIES
    min_images: Annotated[int, Field(ge=1)] = 1
    """Fewest training images of a modality with which the site takes part."""
    min_patients: Annotated[int, Field(ge=1)] = 1
    """Fewest patients that these images are of."""
    max_rounds: Annotated[int, Field(ge=1)] = 1000
    """Most rounds of one study."""
    hours: tuple[Annotated[str, AfterValidator(check_window)], ...] = ()
    """Local time at which a round or an evaluation may begin; empty: always. See client.hours."""
    privacy: Literal["none", "record", "site"] = "none"
    """The mode of differential privacy that a study must have; none: it need have none."""
    max_epsilon: Positive | None = None
    """Most epsilon that this site's patients may spend, over all studies together (see
    client.spending); a study without record privacy is then refused."""
    delta: Delta = 1e-5
    """The delta of `max_epsilon`: below one over the number of patients."""
    declared_images: dict[Annotated[str, AfterValidator(_known)], Count] = Field(default={})
    """Modality -> a number of images that is no secret. With record privacy it leaves in place of
    the true one, which is a fact about patients."""
    allowed_apps: tuple[Annotated[str, Field(pattern=SHA256)], ...] = ()
    """sha256 of the bundles whose runs are answered; empty: any, as none of them is ever run."""
    send_metrics: bool = True
    """Whether losses and evaluation figures leave; the numbers of images must."""
    min_test_images: Annotated[int, Field(ge=2)] = 20
    """Fewest labelled test images of a modality whose evaluation figures leave."""
    send_score_histograms: bool = False
    """Whether an evaluation's counts of positives and negatives by score leave."""
    min_patients_per_cell: Annotated[int, Field(ge=2)] = 10
    """Such a count is of no patient, or of at least so many."""
    send_prototypes: bool = True
    """They show the coordinator what the memory holds; record privacy makes its memory of them."""
    min_patients_per_prototype: Annotated[int, Field(ge=2)] = 10
    """The stricter of this and the recipe's value holds."""


def check_bundle(policy: Policy, bundle: str) -> None:
    """Hold that messages of runs with this bundle may be answered.

    Raises:
        PolicyRefusal: they may not.
    """
    if policy.allowed_apps and bundle not in policy.allowed_apps:
        which = f"the bundle {bundle}" if bundle else "a bundle that it cannot tell"
        raise PolicyRefusal(f"this site's policy does not answer runs submitted with {which}")


def check_hours(policy: Policy, now: datetime | None = None) -> None:
    """Hold that work may begin now.

    Raises:
        NotNow: it may not.
    """
    now = now or datetime.now()
    if begin := opens_at(policy.hours, now):
        raise NotNow(
            f"this site works {', '.join(policy.hours)} by its own clock, where it is now "
            f"{now:%a %H:%M}; ask again from {begin.astimezone().isoformat(timespec='minutes')} on"
        )


def approve(
    policy: Policy,
    recipe: Recipe,
    round_number: int,
    images: Mapping[str, int],
    patients: Mapping[str, int],
) -> Recipe:
    """Hold a round against the policy before anything is trained, or sent again.

    Args:
        policy: The site's.
        recipe: What the coordinator asks for.
        round_number: The round it asks for.
        images: Modality -> training images that the site uses.
        patients: Modality -> patients that these are of.

    Returns:
        The recipe to train by: with the stricter minimum of patients in a prototype.

    Raises:
        PolicyRefusal: something is not allowed; the text says what.
    """
    rounds = recipe.federation.rounds
    if rounds > policy.max_rounds:
        raise PolicyRefusal(
            f"the recipe has {rounds} rounds; this site's policy allows {policy.max_rounds}"
        )
    if not 1 <= round_number <= rounds:
        raise PolicyRefusal(f"round {round_number} is not one of the recipe's rounds 1 to {rounds}")
    _check_privacy(policy, recipe.privacy.mode)
    if not images:
        raise PolicyRefusal("this site has no training images")
    for modality in images:
        _check_modality(policy, modality)
        few = images[modality] < policy.min_images
        if recipe.privacy.mode == "record":
            few = few or patients.get(modality, 0) < policy.min_patients
            _check_record(policy, modality, few=few)
        else:
            _check_numbers(policy, modality, images[modality], patients.get(modality, 0))
    minimum = max(recipe.federation.prototype_min_patients, policy.min_patients_per_prototype)
    federation = recipe.federation.model_copy(update={"prototype_min_patients": minimum})
    return recipe.model_copy(update={"federation": federation})


def check_evaluation(policy: Policy) -> None:
    """Hold that figures on this site's own labels may be made.

    Raises:
        PolicyRefusal: they may not.
    """
    if policy.privacy == "record":
        raise PolicyRefusal(
            "this site's policy asks for record privacy; figures on its own labels would leave "
            "without noise"
        )


def _check_privacy(policy: Policy, mode: str) -> None:
    if policy.privacy not in ("none", mode):
        raise PolicyRefusal(
            f"this site's policy asks for differential privacy of mode '{policy.privacy}'; the "
            f"recipe has {mode if mode == 'none' else repr(mode)}"
        )
    if policy.max_epsilon is not None and mode != "record":
        raise PolicyRefusal(
            f"this site's policy allows an epsilon of at most {policy.max_epsilon:g}; the recipe "
            "has no record privacy, so nothing at this site bounds it"
        )


def _check_modality(policy: Policy, modality: str) -> None:
    if modality not in policy.allowed_modalities:
        raise PolicyRefusal(f"this site's policy does not allow training on '{modality}'")


def _check_record(policy: Policy, modality: str, *, few: bool) -> None:
    """The text leaves, and true numbers are facts about patients."""
    if few:
        raise PolicyRefusal(
            f"this site has fewer images or patients of '{modality}' than its policy asks for"
        )
    if modality not in policy.declared_images:
        raise PolicyRefusal(
            f"a study with record privacy needs a public number of images of '{modality}'; this "
            "site's policy has none in declared_images"
        )


def _check_numbers(policy: Policy, modality: str, images: int, patients: int) -> None:
    if images < policy.min_images:
        raise PolicyRefusal(
            f"this site has {images} training images of '{modality}', fewer than the "
            f"{policy.min_images} its policy asks for"
        )
    if patients < policy.min_patients:
        raise PolicyRefusal(
            f"this site has {patients} patients to train on of '{modality}', fewer than the "
            f"{policy.min_patients} its policy asks for"
        )
