"""List what `fedmermed-site prepare` is given: files, directory trees and CSV tables.

Listing streams. It holds the names of the directories on the way to the current one and no more,
reads no file but a CSV, and comes in the same order each time.
"""

import csv
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from client.ingest.types import Item, Reason, Rules
from core.errors import UserError
from core.modalities import MODALITIES
from core.shards import SPLITS

COLUMNS: Final = ("image_path", "modality", "label", "split", "patient")
DIRECTORY: Final = "directory"

Kind = Reason | str | None
"""of a name: DIRECTORY, None for a file to read, or why it cannot be read"""


@dataclass(frozen=True)
class _Folder:
    """A directory within a source, and what its place says of the files right in it."""

    path: Path
    key: str
    modality: str | None = None
    label: str = ""

    def folder(self, name: str, *, top: bool) -> "_Folder":
        path, key = self.path / name, f"{self.key}/{name}"
        if top and name in MODALITIES:
            return _Folder(path, key, name)
        # Bytes that are no text would stop the shard's table from being written.
        label = os.fsencode(name).decode("utf-8", "backslashreplace")
        return _Folder(path, key, self.modality, label)

    def item(self, name: str, reason: Reason | None, rules: Rules) -> Item:
        label = self.label if rules.labels == "folder" else ""
        return Item(self.path / name, f"{self.key}/{name}", self.modality, label, reason=reason)


def list_sources(sources: Sequence[Path], rules: Rules) -> Iterator[Item]:
    """List every file of the sources, in the order given; within a directory by the bytes of names.

    A first directory below a source that is named like a modality gives its files that modality.
    With `rules.labels` "folder" the directory that holds a file is its class, unless that is the
    source itself or such a modality's directory. Names that begin with a dot are passed over.
    Links to files are read, links to directories are not followed: an item says so, as it does for
    directories that cannot be read and for what is neither file nor directory (never opened).

    A CSV has columns image_path,modality[,label,split,patient]; paths are relative to it.

    Args:
        sources: Files, directories, and tables whose names end in .csv.
        rules: Only its `labels` and `patients` matter here.

    Returns:
        Items with keys "position of the source/path within it", equal only where a CSV names a
        file twice; bytes of names that are no text stand in it as `os.fsdecode` gives them.

    Raises:
        UserError: a source is missing, or is a lone file where folders are to tell the patients;
            during iteration: a CSV is no such table, or a line names an unknown modality or split.
    """
    for source in sources:
        if not os.path.exists(source):
            raise UserError(f"source '{source}' does not exist; check the path")
        if rules.patients == "folder" and not (os.path.isdir(source) or _is_table(source)):
            raise UserError(
                f"source '{source}' is a file, but with --patients folder the folders below a "
                "source tell the patients; give the folder above"
            )
    return _list_each(sources, rules)


def identity_of(item: Item, rules: Rules) -> str:
    """Whose image a file without a PatientID is, with the kind of that knowledge in front.

    What the CSV calls the patient; else the folder that holds the file, where `rules.patients` says
    so; else the file is its own patient. Independent of where the source itself lies.
    """
    if item.patient:
        return f"csv:{item.patient}"
    if rules.patients == "folder":
        return f"folder:{item.key.rpartition('/')[0]}"
    return f"file:{item.key}"


def _list_each(sources: Sequence[Path], rules: Rules) -> Iterator[Item]:
    for position, source in enumerate(sources):
        if os.path.isdir(source):
            yield from _list_tree(_Folder(source, str(position)), rules)
        elif _is_table(source):
            yield from _list_table(source, position)
        else:
            yield _Folder(source.parent, str(position)).item(source.name, _file_kind(source), rules)


def _list_tree(source: _Folder, rules: Rules) -> Iterator[Item]:
    """Walk a tree without recursion: a tree may be deeper than Python's stack."""
    walks = [_list_directory(source, rules, top=True)]
    while walks:
        found = next(walks[-1], None)
        if found is None:
            walks.pop()
        elif isinstance(found, Item):
            yield found
        else:
            walks.append(_list_directory(found, rules, top=False))


def _list_directory(folder: _Folder, rules: Rules, *, top: bool) -> Iterator[Item | _Folder]:
    names: list[tuple[bytes, Kind]] = []
    failed = False
    try:
        with os.scandir(folder.path) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    names.append((os.fsencode(entry.name), _kind(entry)))
    except OSError:
        failed = True
    names.sort(key=lambda pair: pair[0])
    for raw, kind in names:
        name = os.fsdecode(raw)
        if kind == DIRECTORY:
            yield folder.folder(name, top=top)
        else:
            yield folder.item(name, kind if isinstance(kind, Reason) else None, rules)
    if failed:
        yield Item(folder.path, folder.key, reason=Reason.UNREADABLE)


def _kind(entry: os.DirEntry[str]) -> Kind:
    try:
        if entry.is_symlink():
            return Reason.LINK if entry.is_dir() else _file_kind(Path(entry.path))
        if entry.is_dir(follow_symlinks=False):
            return DIRECTORY
        return None if entry.is_file(follow_symlinks=False) else Reason.SPECIAL
    except OSError:
        return Reason.UNREADABLE


def _file_kind(path: Path) -> Reason | None:
    try:
        return None if stat.S_ISREG(path.stat().st_mode) else Reason.SPECIAL
    except OSError:
        return Reason.UNREADABLE


def _is_table(source: Path) -> bool:
    return source.suffix.lower() == ".csv" and os.path.isfile(source)


def _list_table(table: Path, position: int) -> Iterator[Item]:
    rows = 0
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            _check_columns(table, list(reader.fieldnames or []))
            for row in reader:
                rows += 1
                yield _table_item(table, position, reader.line_num, row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"'{table}' cannot be read as CSV: {error}") from None
    if not rows:
        raise UserError(f"'{table}' has no rows; give one line an image")


def _check_columns(table: Path, columns: Sequence[str]) -> None:
    if not {"image_path", "modality"} <= set(columns) <= set(COLUMNS):
        raise UserError(
            f"'{table}': expected columns image_path,modality[,label,split,patient], "
            f"found {','.join(columns) or 'nothing'}; correct the first line"
        )


def _table_item(table: Path, position: int, line: int, row: dict[str | Any, str | Any]) -> Item:
    values = {key: (value or "").strip() for key, value in row.items() if isinstance(key, str)}
    where = f"'{table}', line {line}"
    path, modality = values["image_path"], values["modality"]
    if None in row or not path:
        raise UserError(f"{where}: has no image_path or too many values; correct the line")
    if modality not in MODALITIES:
        raise UserError(
            f"{where}: expected a modality of {', '.join(MODALITIES)}, "
            f"found '{modality}'; correct the line"
        )
    if values.get("split", SPLITS[0]) not in SPLITS:
        raise UserError(
            f"{where}: expected split train, val or test, found '{values['split']}'; correct it"
        )
    return Item(
        path=table.parent / path,
        key=f"{position}/{path}",
        modality=modality,
        label=values.get("label", ""),
        split=values.get("split", ""),
        patient=values.get("patient", ""),
    )
