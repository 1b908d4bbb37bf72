"""How the audit file is shown: a table and what can be said of the chain; JSON for scripts."""

from collections.abc import Iterator
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import JustifyMethod
from rich.markup import escape
from rich.table import Table

from client.chain import Chain, Entry

COLUMNS: Final[dict[str, JustifyMethod]] = {
    "line": "right",
    "time, UTC": "left",
    "study": "left",
    "round": "right",
    "way": "left",
    "what": "left",
    "bytes": "right",
    "decision": "left",
}


def select(chain: Chain, study: str) -> list[tuple[int, Entry]]:
    """Numbered lines of the studies whose id begins so."""
    numbered = enumerate(chain.entries, 1)
    return [(n, e) for n, e in numbered if str(e.get("study", "")).startswith(study)]


def table(lines: list[tuple[int, Entry]]) -> Table:
    """Lines as a person reads them; what a coordinator wrote cannot steer the terminal."""
    result = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading, justify in COLUMNS.items():
        result.add_column(heading, justify=justify, overflow="fold")
    for number, entry in lines:
        size = entry.get("bytes", "")
        cells = (
            str(entry.get("time", ""))[:19].replace("T", " "),
            str(entry.get("study", ""))[:8],
            str(entry.get("round") or ""),
            str(entry.get("direction", "")),
            str(entry.get("message", "")),
            f"{size:,}" if isinstance(size, int) else str(size),
            str(entry.get("decision", "") if entry else "not readable")[:300],
        )
        result.add_row(f"{number:,}", *(escape(_printable(cell)) for cell in cells))
    return result


def remarks(chain: Chain) -> Iterator[str]:
    """What can be said of the chain, a line each; of one without a fault, its head comes last."""
    lines, first = chain.head.lines, chain.first_chained
    unchained = first - 1 if first else lines
    if any(chain.entries[:unchained]):
        known = f"a change made before line {first:,} was written" if first else "a change in them"
        yield f"lines 1 to {unchained:,} are unchained, from an older version: {known} is not found"
    if chain.unrecorded:
        yield "the last line was cut short by a kill, a crash or a full disk; the next records it"
    if chain.problem:
        yield f"[bold red]broken:[/] {escape(chain.problem)}"
        return
    if first:
        yield f"[bold green]whole:[/] lines {first:,} to {lines:,} follow from one another"
    yield f"head: {chain.head.sha256} after line {lines:,}; note it elsewhere now and then"


def as_json(chain: Chain, site: str, lines: list[tuple[int, Entry]]) -> dict[str, Any]:
    """The same for scripts."""
    return {
        "site": site,
        "whole": not chain.problem,
        "problem": chain.problem,
        "first_chained": chain.first_chained,
        "last_line_cut_short": chain.unrecorded,
        "lines": chain.head.lines,
        "head": chain.head.sha256,
        "entries": [{"line": number, **entry} for number, entry in lines],
    }


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
