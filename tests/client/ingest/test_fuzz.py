"""A short run of benchmarks/fuzz_readers.py; its docstring says what is checked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def fuzz(tmp_path):
    def run(*options):
        out = tmp_path / "out.json"
        done = subprocess.run(
            [
                *(sys.executable, ROOT / "benchmarks" / "fuzz_readers.py", "--jobs", "2"),
                *("--json", out, "--home", tmp_path, *options),
            ],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(out.read_text())

    return run


def test_each_hostile_file_has_one_of_its_right_outcomes(tmp_path, fuzz):
    (tmp_path / "none").mkdir()
    tally = fuzz("--data", tmp_path / "none", "--files", "1")
    assert tally["batches"] == 1
    assert tally["files"] >= 58
    assert tally["reasons"]["WORKER_DIED"] >= 1  # the run went on


def test_mutated_real_files_end_with_pictures_or_a_reason(real_data, fuzz):
    tally = fuzz("--data", real_data / "dicom", "--files", "250", "--no-crafted", "--seed", "4")
    assert tally["files"] == 250
    assert len(tally["reasons"]) >= 8
    assert tally["reasons"][""] >= 25  # far from all are so damaged that nothing is decoded
