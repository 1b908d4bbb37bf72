import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from email.utils import formatdate
from time import monotonic, time

import grpc
import pytest

from client.check import connection, network
from client.check.connection import Target, get, target_of, within
from client.check.findings import Status
from core.errors import UserError

FLOWER = {network.FLEET: (405, {"Allow": "POST"})}
GREEN, YELLOW, RED = Status


@pytest.fixture
def closed_port():
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def silent(monkeypatch):
    """A port that takes connections and never says a word."""
    monkeypatch.setattr(connection, "SECONDS", 0.2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield Target("localhost", listener.getsockname()[1])


def test_an_address_comes_apart():
    assert target_of("fl.example.org:443", "ca.crt") == Target("fl.example.org", 443, "ca.crt")
    assert target_of("[2001:db8::1]:8443") == Target("2001:db8::1", 8443)


def test_a_sound_coordinator_is_green(serve, authority):
    target = serve(FLOWER, certificate=authority.issue())
    for check in (network.reach, network.certificate, network.fleet, network.control):
        assert check(target).status == GREEN, check(target)
    assert network.certificate(target).values == {"days": 89}
    assert network.clock(target).status == GREEN
    assert network.certificate(replace(target, host="127.0.0.1")).status == GREEN


def test_a_closed_port_is_red(closed_port):
    finding = network.reach(Target("127.0.0.1", closed_port))
    assert finding.status == RED
    assert "connection refused" in finding.found
    assert "Correct the port in [coordinator] superlink" in finding.remedy


def test_an_unknown_name_is_red(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    finding = network.reach(Target("fl.example.org", 443))
    assert finding.status == RED
    assert "the name 'fl.example.org' is not known here" in finding.found


def test_a_name_server_that_hangs_is_given_up(monkeypatch):
    forever = threading.Event()
    monkeypatch.setattr(connection, "SECONDS", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: forever.wait())
    began = monotonic()
    finding = network.reach(Target("fl.example.org", 443))
    assert monotonic() - began < 3
    forever.set()
    assert finding.status == RED
    assert "firewall" in finding.remedy


def test_an_unknown_authority_is_red(serve, authority, make_authority):
    other = make_authority("other", "Other CA")
    target = serve(FLOWER, certificate=authority.issue())
    finding = network.certificate(replace(target, root_certificates=str(other.file)))
    assert finding.status == RED
    assert "was not issued by a CA in" in finding.found
    assert "CA file" in finding.remedy
    public = network.certificate(replace(target, root_certificates=None))
    assert public.status == RED
    assert "no public authority" in public.found
    assert "[coordinator] root_certificates" in public.remedy


def test_another_authority_of_the_same_name_is_red(serve, make_authority):
    impostor = make_authority("impostor", "Coordinator CA")
    target = serve(FLOWER, certificate=impostor.issue())
    assert "was not issued by a CA in" in network.certificate(target).found


@pytest.mark.parametrize(
    ("host", "days", "found", "remedy"),
    [
        ("fl.example.org", (-1, 90), "for another name than 'localhost'", "subjectAltName"),
        ("localhost", (-9, -1), "has expired", "valid now"),
        ("localhost", (2, 9), "not valid yet", "this machine's clock"),
    ],
)
def test_a_bad_certificate_is_red_and_named(serve, authority, host, days, found, remedy):
    finding = network.certificate(serve(FLOWER, certificate=authority.issue(host, days)))
    assert finding.status == RED
    assert found in finding.found
    assert remedy in finding.remedy


def test_a_certificate_that_expires_soon_is_yellow(serve, authority):
    finding = network.certificate(serve(FLOWER, certificate=authority.issue(days=(-1, 5))))
    assert finding.status == YELLOW
    assert "4 more days" in finding.found


def test_plain_http_is_red(serve):
    finding = network.certificate(serve(FLOWER))
    assert finding.status == RED
    assert "speaks plain HTTP" in finding.found
    assert "never send updates over plain HTTP" in finding.remedy


def test_a_silent_port_is_red_and_soon(silent, authority):
    began = monotonic()
    assert network.reach(silent).status == GREEN
    finding = network.certificate(replace(silent, root_certificates=str(authority.file)))
    assert monotonic() - began < 3
    assert finding.status == RED
    assert "TLS handshake failed" in finding.found
    with pytest.raises(UserError, match=r"broke off a request: .*timed out; ask the coordinator"):
        get(silent, "/")


@pytest.mark.parametrize("text", [b"", b"no certificate", "-----BÉGIN".encode(), None])
def test_root_certificates_that_cannot_be_read_are_named(serve, authority, tmp_path, text):
    target = serve(FLOWER, certificate=authority.issue())
    file = tmp_path / "root.crt"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(UserError, match=r"root\.crt' cannot be read as PEM: .+; correct"):
        network.certificate(replace(target, root_certificates=str(file)))


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(404, "forwards /v1/fleet/"), (403, "forwards /v1/fleet/"), (200, "gateway's address"),
     (502, "start the SuperLink"), (503, "start the SuperLink")],
)  # fmt: skip
def test_what_is_not_flowers_fleet_path_is_red(serve, authority, status, remedy):
    target = serve({network.FLEET: (status, {})}, certificate=authority.issue())
    finding = network.fleet(target)
    assert finding.status == RED
    assert f"HTTP {status}" in finding.found
    assert remedy in finding.remedy


@pytest.mark.parametrize(
    ("path", "named"), [(network.CLOSED[0], "/v1/control/"), (network.CLOSED[1], "/v1/runtime/")]
)
def test_an_exposed_control_path_is_yellow(serve, authority, path, named):
    target = serve(FLOWER | {path: (405, {"Allow": "POST"})}, certificate=authority.issue())
    finding = network.control(target)
    assert finding.status == YELLOW
    assert f"exposes {named} (HTTP 405)" in finding.found
    assert "forwards /v1/fleet/ alone" in finding.remedy


@pytest.mark.parametrize(
    ("theirs_minus_ours", "status", "words"),
    [(0, GREEN, ""), (50, GREEN, ""), (-4, GREEN, ""), (-8, RED, "ahead of"),
     (70, RED, "behind"), (86_400, RED, "24 h behind")],
)  # fmt: skip
def test_the_clock_is_held_against_the_coordinators(
    serve, authority, theirs_minus_ours, status, words
):
    date = formatdate(time() + theirs_minus_ours, usegmt=True)
    reply = (405, {"Allow": "POST", "Date": date})
    finding = network.clock(serve({network.FLEET: reply}, certificate=authority.issue()))
    assert finding.status == status
    assert words in finding.found


@pytest.mark.parametrize("date", ["", "soon"])
def test_no_date_to_compare_with_is_yellow(serve, authority, date):
    reply = (405, {"Allow": "POST", "Date": date})
    finding = network.clock(serve({network.FLEET: reply}, certificate=authority.issue()))
    assert finding.status == YELLOW


def test_the_environments_proxy_is_taken(serve, authority, monkeypatch):
    """A CONNECT proxy that wants a login, as hospitals have them."""
    target = serve(FLOWER, certificate=authority.issue())
    asked = []

    def pump(source, sink):
        with suppress(OSError):  # either side may be gone
            while data := source.recv(65_536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def proxy(listener):
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            head = client.recv(65_536).decode()
            asked.append(head)
            if "Basic dXNlcjpwQHNz" not in head:  # user:p@ss
                client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
                client.close()
                continue
            upstream = socket.create_connection(("127.0.0.1", target.port))
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            threading.Thread(target=pump, args=(client, upstream), daemon=True).start()
            threading.Thread(target=pump, args=(upstream, client), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=proxy, args=(listener,), daemon=True).start()
        port = listener.getsockname()[1]
        monkeypatch.setenv("https_proxy", f"http://user:p%40ss@127.0.0.1:{port}")
        finding = network.reach(target)
        assert finding.status == GREEN
        assert "through the proxy 127.0.0.1" in finding.found
        assert network.fleet(target).status == GREEN
        assert asked[0].startswith(f"CONNECT localhost:{target.port} ")
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        finding = network.reach(target)
        assert finding.status == RED
        assert "407" in finding.found
        monkeypatch.setenv("no_proxy", "localhost")
        assert "proxy" not in network.reach(target).found
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("reply", "status"), [(b"\x08\x01", GREEN), (b"\x08\x02", RED), (b"", RED)]
)
def test_the_health_service_says_whether_it_serves(reply, status):
    server = grpc.server(ThreadPoolExecutor(1))
    check = grpc.unary_unary_rpc_method_handler(lambda request, context: reply)
    handler = grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check})
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert network.health(f"127.0.0.1:{port}").status == status
    finally:
        server.stop(None)


def test_no_health_service_is_red(closed_port):
    finding = network.health(f"127.0.0.1:{closed_port}")
    assert finding.status == RED
    assert "does not answer gRPC: unavailable" in finding.found
    assert "--health-server-address" in finding.remedy


def test_a_call_within_its_time_gives_its_value_or_its_error():
    assert within(lambda a, b: a + b, 1, b=2) == 3
    with pytest.raises(ZeroDivisionError):
        within(lambda: 1 / 0)
