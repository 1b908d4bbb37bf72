"""Certificates and small servers, so that each fault of a coordinator can be had."""

import datetime
import ipaddress
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client.check.connection import Target

Reply = tuple[int, dict[str, str]]
Serve = Callable[..., Target]


@dataclass(frozen=True)
class Authority:
    """A CA of its own, which writes certificates into a directory."""

    directory: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def file(self) -> Path:
        return self.directory / "ca.crt"

    def issue(self, host: str = "localhost", days: tuple[float, float] = (-1, 90)) -> Path:
        """A file with certificate and key of a server, valid from and to so many days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.DNSName(host)]
        if host == "localhost":
            names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
        certificate = (
            _builder("server", self.certificate.subject, key, days)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        file = self.directory / f"{host}{days[0]:g}.pem"
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + private)
        return file


def _builder(
    name: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: tuple[float, float]
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    start, end = (now + datetime.timedelta(days=day) for day in days)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )


def _authority(directory: Path, name: str) -> Authority:
    directory.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    certificate = (
        _builder(name, subject, key, (-2, 365))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    made = Authority(directory, key, certificate)
    made.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return made


MakeAuthority = Callable[[str, str], Authority]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def make_authority(tmp_path: Path) -> MakeAuthority:
    """Make a CA in a directory of its own: folder, name -> CA."""
    return lambda folder, name: _authority(tmp_path / folder, name)


@pytest.fixture
def authority(make_authority: MakeAuthority) -> Authority:
    """The coordinator's CA, which vouches for what `serve` serves."""
    return make_authority("ca", "Coordinator CA")


@pytest.fixture
def serve(authority: Authority) -> Iterator[Serve]:
    """Serve paths -> (status, headers) on a free port; over TLS if a certificate is given."""
    running: list[ThreadingHTTPServer] = []

    def start(
        paths: Mapping[str, Reply] | None = None, *, certificate: Path | None = None
    ) -> Target:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, headers = (paths or {}).get(self.path, (404, {}))
                self.send_response_only(status)
                self.send_header("Content-Length", "0")
                for key, value in ({"Date": self.date_time_string()} | headers).items():
                    self.send_header(key, value)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        running.append(server)
        return Target("localhost", server.server_port, str(authority.file))

    yield start
    for server in running:
        server.shutdown()
        server.server_close()
