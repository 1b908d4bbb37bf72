import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from client.check import machine
from client.check.findings import Status, duration, gigabytes
from client.check.training import Measured, round_time, step, step_fits
from client.site import SiteConfig

GREEN, YELLOW, RED = Status
GB = 1_000_000_000
MEASURED = Measured(
    torch="2.15", device="cpu", step_seconds=2.0, other_seconds=40.0, peak_bytes=GB,
    message_bytes=GB, reply_bytes=GB, private_bytes=2 * GB,
)  # fmt: skip
SITE = SiteConfig(name="a", shards=("d",))


def with_disk(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_the_disk_must_hold_two_rounds_of_state(monkeypatch, tmp_path):
    state = tmp_path / "not" / "yet"
    with_disk(monkeypatch, 6 * GB)
    finding = machine.disk(state, MEASURED)
    assert finding.status == GREEN
    assert finding.found == "6.0 GB free, the state needs 6.0 GB"
    with_disk(monkeypatch, 4.5 * GB)
    finding = machine.disk(state, MEASURED)
    assert finding.status == RED
    assert f"Free 1.5 GB on the disk of '{tmp_path}'" in finding.remedy
    assert machine.disk(state, Measured()).status == YELLOW


@pytest.mark.parametrize(
    ("available", "status"), [(6.7 * GB, GREEN), (6.6 * GB, RED), (None, YELLOW)]
)
def test_memory_must_hold_the_step_and_flowers_messages(monkeypatch, available, status):
    """1 GB to train + 5.4 x 1 GB of messages + .3 GB of idle processes = 6.7 GB."""
    monkeypatch.setattr(machine, "available_memory", lambda: available)
    finding = machine.memory(MEASURED)
    assert finding.status == status
    if available:
        assert finding.values["needed_bytes"] == 6_700_000_000


def test_available_memory_is_the_machines_or_the_containers(tmp_path):
    machines = machine.available_memory(tmp_path)
    assert 10_000_000 < machines < 10**14
    (tmp_path / "memory.current").write_text("9000000\n")
    (tmp_path / "memory.stat").write_text("anon 2000000\nactive_file 4000000\ninactive_file 1000\n")
    (tmp_path / "memory.max").write_text("12000000\n")
    assert machine.available_memory(tmp_path) == 12_000_000 - 9_000_000 + 4_001_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_memory(tmp_path) == pytest.approx(machines, rel=0.5)


def test_more_threads_than_cores_are_yellow(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    assert machine.processors(SITE).status == GREEN
    assert machine.processors(SITE.model_copy(update={"threads": 2})).status == GREEN
    finding = machine.processors(SITE.model_copy(update={"threads": 3}))
    assert finding.status == YELLOW
    assert "threads = 2" in finding.remedy


def test_a_container_without_shared_memory_is_yellow(monkeypatch, tmp_path):
    with_disk(monkeypatch, 20_000_000)
    assert machine.shared_memory().status == GREEN
    with_disk(monkeypatch, 1_000_000)
    assert "--shm-size" in machine.shared_memory().remedy
    monkeypatch.undo()
    assert machine.shared_memory(tmp_path / "nowhere").status == YELLOW


def test_the_device_is_told(monkeypatch):
    assert "training on the CPU" in machine.device(SITE, MEASURED).found
    gpu = replace(MEASURED, device="cuda", gpu="NVIDIA H100", gpu_bytes=80 * GB)
    assert "NVIDIA H100 with 80.0 GB" in machine.device(SITE, gpu).found
    broken = machine.device(SITE, Measured(error="no CUDA", remedy="Install a driver."))
    assert (broken.status, broken.remedy) == (RED, "Install a driver.")
    monkeypatch.setattr(machine.Path, "exists", lambda path: True)
    finding = machine.device(SITE, MEASURED)
    assert finding.status == YELLOW
    assert "--gpus all" in finding.remedy


@pytest.mark.parametrize(("deadline", "status"), [(1000.0, GREEN), (150.0, YELLOW), (99.0, RED)])
def test_a_rounds_time_is_held_against_the_deadline(make_recipe, deadline, status):
    """20 steps of 2 s + 40 s of evaluation + 20 s for messages = 100 s."""
    recipe = make_recipe(rounds=30, local_steps=20, round_timeout_seconds=deadline)
    finding = round_time(recipe, MEASURED)
    assert finding.status == status
    assert finding.values == {"round_seconds": 100.0, "study_seconds": 3000.0}
    assert "a round about 100 s: 20 steps 40 s, evaluation and memory 40 s" in finding.found
    assert "the study 50 min" in finding.found


def test_a_step_tells_time_and_memory_or_why_not():
    assert step(MEASURED).found == "2 s on the CPU, peak 1.0 GB of memory"
    gpu = replace(MEASURED, device="cuda", gpu="H100", gpu_peak_bytes=5 * GB)
    assert step(gpu).found == "2 s on H100, peak 1.0 GB of memory and 5.0 GB of the GPU's"
    full = step(replace(gpu, out_of_memory="GPU", error="an allocation failed"))
    assert full.status == RED
    assert full.found == "out of memory on H100: an allocation failed"
    assert "optim.batch_size" in full.remedy
    killed = step(replace(gpu, out_of_memory="memory", error="killed by the system"))
    assert killed.found == "out of memory on this machine: killed by the system"
    assert "report this line" in step(replace(MEASURED, error="RuntimeError: no kernel")).remedy


@pytest.mark.parametrize(
    ("foretold", "seconds", "status"),
    [(9 * GB, 2.0, GREEN), (9.1 * GB, 2.0, YELLOW), (9.1 * GB, 0.0, RED), (20 * GB, 0.0, RED)],
)
def test_a_step_that_does_not_fit_is_told_with_what_would(foretold, seconds, status):
    """Of 10 GB free a tenth is spared; where the step ran all the same, it is no more than near."""
    measured = replace(
        MEASURED, gpu="H100", foretold_bytes=int(foretold), free_bytes=10 * GB,
        step_seconds=seconds, savings=(("model.checkpointing = true", 3 * GB),),
    )  # fmt: skip
    finding = step_fits(measured)
    assert finding.status == status
    assert finding.found == f"{gigabytes(foretold)} foretold for a step, 10.0 GB free on H100"
    if status != GREEN:
        assert "a recipe with model.checkpointing = true (3.0 GB), or with a s" in finding.remedy


def test_several_devices_are_told_and_need_more_memory_and_disk(monkeypatch, tmp_path):
    several = replace(
        MEASURED, device="cuda:1", devices=4, gpu="H100", gpu_bytes=80 * GB, gpu_free_bytes=9 * GB
    )
    assert (
        "4 GPUs train together, least free: H100 with 80.0 GB"
        in machine.device(SITE, several).found
    )
    assert step(several).found.startswith("2 s on H100 (its share of the batch, one of 4)")
    monkeypatch.setattr(machine, "available_memory", lambda: 20 * GB)
    assert machine.memory(several).values["needed_bytes"] == 9_700_000_000  # 3 GB more
    with_disk(monkeypatch, 20 * GB)  # 2 x (2 + 1) of state, and once all that comes and goes
    assert machine.disk(tmp_path, several).values["needed_bytes"] == 10 * GB


def test_quantities_are_short():
    assert [gigabytes(n) for n in (0, 9_216, 12_300_000, 1.234e10)] == [
        "0.0 kB", "9.2 kB", "12.3 MB", "12.3 GB",
    ]  # fmt: skip
    assert [duration(s) for s in (0.0741, 1.52, 40, 119.9, 3000, 9000, 500_000)] == [
        "0.074 s", "1.5 s", "40 s", "120 s", "50 min", "2.5 h", "5.8 days",
    ]  # fmt: skip
