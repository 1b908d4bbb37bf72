"""Against a real SuperLink over TLS, with its gRPC health service."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from client.check import network, training
from client.check.connection import Target
from client.check.findings import Status
from client.check.run import check_site
from client.check.table import Board
from client.check.training import Measured
from client.site import load_site
from server.processes import free_port

GREEN, YELLOW, RED = Status


@pytest.fixture
def superlink(authority, tmp_path):
    """Target and health address of a SuperLink that asks SuperNodes for keys, as hospitals do."""
    port, health = free_port(), free_port()
    pem = authority.issue()
    command = [
        Path(sys.executable).parent / "flower-superlink",
        *("--host", "127.0.0.1", "--port", port, "--isolation", "process"),
        *("--ssl-ca-certfile", authority.file, "--ssl-certfile", pem, "--ssl-keyfile", pem),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        *("--health-server-address", f"127.0.0.1:{health}"),
    ]
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    log = tmp_path / "superlink.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | quiet | {"FLWR_HOME": str(tmp_path / "flower")},
        )  # fmt: skip
    target = Target("localhost", port, str(authority.file))
    try:
        deadline = time.monotonic() + 60
        while network.reach(target).status != GREEN:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield target, f"127.0.0.1:{health}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_site_finds_its_superlink(superlink, authority, make_authority, make_sites, monkeypatch):
    monkeypatch.setattr(training, "measure", lambda *_: Measured(device="cpu"))
    target, health = superlink
    site_file = make_sites({"st-mary": ["ct"]})[0]
    other = make_authority("other", "Other CA")
    plain = site_file.read_text()

    def found(superlink_address, certificates):
        site_file.write_text(
            f"{plain}[coordinator]\nsuperlink = '{superlink_address}'\n"
            f"root_certificates = '{certificates}'\nhealth = '{health}'\n"
        )
        board = Board()
        check_site(board, site_file, load_site(site_file), None)
        return board.findings

    findings = found(f"localhost:{target.port}", authority.file)
    for name in ("coordinator", "TLS", "fleet path", "clock", "health"):
        assert findings[name].status == GREEN, findings[name]
    assert findings["control path"].status == YELLOW  # no gateway before it
    assert "exposes /v1/control/" in findings["control path"].found

    findings = found(f"localhost:{target.port}", other.file)
    assert findings["TLS"].status == RED
    assert not {"fleet path", "control path", "clock"} & set(findings)
    assert findings["health"].status == GREEN

    findings = found(health, authority.file)  # a mistaken port: gRPC without TLS
    assert findings["TLS"].status == RED
