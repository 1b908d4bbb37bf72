"""A study for MLflow: recipe, figures of every round, and at the end the model.

The study is one run of MLflow, found again by the study's id: what is there is not sent twice, so
that the command may be stopped and started as one likes. Metrics have the names of server/events.py
and stand at the same rounds and times.

**Guarantees**:
    - MLflow's own telemetry is switched off before it is imported.
    - Sent is what the history, the recipe and the study's own files hold: nothing else of a site.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from core.checkpoint import read_json
from core.errors import UserError
from server.events import POLL_SECONDS, began, scalars, timed
from server.history import Line, read_history, read_recipe
from server.report_facts import flat_settings

STUDY: Final = "fedmermed.study"
ROUNDS: Final = "fedmermed.rounds"
"""Tags: the study's id, and the rounds that were sent."""
BATCH: Final = 1000
"""Metrics that MLflow takes at once."""
PARAMS: Final = 100
ARTIFACTS: Final = ("model.safetensors", "summary.json", "summary.png")


def track(run: Path, uri: str, experiment: str, *, follow: bool = False) -> str:
    """Send a study to MLflow, or what of it is not there yet.

    Args:
        run: The run directory; it is only read.
        uri: Where MLflow keeps its records, such as sqlite:////srv/mlflow.db or http://host:5000.
        experiment: Of MLflow; it is made if missing.
        follow: Go on with new rounds until the last one of the recipe is done.

    Returns:
        The id of MLflow's run.

    Raises:
        UserError: there is no such study, MLflow is not installed, or it refuses.
    """
    if not (run / "recipe.json").exists() or not (run / "study.json").exists():
        raise UserError(f"'{run}' is not a run directory; give the directory of a study")
    mlflow = _mlflow()
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        found = _open(client, run, experiment)
        rounds, start = read_recipe(run / "recipe.json").federation.rounds, began(run)
        while True:
            lines = read_history(run)
            _send(mlflow, client, found, lines, start)
            if len(lines) >= rounds:
                _finish(client, found, run)
                return str(found)
            if not follow:
                return str(found)
            time.sleep(POLL_SECONDS)
    except mlflow.exceptions.MlflowException as error:
        raise UserError(f"MLflow at '{uri}' refused: {error}") from None


def _open(client: Any, run: Path, experiment: str) -> str:
    """MLflow's run of this study."""
    known = client.get_experiment_by_name(experiment)
    number = known.experiment_id if known else client.create_experiment(experiment)
    study, recipe = read_json(run / "study.json"), read_recipe(run / "recipe.json")
    there = client.search_runs([number], f"tags.`{STUDY}` = '{study['study']}'", max_results=1)
    if there:
        return str(there[0].info.run_id)
    versions = {f"version.{name}": text for name, text in study.get("packages", {}).items()}
    made = client.create_run(
        number, run_name=recipe.name, start_time=round(1000 * began(run)),
        tags={STUDY: study["study"], ROUNDS: "0", **versions},
    )  # fmt: skip
    from mlflow.entities import Param

    params = [Param(name, str(value)) for name, value in flat_settings(recipe)]
    for first in range(0, len(params), PARAMS):
        client.log_batch(made.info.run_id, params=params[first : first + PARAMS])
    return str(made.info.run_id)


def _send(mlflow: Any, client: Any, found: str, lines: Sequence[Line], start: float) -> None:
    """All rounds that are not there; the tag follows them, so that a kill loses none."""
    # More than there are, if damaged rounds were dropped: those come again.
    told = min(int(client.get_run(found).data.tags[ROUNDS]), len(lines))
    metrics = [
        mlflow.entities.Metric(tag, float(value), round(1000 * when), step)
        for line, when in timed(lines, start)
        if line["round"] > told
        for tag, value, step in scalars(line)
    ]
    for first in range(0, len(metrics), BATCH):
        client.log_batch(found, metrics=metrics[first : first + BATCH])
    client.set_tag(found, ROUNDS, str(len(lines)))


def _finish(client: Any, found: str, run: Path) -> None:
    there = {file.path for file in client.list_artifacts(found)}
    for name in ARTIFACTS:
        if name not in there and (run / name).is_file():
            client.log_artifact(found, str(run / name))
    client.set_terminated(found)


def _mlflow() -> Any:
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ[name] = "true"
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    try:
        import mlflow
    except ModuleNotFoundError:
        raise UserError(
            "this needs MLflow, which is not installed; pip install 'fedmermed[mlflow]'"
        ) from None
    return mlflow
