"""Transports of fewer bits through the real apps: what is sent, refused, resumed."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from core.checkpoint import load_arrays, sha256_file
from core.initial import initial_state
from core.transport import pack_state
from core.wire import GlobalState
from server.app import app as server_app
from server.engines import load_client_app, server_context
from server.grid import FIRST_NODE_ID, InProcessGrid
from server.history import open_run, read_history


class Wire(InProcessGrid):
    """Hands each train message and its reply to `look`; what that returns is what arrives."""

    def __init__(self, site_files, look=lambda message, reply: reply):
        super().__init__(load_client_app(), [{"site": str(file)} for file in site_files])
        self.look = look

    def deliver(self, message):
        reply = super().deliver(message)
        return self.look(message, reply) if message.metadata.message_type == "train" else reply


def federate(run_dir, recipe, grid):
    """Run or resume a study; the digest of its last checkpoint."""
    run = open_run(run_dir, recipe)
    server_app(grid, server_context(run_dir, []))
    return sha256_file(run.checkpoint_path(recipe.federation.rounds))


def state_after(run_dir, number):
    return GlobalState.from_arrays(load_arrays(run_dir / f"round-{number:04d}.safetensors")[0])


def fresh(site_files):
    for file in site_files:
        (file.parent / "state").rename(file.parent / "state-of-another-run")


@pytest.fixture
def recipe(make_recipe):
    return make_recipe(transport="delta16")


@pytest.fixture
def two_sites(make_sites):
    return make_sites({"a": ["ct"], "b": ["us", "ct"]})


def test_half_the_bytes_travel_and_the_server_keeps_its_float32(
    tmp_path, recipe, make_recipe, two_sites
):
    sent, received = [], []

    def look(message, reply):
        for content, types in ((message.content, sent), (reply.content, received)):
            types.append({n: a.numpy().dtype.name for n, a in content["arrays"].items()})
        return reply

    federate(tmp_path / "half", recipe, Wire(two_sites, look))
    for types in (*sent, *received):
        for name, dtype in types.items():
            assert dtype == ("float16" if name.startswith(("student/", "teacher/")) else "float32")
        assert {"scales/student", "scales/teacher"} <= set(types)
    student = state_after(tmp_path / "half", 2).student
    assert {array.dtype.name for array in student.values()} == {"float32"}
    rounded = pack_state({f"student/{n}": a for n, a in student.items()}, "delta16")
    assert any(  # what came back is finer than what any site was sent
        (rounded[f"student/{n}"].astype(np.float32) * scale != student[n]).any()
        for n, scale in zip(sorted(student), rounded["scales/student"], strict=True)
    )
    fresh(two_sites)
    federate(tmp_path / "whole", make_recipe(), Wire(two_sites))
    half, whole = (sum(_weights(read_history(tmp_path / n))) for n in ("half", "whole"))
    assert 0.5 < half / whole < 0.62  # names and prototypes are as long as before


def _weights(lines):
    return [line[key] for line in lines for key in ("bytes_down", "bytes_up")]


def test_what_a_site_trained_moves_the_servers_own_weights(tmp_path, make_recipe, make_sites):
    """One site: after a round the server has its weights plus exactly the difference sent."""
    recipe = make_recipe(transport="delta16", min_sites=1, rounds=1)
    seen = {}

    def look(message, reply):
        seen.update({name: array.numpy() for name, array in reply.content["arrays"].items()})
        return reply

    federate(tmp_path / "run", recipe, Wire(make_sites({"alone": ["ct"]}), look))
    before, after = (state_after(tmp_path / "run", number) for number in (0, 1))
    for group in ("student", "teacher"):
        own, new = getattr(before, group), getattr(after, group)
        for name, scale in zip(sorted(own), seen[f"scales/{group}"], strict=True):
            expected = own[name] + seen[f"{group}/{name}"].astype(np.float32) * scale
            assert new[name].tobytes() == expected.tobytes(), name
        assert any((own[name] != new[name]).any() for name in own)


def test_the_order_of_the_sites_changes_no_bit(tmp_path, recipe, make_sites):
    files = make_sites({"a": ["ct"], "b": ["us", "ct"], "c": ["oct"]})
    one = federate(tmp_path / "one", recipe, Wire(files))
    fresh(files)
    assert federate(tmp_path / "other", recipe, Wire([files[2], files[0], files[1]])) == one


@pytest.mark.parametrize("teacher", ["average", "rebuild"])
@pytest.mark.parametrize("transport", ["delta16", "delta8"])
def test_killed_after_any_reply_and_resumed_it_ends_with_the_same_bits(
    tmp_path, make_recipe, two_sites, transport, teacher
):
    recipe = make_recipe(transport=transport, teacher=teacher)
    calm = federate(tmp_path / "calm", recipe, Wire(two_sites))
    fresh(two_sites)
    deaths = 0
    while _dies(lambda: _killed(tmp_path / "killed", recipe, two_sites)):
        deaths += 1
    assert deaths == 4
    assert federate(tmp_path / "killed", recipe, Wire(two_sites)) == calm


def _dies(function):
    """Run it in a child; whether that was killed."""
    child = os.fork()
    if not child:
        try:
            function()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def _killed(run_dir, recipe, site_files):
    """Run until a site has trained something new."""

    def rounds():
        return [sorted(p.name for p in f.parent.glob("state/studies/*/*")) for f in site_files]

    before = rounds()

    def look(message, reply):
        if rounds() != before:
            os.kill(os.getpid(), signal.SIGKILL)
        return reply

    federate(run_dir, recipe, Wire(site_files, look))


def arrays_of(reply):
    return {name: array.numpy() for name, array in reply.content["arrays"].items()}


def test_eight_bits_go_up_and_what_is_owed_stays_at_the_site(tmp_path, make_recipe, make_sites):
    """One site, two rounds: what it sent is what it changed, but for what it owes at the end."""
    recipe = make_recipe(transport="delta8", min_sites=1)
    (file,) = make_sites({"alone": ["ct"]})
    replies, owed = [], []

    def look(message, reply):
        for name, array in message.content["arrays"].items():
            kinds = {"student": "float16", "teacher": "int8"}
            assert array.dtype == kinds.get(name.partition("/")[0], "float32")
        replies.append(arrays_of(reply))
        (private,) = file.parent.glob("state/studies/*/round-*/private.safetensors")
        kept = load_arrays(private)[0]
        owed.append({n.removeprefix("owed/"): a for n, a in kept.items() if n.startswith("owed/")})
        return reply

    federate(tmp_path / "run", recipe, Wire([file], look))
    groups = ("student/", "teacher/")
    for reply in replies:
        assert {a.dtype.name for n, a in reply.items() if n.startswith(groups)} == {"int8"}
        assert not any(name.startswith("owed/") for name in reply)
    names = {n for n in replies[0] if n.startswith(groups)}
    assert set(owed[0]) == set(owed[1]) == names
    assert any(array.any() for array in owed[0].values())
    before, after = (state_after(tmp_path / "run", number).to_arrays() for number in (0, 2))
    for name in names:
        sent = sum(r[name].astype(np.float64) * _scale_of(r, name) for r in replies)
        np.testing.assert_allclose(after[name], before[name] + sent, rtol=0, atol=1e-6)
        assert np.abs(owed[1][name]).max() <= _scale_of(replies[1], name) * 127 / 253


def _scale_of(reply, name):
    group = name.partition("/")[0]
    names = sorted(n for n in reply if n.startswith(f"{group}/"))
    return float(reply[f"scales/{group}"][names.index(name)])


def test_a_site_that_starts_afresh_owes_nothing(make_recipe, make_sites):
    recipe = make_recipe(transport="delta8")
    (file,) = make_sites({"st-mary": ["ct"]})
    down = pack_state(initial_state(recipe).to_arrays(), "delta8")
    ask(file, recipe.to_json(), down)
    (private,) = file.parent.glob("state/studies/*/round-0001/private.safetensors")
    second = arrays_of(ask(file, recipe.to_json(), down, round_number=2))
    kept = load_arrays(private.parents[1] / "round-0002" / "private.safetensors")[0]
    fresh([file])
    alone = arrays_of(ask(file, recipe.to_json(), down, round_number=2))
    assert any(alone[name].tobytes() != second[name].tobytes() for name in alone)
    (private,) = file.parent.glob("state/studies/*/round-0002/private.safetensors")
    owed = {n: a for n, a in load_arrays(private)[0].items() if n.startswith("owed/")}
    assert any(array.tobytes() != kept[name].tobytes() for name, array in owed.items())


def test_killed_at_any_operation_on_its_disk_a_site_sends_the_same_bytes(
    make_recipe, make_sites, kill_points
):
    recipe = make_recipe(transport="delta8")
    (file,) = make_sites({"st-mary": ["ct"]})
    down = pack_state(initial_state(recipe).to_arrays(), "delta8")
    state = file.parent / "state"
    ask(file, recipe.to_json(), down)
    shutil.copytree(state, file.parent / "before")
    calm = arrays_of(ask(file, recipe.to_json(), down, round_number=2))
    deaths = 0
    shutil.rmtree(state)
    shutil.copytree(file.parent / "before", state)
    for killed in kill_points(lambda: ask(file, recipe.to_json(), down, round_number=2)):
        deaths += killed
        if killed:  # what is there now is what the next process finds
            again = arrays_of(ask(file, recipe.to_json(), down, round_number=2))
            assert {n: a.tobytes() for n, a in again.items()} == {
                n: a.tobytes() for n, a in calm.items()
            }
            shutil.rmtree(state)
            shutil.copytree(file.parent / "before", state)
    assert deaths > 5


BAD = {
    "inf": (lambda a: np.full_like(a, np.inf), "is not finite; update rejected"),
    "nan": (lambda a: np.full_like(a, np.nan), "is not finite; update rejected"),
    "float32": (lambda a: a.astype(np.float32), "has dtype float32, expected float16"),
    "shape": (lambda a: a.reshape(1, *a.shape), "has shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_update_is_rejected_by_name_and_the_round_goes_on(case, tmp_path, recipe, make_sites):
    change, words = BAD[case]
    files = make_sites({"a": ["ct"], "b": ["us"], "st-mary": ["ct"]})

    def look(message, reply):
        if message.metadata.dst_node_id == FIRST_NODE_ID + 2:
            name = next(n for n in reply.content["arrays"] if n.startswith("student/"))
            array = reply.content["arrays"][name].numpy()
            reply.content["arrays"][name] = Array(change(array))
        return reply

    federate(tmp_path / "run", recipe, Wire(files, look))
    for line in read_history(tmp_path / "run"):
        assert line["sites"]["st-mary"]["outcome"] == "rejected"
        assert f"site 'st-mary', round {line['round']}: array" in line["sites"]["st-mary"]["reason"]
        assert words in line["sites"]["st-mary"]["reason"]
        assert line["sites"]["a"]["outcome"] == line["sites"]["b"]["outcome"] == "admitted"


BAD_EIGHT = {
    "a scale that is nan": (
        "scales/student", lambda a: np.full_like(a, np.nan), "is not finite; update rejected"
    ),
    "a scale that is inf": (
        "scales/student", lambda a: np.full_like(a, np.inf), "holds a scale that is not finite"
    ),
    "a large scale": (
        "scales/student", lambda a: a * np.float32(1e9), "student moved by"
    ),
    "half precision": ("student/", lambda a: a.astype(np.float16), "float16, expected int8"),
    "more numbers": ("student/", lambda a: np.zeros((9, *a.shape), np.int8), "has shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_EIGHT)
def test_a_bad_update_in_eight_bits_is_rejected_by_name(case, tmp_path, make_recipe, make_sites):
    prefix, change, words = BAD_EIGHT[case]
    files = make_sites({"a": ["ct"], "st-mary": ["ct"], "b": ["us"]})

    def look(message, reply):
        if message.metadata.dst_node_id == FIRST_NODE_ID + 1:
            name = next(n for n in sorted(reply.content["arrays"]) if n.startswith(prefix))
            array = reply.content["arrays"][name].numpy()
            reply.content["arrays"][name] = Array(change(array))
        return reply

    federate(tmp_path / "run", make_recipe(transport="delta8", rounds=1), Wire(files, look))
    (line,) = read_history(tmp_path / "run")
    assert line["sites"]["st-mary"]["outcome"] == "rejected"
    assert words in line["sites"]["st-mary"]["reason"]
    assert line["sites"]["a"]["outcome"] == line["sites"]["b"]["outcome"] == "admitted"


def ask(site_file, recipe_json, arrays, round_number=1):
    step = 2 * (round_number - 1)
    config = {"study": "ab" * 16, "round": round_number, "step": step, "recipe": recipe_json}
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    grid = InProcessGrid(load_client_app(), [{"site": str(site_file)}])
    content = RecordDict({"arrays": record, "config": ConfigRecord(config)})
    (reply,) = grid.send_and_receive([Message(content, FIRST_NODE_ID, "train")])
    return reply


@pytest.mark.parametrize("transport", ["delta16", "delta8"])
def test_a_reply_holds_exactly_the_declared_keys_and_is_the_same_when_asked_again(
    make_recipe, make_sites, transport
):
    recipe = make_recipe(transport=transport, teacher="rebuild")
    (file,) = make_sites({"st-mary": ["ct"]})
    grid_state = initial_state(recipe)
    arrays = pack_state(grid_state.to_arrays(), transport)
    first, again = (ask(file, recipe.to_json(), arrays).content["arrays"] for _ in range(2))
    expected = {f"student/{name}" for name in grid_state.student}
    assert set(first) == expected | {"scales/student", "prototypes/ct", "prototype_counts/ct"}
    assert all(again[n].numpy().tobytes() == a.numpy().tobytes() for n, a in first.items())


def test_a_site_refuses_a_transport_it_does_not_know_or_that_the_arrays_are_not_in(
    recipe, make_sites
):
    (file,) = make_sites({"st-mary": ["ct"]})
    arrays = initial_state(recipe).to_arrays()
    table = json.loads(recipe.to_json())
    table["federation"]["transport"] = "delta4"
    reply = ask(file, json.dumps(table), arrays)
    assert "'federation.transport'" in reply.error.reason
    reply = ask(file, recipe.to_json(), arrays)
    assert "not in the recipe's transport: array 'scales/student' is missing" in reply.error.reason
