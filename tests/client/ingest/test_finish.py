"""From journal to shard: the format, its bytes, and what is counted."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from client.ingest.duplicates import fingerprint
from client.ingest.finish import put_in_place, rejected_files, sample, summarise
from client.ingest.journal import Journal, open_journal
from client.ingest.recorder import RAW, Recorder
from client.ingest.types import Item, Outcome, Picture, Reason, Rules
from core.modalities import MODALITIES
from core.shards import open_shard, write_shard

PX = 16
RULES = Rules(px=PX, ct_window=(50.0, 350.0))
GREY, COLOUR = (PX, PX, 1), (PX, PX, 3)


def picture(seed: int, shape: tuple[int, ...] = GREY, modality: str = "ct") -> Picture:
    return Picture(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), modality)


def used(*pictures: Picture, patient: str = "p", **facts: str) -> Outcome:
    found = tuple(fingerprint(p.pixels) for p in pictures)
    return Outcome(pictures=pictures, fingerprints=found, patient=patient, **facts)  # type: ignore[arg-type]


Record = tuple[str, Outcome]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with open_journal(tmp_path / ".s.preparing", {}) as journal:
        yield journal


def fill(journal: Journal, *records: Record) -> None:
    """Records outcomes with their labels."""
    items = [Item(Path(f"/e/{n}"), f"0/{n}", label=label) for n, (label, _) in enumerate(records)]
    list(journal.list_items(items, bytes(32)))
    with Recorder(journal, RULES) as recorder:
        for label, outcome in records:
            recorder.record(label, "train" if label else "", outcome)
        recorder.commit()


def place(journal: Journal, target: Path) -> list[str]:
    said: list[str] = []
    put_in_place(journal, target, "a name", RULES, said.append)
    return said


def test_grey_pictures_become_the_shard_that_write_shard_would_write(
    journal: Journal, tmp_path: Path
) -> None:
    first, second, third = (picture(n) for n in range(3))
    fill(
        journal,
        ("b", used(first, second, patient="1" * 32)),
        ("", Outcome(reason=Reason.EMPTY)),
        ("a", used(third, patient="2" * 32)),
    )
    place(journal, tmp_path / "s")
    shard = open_shard(tmp_path / "s", verify=True)
    expected = np.stack([p.pixels for p in (first, second, third)])
    np.testing.assert_array_equal(shard.images, expected)
    assert (shard.name, shard.classes) == ("a name", {"ct": ("a", "b")})
    assert shard.patient.tolist() == [0, 0, 1]
    assert shard.label.tolist() == [1, 1, 0]
    table = (tmp_path / "s" / "table.csv").read_text().splitlines()
    assert table[1] == f"ct,{'1' * 32},b,train"
    write_shard(tmp_path / "again", shard)
    assert (tmp_path / "again" / "images.npy").read_bytes() == (
        tmp_path / "s" / "images.npy"
    ).read_bytes()


def test_one_colour_picture_makes_all_pictures_colour(journal: Journal, tmp_path: Path) -> None:
    grey, colour = picture(0), picture(1, COLOUR, "cfp")
    fill(journal, ("", used(grey)), ("", used(colour, patient="q")), ("", used(picture(2))))
    place(journal, tmp_path / "s")
    shard = open_shard(tmp_path / "s", verify=True)
    assert shard.images.shape == (3, PX, PX, 3)
    np.testing.assert_array_equal(shard.images[0], np.broadcast_to(grey.pixels, COLOUR))
    np.testing.assert_array_equal(shard.images[1], colour.pixels)
    assert shard.classes == {"ct": (), "cfp": ()}


def test_only_a_shard_with_ct_names_the_window(journal: Journal, tmp_path: Path) -> None:
    fill(journal, ("", used(picture(0))))
    place(journal, tmp_path / "s")
    assert json.loads((tmp_path / "s" / "manifest.json").read_text())["ct_window"] == [50, 350]
    with open_journal(tmp_path / ".o.preparing", {}) as other:
        fill(other, ("", used(picture(0, modality="us"))))
        place(other, tmp_path / "o")
    assert "ct_window" not in json.loads((tmp_path / "o" / "manifest.json").read_text())


def test_a_file_system_without_links_gives_the_same_shard(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    fill(journal, ("", used(picture(0))))
    monkeypatch.setattr(os, "link", refuse)
    place(journal, tmp_path / "s")
    assert open_shard(tmp_path / "s", verify=True).images.shape == (1, *GREY)


def test_a_shard_that_is_in_place_is_not_built_again(journal: Journal, tmp_path: Path) -> None:
    fill(journal, ("", used(picture(0))))
    assert place(journal, tmp_path / "s")
    assert not place(journal, tmp_path / "s")


def test_a_damaged_shard_is_replaced_by_a_whole_one(journal: Journal, tmp_path: Path) -> None:
    fill(journal, ("", used(picture(0))))
    place(journal, tmp_path / "s")
    (tmp_path / "s" / "images.npy").unlink()
    with open_journal(tmp_path / ".s.preparing2", {}) as again:
        fill(again, ("", used(picture(0))))
        place(again, tmp_path / "s")
    open_shard(tmp_path / "s", verify=True)


def test_the_summary_counts_every_file_once(journal: Journal) -> None:
    fill(
        journal,
        ("x", used(picture(0), picture(1), kind="PNG", text="masked", patient="a")),
        ("x", used(picture(0), kind="PNG", patient="b")),
        ("x", used(picture(2, COLOUR, "cfp"), kind="DICOM", vendor="Siemens", patient="c")),
        ("", Outcome(reason=Reason.READER_FAILED, note="ValueError")),
        ("", Outcome(reason=Reason.EMPTY)),
        ("", Outcome(reason=Reason.EMPTY)),
    )
    summary = summarise(journal, "a name", 2.5, 4)
    assert summary.pictures == {("ct", "train"): 2, ("cfp", "train"): 1}
    assert (summary.patients, summary.files, summary.used) == (2, 6, 2)
    assert summary.reasons == {Reason.READER_FAILED: 1, Reason.EMPTY: 2, Reason.DUPLICATE: 1}
    assert summary.duplicate_pictures == {Reason.DUPLICATE: 1}
    assert (summary.kinds, summary.vendors) == ({"PNG": 1, "DICOM": 1}, {"Siemens": 1})
    assert (summary.text, summary.seconds, summary.read) == ({"masked": 1}, 2.5, 4)
    assert sum(summary.reasons.values()) + summary.used == summary.files
    assert list(rejected_files(journal)) == [
        (Path("/e/1"), Reason.DUPLICATE, ""),
        (Path("/e/3"), Reason.READER_FAILED, "ValueError"),
        (Path("/e/4"), Reason.EMPTY, ""),
        (Path("/e/5"), Reason.EMPTY, ""),
    ]


def test_a_sample_has_pictures_of_every_modality_and_is_small(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.ingest.finish.SAMPLES", 5)
    many = [("a", used(picture(n), patient=f"{n}")) for n in range(40)]
    fill(journal, *many, ("", used(picture(99, COLOUR, "us"), patient="u")))
    shard = sample(journal, "a name", RULES)
    assert shard.modality.tolist() == [0] * 5 + [MODALITIES.index("us")]
    assert shard.label.tolist() == [0] * 5 + [-1]
    np.testing.assert_array_equal(shard.images[-1], picture(99, COLOUR).pixels)
    number = int(shard.patient[0]) - 1
    np.testing.assert_array_equal(shard.images[0][..., :1], picture(number).pixels)
    assert len(set(shard.patient.tolist())) == 6
    assert (journal.work / RAW).exists()
