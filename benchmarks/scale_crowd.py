"""Many sites in one process, which train nothing; for scale.py.

    python benchmarks/scale_crowd.py PLACE ADDRESS RECIPE.json

Each site of the coordinator's directory PLACE connects with its own key through the gateway, by the
code of Flower's SuperNode and with our pauses between looks, takes every object of a message, and
answers at once: its name, or an update of random numbers in the recipe's transport. What lies
between connection and training at a hospital, a second process and its start, is left out.
"""

import sys
import threading
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.supernode.fleet_http_connection import http_request_response

from client.guard import FIRST_PAUSE_SECONDS
from client.pauses import Pauses
from core.checkpoint import Arrays
from core.config import Recipe
from core.initial import initial_state
from core.parcel import close_parcel
from core.transport import pack_update
from server.history import read_recipe

LOOK_SECONDS = 3.0
"""Flower's pause between two looks for a message."""
MAKING = threading.Lock()
"""One reply is made at a time: the crowd shares a processor with what is measured."""


def start_of(recipe: Recipe) -> Arrays:
    """What a site's weights are asked to be like, under wire names."""
    groups = ("student/", "teacher/") if recipe.federation.teacher == "average" else ("student/",)
    state = initial_state(recipe).to_arrays()
    return {name: array for name, array in state.items() if name.startswith(groups)}


def answer(message: Message, recipe: Recipe, start: Arrays, name: str, number: int) -> RecordDict:
    """A site's name, or its weights moved by little; the message's content is not read."""
    if message.metadata.message_type == "query":
        return RecordDict({"info": ConfigRecord({"site": name, "version": "crowd"})})
    round_number = int(message.metadata.group_id)
    rng = np.random.default_rng([number, round_number])
    moved = {
        n: a + np.float32(1e-4) * rng.standard_normal(a.shape, np.float32) for n, a in start.items()
    }
    packed = pack_update(moved, start, recipe.federation.transport)
    record = ArrayRecord({n: Array(array) for n, array in packed.items()})
    metrics = MetricRecord({"round": round_number, "num_examples/ct": 100})
    return RecordDict({"arrays": record, "metrics": metrics})


def objects(reply: Message) -> tuple[ObjectTree, dict[str, bytes]]:
    """A reply's tree and what it consists of."""
    with no_object_id_recompute():
        reply.metadata.__dict__["_message_id"] = reply.object_id
        parts = get_all_nested_objects(reply)
        return get_object_tree(reply), {name: part.deflate() for name, part in parts.items()}


def site(place: Path, address: str, recipe: Recipe, start: Arrays, name: str, number: int) -> None:
    """Answer until the process ends."""
    kit = place / "kits" / name
    key = load_ssh_private_key((kit / "site.key").read_bytes(), None)
    pauses = Pauses()
    with http_request_response(address, False, str(kit / "ca.crt"), (key, key.public_key())) as (
        _,
        receive,
        send,
        _,
        _,
        pull_object,
        push_object,
        confirm,
    ):
        print("connected", flush=True)
        while True:
            if (received := receive()) is None:
                pauses.sleep(LOOK_SECONDS)
                continue
            pauses = Pauses()
            message, tree = received
            run = message.metadata.run_id
            ids = [part.object_id for part in iterate_object_tree(tree)]
            pull_objects(
                ids, lambda part, run=run: pull_object(run, part),
                initial_backoff=FIRST_PAUSE_SECONDS,
            )  # fmt: skip
            confirm(run, message.metadata.message_id)
            with MAKING:
                content = answer(message, recipe, start, name, number)
                for record in content.array_records.values():
                    close_parcel(record, Array)
                reply = Message(content, reply_to=message)
                whole, parts = objects(reply)
            asked, session = send(reply, whole, 0.0)
            for part in (p for p in parts if p in asked):
                push_object(run, session, part, parts[part])


def main() -> None:
    """Connect all, and stay."""
    place, address, recipe = Path(sys.argv[1]), sys.argv[2], read_recipe(Path(sys.argv[3]))
    start = start_of(recipe)
    names = sorted(kit.name for kit in (place / "kits").iterdir() if kit.is_dir())
    threads = [
        threading.Thread(target=site, args=(place, address, recipe, start, name, number))
        for number, name in enumerate(names)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
