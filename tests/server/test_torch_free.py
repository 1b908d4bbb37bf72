"""The aggregation side runs where torch is not installed."""

import subprocess
import sys

import numpy as np

from core.wire import GlobalState
from server.history import Checkpoint, open_run, read_history

PROGRAM = """
import sys
sys.modules["torch"] = None                       # importing torch raises from here on
from pathlib import Path
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
import core.admission, core.collapse, core.prototypes, core.schedules
import server.app, server.engines, server.history, server.page.serve
import server.strategy, server.summary
from server.grid import InProcessGrid

def site(message, context):
    name = context.node_config["name"]
    if message.metadata.message_type == "query":
        return Message(RecordDict({"info": ConfigRecord({"site": name})}), reply_to=message)
    change = np.float32({"a": 0.5, "b": 1.5}[name])
    arrays = {n: Array(a.numpy() + change) for n, a in message.content["arrays"].items()}
    for modality, axis in (("ct", 0), ("us", 1)):
        rows = np.eye(16, dtype=np.float32)[axis : axis + 1]
        arrays[f"prototypes/{modality}"] = Array(rows)
        arrays[f"prototype_counts/{modality}"] = Array(np.full(1, 12, np.float32))
    metrics = {"round": 1, "num_examples/ct": 20, "num_examples/us": 30,
               "loss/ct": 2.0, "loss_ceiling/ct": 4.0,
               "teacher_entropy/ct": 1.0, "mean_cosine/ct": 0.1, "rankme/ct": 9.0}
    content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord(metrics)}
    return Message(RecordDict(content), reply_to=message)

run_dir = Path(sys.argv[1])
grid = InProcessGrid(site, [{"name": "a"}, {"name": "b"}])
config = {"recipe": str(run_dir / "recipe.json"), "run-dir": str(run_dir)}
server.app.app(grid, Context(1, 1, {}, RecordDict(), config))
assert sys.modules["torch"] is None
"""


def test_a_whole_aggregation_needs_no_torch(tmp_path, make_recipe):
    recipe = make_recipe(rounds=1)
    run = open_run(tmp_path / "run", recipe)
    arrays = {"w": np.ones(3, np.float32)}
    run.load(lambda: GlobalState(student=arrays, teacher=arrays))
    subprocess.run([sys.executable, "-c", PROGRAM, str(run.path)], check=True)
    checkpoint = run.load(lambda: None)
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.round_number == 1
    assert checkpoint.state.student["w"].tolist() == [2.0] * 3
    assert sorted(checkpoint.state.prototypes.counts) == ["ct", "us"]


def test_site_privacy_needs_neither_torch_nor_scipy(tmp_path, make_site_recipe):
    recipe = make_site_recipe({"rounds": 1}, noise_multiplier=0.5)
    run = open_run(tmp_path / "run", recipe)
    arrays = {"w": np.ones(3, np.float32)}
    run.load(lambda: GlobalState(student=arrays, teacher=arrays))
    program = PROGRAM.replace("import sys\n", "import sys\nsys.modules['scipy'] = None\n", 1)
    sent = 'message.content["arrays"].items()'
    program = program.replace(sent, f'{sent} if n.startswith("student/")')
    subprocess.run([sys.executable, "-c", program, str(run.path)], check=True)
    (line,) = read_history(run.path)
    assert [site["outcome"] for site in line["sites"].values()] == ["admitted"] * 2
    assert line["metrics"]["epsilon"] > 0


def test_without_torch_an_initial_state_is_asked_for_in_plain_words(tmp_path, recipe):
    run = open_run(tmp_path / "run", recipe)
    program = PROGRAM.replace('{"name": "a"}, {"name": "b"}', "")
    result = subprocess.run(
        [sys.executable, "-c", program, str(run.path)], capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "UserError: the initial weights need torch and timm, but 'torch' is not installed; " in (
        result.stderr
    )
