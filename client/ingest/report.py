"""What a preparation came to: a page for a data manager, the same as JSON, and the files left out.

The page and the JSON hold counts, settings, and words of closed lists: no path and no text of a
file. Both may be shown; rejected.csv names paths, and the sheets are patients' images. The whole
directory stays at the site.
"""

import base64
import csv
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from client.contact_sheet import draw_sheet, sheet_rows
from client.ingest.remedies import MEND, REMEDY
from client.ingest.types import Reason, Rules, Summary
from core.checkpoint import sync_directory, write_atomically, write_json
from core.errors import UserError
from core.modalities import MODALITIES, TITLES
from core.shards import SPLITS, Shard

Rejection = tuple[Path, Reason, str]
"""Path, reason, and the type of an error"""
Sheet = tuple[str, str, list[str]]
"""Modality, PNG in base64, and the classes from top to bottom"""

PAGE: Final = "report.html"
FACTS: Final = "report.json"
REJECTED: Final = "rejected.csv"
SHEETS: Final = {f"sheet-{modality}.png" for modality in MODALITIES}


def check_report(directory: Path) -> None:
    """Refuse to write a report over something else; call it before hours of reading."""
    if not directory.exists():
        return
    ours = {PAGE, FACTS, REJECTED} | SHEETS
    if not directory.is_dir() or any(
        path.name.strip(".").removesuffix(".partial") not in ours for path in directory.iterdir()
    ):
        raise UserError(f"'{directory}' exists and is not a report; it is left as it is: rename it")


def write_report(
    directory: Path,
    summary: Summary,
    rules: Rules,
    shard: Shard | None,
    rejected: Iterable[Rejection],
    *,
    sheets: bool = True,
) -> None:
    """Write report.html, report.json, rejected.csv and sheet-MODALITY.png; replaces an older one.

    Args:
        directory: Made if missing; only its owner may read it.
        summary: What to report.
        rules: By which it was made.
        shard: Where sample pictures come from, or None where there are none.
        rejected: The files that gave no picture; written as they come.
        sheets: Whether to show sample pictures.

    Raises:
        UserError: the directory holds something else, or the disk refuses.
    """
    check_report(directory)
    facts = report_facts(summary, rules)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        _write_rejected(directory / REJECTED, rejected)
        for name in SHEETS:
            (directory / name).unlink(missing_ok=True)
        drawn = _write_sheets(directory, shard) if shard and sheets else []
        write_json(directory / FACTS, facts)
        write_atomically(directory / PAGE, _page(facts, drawn).encode())
    except OSError as error:
        raise UserError(f"report '{directory}' cannot be written: {error}") from None


def report_facts(summary: Summary, rules: Rules) -> dict[str, Any]:
    """What report.json holds and report.html shows."""
    found = sorted(summary.reasons.items(), key=lambda item: (-item[1], item[0]))
    return {
        "version": 1,
        "shard": summary.name,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "result": result_sentence(summary),
        "pictures": {
            modality: {split: summary.pictures.get((modality, split), 0) for split in SPLITS}
            for modality in MODALITIES
            if any(summary.pictures.get((modality, split)) for split in SPLITS)
        },
        "patients": summary.patients,
        "files": {"all": summary.files, "used": summary.used},
        "rejected": [
            {
                "reason": str(reason),
                "files": files,
                "worth_a_look": reason in MEND,
                "what_to_do": REMEDY[reason],
            }
            for reason, files in found
        ],
        "copies_left_out": {str(r): n for r, n in summary.duplicate_pictures.items()},
        "burned_in_text": {found: summary.text.get(found, 0) for found in ("masked", "found")},
        "kinds": _by_count(summary.kinds),
        "vendors": _by_count(summary.vendors),
        "settings": asdict(rules),
        "run": {"seconds": round(summary.seconds, 1), "files_read": summary.read},
    }


def result_sentence(summary: Summary) -> str:
    """The result in one sentence or two."""
    pictures, unused = sum(summary.pictures.values()), summary.files - summary.used
    look = sum(files for reason, files in summary.reasons.items() if reason in MEND)
    if not pictures:
        return f"None of {_count(summary.files, 'file')} gave a picture; no shard was written."
    text = (
        f"{_count(pictures, 'picture')} of {_count(summary.patients, 'patient')} "
        f"{'is' if pictures == 1 else 'are'} ready to train, "
        f"from {summary.used:,} of {_count(summary.files, 'file')}."
    )
    if not unused:
        return text
    if not look:
        return f"{text} {_count(unused, 'file')} gave none, as it should be."
    if look == unused:
        return f"{text} {_count(unused, 'file')} gave none; see what can be done."
    return f"{text} {_count(unused, 'file')} gave none, of which {look:,} may be won back."


def summary_table(summary: Summary) -> Group:
    """The result for a terminal."""
    pictures = Table(title=f"shard {escape(summary.name)}", title_justify="left")
    pictures.add_column("modality")
    for heading in (*SPLITS, "all"):
        pictures.add_column(heading, justify="right")
    for modality in MODALITIES:
        row = [summary.pictures.get((modality, split), 0) for split in SPLITS]
        if any(row):
            pictures.add_row(TITLES[modality], *(f"{n:,}" for n in (*row, sum(row))))
    rejected = Table(title="files without a picture", title_justify="left")
    rejected.add_column("files", justify="right")
    rejected.add_column("reason")
    rejected.add_column("what to do")
    for reason, files in sorted(summary.reasons.items(), key=lambda i: (i[0] not in MEND, -i[1])):
        rejected.add_row(f"{files:,}", str(reason), MEND.get(reason, ""))
    shown = [table for table in (pictures, rejected) if table.row_count]
    return Group(*shown, result_sentence(summary))


def _page(facts: Mapping[str, Any], sheets: list[Sheet]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters["sum_values"] = lambda counts: sum(counts.values())
    template = environment.get_template("report.html.j2")
    return template.render(facts, titles=TITLES, splits=SPLITS, sheets=sheets)


def _write_sheets(directory: Path, shard: Shard) -> list[Sheet]:
    sheets = []
    for modality in shard.classes:
        rows = sheet_rows(shard, modality)
        data = draw_sheet(shard, rows)
        write_atomically(directory / f"sheet-{modality}.png", data)
        classes = list(dict.fromkeys(name or "no class" for name, _ in rows))
        sheets.append((modality, base64.b64encode(data).decode(), classes))
    return sheets


def _write_rejected(path: Path, rejected: Iterable[Rejection]) -> None:
    """Stream the rows to a CSV in UTF-8; bytes of a path that are no text are written as hex."""
    aside = path.with_name(f".{path.name}.partial")
    with open(aside, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "reason", "error"])
        for name, reason, note in rejected:
            # Absolute, so that no spreadsheet takes a name for a formula.
            text = os.fsencode(os.path.abspath(name)).decode("utf-8", "backslashreplace")
            writer.writerow([text, reason, note])
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_directory(path.parent)


def _by_count(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"
