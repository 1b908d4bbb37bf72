"""What a check finds: a colour, what was seen, and for what is not green a remedy."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from core.errors import UserError

Value = str | int | float


class Status(StrEnum):
    """Red keeps the site from taking part; yellow is worth knowing, or could not be told."""

    GREEN = "green"
    YELLOW = "yellow"
    RED = "red"


@dataclass(frozen=True)
class Finding:
    """One line of the table. It holds counts and paths of this machine, never a patient's key."""

    status: Status
    found: str
    remedy: str = ""
    values: Mapping[str, Value] = field(default_factory=dict)
    """Measured figures for scripts; units are in the names."""


def green(found: str, **values: Value) -> Finding:
    """All is well."""
    return Finding(Status.GREEN, found, "", values)


def yellow(found: str, remedy: str, **values: Value) -> Finding:
    """It cannot be told, or is not as it should be but stops nothing."""
    return Finding(Status.YELLOW, found, remedy, values)


def red(found: str, remedy: str, **values: Value) -> Finding:
    """The site cannot take part before this is mended."""
    return Finding(Status.RED, found, remedy, values)


def from_error(error: UserError) -> Finding:
    """Our own messages say what to do after the last semicolon."""
    found, _, remedy = str(error).rpartition("; ")
    if not found:
        found, remedy = remedy, "Mend what this line names, then check again."
    return red(found, remedy[0].upper() + remedy[1:].rstrip(".") + ".")


def gigabytes(count: float) -> str:
    """Bytes for a reader: '12.3 GB', '45.0 MB' below one, '12.0 kB' below a thousandth."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def duration(seconds: float) -> str:
    """Seconds for a reader: '0.13 s', '12 s', '3.5 min', '2.5 h', '4.1 days'."""
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            value = seconds / divisor
            return f"{value:.2g} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{seconds / 86_400:.1f} days"
