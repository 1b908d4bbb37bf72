"""The coordinator's Flower ServerApp: reads where recipe and run directory are, and runs."""

import ctypes
import logging
import signal
import sys
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.history import read_recipe
from server.parcels import ParcelGrid
from server.study import run_study

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the study that the run config names."""
    _end_with_its_starter()
    log = logging.getLogger("fedmermed")
    if not log.handlers:  # a process of its own: what it prints becomes the run's log
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
    config = context.run_config
    file = Path(str(config["recipe"]))
    if not file.exists():  # the working directory is Flower's; configs/ travels in the bundle
        file = Path(__file__).resolve().parents[1] / file
    recipe = read_recipe(file)
    registered = str(config.get("registered", ""))
    run_study(
        ParcelGrid(grid) if registered else grid,  # on the service sites answer by a launcher
        recipe,
        Path(str(config["run-dir"])),
        expect_sites=int(config.get("sites", 0)),
        registered=Path(registered) if registered else None,
    )


def _end_with_its_starter() -> None:
    """A process of its own holds the run directory: it must not outlive who would stop it.

    Flower looks whether the starter's id exists, which it does as long as nobody reaps it.
    """
    if sys.platform == "linux" and Path(sys.argv[0]).name == "flwr-serverapp":
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
