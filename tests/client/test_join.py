import datetime as dt
import os

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from client import join as module
from client.join import join, supernode_command
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


def command(kit):
    return supernode_command(kit / "site.toml", load_site(kit / "site.toml"), 9094)


def option(words, name):
    return words[words.index(name) + 1]


def test_a_kit_becomes_a_silent_supernode_with_its_key(kit, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.delenv("FLWR_HOME", raising=False)
    join(kit / "site.toml", 9123)
    [(program, words, environment)] = started
    assert os.path.basename(program) == "flower-supernode"
    assert option(words, "--superlink") == load_site(kit / "site.toml").coordinator.superlink
    assert option(words, "--root-certificates") == str(kit / "ca.crt")
    assert option(words, "--auth-supernode-private-key") == str(kit / "site.key")
    assert option(words, "--node-config") == f'site="{kit / "site.toml"}"'
    assert (option(words, "--host"), option(words, "--port")) == ("127.0.0.1", "9123")
    assert "--insecure" not in words
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["PATH"].split(os.pathsep)[0] == os.path.dirname(program)
    assert environment["FLWR_HOME"] == str(kit / "state" / "flower")
    assert (kit / "state").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("key", ["superlink", "root_certificates", "private_key"])
def test_what_the_site_file_does_not_say_is_asked_for(kit, key):
    lines = (kit / "site.toml").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(key)]
    (kit / "site.toml").write_text("\n".join(kept))
    with pytest.raises(UserError, match=rf"site.toml': \[coordinator\] {key} is missing; take it"):
        command(kit)


def test_a_key_that_others_may_read_is_refused(kit):
    for mode in (0o640, 0o604, 0o620):
        (kit / "site.key").chmod(mode)
        with pytest.raises(UserError, match=rf"open to others .*\(mode {mode:o}\); run: chmod 600"):
            command(kit)


def test_a_missing_key_is_named(kit):
    (kit / "site.key").unlink()
    with pytest.raises(UserError, match=r"site.key' cannot be read: No such file"):
        command(kit)


def test_a_key_that_flower_would_not_take_is_refused_without_quoting_it(kit):
    file = kit / "site.key"
    whole = file.read_bytes()
    edwards = ed25519.Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
    )
    for data in (b"", whole[: len(whole) // 2], edwards, private_pem(new_key())):
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"holds no unencrypted elliptic-curve key") as caught:
            command(kit)
        assert not any(line in str(caught.value) for line in data.decode().splitlines())


def test_root_certificates_that_are_no_certificates_are_refused(kit):
    for data in (b"", b"hello", (kit / "ca.crt").read_bytes()[:200]):
        (kit / "ca.crt").write_bytes(data)
        with pytest.raises(UserError, match=r"ca.crt' cannot be read as PEM: .*; put ca.crt"):
            command(kit)
    (kit / "ca.crt").unlink()
    with pytest.raises(UserError, match=r"ca.crt' cannot be read as PEM: No such file"):
        command(kit)


def test_an_expired_authority_is_refused(kit):
    born = dt.datetime.now(dt.UTC) - dt.timedelta(days=3651)
    certificate = make_authority(new_key(), born)
    (kit / "ca.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    with pytest.raises(UserError, match=r"ca.crt' expired on .*; ask the coordinator"):
        command(kit)


def test_without_flower_beside_this_python_it_says_so(kit, monkeypatch, tmp_path):
    monkeypatch.setattr(module.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match=r"flower-supernode' does not exist; install flwr"):
        join(kit / "site.toml", 9094)
