"""The operations manual against commands, services, settings and messages that it speaks of."""

import re
from pathlib import Path

import pytest
import typer
import yaml

import client.__main__
import server.__main__
from client.policy import Policy
from core.config import FederationConfig
from core.privacy.config import PrivacyConfig

ROOT = Path(__file__).parents[1]
MANUAL = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
KEYS = {*FederationConfig.model_fields, *Policy.model_fields}
FLOWERS = {"ClientApp stopped responding"}
"""Messages of Flower's own."""
APPS = {"fedmermed-server": server.__main__.app, "fedmermed-site": client.__main__.app}


def commands(app):
    """Name -> options of each command."""
    found = typer.main.get_command(app).commands
    return {
        name: {word for option in command.params for word in option.opts}
        for name, command in found.items()
    }


def source():
    """All our code as one text, its broken strings joined."""
    text = "\n".join(
        file.read_text(encoding="utf-8")
        for package in ("core", "client", "server")
        for file in (ROOT / package).rglob("*.py")
    )
    return re.sub(r'"\s*\n\s*f?"', "", text)


def messages():
    tables = MANUAL[MANUAL.index("## Messages") :]
    rows = re.findall(r"^\| (.*?) \|", tables, re.MULTILINE)
    return [words for row in rows for words in re.findall(r"`([^`]+)`", row)]


def test_every_command_and_option_of_the_manual_exists():
    found = re.findall(r"(fedmermed-\w+) (\w+)([^`]*)`", MANUAL)
    assert len(found) >= 5
    for program, command, rest in found:
        known = commands(APPS[program])
        assert command in known, f"{program} {command}"
        assert set(re.findall(r"--[\w-]+", rest)) <= known[command], f"{program} {command}{rest}"


def test_every_service_of_the_manual_is_one_of_the_compose_file():
    named = set(re.findall(r"service `(\w+)`", MANUAL))
    assert named == {"gateway", "superlink", "apps", "supernode", "trainer"}
    assert named <= set(COMPOSE["services"])


def test_every_network_of_the_manual_is_closed_to_the_outside():
    named = set(re.findall(r"network `(\w+)`", MANUAL))
    assert named == {"core", "inside"}
    assert all(COMPOSE["networks"][name]["internal"] is True for name in named)


@pytest.mark.parametrize(
    ("port", "service"), [("8000/tcp", "superlink"), ("9094/tcp", "supernode")]
)
def test_the_firewall_table_has_the_ports_of_the_compose_file(port, service):
    assert port in MANUAL
    assert port.partition("/")[0] in str(COMPOSE["services"][service])
    assert "ports" not in COMPOSE["services"][service]


def test_every_setting_of_the_manual_is_a_key_of_recipe_or_policy():
    rules = MANUAL[MANUAL.index("Rules of a round") : MANUAL.index("## Backup")]
    named = {word for word in re.findall(r"`(\w+)`", rules + MANUAL) if "_" in word}
    places = {"state_dir", "allowed_apps"}  # of the site file
    assert named - places <= KEYS
    assert {"min_sites", "grace_seconds", "round_timeout_seconds", "quarantine_after"} <= named


@pytest.mark.parametrize("words", sorted(set(messages())))
def test_every_message_of_the_manual_is_one_that_is_given(words):
    if words in FLOWERS or words in {"join", "check"}:
        return
    assert words in source()


def test_every_test_that_the_privacy_page_names_exists_and_every_setting_too():
    page = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)`", page)
    assert len(named) >= 12
    assert not [name for name in named if not (ROOT / name).is_file()]
    settings = {*PrivacyConfig.model_fields, *Policy.model_fields}
    told = re.findall(r"`(?:privacy\.)?([a-z]+(?:_[a-z]+)+)`", page)
    assert not [name for name in told if name not in settings]
