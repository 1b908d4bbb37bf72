"""Where a coordinator's SuperLink listens: DIR/flower/config.toml, which Flower's commands read."""

import json
import tomllib
from pathlib import Path

from core.checkpoint import write_atomically
from core.errors import UserError

CONNECTION = """\
# How Flower's commands reach the SuperLink from here; 'serve' writes it.
[superlink]
default = "fedmermed"

[superlink.fedmermed]
address = {address}
root-certificates = {authority}
"""


def write_connection(directory: Path, address: str) -> None:
    """Note where the SuperLink of a coordinator's directory listens."""
    authority = json.dumps(str(directory.absolute() / "ca.crt"))
    text = CONNECTION.format(address=json.dumps(address), authority=authority)
    write_atomically(directory / "flower" / "config.toml", text.encode())


def read_connection(directory: Path) -> str:
    """Where the SuperLink listens, host:port.

    Raises:
        UserError: this is no coordinator's directory, or no service has run from it yet.
    """
    file = directory / "flower" / "config.toml"
    if (directory / "ca.crt").exists() and not file.exists():
        raise UserError(
            f"no service has run from '{directory}' yet, so nothing says where its SuperLink is; "
            f"start 'fedmermed-server serve {directory}' and leave it running"
        )
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
        return str(found["superlink"]["fedmermed"]["address"])
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"'{file}' does not tell where the SuperLink is; give a directory that "
            "'fedmermed-server provision' made"
        ) from None
