"""The live page over HTTP: a document, its script and sheet, and a stream of what is new.

  /                     the only study, or a comparison of all
  /study/NAME           one of several
  /events /events/NAME  server-sent events: parts of that page, but for those of ?have=DIGEST,...
  /page.css /page.js /icon.svg

**Guarantees**:
    - Only GET and HEAD of these are answered; there is no call that changes anything, and no path
      of a request becomes one of a file.
    - Who may read is as server/access.py guarantees, for every path alike.
    - The page's policy lets a browser load and run what comes from this server as a file, and
      nothing else: no inline script or style, no other host, no frame, no form. No other site's
      page may read it (no CORS) or embed it.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from core.evaluation.page import SHARED
from server.access import refusal
from server.page.studies import Studies
from server.page.view import Look, Part, View, environment

LOOK_SECONDS: Final = 1.0
BEAT_SECONDS: Final = 3.0
"""So often a page without news hears that there is none."""
HERE: Final = Path(__file__).parent
FILES: Final = {
    "/page.css": ((SHARED / "page.css", HERE / "live.css"), "text/css"),
    "/page.js": ((HERE / "page.js",), "text/javascript"),
    "/icon.svg": ((HERE / "icon.svg",), "image/svg+xml"),
}
HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
MOST_DIGESTS: Final = 64


class PageApp:
    """The ASGI application.

    Args:
        studies: What is shown.
        token: What readers must show; None: readers on this machine show nothing.
        closing: Whether streams shall end now, because the server does.
    """

    def __init__(
        self, studies: Studies, token: str | None, closing: Callable[[], bool] = lambda: False
    ) -> None:
        self._studies = studies
        self._token = token
        self._closing = closing
        self._files = {
            path: ("\n".join(file.read_text(encoding="utf-8") for file in files), kind)
            for path, (files, kind) in FILES.items()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http":
            response = await self._answer(Request(scope, receive))
            response.headers.update(HEADERS)
            await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        if refused := refusal(request, self._token, 'Basic realm="FedMerMED", charset="UTF-8"'):
            return refused
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("only GET\n", 405, headers={"Allow": "GET, HEAD"})
        path = request.scope["path"]
        if path in self._files:
            text, kind = self._files[path]
            return Response(text, media_type=kind)
        kind, _, name = path[1:].partition("/")
        view = await run_in_threadpool(self._find, kind, name)
        if view is None:
            return PlainTextResponse("there is no such page\n", 404)
        if kind == "events":
            if request.method == "HEAD":
                return Response(media_type="text/event-stream")
            have = request.query_params.get("have", "").split(",")[:MOST_DIGESTS]
            events = _events(view, set(have), self._closing)
            return StreamingResponse(events, media_type="text/event-stream")
        return HTMLResponse(await run_in_threadpool(_document, view, name))

    def _find(self, kind: str, name: str) -> View | None:
        """The page of a study or the first one, where there is such a page."""
        if name:
            return self._studies.views().get(name) if kind in ("study", "events") else None
        return self._studies.front() if kind in ("", "events") else None


def _document(view: View, name: str) -> str:
    events = f"/events/{quote(name, safe='')}" if name else "/events"
    template = environment().get_template("document.html.j2")
    return template.render(look=view.look(), events=events, several=bool(name))


async def _events(view: View, have: set[str], closing: Callable[[], bool]) -> AsyncIterator[str]:
    """What is new, second by second, until the reader is gone."""
    yield "retry: 2000\n\n"
    quiet = 0.0
    while not closing():
        look = await run_in_threadpool(view.look)
        news = {name: part for name, part in look.parts.items() if part.digest not in have}
        if news or quiet >= BEAT_SECONDS:
            yield f"data: {_message(look, news)}\n\n"
            quiet = 0.0
        have = {part.digest for part in look.parts.values()}
        await asyncio.sleep(LOOK_SECONDS)
        quiet += LOOK_SECONDS


def _message(look: Look, news: dict[str, Part]) -> str:
    parts = {name: {"html": part.html, "digest": part.digest} for name, part in news.items()}
    return json.dumps({"now": look.now, "title": look.title, "parts": parts})
