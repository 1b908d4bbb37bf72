"""A site's own file: its name, its data, and what its privacy office allows.

Written by the hospital and read on its machine only; nothing in it comes from the coordinator.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from core.address import Address
from core.config import Recipe, Strict, load_toml
from core.errors import UserError
from core.modalities import MODALITIES

SITE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
DEVICE = r"^(auto|cpu|cuda(:[0-9]+)?)$"


def _known(name: str) -> str:
    if name not in MODALITIES:
        raise ValueError(f"must be one of {', '.join(MODALITIES)}")
    return name


Modality = Annotated[str, AfterValidator(_known)]


class Refusal(UserError):
    """Work that the site will not do; its text holds no path and may be sent to the coordinator."""


class PolicyRefusal(Refusal):
    """Work that the site's policy does not allow."""


class Policy(Strict):
    """What the site agrees to; what is not allowed here is refused."""

    allowed_modalities: tuple[Modality, ...] = MODALITIES
    min_images: Annotated[int, Field(ge=1)] = 1
    """Fewest training images of a modality with which the site takes part."""
    max_rounds: Annotated[int, Field(ge=1)] = 1000
    """Most rounds of one study."""
    send_metrics: bool = True
    """Whether losses and evaluation figures leave; the numbers of images must."""
    min_test_images: Annotated[int, Field(ge=2)] = 20
    """Fewest labelled test images of a modality whose evaluation figures leave."""
    send_score_histograms: bool = False
    """Whether an evaluation's counts of positives and negatives by score leave."""
    min_patients_per_cell: Annotated[int, Field(ge=2)] = 10
    """Such a count is of no patient, or of at least so many."""
    send_prototypes: bool = True
    min_patients_per_prototype: Annotated[int, Field(ge=2)] = 10
    """The stricter of this and the recipe's value holds."""


class Coordinator(Strict):
    """Where the coordinator is, for `check` and `join`. None of it changes training."""

    superlink: Address | None = None
    """What the SuperNode is given as --superlink."""
    root_certificates: Annotated[str, Field(min_length=1)] | None = None
    """What the SuperNode is given as --root-certificates, relative to this file."""
    private_key: Annotated[str, Field(min_length=1)] | None = None
    """By which the coordinator knows this site's SuperNode, relative to this file."""
    health: Address | None = None
    """The SuperLink's gRPC health service, where the coordinator lets sites reach it."""
    recipe: Annotated[str, Field(min_length=1)] | None = None
    """A copy of the study's recipe, relative to this file."""


class SiteConfig(Strict):
    """The site file, its paths made absolute."""

    name: Annotated[str, Field(pattern=SITE_NAME)]
    shards: Annotated[tuple[str, ...], Field(min_length=1)]
    """Shards, or directories that hold several; relative to this file."""
    state_dir: Annotated[str, Field(min_length=1)] = "state"
    """Where the site keeps its training state and its audit file, relative to this file."""
    device: Annotated[str, Field(pattern=DEVICE)] = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of torch; 0 leaves it to torch. Equal bits need equal numbers."""
    policy: Policy = Policy()
    coordinator: Coordinator = Coordinator()

    @property
    def shard_paths(self) -> list[Path]:
        """Where the shards are."""
        return [Path(path) for path in self.shards]

    @property
    def state_path(self) -> Path:
        """Where the state is."""
        return Path(self.state_dir)


def load_site(path: Path) -> SiteConfig:
    """Read a site file.

    Raises:
        UserError: the file is missing, is not TOML, or holds an unknown key or a bad value.
    """
    site = load_toml(SiteConfig, path, "site file")
    home = path.absolute().parent
    paths = {"root_certificates", "private_key", "recipe"}
    given = site.coordinator.model_dump(include=paths, exclude_none=True)
    files = {key: str(home / file) for key, file in given.items()}
    return site.model_copy(
        update={
            "shards": tuple(str(home / shard) for shard in site.shards),
            "state_dir": str(home / site.state_dir),
            "coordinator": site.coordinator.model_copy(update=files),
        }
    )


def approve(
    site: SiteConfig, recipe: Recipe, round_number: int, num_examples: Mapping[str, int]
) -> Recipe:
    """Hold a round against the site's policy before anything is trained.

    Args:
        site: The site.
        recipe: What the coordinator asks for.
        round_number: The round it asks for.
        num_examples: Modality -> training images that the site would use.

    Returns:
        The recipe to train by: with the stricter minimum of patients in a prototype.

    Raises:
        PolicyRefusal: something is not allowed; the text says what.
    """
    policy, rounds = site.policy, recipe.federation.rounds
    if rounds > policy.max_rounds:
        raise PolicyRefusal(
            f"the recipe has {rounds} rounds; this site's policy allows {policy.max_rounds}"
        )
    if not 1 <= round_number <= rounds:
        raise PolicyRefusal(f"round {round_number} is not one of the recipe's rounds 1 to {rounds}")
    if not num_examples:
        raise PolicyRefusal("this site has no training images")
    for modality, images in num_examples.items():
        if modality not in policy.allowed_modalities:
            raise PolicyRefusal(f"this site's policy does not allow training on '{modality}'")
        if images < policy.min_images:
            raise PolicyRefusal(
                f"this site has {images} training images of '{modality}', fewer than the "
                f"{policy.min_images} its policy asks for"
            )
    minimum = max(recipe.federation.prototype_min_patients, policy.min_patients_per_prototype)
    federation = recipe.federation.model_copy(update={"prototype_min_patients": minimum})
    return recipe.model_copy(update={"federation": federation})
