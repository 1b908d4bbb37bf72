"""Peak memory of the coordinator's process as a multiple of the state, for few and for many sites.

    python benchmarks/server_memory.py --parameters 100 --sites 10 50 [--transport delta16]

The process is the real one: `run_study` on Flower's HttpGrid, which takes messages apart and puts
them together as in a hospital network. Only what lies behind its HTTP client is played: another
process writes each site's reply to disk when it is asked for, object by object, and the client
reads them from there. Peaks are what the kernel recorded (VmHWM), each in a fresh process. A state
of 100 million parameters (students and teachers, 400 MB) needs 400 MB of disk a site.
"""

import argparse
import json
import logging
import multiprocessing
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedResponse,
    PullObjectResponse,
    PushObjectResponse,
)
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import (
    GetNodesResponse,
    PullAppMessagesResponse,
    PushAppMessagesResponse,
)
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from core.checkpoint import Arrays, load_arrays, read_json
from core.config import recipe_from_json
from core.transport import Transport, pack_state, pack_update, unpack_state
from core.wire import GlobalState
from server.history import open_run, read_history, read_recipe
from server.study import run_study

RUN_ID, FIRST_NODE_ID = 1, 1000
WIDTH, PROTOTYPES, DIM = 768, 32, 256
BLOCK = {
    "qkv": (3 * WIDTH, WIDTH), "proj": (WIDTH, WIDTH),
    "fc1": (4 * WIDTH, WIDTH), "fc2": (WIDTH, 4 * WIDTH),
}  # fmt: skip
"""Weights of a block of a ViT-B: 7.1 million parameters."""


def network(blocks: int, rng: np.random.Generator) -> Arrays:
    return {
        f"blocks.{i}.{name}": rng.normal(0, 0.02, shape).astype(np.float32)
        for i in range(blocks)
        for name, shape in BLOCK.items()
    }


def task() -> None:
    """Flower builds no Message outside a task."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, SUPERLINK_NODE_ID


class PlayedClient:
    """What HttpGrid calls; a question to a site is answered by the other process."""

    def __init__(self, sites: Connection, objects: Path, count: int) -> None:
        self.sites = sites
        self.objects = objects
        self.count = count
        self.asked: dict[str, bytes] = {}

    def GetNodes(self, request: Any) -> GetNodesResponse:
        """All sites are connected."""
        ids = range(FIRST_NODE_ID, FIRST_NODE_ID + self.count)
        return GetNodesResponse(nodes=[NodeInfo(node_id=number) for number in ids])

    def PushMessages(self, request: Any) -> PushAppMessagesResponse:
        """Note who is asked what."""
        self.asked = {m.metadata.message_id: m.SerializeToString() for m in request.messages_list}
        objects = {
            o.object_id for t in request.message_object_trees for o in iterate_object_tree(t)
        }
        return PushAppMessagesResponse(message_ids=list(self.asked), objects_to_push=objects)

    def PushObject(self, request: Any) -> PushObjectResponse:
        """Take an object as if it were sent."""
        return PushObjectResponse(stored=True)

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:
        """Have the sites asked answer now."""
        whole = PullAppMessagesResponse()
        for number in request.message_ids:
            self.sites.send(self.asked.pop(number))
            whole.MergeFromString(self.sites.recv())
        return whole

    def PullObject(self, request: Any) -> PullObjectResponse:
        """One object of a reply, as it would come over HTTP."""
        file = self.objects / request.object_id
        content = file.read_bytes()
        file.unlink()
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> ConfirmMessageReceivedResponse:
        """Nothing to clear up."""
        return ConfirmMessageReceivedResponse()


def play_sites(server: Connection, home: Path, blocks: int) -> None:
    """Write the initial state; then answer each message by objects in a folder."""
    task()
    rng = np.random.default_rng(0)
    recipe = read_recipe(home / "recipe.json")
    run = open_run(home / "run", recipe)
    run.load(lambda: GlobalState(student=network(blocks, rng), teacher=network(blocks, rng)))
    arrays, _ = load_arrays(run.checkpoint_path(0))
    (home / "objects").mkdir()
    server.send(None)
    while (question := server.recv()) is not None:
        message = message_from_proto(MessageProto.FromString(question))
        number = message.metadata.dst_node_id - FIRST_NODE_ID
        reply = Message(
            answer(message, arrays, number, recipe.federation.transport), reply_to=message
        )
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            for name, part in get_all_nested_objects(reply).items():
                (home / "objects" / name).write_bytes(part.deflate())
            whole = PullAppMessagesResponse(
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
            )
        server.send(whole.SerializeToString())


def answer(message: Message, arrays: Arrays, number: int, transport: Transport) -> RecordDict:
    """The state a little larger, and prototypes of three modalities."""
    if message.metadata.message_type == "query":
        return RecordDict({"info": ConfigRecord({"site": f"site-{number:02d}"})})
    scale = np.float32(1 + number / 1000 + int(message.metadata.group_id) / 100)
    start = unpack_state(pack_state(arrays, transport), transport)
    update = {name: array * scale for name, array in arrays.items()}
    packed = pack_update(update, start, transport)
    record = {name: Array(array) for name, array in packed.items()}
    rows = np.random.default_rng(number).normal(size=(PROTOTYPES, DIM)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for modality in ("ct", "cxr", "us"):
        record[f"prototypes/{modality}"] = Array(rows)
        record[f"prototype_counts/{modality}"] = Array(np.full(PROTOTYPES, 12 + number, np.float32))
    metrics = {f"num_examples/{m}": 500 + number for m in ("ct", "cxr", "us")}
    metrics["round"] = int(message.metadata.group_id)  # content stays away from here
    return RecordDict({"arrays": ArrayRecord(record), "metrics": MetricRecord(metrics)})


def measure(home: Path, count: int, blocks: int, rounds: int, transport: str) -> None:
    """Run the study in this process and write what it took to home/figures.json."""
    task()
    federation = {"rounds": rounds, "min_sites": count, "transport": transport}
    federation["prototypes_per_modality"] = PROTOTYPES
    memory = {"entries_per_modality": 4096}  # the prototypes' counts sum to less
    model = {"embedding_dim": DIM}
    table = {"name": "memory", "model": model, "memory": memory, "federation": federation}
    recipe = recipe_from_json(json.dumps(table), "benchmark")
    (home / "recipe.json").write_text(recipe.model_dump_json())
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    sites = spawn.Process(target=play_sites, args=(there, home, blocks))
    sites.start()
    here.recv()
    grid = HttpGrid(token="played")
    grid.set_run(Run.create_empty(RUN_ID))
    grid._client = PlayedClient(here, home / "objects", count)  # type: ignore[assignment]
    base, began = peak_bytes(), time.monotonic()
    run_study(grid, recipe, home / "run")
    seconds = time.monotonic() - began
    here.send(None)
    sites.join()
    lines = read_history(home / "run")
    assert all(o["outcome"] == "admitted" for line in lines for o in line["sites"].values())
    figures = {"base": base, "peak": peak_bytes(), "seconds": seconds / rounds}
    (home / "figures.json").write_text(json.dumps(figures))


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=100, help="millions, of the state")
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--transport", choices=["float32", "delta16", "delta8"], default="float32")
    parser.add_argument("--home", type=Path, help="a directory on a disk with room")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    block = sum(int(np.prod(shape)) for shape in BLOCK.values())
    blocks = max(1, round(options.parameters * 1e6 / 2 / block))
    if options.measure:
        logging.basicConfig(level=logging.WARNING)
        measure(options.home, options.sites[0], blocks, options.rounds, options.transport)
        return
    state = 2 * blocks * block * 4
    print(f"state: {state / 4e6:.1f} million parameters, {state / 1e6:.0f} MB")
    print("| sites | before the study, MB | peak, MB | of the state | seconds a round |")
    print("|---:|---:|---:|---:|---:|")
    for count in options.sites:
        with tempfile.TemporaryDirectory(dir=options.home) as home:
            command = [sys.executable, __file__, "--measure", "--home", home]
            command += ["--sites", str(count), "--rounds", str(options.rounds)]
            command += ["--transport", options.transport]
            subprocess.run([*command, "--parameters", str(options.parameters)], check=True)
            it = read_json(Path(home) / "figures.json")
        print(
            f"| {count} | {it['base'] / 1e6:.0f} | {it['peak'] / 1e6:.0f} | "
            f"{it['peak'] / state:.2f} | {it['seconds']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
