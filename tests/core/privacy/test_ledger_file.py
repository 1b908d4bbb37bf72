"""The file of a ledger outlives kills, power cuts and full disks, and shows damage."""

import json
import os
import random
from pathlib import Path

import pytest

from core.errors import UserError
from core.privacy.accounting import Event, epsilon
from core.privacy.ledger import Ledger
from core.privacy.ledger_file import LedgerFile

DELTA = 1e-5
EVENTS = (Event("gradients", 1.1, 0.02, 20), Event("prototypes", 8.9, 1.0, 1))


def digest(number: int) -> str:
    return f"{number:064x}"


def charge(ledger: Ledger, number: int, *, reply: int | None = None, sigma: float = 8.9) -> None:
    events = (EVENTS[0], Event("prototypes", sigma, 1.0, 1))
    name = digest(number if reply is None else reply)
    ledger.charge("a", number, name, events, delta=DELTA, ceiling=None)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "state" / "ledger.jsonl")


@pytest.fixture
def three(ledger: Ledger) -> Ledger:
    """Three rounds."""
    for number in (1, 2, 3):
        charge(ledger, number)
    return ledger


def head(ledger: Ledger) -> Path:
    return ledger.path.with_name("ledger.head")


def rounds(ledger: Ledger) -> list[int]:
    return [c.round for c in ledger.charges()]


def test_a_kill_at_any_operation_forgets_nothing_and_repeats_nothing(
    ledger: Ledger, kill_points
) -> None:
    """A site that is killed asks for the same charge again before it sends the same reply."""
    kills = 0
    for number in range(1, 4):
        for killed in kill_points(lambda n=number: charge(ledger, n)):
            kills += killed
            assert rounds(ledger)[: number - 1] == list(range(1, number))
            assert ledger.charged("a", number) in ([], [digest(number)])
        assert ledger.charged("a", number) == [digest(number)]
    assert kills >= 13  # four a charge, and the directory of the first
    assert ledger.events() == list(EVENTS * 3)
    assert ledger.epsilon(DELTA) == epsilon(EVENTS * 3, DELTA)


def test_kills_between_charges_of_other_replies_leave_a_ledger_that_reads(
    ledger: Ledger, kill_points
) -> None:
    """Retrained after each kill: another reply, so a line that is not settled meets a new one."""
    reply, before = [1], []
    for killed in kill_points(lambda: charge(ledger, 1, reply=reply[0])):
        charged = ledger.charged("a", 1)
        assert charged[: len(before)] == before
        assert killed or charged[-1] == digest(reply[0])
        reply[0], before = reply[0] + 1, charged
    assert len(charged) == len(set(charged)) >= 2


def test_a_charge_is_on_the_disk_when_charge_returns(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    charge(ledger, 1)
    directory = ledger.path.parent
    expected = [ledger.path, directory / ".ledger.head.partial", directory]
    assert synced == [str(path) for path in expected]


def test_a_line_that_only_memory_holds_is_synced_before_its_charge_returns_again(
    ledger: Ledger, kill_points, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, _ in enumerate(kill_points(lambda: charge(ledger, 1))):
        if number == 1:  # mkdir, then the sync of the line: it is written, and not on the disk
            break
    assert ledger.charged("a", 1)
    assert not head(ledger).exists()
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(descriptor))
    charge(ledger, 1)
    assert len(synced) == 3
    assert head(ledger).exists()


def torn(ledger: Ledger) -> bytes:
    """The line of round 4 as it would follow, taken back from both files."""
    before, told = ledger.path.read_bytes(), head(ledger).read_bytes()
    charge(ledger, 4)
    line = ledger.path.read_bytes()[len(before) :]
    ledger.path.write_bytes(before)
    head(ledger).write_bytes(told)
    return line


def test_a_line_cut_short_anywhere_was_never_charged_and_stops_nothing(three: Ledger) -> None:
    line, before, told = torn(three), three.path.read_bytes(), head(three).read_bytes()
    for size in [*range(0, len(line), 11), len(line) - 2, len(line) - 1]:
        three.path.write_bytes(before + line[:size])
        head(three).write_bytes(told)
        assert rounds(three) == [1, 2, 3]
        charge(three, 5)
        assert rounds(three) == [1, 2, 3, 5]


def test_a_whole_line_that_is_not_settled_counts(three: Ledger) -> None:
    three.path.write_bytes(three.path.read_bytes() + torn(three))
    assert three.charged("a", 4) == [digest(4)]
    charge(three, 5)
    assert rounds(three) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("junk", [bytes(9000), b"\0" * 40 + b'"}\n', b"x" * 2000])
def test_what_a_power_cut_leaves_of_a_line_is_written_over(junk: bytes, three: Ledger) -> None:
    three.path.write_bytes(three.path.read_bytes() + junk)
    assert len(three.charges()) == 3
    charge(three, 4)
    assert len(three.charges()) == 4
    lines = three.path.read_bytes().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3, 4]


def fails(ledger: Ledger, words: str) -> None:
    """Nothing is told and nothing charged, in words that name the file."""
    before = {path: path.read_bytes() for path in ledger.path.parent.glob("ledger.*")}
    with pytest.raises(UserError, match=words) as told:
        ledger.epsilon(DELTA)
    with pytest.raises(UserError, match=words):
        charge(ledger, 9)
    assert str(ledger.path) in str(told.value)
    for path, data in before.items():
        assert path.read_bytes() == data


def test_a_flipped_bit_anywhere_is_damage(three: Ledger) -> None:
    whole = three.path.read_bytes()
    for place in random.Random(0).sample(range(len(whole)), 60):
        for bit in (0, 5):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            three.path.write_bytes(data)
            with pytest.raises(UserError, match="what was spent is not known"):
                three.charges()
    three.path.write_bytes(data)
    fails(three, "was changed|ends before")


def test_missing_moved_and_added_lines_are_damage(three: Ledger) -> None:
    first, second, third = three.path.read_bytes().splitlines(keepends=True)
    for lines, words in [
        ([first, second], "ends before line 3 of 3"),
        ([first, second, third[:-1]], "ends before line 3 of 3"),
        ([], "ends before line 1 of 3"),
        ([second, third], "ends before line 3 of 3"),
        ([first, third, third], "line 2 was changed"),
        ([second, first, third], "line 1 was changed"),
        ([first, second, third, third, third], r"has 5 lines, and ledger\.head tells of 3"),
    ]:
        three.path.write_bytes(b"".join(lines))
        fails(three, words)


def test_lines_that_were_written_anew_are_not_those_of_the_head(
    three: Ledger, tmp_path: Path
) -> None:
    forged = Ledger(tmp_path / "ledger.jsonl")
    for number in (1, 2, 3):
        charge(forged, number, sigma=3.0)
    three.path.write_bytes(forged.path.read_bytes())
    fails(three, r"line 3 is not the one that ledger\.head tells of")


def test_a_deleted_ledger_is_damage_and_so_is_a_lost_or_damaged_head(three: Ledger) -> None:
    told, lines = head(three).read_bytes(), three.path.read_bytes()
    head(three).write_bytes(told[:-20])
    fails(three, r"damaged ledger\.head")
    head(three).unlink()
    fails(three, r"has 3 lines, and ledger\.head tells of 0")
    head(three).write_bytes(told)
    three.path.unlink()
    with pytest.raises(UserError, match="is missing"):
        three.charges()
    fails_to_charge = pytest.raises(UserError, match="ends before line 1 of 3")
    with fails_to_charge:
        charge(three, 4)
    three.path.write_bytes(lines)
    assert len(three.charges()) == 3


def test_an_entry_that_is_no_charge_is_told_with_its_line(three: Ledger) -> None:
    with LedgerFile(three.path).opened() as file:
        file.append(b'{"study": "a"}')
    fails(three, "line 4: 'round': field required")


def full_disk(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_charges_nothing_that_returns(
    three: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(UserError, match="cannot be written: No space left on device"):
            charge(three, 4)
    charge(three, 4)  # whatever got to the disk, it counts once
    assert three.charged("a", 4) == [digest(4)]


def test_a_read_only_ledger_is_told_and_not_charged(
    three: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def read_only(path: str, flags: int, mode: int = 0o777, **options: object) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(30, "Read-only file system")
        return real(path, flags, mode, **options)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(UserError, match="cannot be written: Read-only file system"):
        charge(three, 4)
    assert len(three.charges()) == 3


def test_a_directory_in_the_way_is_an_error(ledger: Ledger) -> None:
    ledger.path.mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be read"):
        ledger.charges()
    with pytest.raises(UserError, match="cannot be written"):
        charge(ledger, 1)


def test_the_files_are_their_owners_alone(three: Ledger) -> None:
    for path in (three.path, head(three)):
        assert path.stat().st_mode & 0o777 == 0o600
    assert three.path.parent.stat().st_mode & 0o077 == 0
