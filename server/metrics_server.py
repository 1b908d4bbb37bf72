"""The endpoint /metrics: who may read it, and nothing else.

**Guarantees**:
    - Only GET and HEAD of /metrics are answered; there is no call that changes anything.
    - It listens on a loopback address unless a token file is given.
    - Who may read is as server/access.py guarantees.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from server.access import check_listen, read_token, refusal
from server.metrics import StudyCollector

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
    token = read_token(token_file) if token_file else None
    host, port = check_listen(listen, token, "the metrics name")
    app = MetricsApp(run, token)
    uvicorn.run(
        app, host=host, port=port, log_level="warning", access_log=False, server_header=False,
        lifespan="off",
    )  # fmt: skip


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
        if refused := refusal(request, self._token, "Bearer"):
            return refused
        if request.url.path != "/metrics":
            return PlainTextResponse("only /metrics is here\n", 404)
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("only GET\n", 405, headers={"Allow": "GET, HEAD"})
        text = await run_in_threadpool(generate_latest, self._registry)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})
