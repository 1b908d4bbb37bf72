"""A federation small enough for a test: a ViT of width 32, phantoms of 32 pixels."""

import importlib.util
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from core.config import Recipe, recipe_from_json
from core.modalities import MODALITIES
from core.phantoms import make_phantoms
from core.shards import write_shard

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as our commands do; torch comes later

MakeRecipe = Callable[..., Recipe]
MakeSites = Callable[..., list[Path]]
KillPoints = Callable[[Callable[[], None]], Iterator[bool]]

TINY: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "model": {
        "options": {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8},
        "head_hidden": 32,
        "embedding_dim": 16,
    },
    "views": {"global_px": 32, "local_px": 16, "local_views": 1},
    "memory": {"entries_per_modality": 32},
    "optim": {"batch_size": 8, "precision": "fp32"},
    "federation": {
        "rounds": 2,
        "local_steps": 2,
        "min_sites": 2,
        "wait_for_sites_seconds": 0.5,
        "grace_seconds": 0.5,
        "prototypes_per_modality": 3,
        "prototype_min_patients": 2,
    },
    "evaluation": {"every_rounds": 2},
}


RECORD: dict[str, Any] = {
    **TINY,
    "loss": {"koleo_weight": 0.0},
    "evaluation": {"every_rounds": 0},
    "privacy": {
        "mode": "record", "sampling_rate": 0.5, "expected_patients": 6, "images_per_patient": 2,
        "chunk": 4,
    },
}  # fmt: skip

SITE: dict[str, Any] = {
    **TINY,
    "federation": {
        **TINY["federation"], "teacher": "rebuild", "robust": "none", "quarantine_after": 0,
    },
    "privacy": {"mode": "site", "sites": 3},
}  # fmt: skip


def write_site(
    home: Path, modalities: Sequence[str], *, patients: int = 14, seed: int = 0, policy: str = ""
) -> Path:
    """Draw a site's phantoms and write its site file; the directory's name is the site's."""
    for modality in modalities:
        number = seed + MODALITIES.index(modality)
        shard = make_phantoms(modality, patients=patients, images_per_patient=2, px=32, seed=number)
        write_shard(home / "data" / modality, shard)
    home.mkdir(parents=True, exist_ok=True)
    file = home / "site.toml"
    file.write_text(
        f"name = {json.dumps(home.name)}\nshards = ['data']\nthreads = 1\ndevice = 'cpu'\n"
        f"[policy]\nmin_patients_per_prototype = 2\n{policy}"
    )
    return file


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real images and DICOM files beside the checkout; tests that need them skip without."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    data = Path(os.environ.get("FEDMERMED_TEST_DATA", default))
    if not data.is_dir():
        pytest.skip("needs the real test data (FEDMERMED_TEST_DATA)")
    return data


@pytest.fixture(scope="session")
def load_benchmark() -> Callable[[str], ModuleType]:
    """Import a module of benchmarks/ by its name, without putting its neighbours on the path.

    One of them is called `coverage`, as the tool that measures tests is.
    """

    def load(name: str) -> ModuleType:
        file = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def make_recipe() -> MakeRecipe:
    """The tiny recipe with other values in its federation section."""

    def make(**federation: object) -> Recipe:
        table = {**TINY, "federation": {**TINY["federation"], **federation}}
        return recipe_from_json(json.dumps(table), "test")

    return make


@pytest.fixture
def make_record_recipe() -> MakeRecipe:
    """The tiny recipe with record privacy, and other values in its privacy section."""

    def make(federation: Mapping[str, object] | None = None, **privacy: object) -> Recipe:
        table = {
            **RECORD,
            "privacy": {**RECORD["privacy"], **privacy},
            "federation": {**RECORD["federation"], **(federation or {})},
        }
        return recipe_from_json(json.dumps(table), "test")

    return make


@pytest.fixture
def make_site_recipe() -> MakeRecipe:
    """The tiny recipe with site privacy, and other values in its privacy section."""

    def make(federation: Mapping[str, object] | None = None, **privacy: object) -> Recipe:
        table = {
            **SITE,
            "privacy": {**SITE["privacy"], **privacy},
            "federation": {**SITE["federation"], **(federation or {})},
        }
        return recipe_from_json(json.dumps(table), "test")

    return make


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> Recipe:
    """Two rounds of two steps at two sites."""
    return make_recipe()


@pytest.fixture
def make_sites(tmp_path: Path) -> MakeSites:
    """Write sites: name -> modalities; returns their site files in the order given."""

    def make(sites: Mapping[str, Sequence[str]], **options: object) -> list[Path]:
        return [
            write_site(tmp_path / "sites" / name, modalities, seed=10 * number, **options)  # type: ignore[arg-type]
            for number, (name, modalities) in enumerate(sites.items())
        ]

    return make


@pytest.fixture
def kill_points() -> KillPoints:
    """Run a function in a child that dies by SIGKILL before its n-th operation on the disk.

    Yields after each death, for n = 1, 2, ..., whether the child was killed; ends once it was not.
    """
    operations = [(os, "replace"), (os, "fsync"), (os, "rename"), (shutil, "rmtree"), (os, "mkdir")]

    def points(function: Callable[[], None]) -> Iterator[bool]:
        for number in itertools.count(1):
            child = os.fork()
            if child == 0:
                left = itertools.count(number - 1, -1)

                def dying(original: Callable[..., Any], left: Iterator[int] = left) -> Any:
                    def operation(*args: Any, **kwargs: Any) -> Any:
                        if next(left) <= 0:
                            os.kill(os.getpid(), signal.SIGKILL)
                        return original(*args, **kwargs)

                    return operation

                for module, name in operations:
                    setattr(module, name, dying(getattr(module, name)))
                try:
                    function()
                finally:
                    os._exit(0)
            _, status = os.waitpid(child, 0)
            killed = os.WIFSIGNALED(status)
            yield killed
            if not killed:
                return

    return points
