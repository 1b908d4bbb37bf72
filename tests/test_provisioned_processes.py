"""A real service and SuperNodes, started from what `provision` made."""

import datetime as dt
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from server.certificates import make_server_certificate, read_certificate, read_key
from server.processes import free_port
from server.provision import provision

BIN = Path(sys.executable).parent
SECONDS = 120
REFUSED = "the coordinator does not let this site in yet"


def environment(directory):
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    proxies = {name for name in os.environ if name.lower().endswith("_proxy")}
    kept = {name: value for name, value in os.environ.items() if name not in proxies}
    return kept | quiet | {"PATH": path, "FLWR_HOME": str(directory)}


@contextmanager
def running(log, words, *, home):
    """A process whose output goes to `log`; at the end it and its group are gone."""
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [str(word) for word in words],
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment(home),
        )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def service(study, port):
    """The coordinator's service, from the coordinator's directory alone."""
    words = [sys.executable, "-m", "server", "serve", study, "--listen", f"127.0.0.1:{port}"]
    log = study / "serve.log"
    with running(log, [*words, "--port", free_port()], home=study / "flower") as process:
        wait_for(lambda: listens(port), process, log)
        yield


def listens(port):
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def wait_for(ready, process, log):
    deadline = time.monotonic() + SECONDS
    while not ready():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


def ends(process):
    return process.wait(SECONDS)


def admit(study):
    words = [sys.executable, "-m", "server", "admit", study]
    done = subprocess.run(
        words, env=environment(study / "flower"), capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def nodes(study):
    """Node id -> status, as Flower's own list tells."""
    done = subprocess.run(
        [BIN / "flwr", "supernode", "list", "fedmermed", "--format", "json"],
        env=environment(study / "flower"), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {node["node-id"]: node["status"] for node in json.loads(done.stdout)["nodes"]}


def registered(study):
    """Ids of the nodes that were registered."""
    files = (study / "registered").iterdir()
    return {str(json.loads(file.read_text())["node-id"]) for file in files}


def join(site, log):
    words = [sys.executable, "-m", "client", "join", site, "--port", free_port()]
    return running(log, words, home=site / "flower")


@pytest.fixture
def study(tmp_path):
    """A provisioned directory of one site, whose gateway will listen on a free port."""
    directory, port = tmp_path / "study", free_port()
    list(provision(directory, address=f"localhost:{port}", sites=["st-mary"]))
    return directory, port


def test_a_registered_site_joins_and_strangers_and_retired_keys_do_not(study, tmp_path):
    directory, port = study
    site = tmp_path / "st-mary"
    shutil.move(directory / "kits" / "st-mary", site)  # handed over
    with service(directory, port):
        with join(site, log := tmp_path / "site.log") as node:
            wait_for(lambda: REFUSED in log.read_text(), node, log)  # provisioned, not admitted yet
            assert admit(directory) == ["site st-mary: admitted"]
            [first] = registered(directory)
            wait_for(lambda: nodes(directory)[first] == "online", node, log)  # without a new start
            assert log.read_text().count(REFUSED) == 1

            list(provision(directory, rotate="st-mary"))
            assert [line.partition(": ")[2] for line in admit(directory)] == [
                "retired key refused from now on", "admitted",
            ]  # fmt: skip
            assert admit(directory) == ["site st-mary: admitted already"]
            wait_for(lambda: log.read_text().count(REFUSED) == 2, node, log)  # sent away
            [second] = registered(directory) - {first}
            assert nodes(directory)[second] == "registered"
            shutil.copy(directory / "kits" / "st-mary" / "site.key", site / "site.key")
            wait_for(lambda: nodes(directory)[second] == "online", node, log)
        list(provision(directory, revoke="st-mary"))
        admit(directory)
        assert set(nodes(directory).values()) == {"unregistered"}


def test_an_expired_certificate_is_refused_by_join_and_by_flower(study, tmp_path):
    directory, port = study
    born = dt.datetime.now(dt.UTC) - dt.timedelta(days=31)
    expired = make_server_certificate(
        read_certificate(directory / "ca.crt"), read_key(directory / "ca.key"),
        read_key(directory / "server.key"), "localhost", born, 30,
    )  # fmt: skip
    (directory / "server.crt").write_bytes(expired.public_bytes(Encoding.PEM))
    kit = directory / "kits" / "st-mary"
    with service(directory, port):
        with join(kit, tmp_path / "join.log") as process:
            assert ends(process) == 2
        said = (tmp_path / "join.log").read_text()
        assert said.startswith(f"error: localhost:{port}: the certificate has expired; Ask the")
        words = [
            BIN / "flower-supernode", "--superlink", f"localhost:{port}", "--port", free_port(),
            "--root-certificates", kit / "ca.crt",
            "--auth-supernode-private-key", kit / "site.key",
        ]  # fmt: skip
        with running(tmp_path / "plain.log", words, home=tmp_path) as process:
            assert ends(process) != 0
        assert "CERTIFICATE_VERIFY_FAILED" in (tmp_path / "plain.log").read_text()
