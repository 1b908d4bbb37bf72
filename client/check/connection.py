"""Connections to the coordinator that are verified as Flower's SuperNode verifies them, and end."""

import base64
import http.client
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import ParamSpec, TypeVar
from urllib.parse import unquote, urlsplit

from core.address import split_address
from core.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")

SECONDS = 5.0
"""For each attempt; `within` gives up after three of them."""


@dataclass(frozen=True)
class Target:
    """The coordinator's address, and the file whose authorities vouch for it."""

    host: str
    port: int
    root_certificates: str | None = None
    """None: the authorities that come with the SuperNode's HTTP library."""

    def __str__(self) -> str:
        return f"{self.host} port {self.port}"


@dataclass(frozen=True)
class Answer:
    """What an HTTP server said to a GET."""

    status: int
    allow: str
    date: str
    asked_at: float
    """This machine's time half-way between question and answer."""


def target_of(address: str, root_certificates: str | None = None) -> Target:
    """Take 'host:port' apart."""
    return Target(*split_address(address), root_certificates)


def within(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a call that may outlast its own timeouts: a name server that hangs, a peer that drips.

    Raises:
        TimeoutError: it took longer than three attempts.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(call(*args, **kwargs))
        except Exception as error:
            errors.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(3 * SECONDS)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no end after {3 * SECONDS:g} s")
    return results[0]


def proxy_for(host: str) -> str | None:
    """The proxy that the environment names for HTTPS; the SuperNode's library takes it too."""
    proxies = urllib.request.getproxies()
    if urllib.request.proxy_bypass(host):
        return None
    return proxies.get("https") or proxies.get("all")


def connect(target: Target) -> socket.socket:
    """Open a TCP connection, through the proxy if there is one.

    Raises:
        OSError: it cannot be opened.
    """
    proxy = proxy_for(target.host)
    if proxy is None:
        return socket.create_connection((target.host, target.port), SECONDS)
    parts = urlsplit(proxy)
    if parts.hostname is None:
        raise OSError(f"the proxy '{proxy}' has no host")
    headers = {}
    if parts.username:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    tunnel = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=SECONDS)
    tunnel.set_tunnel(target.host, target.port, headers)
    tunnel.connect()
    opened: socket.socket = tunnel.sock
    return opened


def secure(target: Target) -> ssl.SSLSocket:
    """Open a TLS connection.

    Raises:
        OSError: it cannot be opened, or (ssl.SSLError) is not to be trusted.
        UserError: the root certificates cannot be read.
    """
    context = _context(target.root_certificates)
    plain = connect(target)
    try:
        return context.wrap_socket(plain, server_hostname=target.host)
    except BaseException:
        plain.close()
        raise


def speaks_plain_http(target: Target) -> bool:
    """Whether HTTP without TLS is answered."""
    try:
        with connect(target) as plain:
            plain.sendall(f"GET /health HTTP/1.0\r\nHost: {target.host}\r\n\r\n".encode())
            return plain.recv(5) == b"HTTP/"
    except OSError:
        return False


def get(target: Target, path: str) -> Answer:
    """Ask for a path over TLS.

    Raises:
        UserError: no whole answer came.
    """
    try:
        return within(_get, target, path)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{target} broke off a request: {error or type(error).__name__}; ask the coordinator "
            "to look at the gateway's log"
        ) from None


def _get(target: Target, path: str) -> Answer:
    connection = http.client.HTTPConnection(target.host, target.port)
    connection.sock = secure(target)
    try:
        started = time.time()
        connection.request("GET", path)
        response = connection.getresponse()
        asked_at = (started + time.time()) / 2
    finally:
        connection.close()
    headers = response.headers
    return Answer(response.status, headers.get("Allow", ""), headers.get("Date", ""), asked_at)


def _context(root_certificates: str | None) -> ssl.SSLContext:
    """As Flower's protobuf client makes it, so that it trusts what the SuperNode will trust."""
    if root_certificates is None:
        import httpx

        return httpx.create_ssl_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=Path(root_certificates).read_bytes().decode("ascii"))
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise UserError(
            f"root certificates '{root_certificates}' cannot be read as PEM: "
            f"{getattr(error, 'strerror', None) or error}; correct [coordinator] "
            "root_certificates in the site file, or ask the coordinator for its CA file"
        ) from None
    return context
