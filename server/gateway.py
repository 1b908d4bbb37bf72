"""The coordinator's public door: it passes Flower's fleet calls to the SuperLink and nothing else.

Flower serves fleet, control and runtime on one port, and control has no login: who reaches it can
start runs at all sites. The SuperLink therefore listens on the loopback, and this stands before it.

**Guarantees**, whatever a peer on the network sends:

- The SuperLink gets a POST to one of `FLEET`, or a GET of its health, and nothing else. The path
  is ours, from the list, never the peer's: a raw path that is not a listed one byte for byte is
  refused, and so is one with a query.
- A request is parsed once and written anew: its framing, and headers that are not in `PASSED`, end
  here. Where both a length and a transfer coding are given, it is refused.
- A body is at most `MAX_BODY_BYTES`, streamed in pieces, and kept nowhere.
- The SuperLink's certificate is verified under the study's CA, for the name localhost.
- A request has `REQUEST_SECONDS` in all, `IDLE_SECONDS` between two pieces of its body, and
  `MAX_REQUESTS` run at a time. A connection whose request is refused, by whomever, is closed.
- Without a SuperLink the answer is 502, of an overload 503: SuperNodes try again after both.

Why not nginx: this runs from the same Python install on every machine, in tests and in the image.
"""

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from pathlib import Path
from typing import Any, Final

import httpx

from core.admission import printable

LOG = logging.getLogger("fedmermed.gateway")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

FLEET: Final = frozenset(
    f"/v1/fleet/{name}".encode()
    for name in (
        "register-node", "activate-node", "deactivate-node", "unregister-node",
        "send-node-heartbeat", "pull-messages", "push-messages", "get-run", "get-fab",
        "push-object", "pull-object", "confirm-message-received",
    )
)  # fmt: skip
"""All that a SuperNode of Flower 1.41 calls."""
HEALTH: Final = b"/health"
PASSED: Final = frozenset(
    {
        b"accept", b"content-type", b"content-length", b"flwr-public-key", b"flwr-signature",
        b"flwr-timestamp", b"flwr-package-name", b"flwr-package-version", b"flwr-component-name",
    }
)  # fmt: skip
RETURNED: Final = frozenset(
    {"content-type", "content-length", "flwr-version-incompatibility-message"}
)

MAX_BODY_BYTES: Final = 16 * 2**20
"""Flower sends arrays in pieces of 5 MiB."""
MAX_REQUESTS: Final = 128
IDLE_SECONDS: Final = 30.0
REQUEST_SECONDS: Final = 300.0


class _Refused(Exception):
    """An answer of our own."""

    def __init__(self, status: int, words: str, headers: tuple[tuple[bytes, bytes], ...] = ()):
        super().__init__(words)
        self.status, self.words, self.headers = status, words, headers


def make_gateway(superlink: str, authority: Path) -> ASGIApp:
    """The gateway as an ASGI app.

    Args:
        superlink: Where the SuperLink listens, host:port.
        authority: The CA's certificate.
    """
    client: list[httpx.AsyncClient] = []  # made within the event loop that it belongs to
    running = 0
    told = 0.0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal running, told
        if scope["type"] != "http":
            return await _lifespan(client, superlink, authority, receive, send)
        running += 1
        reply = _Reply(send)
        try:
            if running > MAX_REQUESTS:
                raise _Refused(503, "too many requests at a time; try again")
            await _within(REQUEST_SECONDS, _pass_on(client[0], scope, receive, reply), reply)
        except _Refused as refused:
            await reply.refuse(refused)
            # A line a second at most: who knocks must not fill the disk.
            if time.monotonic() - told > 1:
                told = time.monotonic()
                peer = (scope.get("client") or ("?",))[0]
                what = printable(f"{scope['method']} {scope['raw_path'].decode('latin-1')}", 80)
                LOG.warning("%s: %s: %d %s", peer, what, refused.status, refused.words)
        finally:
            running -= 1

    return app


async def _lifespan(
    client: list[httpx.AsyncClient], superlink: str, authority: Path, receive: Receive, send: Send
) -> None:
    """Open the connections to the SuperLink, and close them at the end."""
    await receive()
    timeout = httpx.Timeout(60.0, connect=5.0, pool=10.0)
    # Shorter than the SuperLink keeps an idle connection: never write to one that it closes.
    limits = httpx.Limits(max_connections=MAX_REQUESTS, keepalive_expiry=3.0)
    async with httpx.AsyncClient(
        base_url=f"https://{superlink}",
        verify=ssl.create_default_context(cafile=str(authority)),
        timeout=timeout,
        limits=limits,
        trust_env=False,  # no proxy lies between
    ) as opened:
        opened.headers.clear()  # those of the library's own
        client.append(opened)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})


def _called(scope: Scope) -> bytes:
    """The listed path that a request is for.

    Raises:
        _Refused: it is for none, or is not framed in one way.
    """
    path: bytes = scope["raw_path"]
    if path != HEALTH and path not in FLEET:
        raise _Refused(403, "only Flower's fleet service is served here")
    if scope["query_string"]:
        raise _Refused(403, "no query is taken")
    if path == HEALTH and scope["method"] != "GET":
        raise _Refused(405, "use GET", ((b"allow", b"GET"),))
    if path == HEALTH or scope["method"] != "POST":
        return HEALTH  # sites ask so whether a SuperLink is behind
    names = [name for name, _ in scope["headers"]]
    if b"transfer-encoding" in names and b"content-length" in names:
        raise _Refused(400, "a length and a transfer coding exclude each other")
    if len(names) != len(set(names)) and any(names.count(name) > 1 for name in PASSED):
        raise _Refused(400, "a header is given twice")
    return path


async def _within(seconds: float, work: Coroutine[Any, Any, None], reply: "_Reply") -> None:
    """Let an exchange take so long; what goes wrong on the way becomes an answer of ours."""
    try:
        async with asyncio.timeout(seconds):
            await work
    except (httpx.TransportError, TimeoutError) as error:
        if reply.begun:
            raise  # the connection breaks off, which SuperNodes take as a reason to try again
        why = str(error) or type(error).__name__
        raise _Refused(502, f"the SuperLink does not answer ({why}); try again") from None


async def _pass_on(
    client: httpx.AsyncClient, scope: Scope, receive: Receive, reply: "_Reply"
) -> None:
    path = _called(scope)
    headers = [(name, value) for name, value in scope["headers"] if name in PASSED]
    if path == HEALTH:
        request = client.build_request("GET", HEALTH.decode())
    else:
        length = dict(headers).get(b"content-length")
        if length is not None and int(length) > MAX_BODY_BYTES:  # h11 lets digits through only
            raise _Refused(413, f"a body has at most {MAX_BODY_BYTES} bytes")
        request = client.build_request(
            "POST", path.decode(), headers=headers, content=_body(receive)
        )
    request.headers["host"] = "localhost"
    request.extensions["sni_hostname"] = "localhost"
    response = await client.send(request, stream=True)
    try:
        if path == HEALTH and scope["raw_path"] != HEALTH and response.status_code == 200:
            raise _Refused(405, "use POST", ((b"allow", b"POST"),))
        await reply.pass_back(response)
    finally:
        await response.aclose()


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    """A request's body, piece by piece."""
    size, more = 0, True
    while more:
        try:
            message = await asyncio.wait_for(receive(), IDLE_SECONDS)
        except TimeoutError:
            raise _Refused(408, f"nothing came for {IDLE_SECONDS:g} s") from None
        if message["type"] != "http.request":
            raise _Refused(400, "the connection ended within a body")
        piece: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        size += len(piece)
        if size > MAX_BODY_BYTES:
            raise _Refused(413, f"a body has at most {MAX_BODY_BYTES} bytes")
        yield piece


class _Reply:
    """The one answer to a request."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def pass_back(self, response: httpx.Response) -> None:
        """The SuperLink's, piece by piece."""
        headers = [
            (name.lower().encode(), value.encode("latin-1"))
            for name, value in response.headers.multi_items()
            if name.lower() in RETURNED
        ]
        if response.status_code != 200:  # a stranger keeps no connection open
            headers.append((b"connection", b"close"))
        await self._start(response.status_code, headers)
        async for piece in response.aiter_raw():
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        await self._send({"type": "http.response.body", "body": b""})

    async def refuse(self, refused: _Refused) -> None:
        """One of our own."""
        text = f"{refused.words}\n".encode()
        headers = [
            (b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode()),
            (b"connection", b"close"), *refused.headers,
        ]  # fmt: skip
        await self._start(refused.status, headers)
        await self._send({"type": "http.response.body", "body": text})

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.begun = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
