"""No text of a file reaches what `prepare` makes: planted everywhere, searched for everywhere.

One test for each line of the guarantees. A marker stands in every element of DICOM that can hold
text, in the comments of every other format, and in the names of files and folders; the real
command reads them all, is killed once on the way, and goes on.
"""

import base64
import csv
import hashlib
import hmac
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from core.shards import open_shard

ROOT = Path(__file__).parents[3]
LABEL = "benign"


def start(source, target, home, *options):
    """The real command, as a process with a home and a temporary directory of its own."""
    for name in ("home", "tmp"):
        (home / name).mkdir(exist_ok=True)
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "client", "prepare", str(source), str(target), "--px", "32"),
            *("--jobs", "2", "--secret", str(home / "secret"), *options),
        ],
        cwd=home / "tmp",
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "HOME": str(home / "home"), "TMPDIR": str(home / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def kill_on_the_way(process, work):
    """Kill the command once a picture is kept; gives the bytes of its work directory."""
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        raw = work / "pictures.raw"
        if raw.exists() and raw.stat().st_size > 4096:
            break
        time.sleep(0.01)
    assert process.poll() is None, f"it ended too early to be killed: {process.stdout.read()!r}"
    process.send_signal(signal.SIGKILL)
    process.wait()
    return {path.name: path.read_bytes() for path in work.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def planted(load_benchmark):
    """The module that makes the files, after those that it imports."""
    return [load_benchmark(name) for name in ("dicom_bytes", "dicom_files", "planted_files")][-1]


@pytest.fixture(scope="module")
def made(tmp_path_factory, planted):
    """Everything that a killed and continued run over planted files leaves."""
    home = tmp_path_factory.mktemp("phi")
    source = home / "export"
    count = planted.write_planted(source)
    target = home / "shard"
    process = start(source, target, home)
    killed = kill_on_the_way(process, home / ".shard.preparing")
    output = process.stdout.read()
    process = start(source, target, home)
    output += process.communicate(timeout=120)[0]
    assert process.returncode == 0, output.decode()
    return SimpleNamespace(
        home=home,
        source=source,
        count=count,
        killed=killed,
        output=output,
        shard=target,
        report=home / "shard.report",
    )


def layers(data):
    """The bytes, and what is packed inside them: pictures in a page, pixels in a PNG."""
    yield data
    for packed in re.findall(rb"base64,([A-Za-z0-9+/=]+)", data):
        yield from layers(base64.b64decode(packed))
    if data.startswith(b"\x89PNG"):
        image = Image.open(io.BytesIO(data))
        image.load()
        yield repr(image.info).encode()
        yield image.tobytes()
    for start in (match.start() for match in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", data)):
        try:
            yield zlib.decompressobj().decompress(data[start:], 2**20)
        except zlib.error:
            continue


def spellings(stem):
    """A marker as it could be written: in the usual encodings, in hex, in base64."""
    for encoding in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le"):
        yield stem.encode(encoding).lower()
    yield stem.encode().hex().encode()
    for shift in range(3):  # where it begins within three bytes decides what base64 makes of it
        text = base64.b64encode(b"\0" * shift + stem.encode() + b"\0\0")
        sure = text[-(-8 * shift // 6) : 8 * (shift + len(stem)) // 6].lower()
        if len(sure) >= 6:
            yield sure


def found(data, stems):
    """Which of the stems stand somewhere in the bytes."""
    texts = [layer.lower() for layer in layers(data)]
    return [stem for stem in stems if any(s in text for s in spellings(stem) for text in texts)]


def files_below(directory):
    return [path for path in sorted(directory.rglob("*")) if path.is_file()]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "base64", "hex", "png", "zlib"])
def test_the_search_finds_a_marker_that_is_there(encoding):
    text = "before PHIQZ00001 after"
    out = io.BytesIO()
    info = PngImagePlugin.PngInfo()
    info.add_itxt("Title", text, zip=True)
    Image.new("L", (16, 16)).save(out, "PNG", pnginfo=info)
    data = {
        "base64": base64.b64encode(b"x" + text.encode()),
        "hex": text.encode().hex().encode(),
        "png": b"<img src='data:image/png;base64," + base64.b64encode(out.getvalue()) + b"'>",
        "zlib": b"begin" + zlib.compress(text.encode()) + b"end",
    }.get(encoding) or text.encode(encoding)
    assert found(data, ["PHIQZ", "19470311"]) == ["PHIQZ"]
    assert not found(data.replace(b"PHI", b"PHJ")[:10], ["PHIQZ", "19470311"])


def test_thousands_of_elements_are_planted_and_every_way_to_fail_is_taken(planted, made):
    assert made.count > 2500
    with open(made.report / "rejected.csv", newline="", encoding="utf-8") as file:
        reasons = {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}
    assert reasons[f"{planted.FOLDER}-damaged.dcm"] == "shorter than its header says"
    assert reasons[f"{planted.FOLDER}-undecided.dcm"].startswith("modality undecided")
    assert {f"{planted.FOLDER}-{name}" for name in ("crash.dcm", "values.dcm")} < set(reasons)
    assert f"{planted.FOLDER}-cut.png" in reasons
    shard = open_shard(made.shard, verify=True)
    counts = np.bincount(shard.modality, minlength=7)
    assert counts[0] >= 3 + 4 + 6  # planted CT, the volume's slices, the slow files
    assert counts[6] >= 1 + 3  # the planted photograph; PNG, JPEG and TIFF


def test_no_text_date_number_uid_or_name_enters_the_shard(planted, made):
    files = files_below(made.shard)
    assert {path.name for path in files} == {"manifest.json", "images.npy", "table.csv"}
    for path in files:
        assert not found(path.read_bytes(), planted.EVERYTHING), path.name


def test_the_report_quotes_no_file_and_only_its_list_of_rejected_files_names_paths(planted, made):
    for path in files_below(made.report):
        stems = planted.CONTENTS if path.name == "rejected.csv" else planted.EVERYTHING
        assert not found(path.read_bytes(), stems), path.name
    assert found((made.report / "rejected.csv").read_bytes(), [planted.FOLDER])
    assert made.report.stat().st_mode & 0o077 == 0


def test_the_command_prints_nothing_of_a_file(planted, made):
    assert not found(made.output, planted.EVERYTHING), made.output.decode()


def test_the_work_directory_holds_paths_in_its_journal_and_nothing_else_of_a_file(planted, made):
    assert len(made.killed["pictures.raw"]) > 4096
    for name, data in made.killed.items():
        of_journal = name.startswith("journal.sqlite")
        stems = planted.CONTENTS if of_journal else planted.EVERYTHING
        assert not found(data, stems), name
    journal = [data for name, data in made.killed.items() if name.startswith("journal.sqlite")]
    assert any(found(data, [planted.FOLDER]) for data in journal)


def test_nothing_is_left_behind_where_the_command_ran(made):
    assert sorted(path.name for path in made.home.iterdir()) == sorted(
        ["export", "home", "secret", "shard", "shard.report", "tmp"]
    )
    assert not files_below(made.home / "tmp")
    assert not files_below(made.home / "home")
    assert (made.home / "secret").stat().st_mode & 0o077 == 0


def table_of(shard):
    with open(shard / "table.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_patient_key_cannot_be_made_without_the_secret(planted, made):
    keys = {row["patient"] for row in table_of(made.shard)}
    assert all(re.fullmatch(r"[0-9a-f]{32}", key) for key in keys)
    identities = [
        planted.PATIENT,
        f"dicom:{planted.PATIENT}",
        f"dicom:{planted.TAG}ISSUER\0{planted.PATIENT}",
    ]
    guesses = set()
    for text in identities:
        for name in ("md5", "sha1", "sha256", "sha512", "blake2b"):
            guesses.add(hashlib.new(name, text.encode()).hexdigest()[:32])
            for secret in (b"", b"0" * 32, b"\0" * 32, b"fedmermed"):
                guesses.add(hmac.new(secret, text.encode(), name).hexdigest()[:32])
    assert not keys & guesses


@pytest.fixture(scope="module")
def listed(planted, made):
    """The same pictures, listed in a CSV and prepared with another secret."""
    home = made.home.parent / f"{made.home.name}-csv"
    home.mkdir()
    folder = made.source / "dermatology" / f"{planted.FOLDER}CLASS"
    rows = [(folder / f"{planted.FOLDER}.{kind}", "dermatology") for kind in ("png", "jpg", "tif")]
    rows.append((made.source / f"{planted.FOLDER}0" / f"{planted.FOLDER}0.dcm", "ct"))
    lines = ["image_path,modality,label,split,patient"]
    lines += [f"{path},{modality},{LABEL},train,{planted.PATIENT}" for path, modality in rows]
    (home / f"{planted.FOLDER}.csv").write_text("\n".join(lines) + "\n")
    process = start(home / f"{planted.FOLDER}.csv", home / "shard", home)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output.decode()
    return SimpleNamespace(home=home, output=output, shard=home / "shard")


def test_what_a_csv_calls_a_patient_stays_in_the_csv(planted, listed):
    for path in files_below(listed.shard) + files_below(listed.home / "shard.report"):
        assert not found(path.read_bytes(), planted.EVERYTHING), path.name
    assert not found(listed.output, planted.EVERYTHING)


def test_class_names_come_from_the_csv_alone(made, listed):
    assert {row["label"] for row in table_of(listed.shard)} == {LABEL}
    assert {row["label"] for row in table_of(made.shard)} == {""}
    classes = json.loads((made.shard / "manifest.json").read_text())["classes"]
    assert set(map(tuple, classes.values())) == {()}
