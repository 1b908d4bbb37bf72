"""A bundle with planted code, sent through a real SuperLink to a real site."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from client.chain import read
from server.processes import free_port
from server.provision import provision

BIN = Path(sys.executable).parent
SECONDS = 180

PYPROJECT = """\
[project]
name = "fedmermed"
version = "0.1.0"

[tool.flwr.app]
publisher = "fedmermed"

[tool.flwr.app.components]
serverapp = "ask:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
"""

EVIL = "import sys\nwith open({planted!r}, 'a') as f: f.write(sys.argv[0] + chr(10))\n{more}"

ASK = """\
import json, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.5)
    replies = []
    for kind in {kinds!r}:
        content = RecordDict({{"config": ConfigRecord({{"study": "ab" * 16}})}})
        [reply] = grid.send_and_receive([Message(content, nodes[0], kind)], timeout={seconds})
        if reply.has_error():
            replies.append([kind, reply.error.code, reply.error.reason])
        else:
            replies.append([kind, 0, {{n: dict(r) for n, r in reply.content.items()}}])
    Path({answers!r}).write_text(json.dumps(replies))
"""


def environment(home):
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    kept = {name: v for name, v in os.environ.items() if not name.lower().endswith("_proxy")}
    return kept | quiet | {"PATH": path, "FLWR_HOME": str(home)}


@contextmanager
def running(log, words, *, home, ready):
    """A process that has printed `ready`; at the end it has ended."""
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [str(word) for word in words],
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment(home),
        )  # fmt: skip
    try:
        deadline = time.monotonic() + SECONDS
        while ready not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(40)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def study(tmp_path):
    """A SuperLink of Flower's own, and one site that has joined; returns directory, site file."""
    directory, port = tmp_path / "study", free_port()
    list(provision(directory, address=f"localhost:{port}", sites=["st-mary"]))
    (directory / "flower").mkdir(exist_ok=True)
    (directory / "flower" / "config.toml").write_text(
        f'[superlink.fedmermed]\naddress = "127.0.0.1:{port}"\n'
        f'root-certificates = "{directory / "ca.crt"}"\n'
    )
    superlink = [
        BIN / "flower-superlink", "--host", "127.0.0.1", "--port", port,
        "--ssl-ca-certfile", directory / "ca.crt", "--ssl-certfile", directory / "server.crt",
        "--ssl-keyfile", directory / "server.key", "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    site = directory / "kits" / "st-mary"
    join = [sys.executable, "-m", "client", "join", site, "--port", free_port()]
    home, state = directory / "flower", site / "state" / "flower"
    with running(tmp_path / "superlink.log", superlink, home=home, ready="Uvicorn running"):
        key = directory / "sites" / "st-mary.pub"
        words = [BIN / "flwr", "supernode", "register", key, "fedmermed"]
        subprocess.run(words, env=environment(home), check=True, capture_output=True)
        with running(
            log := tmp_path / "site.log", join, home=state, ready="connected to the coord"
        ):
            yield directory, site / "site.toml"
    assert "stopped" in log.read_text()


def submit(directory, app, kinds):
    """Have a ServerApp ask the site, from a bundle that plants code; returns the answers."""
    answers, planted = app.parent / "answers.json", str(app.parent / "planted")
    for package in ("client", "core"):
        (app / package).mkdir(parents=True, exist_ok=True)
        (app / package / "__init__.py").write_text(EVIL.format(planted=planted, more=""))
    more = "from flwr.clientapp import ClientApp\napp = ClientApp()\n"
    (app / "client" / "app.py").write_text(EVIL.format(planted=planted, more=more))
    (app / "pyproject.toml").write_text(PYPROJECT)
    ask = ASK.format(kinds=kinds, answers=str(answers), seconds=SECONDS)
    (app / "ask.py").write_text(ask)
    answers.unlink(missing_ok=True)
    home = directory / "flower"
    done = subprocess.run(
        [BIN / "flwr", "run", app, "fedmermed", "--stream"],
        env=environment(home), capture_output=True, text=True, timeout=3 * SECONDS,
    )  # fmt: skip
    assert answers.exists(), done.stdout + done.stderr
    # The plant works: `flwr run`, on the coordinator's side, imported it. Nobody else did.
    ran = {Path(line).name for line in Path(planted).read_text().splitlines()}
    assert ran == {"flwr"}
    return json.loads(answers.read_text())


def test_a_bundle_with_planted_code_does_not_run_at_a_site(study, tmp_path):
    directory, site_file = study
    app = tmp_path / "sent" / "evil"
    (query, odd, broken) = submit(directory, app, ["query", "train.odd", "train"])
    assert query[:2] == ["query", 0]
    assert query[2]["info"]["site"] == "st-mary"  # our app answered
    assert odd[1:] == [2, "this site answers messages of type query, train and evaluate alone"]
    assert broken[1:] == [2, "the message does not hold exactly what a train message should"]
    state = site_file.parent / "state"
    assert not (state / "flower" / "apps").exists()  # nor was it unpacked
    assert oct((state / "runtime.secret").stat().st_mode & 0o777) == "0o600"
    chain = read(state)
    assert not chain.problem
    bundles = {entry["bundle"] for entry in chain.entries}
    [bundle] = bundles
    assert len(chain.entries) == 6  # a line in and a line out each, also of what was refused

    with open(site_file, "a") as file:
        file.write(f"[policy]\nallowed_apps = ['{'ab' * 32}']\n")
    [query] = submit(directory, app, ["query"])
    [_, code, reason] = query
    assert code == 2
    assert reason.startswith("this site's policy does not answer runs submitted with the bundle ")
    assert read(state).entries[-1]["decision"] == f"not done: {reason}"
    assert bundle not in reason  # another question, another bundle
