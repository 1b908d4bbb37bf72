"""The coordinator's Flower ServerApp: reads where recipe and run directory are, and runs."""

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.history import read_recipe
from server.study import run_study

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the study that the run config names."""
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
        grid,
        recipe,
        Path(str(config["run-dir"])),
        expect_sites=int(config.get("sites", 0)),
        registered=Path(registered) if registered else None,
    )
