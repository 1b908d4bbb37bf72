"""The journal and its recorder: order, copies, splits, settings, and what a kill leaves."""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.ingest.duplicates import fingerprint
from client.ingest.journal import Journal, open_journal
from client.ingest.patients import patient_key, split_of
from client.ingest.recorder import RAW, Recorder
from client.ingest.types import Item, Outcome, Picture, Reason, Rules
from core.errors import UserError
from core.shards import HEADER_BYTES

PX = 16
RULES = Rules(px=PX)
SETTINGS = {"--px": PX, "--ct-window": (40.0, 400.0), "--secret": "a"}
SECRET = bytes(32)


def outcome(*seeds: int, channels: int = 1, patient: str = "p", modality: str = "ct") -> Outcome:
    """A file of pictures of noise, one for each seed."""
    pictures = tuple(
        Picture(
            np.random.default_rng(seed).integers(0, 256, (PX, PX, channels), dtype=np.uint8),
            modality,
        )
        for seed in seeds
    )
    found = tuple(fingerprint(picture.pixels) for picture in pictures)
    return Outcome(pictures=pictures, fingerprints=found, patient=patient, kind="PNG")


def items(count: int, **facts: str) -> list[Item]:
    return [Item(Path(f"/export/{n}"), f"0/{n}", "ct", **facts) for n in range(count)]  # type: ignore[arg-type]


@contextmanager
def listed(work: Path, listing: list[Item]) -> Iterator[Journal]:
    with open_journal(work, SETTINGS) as journal:
        if journal.listed is None:
            list(journal.list_items(listing, SECRET))
        yield journal


def rows(work: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(work / "journal.sqlite")) as connection:
        return connection.execute(query).fetchall()


def test_items_come_back_in_their_order_with_names_that_are_no_text(tmp_path: Path) -> None:
    strange = os.fsdecode(b"\xff\xfe.dcm")
    listing = [
        Item(Path("/e") / strange, f"0/{strange}", None, "a class", "val"),
        Item(Path("/e/b"), "0/b", "us", reason=Reason.LINK),
        *items(2500),
    ]
    with listed(tmp_path / "w", listing) as journal:
        assert list(journal.items_left()) == listing
        assert (journal.listed, journal.done) == (2502, 0)


def test_a_patient_of_a_csv_is_hashed_before_it_is_stored(tmp_path: Path) -> None:
    listing = items(1, patient="DOE^JANE")
    with listed(tmp_path / "w", listing) as journal:
        (item,) = journal.items_left()
    assert item.patient == patient_key(SECRET, "csv:DOE^JANE")
    assert b"DOE" not in (tmp_path / "w" / "journal.sqlite").read_bytes()


def test_only_its_owner_may_look_into_the_work_directory(tmp_path: Path) -> None:
    with listed(tmp_path / "w", items(1)):
        assert (tmp_path / "w").stat().st_mode & 0o777 == 0o700


def test_a_list_that_was_not_finished_is_taken_anew(tmp_path: Path) -> None:
    with open_journal(tmp_path / "w", SETTINGS) as journal:
        next(journal.list_items(items(3), SECRET))
    with listed(tmp_path / "w", items(2)) as journal:
        assert journal.listed == 2
        assert len(list(journal.items_left())) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--px": 32}, r"--px was 16 and now is 32; give the same .* or --restart"),
        ({"--ct-window": (50.0, 350.0)}, "--ct-window was 40,400 and now is 50,350"),
        ({"--secret": "b"}, "the secret has changed; give the same"),
    ],
)
def test_other_settings_are_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with listed(tmp_path / "w", items(1)):
        pass
    with pytest.raises(UserError, match=message):
        open_journal(tmp_path / "w", SETTINGS | change)
    with open_journal(tmp_path / "w", SETTINGS | change, restart=True) as journal:
        assert journal.listed is None


def test_two_processes_do_not_share_a_journal(tmp_path: Path) -> None:
    with listed(tmp_path / "w", items(1)) as journal:
        for restart in (False, True):
            with pytest.raises(UserError, match="is in use: another prepare is at work"):
                open_journal(tmp_path / "w", SETTINGS, restart=restart)
        assert journal.listed == 1


def test_a_damaged_journal_is_an_error_that_restart_mends(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "journal.sqlite").write_bytes(b"not a database" * 1000)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        open_journal(tmp_path / "w", SETTINGS)
    with open_journal(tmp_path / "w", SETTINGS, restart=True) as journal:
        assert journal.listed is None


def test_a_csv_with_a_patient_in_two_splits_is_refused(tmp_path: Path) -> None:
    listing = [
        Item(Path("/e/a"), "0/a", "ct", split="val", patient="7"),
        Item(Path("/e/b"), "0/b", "ct", split="train", patient="7"),
    ]
    message = r"a patient into two splits \(images 'a' and 'b'\)"
    with pytest.raises(UserError, match=message), listed(tmp_path / "w", listing):
        pass


def test_pictures_are_kept_once_and_a_file_of_copies_is_rejected(tmp_path: Path) -> None:
    with listed(tmp_path / "w", items(4)) as journal, Recorder(journal, RULES) as recorder:
        assert recorder.record("", "", outcome(1, 2, 1)) is None
        assert recorder.record("", "", outcome(2, 1)) is Reason.DUPLICATE
        assert recorder.record("", "", Outcome(reason=Reason.EMPTY)) is Reason.EMPTY
        near = outcome(1).pictures[0].pixels + 2  # wraps for the few values of 254 and 255
        soft = Picture(np.where(near < 2, np.uint8(255), near), "ct")
        copy = Outcome(pictures=(soft,), fingerprints=(fingerprint(soft.pixels),), patient="q")
        assert recorder.record("", "", copy) is Reason.NEAR_DUPLICATE
        recorder.commit()
    assert rows(tmp_path / "w", "SELECT item, reason, exact, near FROM outcomes") == [
        (1, None, 1, 0),
        (2, "same image as an earlier one", 2, 0),
        (3, "empty file", 0, 0),
        (4, "nearly the same image as an earlier one", 0, 1),
    ]
    raw = (tmp_path / "w" / RAW).read_bytes()
    kept = [picture.pixels.tobytes() for picture in outcome(1, 2).pictures]
    assert raw[HEADER_BYTES:] == b"".join(kept)


def test_copies_are_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    rules = Rules(px=PX, duplicates="keep")
    with listed(tmp_path / "w", items(2)) as journal, Recorder(journal, rules) as recorder:
        assert recorder.record("", "", outcome(1)) is None
        assert recorder.record("", "", outcome(1)) is None
        assert journal.one("SELECT count(*) FROM pictures") == 2


def splits(tmp_path: Path, listing: list[Item], patients: list[str]) -> dict[str, str]:
    with listed(tmp_path / "w", listing) as journal, Recorder(journal, RULES) as recorder:
        for number, (item, patient) in enumerate(zip(listing, patients, strict=True)):
            recorder.record(item.label, item.split, outcome(number, patient=patient))
        return dict(journal.connection.execute("SELECT key, split FROM patients"))


def test_without_labels_everything_is_for_training(tmp_path: Path) -> None:
    keys = [f"{n:032x}" for n in range(20)]
    assert set(splits(tmp_path, items(20), keys).values()) == {"train"}


def test_with_labels_the_patient_decides_the_split(tmp_path: Path) -> None:
    keys = [f"{n:032x}" for n in range(40)]
    found = splits(tmp_path, items(40, label="a"), keys)
    assert found == {key: split_of(key) for key in keys}
    assert set(found.values()) == {"train", "val", "test"}


def test_the_split_of_a_csv_wins_and_a_patient_stays_in_the_first(tmp_path: Path) -> None:
    listing = [
        Item(Path("/e/a"), "0/a", "ct", split="val"),
        Item(Path("/e/b"), "0/b", "ct", split="test"),
        Item(Path("/e/c"), "0/c", "ct", split="test"),
    ]
    assert splits(tmp_path, listing, ["p", "p", "q"]) == {"p": "val", "q": "test"}


def test_what_was_not_committed_is_cut_off_and_recorded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.ingest.recorder.COMMIT_SECONDS", 1e9)
    work, raw = tmp_path / "w", tmp_path / "w" / RAW
    with listed(work, items(4)) as journal, Recorder(journal, RULES) as recorder:
        recorder.record("", "", outcome(1))
        recorder.commit()
        recorder.record("", "", outcome(2, 3))
    assert raw.stat().st_size == HEADER_BYTES + 3 * PX**2
    with listed(work, items(4)) as journal:
        assert [item.key for item in journal.items_left()] == ["0/1", "0/2", "0/3"]
        with Recorder(journal, RULES) as recorder:
            assert raw.stat().st_size == HEADER_BYTES + PX**2
            assert recorder.record("", "", outcome(2, 3)) is None
            assert recorder.record("", "", outcome(3)) is Reason.DUPLICATE
            recorder.commit()
    kept = b"".join(picture.pixels.tobytes() for picture in outcome(1, 2, 3).pictures)
    assert raw.read_bytes()[HEADER_BYTES:] == kept


def test_lost_pictures_are_noticed(tmp_path: Path) -> None:
    with listed(tmp_path / "w", items(2)) as journal, Recorder(journal, RULES) as recorder:
        recorder.record("", "", outcome(1))
        recorder.commit()
    os.truncate(tmp_path / "w" / RAW, HEADER_BYTES + 5)
    with (
        listed(tmp_path / "w", items(2)) as journal,
        pytest.raises(UserError, match="has lost pictures that its journal counts"),
    ):
        Recorder(journal, RULES)


def test_pictures_are_on_the_disk_before_they_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync: Callable[[int], None] = os.fsync
    with listed(tmp_path / "w", items(1)) as journal, Recorder(journal, RULES) as recorder:
        monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
        monkeypatch.setattr(journal, "commit", lambda: order.append("commit"))
        recorder.record("", "", outcome(1))
        recorder.commit()
    assert order == ["fsync", "commit"]
