"""A site's own file: its name, its data, and what its privacy office allows.

Written by the hospital and read on its machine only; nothing in it comes from the coordinator.
"""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from client.policy import Policy
from core.address import Address
from core.strict import Strict, load_toml

SITE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
DEVICE = r"^(auto|cpu|cuda(:[0-9]+)?)$"


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
    devices: Annotated[int, Field(ge=0)] = 0
    """How many share the training of a round, a process each; 0: all GPUs that torch sees, or one
    process on the CPU."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of torch in a process; 0 leaves it to torch. Equal bits need equal numbers."""
    policy: Policy = Policy()
    coordinator: Coordinator = Coordinator()

    @model_validator(mode="after")
    def _one_gpu_is_one(self) -> Self:
        if ":" in self.device and self.devices > 1:
            raise ValueError(
                f"device = '{self.device}' is one GPU, devices = {self.devices} are more: write "
                "device = 'cuda', or leave out 'devices'"
            )
        return self

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
