"""The endpoint /metrics: who may read it, and nothing else.

**Guarantees**:
    - Only GET and HEAD of /metrics are answered; there is no call that changes anything.
    - It listens on a loopback address unless a token file is given.
    - With a token, every request without exactly it, as 'Authorization: Bearer TOKEN', is refused;
      the comparison takes as long whatever the difference.
    - Without one, a web page that a browser on this machine shows cannot read it through a name of
      its own: the Host of a request must be a loopback address.
"""

import hmac
import ipaddress
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from core.address import split_address
from core.errors import UserError
from server.metrics import StudyCollector

SHORTEST_TOKEN: Final = 16
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


def serve_metrics(run: Path, listen: str, token_file: Path | None) -> None:
    """Answer until stopped.

    Args:
        run: The run directory.
        listen: host:port.
        token_file: Its one line is what readers must show.

    Raises:
        UserError: no such study, the token cannot be used, or the address needs one.
    """
    host, port = split_address(listen)
    token = read_token(token_file) if token_file else None
    if token is None and not is_loopback(host):
        raise UserError(
            f"'{listen}' can be reached from other machines, and the metrics name sites: give "
            "--token-file FILE, or listen on 127.0.0.1"
        )
    app = MetricsApp(run, token)
    uvicorn.run(
        app, host=host, port=port, log_level="warning", access_log=False, server_header=False,
        lifespan="off",
    )  # fmt: skip


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


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host; a name counts only if it is 'localhost'."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class MetricsApp:
    """The ASGI application.

    Args:
        run: The run directory.
        token: What readers must show; None: readers on this machine show nothing.
    """

    def __init__(self, run: Path, token: str | None) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(StudyCollector(run))
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http":
            response = await self._answer(Request(scope, receive))
            await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        if self._token is None:
            if not is_loopback(split_host(request.headers.get("host", ""))):
                return PlainTextResponse("the Host must be a loopback address\n", 403)
        else:
            shown = request.headers.get("authorization", "")
            if not hmac.compare_digest(shown.encode(), f"Bearer {self._token}".encode()):
                challenge = {"WWW-Authenticate": "Bearer"}
                return PlainTextResponse("a token is needed\n", 401, headers=challenge)
        if request.url.path != "/metrics":
            return PlainTextResponse("only /metrics is here\n", 404)
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("only GET\n", 405, headers={"Allow": "GET, HEAD"})
        text = await run_in_threadpool(generate_latest, self._registry)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})


def split_host(header: str) -> str:
    """The host of a Host header, without port and brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0] if ":" in header else header
