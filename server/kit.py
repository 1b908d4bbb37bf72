"""A site's start-up kit: what the coordinator hands to one hospital, by a safe way."""

import json
import os
import shutil
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
the coordinator is away or has not admitted this site yet. The firewall need let through one way
alone: TCP from here to {address}.
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
    write_atomically(aside / "README.md", README.format(name=kit.name, address=address).encode())
    commit_directory(aside, kit)
