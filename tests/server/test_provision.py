import re
import stat
import subprocess
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from cryptography.x509.verification import PolicyBuilder, Store

from client.site import load_site
from core.checkpoint import write_json
from core.errors import UserError
from server.certificates import read_certificate, read_key
from server.provision import Provisioned, provision

ADDRESS = "fl.example.org:443"


@pytest.fixture
def place(tmp_path):
    """A coordinator's directory with sites a and b."""
    run(tmp_path / "study", address=ADDRESS, sites=["a", "b"])
    return tmp_path / "study"


def run(directory, **options):
    return list(provision(directory, **options))


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def public(path):
    return load_ssh_public_key(path.read_bytes())


@pytest.mark.parametrize(
    ("address", "subject"),
    [
        (ADDRESS, x509.DNSName("fl.example.org")),
        ("192.0.2.7:8443", "192.0.2.7"),
        ("[2001:db8::1]:443", "2001:db8::1"),
    ],
)
def test_the_server_certificate_verifies_for_the_address_and_this_machine(
    tmp_path, address, subject
):
    run(tmp_path / "study", address=address, days=30)
    authority = read_certificate(tmp_path / "study" / "ca.crt")
    server = read_certificate(tmp_path / "study" / "server.crt")
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    ours = names.get_values_for_type(x509.DNSName), names.get_values_for_type(x509.IPAddress)
    wanted = subject.value if isinstance(subject, x509.DNSName) else subject
    for host in (wanted, "localhost", "127.0.0.1"):
        assert host in [*ours[0], *map(str, ours[1])]
    verifier = PolicyBuilder().store(Store([authority])).build_server_verifier
    verifier(x509.DNSName("localhost")).verify(server, [])  # by the rules of RFC 5280
    assert (server.not_valid_after_utc - server.not_valid_before_utc).days == 30
    key = read_key(tmp_path / "study" / "server.key")
    assert server.public_key() == key.public_key()


def test_a_kit_holds_what_its_site_needs(place):
    for name in ("a", "b"):
        kit = place / "kits" / name
        site = load_site(kit / "site.toml")
        assert site.name == name
        assert site.coordinator.superlink == ADDRESS
        assert site.coordinator.root_certificates == str(kit / "ca.crt")
        assert (kit / "ca.crt").read_bytes() == (place / "ca.crt").read_bytes()
        key = read_key(kit / "site.key")
        assert site.coordinator.private_key == str(kit / "site.key")
        assert key.public_key() == public(place / "sites" / f"{name}.pub")
        assert isinstance(key.curve, ec.SECP384R1)
        readme = (kit / "README.md").read_text()
        assert re.findall("fedmermed-site ([a-z]+)", readme)[:3] == ["prepare", "check", "join"]
    assert public(place / "sites" / "a.pub") != public(place / "sites" / "b.pub")


def test_private_keys_and_directories_are_the_owners_alone(place):
    for path in (place, *place.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir():
            assert mode == 0o700, path
        elif path.suffix == ".key":
            assert mode == 0o600, path
    private = [name for name, data in contents(place).items() if b"PRIVATE KEY" in data]
    assert sorted(private) == ["ca.key", "kits/a/site.key", "kits/b/site.key", "server.key"]


def test_run_again_it_adds_only_the_new_sites(place):
    before = contents(place)
    run(place, sites=["a", "b", "c"])
    after = contents(place)
    assert {name: after[name] for name in before} == before
    added = {name for name in after if name not in before}
    kit = ["ca.crt", "site.key", "site.toml", "README.md"]
    kit += ["docker-compose.yml", ".env", "cpu.yml"]  # for those who use containers
    assert added == {f"kits/c/{name}" for name in kit} | {"sites/c.pub"}


def test_a_kit_that_was_handed_over_and_deleted_is_not_made_again(place):
    for file in (place / "kits" / "a").iterdir():
        file.unlink()
    (place / "kits" / "a").rmdir()
    run(place, sites=["a"])
    assert not (place / "kits" / "a").exists()


def test_killed_anywhere_and_run_again_it_completes(tmp_path, kill_points):
    study = tmp_path / "study"
    seen = {}
    for killed in kill_points(lambda: run(study, address=ADDRESS, sites=["a", "b"])):
        assert killed or (study / "sites" / "b.pub").exists()
        now = contents(study) if study.exists() else {}
        keys = {name: now[name] for name in now if name.endswith((".key", ".pub", ".crt"))}
        kept = {name: data for name, data in seen.items() if "/." not in f"/{name}"}
        assert {name: keys[name] for name in kept} == kept  # nothing whole is replaced
        seen = keys
    for name in ("a", "b"):
        key = read_key(study / "kits" / name / "site.key")
        assert key.public_key() == public(study / "sites" / f"{name}.pub")
    assert not list(study.rglob("*.partial"))


def test_a_renewed_server_certificate_is_under_the_same_authority(place):
    before = contents(place)
    run(place, renew_server=True, days=10)
    after = contents(place)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"server.key", "server.crt"}
    server = read_certificate(place / "server.crt")
    server.verify_directly_issued_by(read_certificate(place / "ca.crt"))


def test_a_renewal_killed_anywhere_is_mended_by_the_next_run(place, kill_points):
    for _ in kill_points(lambda: run(place, renew_server=True)):
        run(place)
        key, server = read_key(place / "server.key"), read_certificate(place / "server.crt")
        assert server.public_key() == key.public_key()


def test_without_the_authoritys_key_sites_are_added_and_nothing_is_half_renewed(place):
    (place / "ca.key").unlink()
    before = contents(place)
    with pytest.raises(UserError, match=r"private key '.*ca.key' cannot be read"):
        run(place, renew_server=True)
    assert contents(place) == before
    run(place, sites=["c"])
    assert (place / "kits" / "c" / "site.key").exists()


def test_rotation_replaces_one_sites_key_and_says_how_to_refuse_the_old(place):
    old, other = public(place / "sites" / "a.pub"), (place / "sites" / "b.pub").read_bytes()
    lines = run(place, rotate="a")
    new = public(place / "sites" / "a.pub")
    assert new != old
    assert read_key(place / "kits" / "a" / "site.key").public_key() == new
    assert [public(file) for file in (place / "retired").iterdir()] == [old]
    assert (place / "sites" / "b.pub").read_bytes() == other
    assert f"site a: its old key is admitted until you run: fedmermed-server admit {place}" in lines


def test_a_rotation_killed_anywhere_is_finished_by_the_same_command(place, kill_points):
    for _ in kill_points(lambda: run(place, rotate="a")):
        run(place, rotate="a")
        key = read_key(place / "kits" / "a" / "site.key")
        assert key.public_key() == public(place / "sites" / "a.pub")


def test_revocation_forgets_the_key_and_says_how_to_have_it_refused(place):
    key = public(place / "sites" / "a.pub")
    lines = run(place, revoke="a")
    assert f"site a: its old key is admitted until you run: fedmermed-server admit {place}" in lines
    assert not (place / "sites" / "a.pub").exists()
    assert not (place / "kits" / "a").exists()
    assert [public(file) for file in (place / "retired").iterdir()] == [key]
    run(place, sites=["a"])  # comes back with another key
    assert public(place / "sites" / "a.pub") != key


def test_sites_are_named_until_they_are_admitted(place):
    [last] = [line for line in run(place) if "fedmermed-server admit" in line]
    assert last == f"once the service runs, admit a, b: fedmermed-server admit {place}"
    for name in ("a", "b"):
        write_json(Provisioned(place, ADDRESS).node(name), {"node-id": 4711})
    assert not [line for line in run(place) if "admit" in line]
    lines = run(place, rotate="a")
    assert any(line.startswith("once the service runs, admit a: ") for line in lines)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"address": "fl.example.org"}, "address 'fl.example.org' is not HOST:PORT"),
        ({"address": "https://fl.example.org:443"}, "is not HOST:PORT"),
        ({"address": "fl.example.org:0"}, "is not HOST:PORT"),
        ({}, "--address is missing"),
        ({"address": ADDRESS, "sites": ["../a"]}, "site name '../a'"),
        ({"address": ADDRESS, "rotate": "z"}, "site 'z' is not provisioned"),
        ({"address": ADDRESS, "revoke": "z"}, "site 'z' is not provisioned"),
        ({"address": ADDRESS, "rotate": "z", "revoke": "z"}, "rotated or revoked, not both"),
    ],
)
def test_a_bad_request_is_refused_before_a_key_is_made(tmp_path, options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        run(tmp_path / "study", **options)
    assert not list(tmp_path.rglob("*.key"))


def test_another_address_needs_a_new_certificate(place):
    with pytest.raises(UserError, match=r"provisioned for fl.example.org:443, not new.example.org"):
        run(place, address="new.example.org:443")
    run(place, address="new.example.org:443", renew_server=True, sites=["c"])
    names = (
        read_certificate(place / "server.crt")
        .extensions.get_extension_for_class(x509.SubjectAlternativeName)
        .value.get_values_for_type(x509.DNSName)
    )
    assert names == ["new.example.org", "localhost", "superlink"]
    site = load_site(place / "kits" / "c" / "site.toml")
    assert site.coordinator.superlink == "new.example.org:443"


def test_a_directory_that_others_may_read_is_refused(tmp_path):
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(UserError, match=r"open to others \(mode 755\); run: chmod 700"):
        run(tmp_path / "open", address=ADDRESS)


def test_the_command_prints_no_secret(tmp_path):
    study = tmp_path / "study"
    command = [sys.executable, "-m", "server", "provision", study, "--address", ADDRESS]
    for more in (["--sites", "a, b"], ["--rotate", "a"], ["--revoke", "b"], ["--renew-server"]):
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=True)
        assert done.stdout
        printed = done.stdout + done.stderr
        for file in study.rglob("*.key"):
            lines = file.read_text().splitlines()[1:-1]
            assert not [line for line in lines if line in printed]
