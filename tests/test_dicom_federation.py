"""From DICOM exports to a trained model: the real prepare, then a real federation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from core.checkpoint import load_arrays
from core.modalities import MODALITIES
from core.shards import open_shard
from server.engines import run_in_process
from server.history import open_run, read_history

ROOT = Path(__file__).parents[1]
MIXED = {
    "CT 512 x 512, 16 bits, JPEG 2000": 8,
    "ultrasound 480 x 640, colour, uncompressed": 8,
    "chest X-ray 1,024 x 1,000, 12 bits, uncompressed": 6,
}
PLAIN = {"CT 512 x 512, 16 bits, uncompressed": 8, "CT 512 x 512, 16 bits, RLE": 4}


def prepare(export, shard):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "client", "prepare", str(export), str(shard)),
            *("--px", "32", "--jobs", "2", "--no-sheets", "--secret", str(shard.parent / "secret")),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return open_shard(shard, verify=True)


@pytest.fixture
def site(tmp_path, load_benchmark):
    """Write an export of phantoms in DICOM, prepare it, and write the site's file."""
    dicom_files = load_benchmark("dicom_files")

    def make(name, counts, seed):
        home = tmp_path / name
        dicom_files.write_archive(home / "export", counts, seed=seed)
        shard = prepare(home / "export", home / "data" / "archive")
        file = home / "site.toml"
        file.write_text(
            f"name = {json.dumps(name)}\nshards = ['data']\nthreads = 1\ndevice = 'cpu'\n"
            "[policy]\nmin_patients_per_prototype = 2\n"
        )
        return file, shard

    return make


def count_by_modality(shard):
    counts = np.bincount(shard.modality, minlength=len(MODALITIES)).tolist()
    return {m: n for m, n in zip(MODALITIES, counts, strict=True) if n}


def test_a_federation_trains_from_dicom_exports_one_of_them_of_three_modalities(
    tmp_path, recipe, site
):
    mixed_file, mixed = site("mixed", MIXED, seed=1)
    plain_file, plain = site("plain", PLAIN, seed=2)
    assert count_by_modality(mixed) == {"ct": 8, "cxr": 6, "us": 8}
    assert count_by_modality(plain) == {"ct": 12}
    assert len(set(mixed.patient.tolist())) == 6  # four files a patient
    assert set(mixed.split.tolist()) == {"train"}  # nothing is labelled

    run = open_run(tmp_path / "run", recipe)
    run_in_process(tmp_path / "run", [mixed_file, plain_file])

    lines = read_history(tmp_path / "run")
    assert len(lines) == recipe.federation.rounds
    for line in lines:
        sites = line["sites"]
        assert {name: facts["outcome"] for name, facts in sites.items()} == {
            "mixed": "admitted",
            "plain": "admitted",
        }
        assert sites["mixed"]["num_examples"] == {"ct": 8, "cxr": 6, "us": 8}
        assert sites["plain"]["num_examples"] == {"ct": 12}
    first, last = (run.checkpoint_path(number) for number in (0, recipe.federation.rounds))
    before, after = load_arrays(first)[0], load_arrays(last)[0]
    assert all(np.isfinite(array).all() for array in after.values())
    assert any(not np.array_equal(before[name], after[name]) for name in before)
