"""What docker-compose.yml promises a hospital's IT office, held against its text."""

import copy
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = (ROOT / "docker-compose.yml").read_text()
USER = "10001:10001"
LOCAL = {"a", "b", "c"}
NETWORKS = {
    "superlink": {"core"},
    "apps": {"core"},
    "gateway": {"core", "front"},
    "supernode": {"inside", "outside"},
    "trainer": {"inside"},
    "check": {"outside"},
    "prepare": set(),
    "init": set(),
    "export": set(),
    **{f"supernode-{name}": {"front", f"inside-{name}"} for name in LOCAL},
    **{f"trainer-{name}": {f"inside-{name}"} for name in LOCAL},
}
PROFILES = {
    "coordinator": {"superlink", "apps", "gateway"},
    "site": {"supernode", "trainer"},
    "local": {"superlink", "apps", "gateway"}
    | {f"{part}-{name}" for part in ("supernode", "trainer") for name in LOCAL},
    "tools": {"prepare", "check", "init", "export"},
}
KEYS = {
    *("user", "read_only", "cap_drop", "security_opt", "tmpfs", "pids_limit", "init", "restart"),
    *("stop_grace_period", "pull_policy", "logging", "image", "profiles", "healthcheck", "command"),
    *("mem_limit", "shm_size", "networks", "network_mode", "depends_on", "volumes", "configs"),
    *("secrets", "ports", "deploy", "entrypoint"),
}
"""All that a service may say: no environment, capability, privilege, device or build."""
WRITABLE = {"/runs", "/study", "/state", "/site/state", "/link"}
"""Where a volume may be written; elsewhere only by the tool that prepares data."""


STUDY = {
    **{"type": "bind", "source": "${STUDY:-./study}", "target": "/study", "read_only": True},
    "bind": {"create_host_path": False},
}


class Loader(yaml.SafeLoader):
    """Knows compose's own tag."""


Loader.add_constructor("!reset", lambda *_: None)


def problems(compose):
    """Every broken promise of a compose file, as a line each."""
    found = []
    for name, service in compose["services"].items():
        wrong = [*locked(service), *connected(name, service, compose), *mounted(name, service)]
        found += [f"{name}: {each}" for each in wrong]
    for profile, services in PROFILES.items():
        there = {n for n, s in compose["services"].items() if profile in s.get("profiles", ())}
        if there != services:
            found.append(f"profile {profile} has {sorted(there)}")
    for name, network in compose["networks"].items():
        closed = "internal" in network and network["driver_opts"] == {
            "com.docker.network.bridge.inhibit_ipv4": "true"
        }
        if closed != (name not in ("front", "outside")):
            found.append(f"network {name} is {'closed' if closed else 'open'}")
    found += [f"secret {n} is no file" for n, s in compose["secrets"].items() if set(s) != {"file"}]
    return found


def locked(service):
    """How a service's container is less locked down than it should be."""
    wanted = {
        "user": USER,
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "init": True,
        "pull_policy": "never",
    }
    yield from (f"{k} is {service.get(k)!r}" for k, v in wanted.items() if service.get(k) != v)
    yield from (f"'{key}' is not for a service" for key in set(service) - KEYS)
    if not {"mem_limit", "pids_limit"} <= set(service):
        yield "has no limit"
    if "max-size" not in service.get("logging", {}).get("options", {}):
        yield "its log has no limit"
    tool = "tools" in service["profiles"]
    if service.get("restart") != ("no" if tool else "unless-stopped"):
        yield "restarts otherwise"
    if not tool and "test" not in service.get("healthcheck", {}):
        yield "has no healthcheck"


def connected(name, service, compose):
    """How a service reaches, or is reached by, others than it should."""
    networks = set(service.get("networks", ()))
    if networks != NETWORKS.get(name) or (not networks and service.get("network_mode") != "none"):
        yield f"is on {sorted(networks)}"
    if networks and "network_mode" in service:
        yield "has a network_mode"
    if ("ports" in service) != (name == "gateway"):
        yield "publishes a port, or does not"
    for other in service.get("depends_on", ()):
        if other not in compose["services"]:
            yield f"depends on '{other}', which is no service"


def mounted(name, service):
    """What of the host's files and of the volumes a service sees beyond its need."""
    seen = {}
    for volume in service.get("volumes", ()):
        if isinstance(volume, str):
            source, target, *mode = volume.split(":")
            seen[target] = source, mode == ["ro"]
        else:
            seen[volume["target"]] = volume["source"], volume.get("read_only", False)
            if volume["bind"] != {"create_host_path": False}:
                yield f"makes {volume['source']} as root if it is missing"
    for target, (source, read_only) in seen.items():
        if not read_only and target not in WRITABLE and (name, target) != ("prepare", "/site/data"):
            yield f"may write {target}"
        if source == "${STUDY:-./study}" and name != "superlink":
            yield "sees the whole directory of the coordinator"
        if target == "/site/data" and not name.startswith(("trainer", "prepare", "check")):
            yield "sees images"
    secrets = {secret["target"] for secret in service.get("secrets", ())}
    kind = name.partition("-")[0]
    keys = {"gateway": {"/study/server.key"}, "supernode": {"/site/site.key"}}
    if secrets != keys.get("supernode" if kind == "check" else kind, set()):
        yield f"gets the secrets {sorted(secrets)}"


@pytest.fixture
def compose():
    return copy.deepcopy(yaml.load(COMPOSE, Loader))


def test_every_promise_of_the_compose_file_holds(compose):
    assert problems(compose) == []


@pytest.mark.parametrize(
    ("service", "change", "complaint"),
    [
        ("apps", {"user": "0:0"}, "apps: user is '0:0'"),
        ("gateway", {"read_only": False}, "gateway: read_only is False"),
        ("trainer", {"cap_drop": ["NET_RAW"]}, "trainer: cap_drop is"),
        ("trainer", {"cap_add": ["SYS_ADMIN"]}, "trainer: 'cap_add' is not for"),
        ("supernode", {"security_opt": []}, "supernode: security_opt is"),
        ("trainer", {"privileged": True}, "trainer: 'privileged' is not for"),
        ("apps", {"environment": {"KEY": "x"}}, "apps: 'environment' is not for"),
        ("apps", {"env_file": ".env"}, "apps: 'env_file' is not for"),
        ("apps", {"pull_policy": "always"}, "apps: pull_policy is"),
        ("superlink", {"ports": ["8000:8000"]}, "superlink: publishes a port"),
        ("superlink", {"networks": ["core", "front"]}, "superlink: is on"),
        ("superlink", {"network_mode": "host"}, "superlink: has a network_mode"),
        ("trainer-a", {"networks": ["inside-a", "front"]}, "trainer-a: is on"),
        ("gateway", {"healthcheck": {}}, "gateway: has no healthcheck"),
        ("gateway", {"logging": {}}, "gateway: its log has no limit"),
        ("gateway", {"restart": "no"}, "gateway: restarts otherwise"),
        ("gateway", {"depends_on": ["nobody"]}, "gateway: depends on 'nobody'"),
        ("trainer", {"volumes": ["./data:/site/data"]}, "trainer: may write /site/data"),
        ("supernode", {"volumes": ["./data:/site/data:ro"]}, "supernode: sees images"),
        ("gateway", {"volumes": [STUDY]}, "gateway: sees the whole"),
        ("trainer", {"secrets": [{"target": "/site/site.key"}]}, "trainer: gets the secrets"),
        ("apps", {"profiles": ["coordinator"]}, "profile local has"),
    ],
)
def test_a_broken_promise_is_found(compose, service, change, complaint):
    compose["services"][service] |= change
    assert any(line.startswith(complaint) for line in problems(compose))


def test_a_limit_or_a_closed_network_or_a_file_that_is_missing_is_found(compose):
    del compose["services"]["apps"]["mem_limit"]
    del compose["networks"]["core"]["internal"]
    compose["secrets"]["site_key"] = {"environment": "KEY"}
    compose["services"]["trainer"]["volumes"][0]["bind"] = {}
    found = problems(compose)
    assert "apps: has no limit" in found
    assert "network core is open" in found
    assert "secret site_key is no file" in found
    assert any(line.startswith("trainer: makes ${DATA") for line in found)


def test_every_variable_is_documented_with_its_default():
    used = dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", COMPOSE))
    assert len(re.findall(r"\$\{?[A-Za-z_]+", COMPOSE)) == len(
        re.findall(r"\$\{[A-Z_]+:-", COMPOSE)
    )
    told = dict(re.findall(r"^#   ([A-Z_]+) .* ([^ \n]+)$", COMPOSE, re.M))
    assert told == used


def test_every_named_volume_config_and_secret_is_used(compose):
    text = COMPOSE.partition("services:")[2].partition("\nnetworks:")[0]
    for kind in ("volumes", "configs", "secrets", "networks"):
        for name in compose[kind]:
            assert re.search(rf"\b{re.escape(name)}\b", text), (kind, name)


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="docker-compose is not installed")
@pytest.mark.parametrize("profile", PROFILES)
def test_compose_itself_takes_the_file(profile):
    words = ["docker-compose", "--project-directory", ROOT, "--profile", profile, "config", "-q"]
    subprocess.run(words, check=True)
