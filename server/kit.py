"""A site's start-up kit: what the coordinator hands to one hospital, by a safe way."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

from core.checkpoint import commit_directory, write_atomically
from server.certificates import Key, private_ssh

SITE_FILE = """\
# This site's own file; it stays here. Paths are relative to it. What else may stand in it, the
# policy above all, is in the project's configs/sites/example.toml.

name = {name}
shards = ["data"]               # holds the shards that fedmermed-site prepare made
state_dir = "state"             # training state and audit.jsonl; keep it, and keep it private

[coordinator]
superlink = {address}
root_certificates = "ca.crt"    # vouches for the coordinator
private_key = "site.key"        # by which the coordinator knows this site; never leaves it
recipe = "recipe.toml"          # put the study's recipe there
"""

README = """\
# Start-up kit of site {name}

Keep this directory on the machine that will train, readable by its operator alone. `site.key` is
this site's identity: whoever has it can take part in its name. Lost or seen by others: tell the
coordinator, who makes a new one and has the old one refused.

Put the study's recipe here as `recipe.toml`, open `site.toml` and set the site's policy. Then:

    fedmermed-site prepare /archive/export data/radiology --recipe recipe.toml
    fedmermed-site check site.toml
    fedmermed-site join site.toml

`check` says for every red line what to do. `join` runs until it is stopped, and keeps trying while
the coordinator is away or has not admitted this site yet.

The same in containers, with Docker, its compose plugin (2.24 or newer), for a GPU NVIDIA's
container toolkit, and the image `fedmermed-site`. The containers' user has the number 10001; it
must be able to read `site.key` and `data`, and `prepare` to write there.

    sudo chown 10001:10001 site.key && sudo install --directory --owner 10001 data
    docker compose run --rm check
    docker compose up --detach --wait

`.env` says what may be set, a machine without a GPU among it. `ARCHIVE=/archive/export docker
compose run --rm prepare` prepares an archive, `docker compose exec trainer fedmermed-site audit
/site/site.toml` shows what came and left, and `docker compose down` stops.

Either way the firewall need let through one way alone: TCP from here to {address}.
"""

COMPOSE_ENV = """\
# `docker compose` reads this file by itself; docker-compose.yml lists all that may stand here.
COMPOSE_PROJECT_NAME=fedmermed-{project}
COMPOSE_PROFILES=site
KIT=.
DATA=./data
# Without a GPU, remove the '#':
# COMPOSE_FILE=docker-compose.yml:cpu.yml
"""

COMPOSE_CPU = """\
# Takes the GPU out of docker-compose.yml.
services:
  trainer:
    deploy: !reset null
  check:
    deploy: !reset null
"""


def make_kit(kit: Path, address: str, authority: bytes, key: Key) -> None:
    """Write a kit as one step: it is there whole, with a private key of mode 0600, or not at all.

    Args:
        kit: The directory to write; its name is the site's. One that is there is replaced.
        address: Where the site reaches the coordinator, host:port.
        authority: The CA's certificate in PEM.
        key: The site's private key.
    """
    aside = kit.with_name(f".{kit.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    os.mkdir(aside, 0o700)
    site_file = SITE_FILE.format(name=json.dumps(kit.name), address=json.dumps(address))
    write_atomically(aside / "ca.crt", authority)
    write_atomically(aside / "site.key", private_ssh(key), mode=0o600)
    write_atomically(aside / "site.toml", site_file.encode())
    project = re.sub("[^a-z0-9_-]", "-", kit.name.lower())  # all that compose takes
    write_atomically(aside / "docker-compose.yml", compose_file().read_bytes())
    write_atomically(aside / ".env", COMPOSE_ENV.format(project=project).encode())
    write_atomically(aside / "cpu.yml", COMPOSE_CPU.encode())
    write_atomically(aside / "README.md", README.format(name=kit.name, address=address).encode())
    commit_directory(aside, kit)


def compose_file() -> Path:
    """The project's docker-compose.yml: in the checkout, or as installed."""
    checkout = Path(__file__).resolve().parents[1] / "docker-compose.yml"
    return checkout if checkout.exists() else Path(sys.prefix, "share/fedmermed", checkout.name)
