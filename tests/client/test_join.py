import datetime as dt
import importlib.metadata
import json
import os
import sys
import threading

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from client.join import check_kit, hold_alone, join
from client.parts import Meeting, await_secret, make_secret
from client.site import load_site
from core.errors import UserError
from server.certificates import make_authority, new_key, private_pem
from server.processes import free_port
from server.provision import provision


@pytest.fixture
def kit(tmp_path):
    """A kit for a coordinator that is away."""
    list(provision(tmp_path / "study", address=f"127.0.0.1:{free_port()}", sites=["st-mary"]))
    return tmp_path / "study" / "kits" / "st-mary"


def check(kit):
    return check_kit(kit / "site.toml", load_site(kit / "site.toml"))


def meeting(kit, port=9123):
    return Meeting("127.0.0.1", port, f"127.0.0.1:{port}", kit / "state" / "runtime.secret")


def option(words, name):
    return words[words.index(name) + 1]


@pytest.fixture
def started(monkeypatch):
    """What `join` turns into, instead of doing so."""
    calls = []

    def execve(*call):
        calls.append(call)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", execve)
    return calls


def test_the_supernode_part_becomes_a_silent_supernode_with_the_key(kit, started, monkeypatch):
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.delenv("FLWR_HOME", raising=False)
    with pytest.raises(SystemExit):
        join(kit / "site.toml", meeting(kit), "supernode")
    [(program, words, environment)] = started
    assert (program, words[1:4]) == (sys.executable, ["-P", "-m", "client.supernode"])
    assert option(words, "--superlink") == load_site(kit / "site.toml").coordinator.superlink
    assert option(words, "--root-certificates") == str(kit / "ca.crt")
    assert option(words, "--auth-supernode-private-key") == str(kit / "site.key")
    assert option(words, "--node-config") == f'site="{kit / "site.toml"}"'
    assert (option(words, "--host"), option(words, "--port")) == ("127.0.0.1", "9123")
    assert option(words, "--isolation") == "process"
    assert option(words, "--superexec-auth-secret-file") == str(meeting(kit).secret)
    assert "--insecure" not in words
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["PATH"].split(os.pathsep)[0] == os.path.dirname(program)
    assert environment["FLWR_HOME"] == str(kit / "state" / "flower")
    assert (kit / "state").stat().st_mode & 0o777 == 0o700


def test_the_supernode_part_makes_the_secret_once_for_its_owner_alone(kit, started):
    made = set()
    for _ in range(2):
        with pytest.raises(SystemExit):
            join(kit / "site.toml", meeting(kit), "supernode")
        secret = meeting(kit).secret
        assert secret.stat().st_mode & 0o777 == 0o600
        made.add(secret.read_bytes())
    [data] = made
    assert len(data) == 64


def test_the_trainer_part_speaks_to_the_supernode_alone(kit, started, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example.org")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", "lib", "/opt/torch"]))
    secret = kit / "elsewhere"
    make_secret(secret)
    with pytest.raises(SystemExit):
        join(kit / "site.toml", Meeting("", 1, "supernode:9094", secret), "trainer")
    [(program, words, environment)] = started
    assert program == sys.executable
    assert words[1:5] == ["-P", "-m", "client.trainer", str(kit / "site.toml")]
    assert option(words, "--runtime-api-address") == "supernode:9094"
    assert option(words, "--superexec-auth-secret-file") == str(secret)
    assert "HTTP_PROXY" not in environment
    paths = environment["PYTHONPATH"].split(os.pathsep)
    assert paths[-1] == "/opt/torch"
    assert all(os.path.isabs(path) for path in paths)  # no current folder, by whatever name
    assert environment["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] == "0.25"


def test_how_often_the_trainer_looks_can_be_set(kit, started, monkeypatch):
    monkeypatch.setenv("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "2")
    make_secret(secret := kit / "secret")
    with pytest.raises(SystemExit):
        join(kit / "site.toml", Meeting("", 1, "supernode:9094", secret), "trainer")
    assert started[0][2]["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] == "2"


def test_the_trainer_part_waits_for_the_secret(kit):
    secret = meeting(kit).secret
    later = threading.Timer(0.3, make_secret, [secret])
    later.start()
    await_secret(secret, seconds=0.05)
    assert secret.exists()


def test_a_secret_that_others_may_read_is_refused(kit):
    secret = kit / "secret"
    make_secret(secret)
    secret.chmod(0o640)
    for use in (make_secret, await_secret):
        with pytest.raises(UserError, match=r"open to others .*\(mode 640\); run: chmod 600"):
            use(secret)


def test_join_becomes_a_light_supervisor_of_both_parts(kit, started):
    with pytest.raises(SystemExit):
        join(kit / "site.toml", meeting(kit))
    [(program, words, environment)] = started
    assert (program, words[1:4]) == (sys.executable, ["-P", "-m", "client.supervisor"])
    supernode, trainer = json.loads(words[4])
    for part, name in ((supernode, "supernode"), (trainer, "trainer")):
        assert part["name"] == option(part["words"], "--part") == name
        assert option(part["words"], "--parent") == str(os.getpid())
        assert option(part["words"], "--port") == "9123"
        assert part["words"][5] == str(kit / "site.toml")
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"


def test_a_second_join_of_a_site_is_refused_while_the_first_runs(kit):
    (kit / "state").mkdir()
    lock = hold_alone(load_site(kit / "site.toml"))
    assert os.get_inheritable(lock)  # it outlasts the exec
    with pytest.raises(UserError, match=r"site 'st-mary' has joined already"):
        join(kit / "site.toml", meeting(kit))
    os.close(lock)
    os.close(hold_alone(load_site(kit / "site.toml")))


@pytest.mark.parametrize("key", ["superlink", "root_certificates", "private_key"])
def test_what_the_site_file_does_not_say_is_asked_for(kit, key):
    lines = (kit / "site.toml").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(key)]
    (kit / "site.toml").write_text("\n".join(kept))
    with pytest.raises(UserError, match=rf"site.toml': \[coordinator\] {key} is missing; take it"):
        check(kit)


def test_a_key_that_others_may_read_is_refused(kit):
    for mode in (0o640, 0o604, 0o620):
        (kit / "site.key").chmod(mode)
        with pytest.raises(UserError, match=rf"open to others .*\(mode {mode:o}\); run: chmod 600"):
            check(kit)


def test_a_missing_key_is_named(kit):
    (kit / "site.key").unlink()
    with pytest.raises(UserError, match=r"site.key' cannot be read: No such file"):
        check(kit)


def test_a_key_that_flower_would_not_take_is_refused_without_quoting_it(kit):
    file = kit / "site.key"
    whole = file.read_bytes()
    edwards = ed25519.Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
    )
    for data in (b"", whole[: len(whole) // 2], edwards, private_pem(new_key())):
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"holds no unencrypted elliptic-curve key") as caught:
            check(kit)
        assert not any(line in str(caught.value) for line in data.decode().splitlines())


def test_root_certificates_that_are_no_certificates_are_refused(kit):
    for data in (b"", b"hello", (kit / "ca.crt").read_bytes()[:200]):
        (kit / "ca.crt").write_bytes(data)
        with pytest.raises(UserError, match=r"ca.crt' cannot be read as PEM: .*; put ca.crt"):
            check(kit)
    (kit / "ca.crt").unlink()
    with pytest.raises(UserError, match=r"ca.crt' cannot be read as PEM: No such file"):
        check(kit)


def test_an_expired_authority_is_refused(kit):
    born = dt.datetime.now(dt.UTC) - dt.timedelta(days=3651)
    certificate = make_authority(new_key(), born)
    (kit / "ca.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    with pytest.raises(UserError, match=r"ca.crt' expired on .*; ask the coordinator"):
        check(kit)


def test_without_flower_it_says_so(kit, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(UserError, match=r"Flower is not installed; run: pip install flwr==1"):
        join(kit / "site.toml", meeting(kit))
