"""Who may read what the coordinator serves to people and programs: loopback or a token.

**Guarantees** of `refusal`:
    - With a token, every request without exactly it is refused; the comparison takes as long
      whatever the difference. It is shown as 'Authorization: Bearer TOKEN', or, as browsers ask
      for it, as the password of HTTP Basic, whatever the user's name.
    - Without one, a web page that a browser on this machine shows cannot read through a name of
      its own (DNS rebinding): the Host of a request must be a loopback address.
"""

import base64
import binascii
import hmac
import ipaddress
import stat
from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from core.address import split_address
from core.errors import UserError

SHORTEST_TOKEN: Final = 16


def check_listen(listen: str, token: str | None, what: str) -> tuple[str, int]:
    """Hold that nobody listens beyond the loopback without a token.

    Args:
        listen: host:port.
        token: What readers must show; None: nothing.
        what: What is served, as in 'the metrics name sites'.

    Returns:
        Host and port.

    Raises:
        UserError: the address needs a token.
    """
    host, port = split_address(listen)
    if token is None and not is_loopback(host):
        raise UserError(
            f"'{listen}' can be reached from other machines, and {what} sites: give "
            "--token-file FILE, or listen on 127.0.0.1"
        )
    return host, port


def read_token(file: Path) -> str:
    """Read a token file: one line of at least 16 characters, for its owner's eyes alone.

    Raises:
        UserError: it is missing, too short, or others may read it.
    """
    if not file.is_file():
        raise UserError(
            f"token file '{file}' does not exist; make one: "
            f"(umask 077; head -c 32 /dev/urandom | base64 > {file})"
        )
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        raise UserError(
            f"token file '{file}' has mode {mode:04o}, expected 0600: others may read it; "
            f"chmod 600 {file}"
        )
    token = file.read_text(encoding="utf-8").strip()
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
        raise UserError(
            f"token file '{file}' must hold one line of {SHORTEST_TOKEN} or more printable ASCII "
            "characters"
        )
    return token


def refusal(request: Request, token: str | None, challenge: str) -> Response | None:
    """The answer to whom a request is not allowed; None: it is.

    Args:
        request: Any.
        token: What readers must show; None: readers on this machine show nothing.
        challenge: How a client is told to show it (WWW-Authenticate).
    """
    if token is None:
        if is_loopback(split_host(request.headers.get("host", ""))):
            return None
        return PlainTextResponse("the Host must be a loopback address\n", 403)
    shown = _shown(request.headers.get("authorization", ""))
    if hmac.compare_digest(shown, token.encode()):
        return None
    return PlainTextResponse("a token is needed\n", 401, headers={"WWW-Authenticate": challenge})


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host; a name counts only if it is 'localhost'."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def split_host(header: str) -> str:
    """The host of a Host header, without port and brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0] if ":" in header else header


def _shown(header: str) -> bytes:
    """The token in an Authorization header; empty where there is none."""
    scheme, _, rest = header.partition(" ")
    if scheme == "Bearer":
        return rest.encode()
    if scheme == "Basic":
        try:
            return base64.b64decode(rest, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""
