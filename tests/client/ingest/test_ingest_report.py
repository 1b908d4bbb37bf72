"""The report of a preparation: what it says, what it keeps to itself, and what it survives."""

import base64
import csv
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from client.contact_sheet import draw_sheet, sheet_rows, write_sheet
from client.ingest.remedies import LEAVE, MEND, REMEDY
from client.ingest.report import (
    Rejection,
    check_report,
    report_facts,
    result_sentence,
    summary_table,
    write_report,
)
from client.ingest.types import Reason, Rules, Summary
from core.errors import UserError
from core.modalities import MODALITIES
from core.shards import Shard

REJECTED: list[Rejection] = [(Path("/in/secret name.dcm"), Reason.EMPTY, "")]


def summary(**changes: Any) -> Summary:
    facts: dict[str, Any] = {
        "name": "st-mary",
        "pictures": {("ct", "train"): 1200, ("us", "train"): 70, ("us", "test"): 30},
        "patients": 40,
        "files": 1310,
        "used": 1300,
        "reasons": {Reason.EMPTY: 3, Reason.DUPLICATE: 7},
        "duplicate_pictures": {Reason.DUPLICATE: 9},
        "kinds": {"PNG": 300, "DICOM JPEG 2000": 1000},
        "vendors": {"Siemens": 1000},
        "text": {"masked": 21},
        "seconds": 3725.0,
        "read": 1310,
    }
    return Summary(**(facts | changes))


def shard(px: int = 16, channels: int = 1, labelled: bool = False) -> Shard:
    """Forty CT images, each of one grey level, and two of ultrasound."""
    levels = np.arange(42, dtype=np.uint8)[:, None, None, None]
    return Shard(
        name="st-mary",
        images=np.broadcast_to(levels, (42, px, px, channels)),
        modality=np.array([MODALITIES.index("ct")] * 40 + [MODALITIES.index("us")] * 2, np.int16),
        patient=np.arange(42),
        label=np.arange(42) % 2 if labelled else np.full(42, -1),
        split=np.array(["train"] * 42),
        classes={"ct": ("<b>ill</b>", "well"), "us": ("a", "b")}
        if labelled
        else {"ct": (), "us": ()},
    )


def page(directory: Path) -> str:
    """The report's text without its style, its sheets and its tags."""
    text = (directory / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"<style>.*?</style>|data:image/png;base64,[^\"]*", "", text, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text))


def test_the_page_tells_the_result_reasons_and_remedies(tmp_path: Path) -> None:
    out = tmp_path / "st-mary.report"
    write_report(out, summary(), Rules(), shard(), REJECTED)
    text = page(out)
    assert (
        "1,300 pictures of 40 patients are ready to train, from 1,300 of 1,310 files. "
        "10 files gave none, of which 3 may be won back." in text
    )
    assert f"3 empty file {MEND[Reason.EMPTY]}" in text
    assert f"7 same image as an earlier one {LEAVE[Reason.DUPLICATE]}" in text
    assert "ultrasound 70 \N{EN DASH} 30 100" in text
    assert "all 1,270 0 30 1,300" in text
    assert "Siemens 1,000" in text
    assert "21 files in which it was blanked" in text
    assert "1 h 2 min for 1,310 files, 0.352 a second" in text
    assert "centre 40 HU, width 400 HU" in text
    assert "declared: skip, screen: skip, ultrasound: mask, photo: mask, other: mask" in text


def test_the_json_says_the_same(tmp_path: Path) -> None:
    out = tmp_path / "st-mary.report"
    write_report(out, summary(), Rules(px=32), None, REJECTED)
    facts = json.loads((out / "report.json").read_text())
    assert facts["pictures"] == {
        "ct": {"train": 1200, "val": 0, "test": 0},
        "us": {"train": 70, "val": 0, "test": 30},
    }
    assert facts["result"] == result_sentence(summary())
    assert [(row["reason"], row["files"]) for row in facts["rejected"]] == [
        ("same image as an earlier one", 7),
        ("empty file", 3),
    ]
    assert [row["worth_a_look"] for row in facts["rejected"]] == [False, True]
    assert facts["settings"]["px"] == 32
    assert facts["kinds"] == {"DICOM JPEG 2000": 1000, "PNG": 300}
    assert facts["run"] == {"seconds": 3725.0, "files_read": 1310}


def test_only_the_list_of_rejected_files_holds_a_path_and_only_its_owner_may_look(
    tmp_path: Path,
) -> None:
    out = tmp_path / "st-mary.report"
    out.mkdir(mode=0o755)
    write_report(out, summary(), Rules(), shard(), REJECTED)
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert "secret name" in (out / "rejected.csv").read_text()
    for file in out.iterdir():
        assert file.name == "rejected.csv" or b"secret name" not in file.read_bytes()
        assert str(tmp_path).encode() not in file.read_bytes()


def test_the_page_is_complete_in_itself_and_escapes_every_name(tmp_path: Path) -> None:
    out = tmp_path / "report"
    wicked = summary(name="<script>alert(1)</script>", kinds={"<i>": 2})
    write_report(out, wicked, Rules(), shard(labelled=True), [])
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<i>" not in html.replace("<i class", "")
    assert "&lt;b&gt;ill&lt;/b&gt;, well" in html
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|://", html)
    assert html.count("data:image/png;base64,") == 2
    sheet = re.search(r"base64,([^\"]+)", html)
    assert sheet
    assert base64.b64decode(sheet[1]) == (out / "sheet-ct.png").read_bytes()


def test_paths_of_any_bytes_survive_in_the_csv(tmp_path: Path) -> None:
    names = [
        b"/in/a,b.dcm",
        b'/in/a"b\nc\r\nd.dcm',
        b"/in/\xff\xfe.dcm",
        "/in/ü.dcm".encode(),
        b"=cmd",
    ]
    rows = [(Path(os.fsdecode(name)), Reason.READER_FAILED, "KeyError") for name in names]
    out = tmp_path / "report"
    write_report(out, summary(), Rules(), None, rows)
    with open(out / "rejected.csv", encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    paths = [row["path"] for row in read]
    assert paths[:4] == ["/in/a,b.dcm", '/in/a"b\nc\r\nd.dcm', r"/in/\xff\xfe.dcm", "/in/ü.dcm"]
    assert paths[4] == f"{Path.cwd()}/=cmd"  # no formula for a spreadsheet
    assert {(row["reason"], row["error"]) for row in read} == {("reader failed", "KeyError")}


def test_rejected_files_are_written_as_they_come(tmp_path: Path) -> None:
    out, seen = tmp_path / "report", []

    def rows() -> Iterator[Rejection]:
        for number in range(20_000):
            if number == 19_999:
                seen.append((out / ".rejected.csv.partial").stat().st_size)
            yield Path(f"/in/{number}.dcm"), Reason.EMPTY, ""

    write_report(out, summary(), Rules(), None, rows())
    assert seen[0] > 400_000  # of 480 kB
    assert not list(out.glob(".*"))


def test_an_interrupted_list_leaves_the_older_report(tmp_path: Path) -> None:
    out = tmp_path / "report"
    write_report(out, summary(), Rules(), shard(), REJECTED)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def rows() -> Iterator[Rejection]:
        yield REJECTED[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_report(out, summary(patients=1), Rules(), None, rows())
    assert {name: (out / name).read_bytes() for name in before} == before
    check_report(out)  # what was begun does not bar the way
    write_report(out, summary(patients=1), Rules(), None, [])
    assert {file.name for file in out.iterdir()} == {"report.html", "report.json", "rejected.csv"}


def test_no_sheets_when_they_are_not_wanted(tmp_path: Path) -> None:
    out = tmp_path / "report"
    write_report(out, summary(), Rules(), shard(), [], sheets=False)
    assert not list(out.glob("*.png"))
    assert "Samples" not in page(out)


def test_what_is_not_a_report_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.png").touch()
    with pytest.raises(UserError, match="is not a report; it is left as it is"):
        write_report(tmp_path, summary(), Rules(), None, [])
    with pytest.raises(UserError, match="is not a report"):
        check_report(tmp_path / "photo.png")
    assert [file.name for file in tmp_path.iterdir()] == ["photo.png"]


def test_a_report_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written: .*Not a directory"):
        write_report(tmp_path / "file" / "report", summary(), Rules(), None, [])


def test_every_reason_has_one_remedy_of_a_sentence() -> None:
    assert set(REMEDY) == set(Reason)
    assert not set(MEND) & set(LEAVE)
    assert all(line.endswith(".") and len(line) < 200 for line in REMEDY.values())
    assert all(line.startswith("Nothing") for line in LEAVE.values())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pictures": {}, "used": 0}, "None of 1,310 files gave a picture; no shard was written."),
        ({"files": 1300, "reasons": {}}, "from 1,300 of 1,300 files."),
        ({"reasons": {Reason.DUPLICATE: 10}}, "10 files gave none, as it should be."),
        ({"reasons": {Reason.EMPTY: 10}}, "10 files gave none; see what can be done."),
        (
            {"pictures": {("ct", "train"): 1}, "patients": 1, "files": 1, "used": 1, "reasons": {}},
            "1 picture of 1 patient is ready to train, from 1 of 1 file.",
        ),
    ],
)
def test_the_sentence_fits_the_result(changes: dict[str, Any], sentence: str) -> None:
    assert result_sentence(summary(**changes)).endswith(sentence)


def test_an_empty_run_still_makes_a_page(tmp_path: Path) -> None:
    nothing = summary(
        pictures={}, patients=0, files=0, used=0, reasons={}, duplicate_pictures={}, kinds={},
        vendors={}, text={}, seconds=0.0, read=0,
    )  # fmt: skip
    write_report(tmp_path / "report", nothing, Rules(duplicates="keep"), None, [])
    assert "this run keeps copies" in page(tmp_path / "report")
    assert report_facts(nothing, Rules())["pictures"] == {}


def test_the_terminal_shows_modalities_and_what_to_do() -> None:
    console = Console(width=120, file=io.StringIO())
    console.print(summary_table(summary()))
    assert isinstance(console.file, io.StringIO)
    lines = [
        " ".join(re.sub("[│┃]", " ", line).split()) for line in console.file.getvalue().split("\n")
    ]
    assert "ultrasound 70 0 30 100" in lines
    assert f"3 empty file {MEND[Reason.EMPTY]}" in lines
    assert "7 same image as an earlier one" in lines
    assert lines.index("7 same image as an earlier one") > lines.index(
        f"3 empty file {MEND[Reason.EMPTY]}"
    )


def test_a_sheet_shows_evenly_spaced_images_by_class() -> None:
    rows = sheet_rows(shard(), "ct")
    assert [len(members) for _, members in rows] == [12, 12, 12, 4]
    rows = sheet_rows(shard(labelled=True), "ct")
    assert [name for name, _ in rows] == ["<b>ill</b>", "well"]
    assert rows[0][1].tolist() == [0, 2, 6, 10, 12, 16, 20, 24, 26, 30, 34, 38]


@pytest.mark.parametrize(("px", "side"), [(16, 64), (64, 64), (100, 100), (224, 112), (600, 120)])
def test_a_sheet_has_a_bounded_size_whatever_the_pixels(px: int, side: int) -> None:
    images = shard(px=px, channels=3)
    sheet = Image.open(io.BytesIO(draw_sheet(images, sheet_rows(images, "us"))))
    zoom = 64 // px if px < 64 else 1
    assert sheet.size == (12 * side + 11 * 2 * zoom, side)
    assert sheet.getpixel((0, 0)) == (40, 40, 40)


def test_one_picture_shows_all_modalities(tmp_path: Path) -> None:
    write_sheet(tmp_path / "sheet.png", shard(px=64))
    assert Image.open(tmp_path / "sheet.png").size == (12 * 66 - 2, 5 * 66 - 2)
    with pytest.raises(UserError, match="give another path"):
        write_sheet(tmp_path, shard(px=64))


def test_real_images_make_sheets_of_each_modality(real_data: Path, tmp_path: Path) -> None:
    with np.load(real_data / "images64" / "derm_ham10000_64.npz") as arrays:
        images, labels = arrays["test_images"], arrays["test_labels"].ravel().astype(np.int64)
        names = tuple(str(name) for name in arrays["class_names"])
    count = len(images)
    skin = Shard(
        "skin", images, np.full(count, MODALITIES.index("dermatology"), np.int16),
        np.arange(count), labels, np.array(["test"] * count), {"dermatology": names},
    )  # fmt: skip
    write_report(tmp_path / "report", summary(), Rules(), skin, [])
    sheet = Image.open(tmp_path / "report" / "sheet-dermatology.png")
    assert sheet.size == (12 * 66 - 2, 7 * 66 - 2)
    first = np.asarray(sheet)[:64, :64]
    np.testing.assert_array_equal(first, images[np.flatnonzero(labels == 0)[0]])
    assert (tmp_path / "report" / "report.html").stat().st_size < 2_000_000
