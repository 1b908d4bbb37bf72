import hashlib
import json
import os
import signal

import pytest

from client.chain import CUT_SHORT, NO_FIT, append, read
from core.errors import UserError


def fields(decision):
    return {"time": "2026-01-02T03:04:05.678+00:00", "decision": decision}


def write(directory, *decisions):
    for decision in decisions:
        append(directory, fields(decision))


def file(directory):
    return directory / "audit.jsonl"


def lines(directory):
    return file(directory).read_bytes().splitlines(keepends=True)


def decisions(directory):
    return [entry.get("decision") for entry in read(directory).entries]


@pytest.fixture
def home(tmp_path):
    """A chain of five lines, a to e."""
    write(tmp_path, *"abcde")
    return tmp_path


def test_each_digest_is_of_the_digest_and_the_line_before(home):
    digest = "0" * 64
    for line in lines(home):
        assert json.loads(line)["previous"] == digest
        digest = hashlib.sha256(digest.encode() + line.rstrip(b"\n")).hexdigest()
    chain = read(home)
    assert (chain.head.sha256, chain.head.lines) == (digest, 5)
    assert (chain.problem, chain.first_chained) == ("", 1)


def change(k):
    def changed(line):
        return line.replace(b'"decision": "', b'"decision": "x')

    return lambda whole: [*whole[:k], changed(whole[k]), *whole[k + 1 :]]


def remove(k):
    return lambda whole: whole[:k] + whole[k + 1 :]


def repeat(k):
    return lambda whole: whole[: k + 1] + whole[k:]


def swap(k):
    return lambda whole: [*whole[:k], whole[k + 1], whole[k], *whole[k + 2 :]]


def forge(whole):
    """Add a line that follows from the last, as anyone can who has read how."""
    last = whole[-1].rstrip(b"\n")
    digest = hashlib.sha256(json.loads(last)["previous"].encode() + last).hexdigest()
    return [*whole, json.dumps({"previous": digest, **fields("forged")}).encode() + b"\n"]


def blank(whole):
    return [*whole[:2], b"\n", *whole[2:]]


FAULTS = {
    "first line changed": (change(0), "line 2 does not follow from line 1"),
    "third line changed": (change(2), "line 4 does not follow from line 3"),
    "last line changed": (change(4), "line 5, or one before it, is not what audit.head tells of"),
    "first line removed": (remove(0), "line 1 does not follow from the start"),
    "third line removed": (remove(2), "line 3 does not follow from line 2"),
    "last line removed": (remove(4), "line 5 is missing: audit.head tells of 5 lines and the file"),
    "all lines removed": (lambda whole: [], "line 1 is missing"),
    "first two swapped": (swap(0), "line 1 does not follow from the start"),
    "last two swapped": (swap(3), "line 4 does not follow from line 3"),
    "third line twice": (repeat(2), "line 4 does not follow from line 3"),
    "last line twice": (repeat(4), "line 6 does not follow from line 5"),
    "forged line added": (forge, "after line 5 something was added of which audit.head does not"),
    "half a line added": (lambda whole: [*whole, b'{"prev'], "after line 5 something was added"),
    "blank line inserted": (blank, "line 4 does not follow from line 3"),
    "end of the last line cut": (lambda w: [*w[:4], w[4][:-9]], "line 5 is missing"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_still_is_after_more_lines(name, home):
    damage, words = FAULTS[name]
    file(home).write_bytes(b"".join(damage(lines(home))))
    assert read(home).problem.startswith(words)
    write(home, "f", "g")
    assert read(home).problem
    assert decisions(home)[-1] == "g"


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_outlives_a_kill_while_the_next_line_is_written(name, home, kill_points):
    damage, _ = FAULTS[name]
    file(home).write_bytes(b"".join(damage(lines(home))))
    for _ in kill_points(lambda: write(home, "f")):
        assert read(home).problem


@pytest.mark.parametrize("text", [None, "", "{}", '{"lines": -1, "sha256": ""}', "[" * 100_000])
def test_a_missing_or_damaged_head_is_a_fault_for_good(text, home):
    head = home / "audit.head"
    head.unlink() if text is None else head.write_text(text)
    assert read(home).problem.startswith("audit.head is missing or damaged")
    write(home, "f")
    assert read(home).problem == "when line 6 was written, audit.head did not fit the lines before"
    assert decisions(home)[5:] == [NO_FIT, "f"]


def test_a_deleted_file_is_a_fault_and_none_at_all_is_said_so(home, tmp_path):
    file(home).unlink()
    assert read(home).problem.startswith("line 1 is missing")
    with pytest.raises(UserError, match=r"audit.jsonl' does not exist: no message has reached"):
        read(tmp_path / "elsewhere")


def test_a_kill_before_any_operation_on_the_disk_is_no_fault(tmp_path, kill_points):
    written = kills = 0
    for killed in kill_points(lambda: write(tmp_path, "x")):
        kills += killed
        chain = read(tmp_path) if file(tmp_path).exists() else None
        if chain is not None:
            assert chain.problem == ""
            assert chain.head.lines - written in (0, 1)
            written = chain.head.lines
    assert kills >= 7  # two heads of three operations each, and the line
    assert set(decisions(tmp_path)) == {"x"}


def die_writing(directory, decision, size):
    """Append in a child that is killed when so many bytes of its line are in the file."""
    child = os.fork()
    if child == 0:
        real = os.fsync

        def cut_and_die(descriptor):
            if os.path.samestat(os.fstat(descriptor), os.stat(file(directory))):
                os.truncate(file(directory), before + size)
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        before = file(directory).stat().st_size if file(directory).exists() else 0
        os.fsync = cut_and_die
        try:
            write(directory, decision)
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("before", ["", "ab"])
@pytest.mark.parametrize("size", [1, 40, 140])
def test_a_line_cut_short_is_kept_and_recorded_and_no_fault(before, size, tmp_path):
    write(tmp_path, *before)
    die_writing(tmp_path, "lost", size)
    chain = read(tmp_path)
    assert (chain.problem, chain.unrecorded) == ("", True)
    half = file(tmp_path).read_bytes().rpartition(b"\n")[2]
    assert len(half) == size
    write(tmp_path, "next")
    chain = read(tmp_path)
    assert (chain.problem, chain.unrecorded) == ("", False)
    assert lines(tmp_path)[len(before)] == half + b"\n"
    assert decisions(tmp_path) == [*before, None, CUT_SHORT, "next"]


@pytest.mark.parametrize("before", ["", "ab"])
@pytest.mark.parametrize("size", [1, 2, 100])
def test_the_record_of_a_line_cut_short_may_be_cut_short_too(before, size, tmp_path):
    write(tmp_path, *before)
    die_writing(tmp_path, "lost", 40)
    die_writing(tmp_path, "lost too", size)
    assert read(tmp_path).problem == ""
    assert read(tmp_path).unrecorded
    write(tmp_path, "next")
    assert (read(tmp_path).problem, read(tmp_path).unrecorded) == ("", False)
    assert decisions(tmp_path)[-2:] == [CUT_SHORT, "next"]


def test_a_recorded_half_line_cannot_be_changed_or_removed(home):
    die_writing(home, "lost", 40)
    write(home, "next")
    whole = lines(home)
    for damaged in ([*whole[:5], b"other\n", *whole[6:]], whole[:5] + whole[6:]):
        file(home).write_bytes(b"".join(damaged))
        assert "does not follow" in read(home).problem


def test_a_line_without_a_digest_is_no_way_around_the_chain(home):
    # One who can write audit.head too, and gives a reason for nothing.
    plain = json.dumps(fields("planted")).encode()
    digest = hashlib.sha256(read(home).head.sha256.encode() + plain).hexdigest()
    with open(file(home), "ab") as handle:
        handle.write(plain + b"\n")
        handle.write(json.dumps({"previous": digest, **fields("f")}).encode() + b"\n")
    assert read(home).problem == "line 6 holds no digest, and line 7 records no reason"


@pytest.fixture
def old(tmp_path):
    """A file from before lines held digests, of three lines."""
    file(tmp_path).write_text("".join(json.dumps(fields(d)) + "\n" for d in "abc"))
    return tmp_path


def test_unchained_lines_are_read_and_told_apart(old):
    chain = read(old)
    assert (chain.problem, chain.first_chained, chain.head.lines) == ("", 0, 3)
    write(old, "d", "e")
    chain = read(old)
    assert (chain.problem, chain.first_chained, chain.head.lines) == ("", 4, 5)
    assert decisions(old) == list("abcde")


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("damage", [change, remove, repeat])
def test_unchained_lines_cannot_be_changed_once_a_chained_one_follows(old, damage, k):
    write(old, "d")
    file(old).write_bytes(b"".join(damage(k)(lines(old))))
    assert "does not follow" in read(old).problem


def test_an_unchained_line_that_was_cut_short_is_recorded(old):
    with open(file(old), "ab") as handle:
        handle.write(b'{"time": "2026-')
    write(old, "d")
    assert read(old).problem == ""
    assert decisions(old) == ["a", "b", "c", None, CUT_SHORT, "d"]
