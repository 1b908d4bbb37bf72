"""Dockerfile, compose file, start-up kits and manual: what they tell one to run exists."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import typer
import yaml

from client.__main__ import app as site_app
from core.__main__ import app as eval_app
from server.__main__ import app as server_app
from server.provision import provision

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = (ROOT / "docker-compose.yml").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICES = yaml.safe_load(COMPOSE)["services"]
PROFILES = {profile for service in SERVICES.values() for profile in service["profiles"]}
USER = "10001:10001"
PROGRAMS = {
    "fedmermed-site": site_app,
    "fedmermed-server": server_app,
    "fedmermed-eval": eval_app,
}


def understood(words):
    """Hold that one of our programs has such a command with such options; nothing is run."""
    command = typer.main.get_command(PROGRAMS[words[0]])
    name, *rest = words[1:]
    assert name in command.commands, words
    command.commands[name].make_context(name, rest)


def test_images_run_commands_that_our_programs_have():
    for service in SERVICES.values():  # a tool's entrypoint is followed by two paths
        understood(
            service["command"] if "command" in service else [*service["entrypoint"], "x", "y"]
        )


def test_a_command_that_our_programs_lack_is_found():
    with pytest.raises(click.UsageError):
        understood(["fedmermed-site", "join", "/site", "--no-such-option"])
    with pytest.raises(AssertionError):
        understood(["fedmermed-site", "no-such-command"])


def test_the_dockerfile_holds_no_secret_and_no_address_and_ends_without_root():
    assert not re.search(r"https?://|^ADD ", DOCKERFILE, re.M)
    assert not re.search(r"^(ARG|ENV) .*(KEY|TOKEN|SECRET|PASSWORD)", DOCKERFILE, re.M)
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.M)[1:]
    images = {s.split()[3 - 1]: s for s in stages}
    assert set(images) == {"tools", "runtime", "server", "site"}
    for name in ("server", "site"):
        assert re.findall(r"^USER (.*)$", images[name], re.M) == [USER]
        assert (
            "COPY" not in images[name]
        )  # no layer can hold what the checkout holds beside our code
    assert "--extra" not in images["server"]
    assert f"useradd --uid {USER.partition(':')[0]}" in images["runtime"]
    for variable in ("FLWR_TELEMETRY_ENABLED=0", "FLWR_DISABLE_UPDATE_CHECK=1"):
        assert variable in images["runtime"]


def test_a_build_sees_our_packages_and_nothing_else():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] != "#"]
    assert lines[0] == "*"
    packages = {"!core", "!client", "!server"}
    files = {"!constraints.txt", "!pyproject.toml", "!README.md", "!LICENSE", "!docker-compose.yml"}
    assert {line for line in lines if line.startswith("!")} == packages | files


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    study = tmp_path_factory.mktemp("kits") / "study"
    list(provision(study, address="fl.example.org:443", sites=["St.Mary"]))
    return study / "kits" / "St.Mary"


def test_a_kit_has_the_compose_file_and_what_it_asks_for(kit):
    assert (kit / "docker-compose.yml").read_text() == COMPOSE
    lines = [line for line in (kit / ".env").read_text().splitlines() if line[:1] != "#"]
    settings = dict(line.split("=", 1) for line in lines)
    known = set(re.findall(r"\$\{([A-Z_]+):-", COMPOSE))
    assert set(settings) - known == {"COMPOSE_PROJECT_NAME", "COMPOSE_PROFILES"}
    assert settings["COMPOSE_PROJECT_NAME"] == "fedmermed-st-mary"
    assert settings["COMPOSE_PROFILES"] in PROFILES
    assert settings["KIT"] == "."


def test_a_kit_takes_the_gpu_out_of_every_service_of_a_hospital_that_has_one(kit):
    gpu = {name for name, service in SERVICES.items() if "deploy" in service}
    override = (kit / "cpu.yml").read_text()
    assert re.findall(r"^  ([\w-]+):\n    deploy: !reset null$", override, re.M) == sorted(
        gpu, reverse=True
    )
    assert "cpu.yml" in (kit / ".env").read_text()


def test_what_people_are_told_to_type_exists(kit):
    """`docker compose` lines of kit, compose file and, if it is there, the operations manual."""
    manual = ROOT / "docs" / "operations.md"
    texts = [(kit / "README.md").read_text().replace("\n", " "), COMPOSE]
    texts.append((ROOT / "README.md").read_text())
    texts += [manual.read_text()] if manual.exists() else []
    told = [line for text in texts for line in re.findall(r"docker\s+compose ([^`\n]*)", text)]
    assert len(told) > 15
    for line in told:
        line = re.split(r"  |\s#", line)[0]
        for profile in re.findall(r"--profile (\w+)", line):
            assert profile in PROFILES, line
        if run := re.match(r"(?:exec|run --rm) ([\w-]+) ?(.*)$", line):
            assert run[1] in SERVICES, line
            if words := [*SERVICES[run[1]].get("entrypoint", ()), *shlex.split(run[2])]:
                understood(words)


@pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint is not installed")
def test_hadolint_finds_nothing_in_the_dockerfile():
    subprocess.run(["hadolint", ROOT / "Dockerfile"], check=True)
