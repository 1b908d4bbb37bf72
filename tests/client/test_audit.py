import json
import multiprocessing
import stat

import numpy as np

from client.audit import Audit
from client.chain import read
from core.checkpoint import sha256_arrays


def lines(directory):
    return [json.loads(line) for line in (directory / "audit.jsonl").read_text().splitlines()]


def test_a_line_says_what_crossed_the_wire(tmp_path):
    arrays = {"student/w": np.ones((2, 3), np.float32)}
    Audit(tmp_path, "ab12", 7, "cd" * 32).write(
        "out", "train", "trained and sent", arrays=arrays, scalars={"num_examples/ct": 5}, seconds=2
    )
    (line,) = lines(tmp_path)
    assert line.pop("time").startswith("20")
    assert line.pop("previous") == "0" * 64
    assert line == {
        "direction": "out",
        "message": "train",
        "study": "ab12",
        "round": 7,
        "bundle": "cd" * 32,
        "decision": "trained and sent",
        "arrays": {"student/w": [2, 3]},
        "bytes": 24,
        "sha256": sha256_arrays(arrays),
        "scalars": {"num_examples/ct": 5},
        "epsilon": None,
        "seconds": 2,
    }


def test_the_lines_of_several_studies_form_one_chain(tmp_path):
    for study in ("ab" * 16, "cd" * 16, "ab" * 16):
        Audit(tmp_path, study).write("in", "train", "accepted for checking")
    assert [line["study"][:2] for line in lines(tmp_path)] == ["ab", "cd", "ab"]
    chain = read(tmp_path)
    assert (chain.problem, chain.head.lines) == ("", 3)


def test_lines_are_appended_and_private_to_the_owner(tmp_path):
    for number in range(3):
        Audit(tmp_path).write("in", "query", str(number))
    assert [line["decision"] for line in lines(tmp_path)] == ["0", "1", "2"]
    assert stat.S_IMODE((tmp_path / "audit.jsonl").stat().st_mode) == 0o600


def write_many(directory):
    for _ in range(20):
        Audit(directory).write("in", "train", "x" * 2000)


def test_lines_of_two_processes_do_not_mix(tmp_path):
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write_many, args=(tmp_path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(lines(tmp_path)) == 40
    assert read(tmp_path).problem == ""
