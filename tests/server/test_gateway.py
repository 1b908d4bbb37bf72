import contextlib
import hashlib
import socket
import ssl
import threading
import time

import httpx
import pytest
import uvicorn
from flwr.superlink.main import create_app

from server import gateway
from server.gateway import FLEET, HEALTH, MAX_BODY_BYTES, PASSED, make_gateway
from server.gateway_server import Protocol
from server.processes import free_port
from server.provision import provision

PATH = "/v1/fleet/push-object"


@contextlib.contextmanager
def served(app, port, directory, **options):
    """An ASGI app behind TLS, in a thread."""
    server = uvicorn.Server(
        uvicorn.Config(
            app, host="127.0.0.1", port=port, log_level="critical", ws="none",
            ssl_certfile=directory / "server.crt", ssl_keyfile=directory / "server.key", **options,
        )
    )  # fmt: skip
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
        assert thread.is_alive()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(10)


class SuperLink:
    """Notes every request that reaches it, and answers with its body."""

    def __init__(self):
        self.seen = []

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.seen.append((scope["method"], scope["raw_path"], scope["query_string"],
                          dict(scope["headers"]), body))  # fmt: skip
        status = 401 if body == b"stranger" else 200
        headers = [(b"content-type", b"application/x-protobuf"), (b"set-cookie", b"a=b")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    place = tmp_path_factory.mktemp("gateway") / "study"
    list(provision(place, address="localhost:443", sites=[]))
    return place


@pytest.fixture(scope="module")
def open_door(directory):
    with door_before(directory) as opened:
        yield opened


@pytest.fixture
def door(open_door):
    """A gateway's port, and the requests that came through it."""
    open_door[1].seen.clear()
    return open_door


@contextlib.contextmanager
def door_before(directory, *, authority=None, away=False):
    inner, port, superlink = free_port(), free_port(), SuperLink()
    app = make_gateway(f"127.0.0.1:{inner}", authority or directory / "ca.crt")
    options = {"http": Protocol, "lifespan": "on", "timeout_graceful_shutdown": 1}
    with contextlib.ExitStack() as stack:
        if not away:
            stack.enter_context(served(superlink, inner, directory, lifespan="off"))
        stack.enter_context(served(app, port, directory, **options))
        yield port, superlink


def ask(port, directory, method="POST", path=PATH, **options):
    verify = ssl.create_default_context(cafile=directory / "ca.crt")
    with httpx.Client(verify=verify, trust_env=False, timeout=30) as client:
        return client.request(method, f"https://localhost:{port}{path}", **options)


def say(port, directory, *pieces):
    """What a gateway answers to raw bytes; empty if it closes the connection."""
    context = ssl.create_default_context(cafile=directory / "ca.crt")
    with (
        socket.create_connection(("127.0.0.1", port), 10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as link,
    ):
        for piece in pieces:
            link.sendall(piece)
        answer = b""
        with contextlib.suppress(OSError):
            while more := link.recv(65_536):
                answer += more
        return answer


def test_the_list_is_that_of_flowers_fleet_router():
    # From the app as it is served: whatever Flower adds below the prefix must be looked at.
    paths = create_app().openapi()["paths"]
    fleet = {path: list(calls) for path, calls in paths.items() if path.startswith("/v1/fleet")}
    assert {path.encode() for path in fleet} == FLEET
    assert all(calls == ["post"] for calls in fleet.values())
    assert HEALTH.decode() in paths


def test_a_fleet_call_passes_both_ways_with_its_headers_alone(door, directory):
    port, superlink = door
    body = bytes(range(256)) * 20_480  # 5 MiB, as Flower's pieces
    wanted = {name.decode(): "x" for name in PASSED if name != b"content-length"}
    sent = wanted | {"cookie": "a=b", "x-forwarded-for": "1.2.3.4", "flwr-task-token": "t",
                     "authorization": "Bearer b"}  # fmt: skip
    answer = ask(port, directory, content=body, headers=sent)
    assert answer.status_code == 200
    assert hashlib.sha256(answer.content).digest() == hashlib.sha256(body).digest()
    assert answer.headers["content-type"] == "application/x-protobuf"
    assert "set-cookie" not in answer.headers
    [(method, path, query, headers, got)] = superlink.seen
    assert (method, path, query, got) == ("POST", PATH.encode(), b"", body)
    expected = wanted | {"host": "localhost", "content-length": str(len(body))}
    assert headers == {name.encode(): value.encode() for name, value in expected.items()}


def test_every_fleet_call_passes(door, directory):
    port, superlink = door
    for path in sorted(FLEET):
        assert ask(port, directory, path=path.decode(), content=b"x").content == b"x"
    assert sorted(seen[1] for seen in superlink.seen) == sorted(FLEET)


@pytest.mark.parametrize(
    "target",
    [
        "/v1/control/list-runs",
        "/v1/runtime/acquire-task",
        "/docs",
        "/openapi.json",
        "/",
        "*",
        "/v1/fleet",
        "/v1/fleet/",
        "/v1/fleet/start-run",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/pull-messages/../../control/list-runs",
        "/v1/fleet/push-object/",
        "/v1/fleet//push-object",
        "//v1/fleet/push-object",
        "/V1/FLEET/PUSH-OBJECT",
        "/v1/fleet/push%2dobject",
        "/v1/fleet/push-object%00",
        "/v1/fleet/push-object;a=b",
        "/v1/fleet/push-object?a=b",
        "/v1/fleet/push-object#a",
        "/v1\\fleet\\push-object",
        "/health/../v1/control/list-runs",
        "https://localhost/v1/fleet/push-object",
        "https://localhost/v1/control/list-runs",
        "@localhost/v1/control/list-runs",
    ],
)
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_no_other_path_reaches_the_superlink(door, directory, method, target):
    port, superlink = door
    request = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx"
    answer = say(port, directory, request.encode())
    assert answer.split(b"\r\n")[0].split()[1] in (b"403", b"400")
    assert superlink.seen == []


@pytest.mark.parametrize("method", ["CONNECT", "PUT", "DELETE", "OPTIONS", "HEAD", "PRI", "post"])
def test_no_other_method_reaches_a_fleet_call(door, directory, method):
    port, superlink = door
    for target in (PATH, "localhost:8000", "/v1/control/list-runs"):
        request = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n\r\n"
        answer = say(port, directory, request.encode())
        assert answer.split()[1] in (b"400", b"403", b"405")
    # A method that is not POST makes the gateway look whether the SuperLink is there.
    assert {seen[:2] for seen in superlink.seen} <= {("GET", HEALTH)}


SMUGGLED = b"POST /v1/control/list-runs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding : chunked",
        b"Transfer-Encoding:\x0bchunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        b"Content-Length: 0\r\nContent-Length: 5",
        b"Content-Length: +5",
        b"Content-Length: 5, 6",
        b"Content-Length: -1",
        b"Flwr-Signature: a\r\nFlwr-Signature: b\r\nContent-Length: 0",
        b"Content-Type: a\nTransfer-Encoding: chunked\r\nContent-Length: 0",
    ],
)
def test_a_smuggled_request_does_not_reach_the_superlink(door, directory, headers):
    port, superlink = door
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\n".encode() + headers + b"\r\n\r\n"
    answer = say(port, directory, head + b"0\r\n\r\n" + SMUGGLED)
    assert answer.split()[1] in (b"400", b"501")
    assert b" 200 " not in answer
    assert superlink.seen == []


def test_what_follows_a_request_on_its_connection_is_looked_at_like_any_other(door, directory):
    port, superlink = door
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = say(port, directory, head.encode() + b"1\r\nx\r\n0\r\n\r\n" + SMUGGLED)
    assert [seen[1] for seen in superlink.seen] == [PATH.encode()]
    assert answer.count(b"HTTP/1.1 ") == 2
    assert b"HTTP/1.1 403 " in answer


def test_a_body_over_the_limit_is_refused_however_it_is_framed(door, directory):
    port, superlink = door
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\n"
    declared = f"{head}Content-Length: {MAX_BODY_BYTES + 1}\r\n\r\n".encode()
    assert b" 413 " in say(port, directory, declared)
    piece = b"x" * 2**20
    chunks = [b"%x\r\n%b\r\n" % (len(piece), piece)] * (MAX_BODY_BYTES // 2**20)
    endless = [f"{head}Transfer-Encoding: chunked\r\n\r\n".encode(), *chunks, b"1\r\n"]
    assert b" 413 " in say(port, directory, *endless, b"x\r\n")
    assert superlink.seen == []
    whole = ask(port, directory, content=b"x" * MAX_BODY_BYTES)
    assert (whole.status_code, len(whole.content)) == (200, MAX_BODY_BYTES)


def test_a_body_that_stops_and_a_connection_without_a_request_are_ended(directory, monkeypatch):
    monkeypatch.setattr(gateway, "IDLE_SECONDS", 0.5)
    with door_before(directory) as (port, superlink):
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nx"
        assert b" 408 " in say(port, directory, head.encode())
        assert say(port, directory) == b""
        assert say(port, directory, b"POST /v1/fl") == b""
        assert superlink.seen == []


def test_a_request_has_an_end_whatever_drips(directory, monkeypatch):
    monkeypatch.setattr(gateway, "REQUEST_SECONDS", 0.5)
    with door_before(directory) as (port, _):
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nx"
        began = time.monotonic()
        assert b" 502 " in say(port, directory, head.encode())
        assert time.monotonic() - began < 5


def test_too_many_requests_at_a_time_are_told_to_come_again(directory, monkeypatch):
    monkeypatch.setattr(gateway, "MAX_REQUESTS", 1)
    monkeypatch.setattr(gateway, "IDLE_SECONDS", 3.0)
    with door_before(directory) as (port, _):
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nx"
        slow = threading.Thread(target=say, args=(port, directory, head.encode()))
        slow.start()
        time.sleep(0.5)
        assert ask(port, directory, content=b"x").status_code == 503
        slow.join()
        assert ask(port, directory, content=b"x").status_code == 200


def test_a_refusal_of_the_superlink_passes_and_ends_the_connection(door, directory):
    port, _ = door
    answer = ask(port, directory, content=b"stranger")
    assert answer.status_code == 401
    assert answer.headers["connection"] == "close"


def test_without_a_superlink_sites_are_told_to_try_again(directory):
    with door_before(directory, away=True) as (port, _):
        for method, path in (("POST", PATH), ("GET", PATH), ("GET", "/health")):
            answer = ask(port, directory, method, path)
            assert answer.status_code == 502  # flwr.supercore.retry tries again after it
            assert answer.text.startswith("the SuperLink does not answer")


def test_a_superlink_with_a_certificate_of_another_authority_is_not_spoken_to(directory, tmp_path):
    list(provision(tmp_path / "other", address="localhost:443"))
    with door_before(directory, authority=tmp_path / "other" / "ca.crt") as (port, superlink):
        answer = ask(port, directory, content=b"x")
        assert answer.status_code == 502
        assert "CERTIFICATE_VERIFY_FAILED" in answer.text
        assert superlink.seen == []


def test_sites_see_whether_the_superlink_is_there_without_reaching_it(door, directory):
    port, superlink = door
    answer = ask(port, directory, "GET")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert "date" in answer.headers  # by which `check` compares the clocks
    assert ask(port, directory, "GET", "/health").status_code == 200
    assert [seen[:2] for seen in superlink.seen] == [("GET", HEALTH)] * 2
