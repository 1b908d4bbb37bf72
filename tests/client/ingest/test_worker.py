"""The pool and its workers against readers that hang, crash, eat memory, talk and write."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from client.ingest.patients import patient_key
from client.ingest.pool import Pool
from client.ingest.types import Item, Outcome, Reason, Rules
from client.ingest.worker import Setup
from core.errors import UserError

SECRET = bytes(range(32))
ROOT = Path(__file__).parents[3]

# A module of its own: workers import it by name, which they cannot with this one.
READERS = '''
import ctypes, logging, os, signal, sys, threading, time, warnings
import numpy as np
from client.ingest.types import Picture, Reading, Reason, Rejected

def picture(value, px=16):
    pixels = np.random.default_rng(value).integers(0, 256, (px, px, 1), dtype=np.uint8)
    return Picture(pixels, "ct")

def read(item, rules):
    """Does what the name of the file says."""
    word, _, number = item.path.name.partition("-")
    if word == "abort":
        os.abort()
    if word == "segfault":
        ctypes.string_at(0)
    if word == "exit":
        os._exit(0)
    if word == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "hang":  # as native code does: no signal is seen
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGALRM})
        time.sleep(1000)
    if word == "orphan":
        time.sleep(1000)
    if word == "memory":
        np.ones(1 << 40, dtype=np.uint8)
    if word == "eats":
        kept = []
        while True:
            kept.append(bytearray(1 << 24))
    if word == "leak":
        globals().setdefault("leaked", []).append(bytearray(200 << 20))
    if word == "panic":
        class PanicException(BaseException):
            pass
        raise PanicException("DOE^JANE")
    if word == "failed":
        raise ValueError("DOE^JANE")
    if word == "rejected":
        raise Rejected(Reason.TOO_SMALL)
    if word == "halfway":  # dies while its answer is in the pipe
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        pictures = [picture(0, px=4096)] * 1
        return Reading(tuple(pictures) * 40, "dicom:x", "PNG")
    if word == "talks":
        print("DOE^JANE")
        print("DOE^JANE", file=sys.stderr)
        os.write(1, b"DOE^JANE")
        os.write(2, b"DOE^JANE")
        warnings.warn("DOE^JANE")
        logging.getLogger("pydicom").error("DOE^JANE")
    if word == "writes":
        with open(os.path.join(str(item.path.parent), "written"), "wb") as file:
            file.write(b"DOE^JANE")
    if word == "torch":
        assert "torch" not in sys.modules
        assert os.environ["OMP_NUM_THREADS"] == "1"
    if word == "slow":
        time.sleep(0.5)
    if word == "pid":
        return Reading((picture(int(number)),), f"dicom:{os.getpid()}", str(os.getpid()))
    return Reading((picture(int(number or 0)),), f"dicom:{item.path.name}", "PNG", "Siemens")
'''

Read = Callable[..., list[tuple[str, Outcome]]]


@pytest.fixture
def readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "hostile_readers.py").write_text(READERS)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    import hostile_readers  # type: ignore[import-not-found]

    yield hostile_readers
    del sys.modules["hostile_readers"]


@pytest.fixture
def read(readers: ModuleType, tmp_path: Path) -> Read:
    """Reads files of these names in worker processes; gives (name, outcome) as they come."""

    def run(
        *names: str, jobs: int = 2, timeout_s: float = 20, memory: int = 2 << 30
    ) -> list[tuple[str, Outcome]]:
        setup = Setup(Rules(px=16), SECRET, memory, timeout_s, readers.read)
        items = (Item(tmp_path / name, f"0/{name}") for name in names)
        with Pool(setup, jobs) as pool:
            outcomes = [(item.path.name, outcome) for item, outcome in pool.outcomes(items)]
        return outcomes

    return run


def reasons(outcomes: list[tuple[str, Outcome]]) -> dict[str, Reason | None]:
    return {name: outcome.reason for name, outcome in outcomes}


def test_outcomes_come_in_the_order_of_the_items_with_hashed_patients(read: Read) -> None:
    names = [f"{'slow' if number % 7 == 0 else 'good'}-{number}" for number in range(30)]
    outcomes = read(*names, jobs=3)
    assert [name for name, _ in outcomes] == names
    for number, (name, outcome) in enumerate(outcomes):
        expected = np.random.default_rng(number).integers(0, 256, (16, 16, 1), dtype=np.uint8)
        np.testing.assert_array_equal(outcome.pictures[0].pixels, expected)
        assert outcome.patient == patient_key(SECRET, f"dicom:{name}")
        assert (outcome.reason, outcome.kind, outcome.vendor) == (None, "PNG", "Siemens")
        assert len(outcome.fingerprints) == 1


def test_every_way_to_fail_has_its_reason_and_spoils_no_other_file(read: Read) -> None:
    expected = {
        "abort-1": Reason.WORKER_DIED,
        "segfault-1": Reason.WORKER_DIED,
        "exit-1": Reason.WORKER_DIED,
        "killed-1": Reason.TOO_MUCH_MEMORY,
        "memory-1": Reason.TOO_MUCH_MEMORY,
        "eats-1": Reason.TOO_MUCH_MEMORY,
        "panic-1": Reason.READER_FAILED,
        "failed-1": Reason.READER_FAILED,
        "rejected-1": Reason.TOO_SMALL,
        "halfway-1": Reason.TOO_MUCH_MEMORY,
    }
    names = [name for number, bad in enumerate(expected) for name in (f"good-{number}", bad)]
    outcomes = read(*names)
    found = reasons(outcomes)
    assert {name: found[name] for name in expected} == expected
    assert all(reason is None for name, reason in found.items() if name not in expected)
    notes = {name: outcome.note for name, outcome in outcomes if outcome.note}
    assert notes == {"panic-1": "PanicException", "failed-1": "ValueError"}


def test_files_that_hang_cost_their_time_once_and_the_others_go_on(read: Read) -> None:
    names = ["hang-1", *(f"good-{n}" for n in range(40)), "hang-2"]
    start = time.monotonic()
    found = reasons(read(*names, timeout_s=1.5))
    assert [name for name, reason in found.items() if reason] == ["hang-1", "hang-2"]
    assert found["hang-1"] is found["hang-2"] is Reason.TIMED_OUT
    assert time.monotonic() - start < 10


def test_a_file_is_not_blamed_for_the_memory_that_others_left(read: Read) -> None:
    names = [f"leak-{number}" for number in range(6)]
    found = reasons(read(*names, jobs=1, memory=1 << 30))
    assert not any(found.values())


def test_a_listed_reason_needs_no_worker(read: Read, tmp_path: Path, readers: ModuleType) -> None:
    item = Item(tmp_path / "abort-1", "0/x", reason=Reason.LINK)
    with Pool(Setup(Rules(), SECRET, 2 << 30, 5, readers.read), 1) as pool:
        assert list(pool.outcomes([item])) == [(item, Outcome(reason=Reason.LINK))]


def test_what_a_decoder_prints_logs_or_writes_goes_nowhere(
    read: Read, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = read("talks-1", "writes-1")
    assert reasons(found) == {"talks-1": None, "writes-1": Reason.READER_FAILED}
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "written").exists() or (tmp_path / "written").stat().st_size == 0


def test_a_worker_has_no_torch_and_one_thread(read: Read) -> None:
    assert reasons(read("torch-1")) == {"torch-1": None}


def test_no_process_is_left_when_the_pool_is_closed_in_the_middle(
    readers: ModuleType, tmp_path: Path
) -> None:
    setup = Setup(Rules(), SECRET, 2 << 30, 100, readers.read)
    items = [Item(tmp_path / name, name) for name in ("pid-1", "pid-2", "hang-1", "hang-2")]
    with Pool(setup, 2) as pool:
        outcomes = pool.outcomes(items)
        pids = {int(next(outcomes)[1].kind) for _ in range(2)}
        pids |= {worker.process.pid for worker in pool._workers}
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def test_a_worker_whose_parent_was_killed_ends_soon_after_its_time(
    readers: ModuleType, tmp_path: Path
) -> None:
    script = f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path / "lib")!r}]
        from pathlib import Path
        import client.ingest.pool, client.ingest.worker
        from client.ingest.types import Item, Rules
        client.ingest.worker.ORPHAN_SECONDS = 0
        import hostile_readers
        if __name__ == "__main__":
            setup = client.ingest.worker.Setup(Rules(), bytes(32), 2 << 30, 1, hostile_readers.read)
            pool = client.ingest.pool.Pool(setup, 1)
            pool._give(pool._workers[0], client.ingest.pool._Task(Item(Path("orphan-1"), "x")))
            print(pool._workers[0].process.pid, flush=True)
            import time; time.sleep(100)
    """
    (tmp_path / "parent.py").write_text(textwrap.dedent(script))
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout
    pid = int(parent.stdout.readline())
    time.sleep(3)  # until the worker is in the middle of the file
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pid)


def test_workers_that_cannot_start_stop_the_run_with_a_line(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.ingest.pool.serve", sys.modules["hostile_readers"].picture)
    with pytest.raises(UserError, match=r"do not start \(exit status 1, .* raise --memory"):
        read("good-1")


def alive(pid: Any) -> bool:
    """Whether a process runs; one that has ended but nobody asked for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
