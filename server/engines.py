"""Engines: three ways to bring one ServerApp and the sites' ClientApps together on one machine.

The ClientApp is found by name when it is needed: nothing on this side imports the hospital's.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.app.user_config import UserConfig
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid, ServerApp

from core.errors import UserError
from server.app import app as server_app
from server.grid import RUN_ID, InProcessGrid

CLIENT_APP = "client.app:app"


class EngineName(StrEnum):
    """How `simulate` runs a federation."""

    INPROCESS = "inprocess"
    RAY = "ray"
    PROCESSES = "processes"


def run_in_process(run_dir: Path, site_files: Sequence[Path]) -> None:
    """Run everything in this process, site after site."""
    grid = InProcessGrid(load_client_app(), [{"site": str(file)} for file in site_files])
    server_app(grid, server_context(run_dir, site_files))


def run_on_ray(run_dir: Path, site_files: Sequence[Path]) -> None:
    """Run on Flower's simulation engine: sites share the machine's processors and GPUs.

    Raises:
        UserError: ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            "engine 'ray' needs the package ray: install fedmermed[ray], or use another --engine"
        )
    # Read by ray's workers: a simulated node knows its partition number and nothing else.
    os.environ["FEDMERMED_SITES_DIR"] = str(site_files[0].parent.parent.absolute())
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    from flwr.simulation import run_simulation

    wrapper = ServerApp()  # run_simulation passes an empty run config

    @wrapper.main()
    def main(grid: Grid, context: Context) -> None:
        server_app(grid, server_context(run_dir, site_files))

    processors = len(os.sched_getaffinity(0))
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    # On processors a site uses all of them, as in the other engines: equal threads, equal bits.
    resources: dict[str, Any] = {
        "num_cpus": 1 if gpus else processors,
        "num_gpus": min(1.0, gpus / len(site_files)),
    }
    ray: dict[str, Any] = {"num_cpus": processors, "logging_level": "error", "log_to_driver": False}
    flower_log = logging.getLogger("flwr")
    level = flower_log.level
    flower_log.setLevel(logging.ERROR)
    try:
        run_simulation(
            wrapper,
            load_client_app(),
            num_supernodes=len(site_files),
            backend_config={"client_resources": resources, "init_args": ray},
        )
    finally:
        flower_log.setLevel(level)
        importlib.import_module("ray").shutdown()


def run_as_processes(run_dir: Path, site_files: Sequence[Path]) -> None:
    """Run what a coordinator and its sites run, each in processes of its own."""
    from server.processes import run_processes  # a second of Flower's modules

    run_processes(run_dir, site_files)


ENGINES: Mapping[EngineName, Callable[[Path, Sequence[Path]], None]] = {
    EngineName.INPROCESS: run_in_process,
    EngineName.RAY: run_on_ray,
    EngineName.PROCESSES: run_as_processes,
}


def load_client_app() -> Any:
    """The hospital's ClientApp, imported by name at run time."""
    module, attribute = CLIENT_APP.split(":")
    return getattr(importlib.import_module(module), attribute)


def server_context(run_dir: Path, site_files: Sequence[Path]) -> Context:
    """What Flower would hand the ServerApp: the run config, and ids that mean nothing here."""
    config: UserConfig = {
        "recipe": str(run_dir / "recipe.json"),
        "run-dir": str(run_dir),
        "sites": len(site_files),
    }
    return Context(RUN_ID, SUPERLINK_NODE_ID, {}, RecordDict(), config)
