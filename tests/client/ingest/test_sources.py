import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.ingest.sources import identity_of, list_sources
from client.ingest.types import Item, Reason, Rules
from core.errors import UserError

FOLDERS = Rules(labels="folder", patients="folder")


def fill(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def keys(*sources: Path) -> list[str]:
    return [item.key for item in list_sources(sources, Rules())]


def reasons(source: Path) -> dict[str, Reason | None]:
    return {item.path.name: item.reason for item in list_sources([source], Rules())}


def test_files_come_in_the_order_of_their_bytes_source_by_source(tmp_path: Path) -> None:
    first = fill(tmp_path / "first", "b/2", "b/10", "a.dcm", "B/x", "é", "z")
    second = fill(tmp_path / "second", "a.dcm")
    alone = fill(tmp_path, "alone.png") / "alone.png"
    expected = ["0/B/x", "0/a.dcm", "0/b/10", "0/b/2", "0/z", "0/é", "1/a.dcm", "2/alone.png"]
    assert keys(first, second, alone) == expected
    items = list(list_sources([first, second, alone], Rules()))
    assert [item.path for item in items[-2:]] == [second / "a.dcm", alone]
    assert all(item == Item(item.path, item.key) for item in items)  # nothing else is known


def test_the_first_folder_names_the_modality_and_no_other(tmp_path: Path) -> None:
    fill(tmp_path, "ct/p1/s1/1", "us/1", "other/ct/1", "CT/1", "oct")
    found = {item.key: item.modality for item in list_sources([tmp_path], Rules())}
    assert found == {
        "0/ct/p1/s1/1": "ct",
        "0/us/1": "us",
        "0/other/ct/1": None,
        "0/CT/1": None,
        "0/oct": None,
    }
    assert next(list_sources([tmp_path / "ct"], Rules())).modality is None


def test_folders_are_classes_only_where_asked(tmp_path: Path) -> None:
    fill(tmp_path, "ct/head/1", "ct/2", "3", "drusen/wet/4", "us/ct/5")
    labels = {item.key: item.label for item in list_sources([tmp_path], FOLDERS)}
    assert labels == {
        "0/ct/head/1": "head",
        "0/ct/2": "",
        "0/3": "",
        "0/drusen/wet/4": "wet",
        "0/us/ct/5": "ct",
    }
    assert not any(item.label for item in list_sources([tmp_path], Rules()))


def test_identity_is_the_csv_s_patient_then_the_folder_then_the_file() -> None:
    item = Item(Path("/mnt/a/p1/x.png"), "0/p1/x.png")
    assert identity_of(item, Rules()) == "file:0/p1/x.png"
    assert identity_of(item, FOLDERS) == "folder:0/p1"
    listed = Item(item.path, item.key, patient="p1")
    assert identity_of(listed, Rules()) == identity_of(listed, FOLDERS) == "csv:p1"


def test_lone_files_have_no_folder_to_tell_the_patient(tmp_path: Path) -> None:
    source = fill(tmp_path, "p1/a.png") / "p1" / "a.png"
    with pytest.raises(UserError, match=r"a\.png' is a file, .* give the folder above"):
        list_sources([source], FOLDERS)


def test_a_missing_source_is_refused_before_anything_is_listed(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name in ("nowhere", "loop", "x" * 300):
        with pytest.raises(UserError, match="does not exist; check the path"):
            list_sources([tmp_path, tmp_path / name], Rules())


def test_links_to_files_are_read_and_links_to_directories_are_not_followed(tmp_path: Path) -> None:
    fill(tmp_path, "tree/file")
    for name, target in {
        "tree/up": "..",
        "tree/self": ".",
        "tree/absolute": "/",
        "tree/good": "file",
        "tree/dangling": "nowhere",
        "tree/loop": "loop",
        "tree/null": "/dev/null",
    }.items():
        (tmp_path / name).symlink_to(target)
    assert reasons(tmp_path / "tree") == {
        "file": None,
        "good": None,
        "up": Reason.LINK,
        "self": Reason.LINK,
        "absolute": Reason.LINK,
        "dangling": Reason.UNREADABLE,
        "loop": Reason.UNREADABLE,
        "null": Reason.SPECIAL,
    }
    (tmp_path / "source").symlink_to("tree")  # what the operator names is followed
    assert len(keys(tmp_path / "source")) == 8


def test_pipes_sockets_and_devices_are_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        assert reasons(tmp_path) == {"pipe": Reason.SPECIAL, "socket": Reason.SPECIAL}
    assert [item.reason for item in list_sources([tmp_path / "pipe"], Rules())] == [Reason.SPECIAL]


def test_hidden_names_are_passed_over(tmp_path: Path) -> None:
    fill(tmp_path / ".work", ".DS_Store", "._1.dcm", ".git/1", "1.dcm", "a/.b/c")
    assert keys(tmp_path / ".work") == ["0/1.dcm"]


def test_a_name_that_is_no_text_is_listed_and_its_folder_is_a_printable_class(
    tmp_path: Path,
) -> None:
    directory = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(directory)
    with open(directory + b"/\xff\n.png", "wb"):
        pass
    [item] = list_sources([tmp_path], FOLDERS)
    assert item.key == "0/caf\udce9/\udcff\n.png"
    assert os.fsencode(item.path) == directory + b"/\xff\n.png"
    assert item.label == "caf\\xe9"


def test_a_directory_that_cannot_be_read_is_an_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "a/1", "b/1", "c/1")
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = [(item.key, item.reason) for item in list_sources([tmp_path], Rules())]
    assert found == [("0/a/1", None), ("0/b", Reason.UNREADABLE), ("0/c/1", None)]


def test_names_listed_before_a_disk_fails_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "1", "2")
    real = os.scandir

    class Failing:
        def __enter__(self) -> Iterator[Any]:
            def entries() -> Iterator[Any]:
                with real(tmp_path) as found:
                    yield next(found)
                raise OSError(5, "Input/output error")

            return entries()

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", lambda _: Failing())
    first, last = list_sources([tmp_path], Rules())
    assert first.reason is None
    assert (last.key, last.reason) == ("0", Reason.UNREADABLE)


def test_a_tree_deeper_than_any_path_ends(tmp_path: Path) -> None:
    fill(tmp_path, "z")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        # Deeper than Python's stack, then longer than a path may be.
        for name in ["d"] * 1100 + ["e" * 250] * 12:
            os.mkdir(name, dir_fd=descriptor)
            below = os.open(name, os.O_RDONLY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
    finally:
        os.close(descriptor)
    try:
        *_, deepest, last = list_sources([tmp_path], Rules())
        assert deepest.reason == Reason.UNREADABLE
        assert len(os.fsencode(deepest.path)) + 1 > 4096
        assert last.key == "0/z"
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # shutil.rmtree recurses


def test_listing_streams_one_directory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, *(f"{number:02d}/file" for number in range(20)))
    scanned = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(path) or real(path))
    items = list_sources([tmp_path], Rules())
    assert next(items).key == "0/00/file"
    assert len(scanned) == 2


NAMES = st.binary(min_size=1, max_size=12).filter(
    lambda name: not set(name) & set(b"/\0") and not name.startswith(b".")
)


@given(tree=st.dictionaries(NAMES, st.sets(NAMES, max_size=3), max_size=5))
def test_any_names_are_listed_once_with_the_path_that_opens_them(
    tree: dict[bytes, set[bytes]],
) -> None:
    with tempfile.TemporaryDirectory() as root:
        written = set()
        for folder, names in tree.items():
            os.mkdir(os.path.join(os.fsencode(root), folder))
            for name in names:
                path = os.path.join(os.fsencode(root), folder, name)
                with open(path, "wb") as file:
                    file.write(folder + b"/" + name)
                written.add(folder + b"/" + name)
        items = list(list_sources([Path(root)], FOLDERS))
        assert {item.path.read_bytes() for item in items} == written
        assert [os.fsencode(item.key) for item in items] == [
            b"0/" + path for path in sorted(written, key=lambda path: path.split(b"/"))
        ]
        for item in items:
            item.label.encode()


def test_a_csv_gives_modality_label_split_and_patient(tmp_path: Path) -> None:
    table = tmp_path / "list.CSV"
    table.write_text(
        "\ufeffimage_path,modality,label,split,patient\n"
        "images/0.png,ct,head,train,p1\n"
        "\n"
        '"images/a, b.dcm",us,,val,\n'
        "/elsewhere/2.png,cfp,normal,test,p2\n",
        encoding="utf-8",
    )
    assert list(list_sources([tmp_path / "list.CSV"], FOLDERS)) == [
        Item(tmp_path / "images/0.png", "0/images/0.png", "ct", "head", "train", "p1"),
        Item(tmp_path / "images/a, b.dcm", "0/images/a, b.dcm", "us", "", "val", ""),
        Item(Path("/elsewhere/2.png"), "0//elsewhere/2.png", "cfp", "normal", "test", "p2"),
    ]


def test_a_csv_within_a_directory_is_only_a_file(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("image_path,modality\na.png,ct\n")
    assert keys(tmp_path) == ["0/list.csv"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_path\na.png\n", "expected columns image_path,modality"),
        ("image_path,modality,lable\na.png,ct,x\n", "found image_path,modality,lable"),
        ("image_path,modality\n", "has no rows"),
        ("", "found nothing"),
        ("image_path,modality\na.png,mri\n", "line 2: expected a modality of .*found 'mri'"),
        ("image_path,modality\n,ct\n", "line 2: has no image_path"),
        ("image_path,modality\na.png,ct,3\n", "line 2: .*too many values"),
        ("image_path,modality,split\na.png,ct,dev\n", "line 2: expected split .*found 'dev'"),
        ("image_path,modality,split\na.png,ct,\n", "line 2: expected split .*found ''"),
        ("image_path,modality\na.png,ct\n\nb.png,x\n", "line 4: expected a modality"),
        ("image_path,modality\n" + "a" * 200_000, "cannot be read as CSV: field larger"),
        ("image_path,modality\n\udcff.png,ct\n", "cannot be read as CSV: 'utf-8' codec"),
    ],
)
def test_a_csv_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    table = tmp_path / "list.csv"
    table.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        list(list_sources([table], Rules()))
