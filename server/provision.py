"""Who may take part: the coordinator's directory of certificates, and start-up kits for the sites.

DIR/ca.key ca.crt           the CA; its key is needed for server certificates alone: keep it offline
DIR/server.key server.crt   what the SuperLink (and the gateway before it) shows
DIR/sites/NAME.pub          a site's public key, which `admit` registers with the SuperLink
DIR/registered/NAME-*.json  the node's id, as `admit` learnt it
DIR/retired/NAME-*.pub      public keys that were rotated or revoked; `admit` unregisters them
DIR/kits/NAME/              what the hospital gets, its private key with it; hand over, then delete
DIR/flower/config.toml      how Flower's own commands reach the SuperLink; written by `serve`

A site is provisioned once its public key is there: that file is written last.
"""

import datetime as dt
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import TypeAdapter, ValidationError

from core.address import Address, split_address
from core.checkpoint import read_json, sha256_file, write_atomically, write_json
from core.errors import UserError
from server.certificates import (
    fits,
    make_authority,
    make_server_certificate,
    new_key,
    private_pem,
    public_ssh,
    read_certificate,
    read_key,
)
from server.kit import make_kit
from server.roster import SITE_NAME


@dataclass(frozen=True)
class Provisioned:
    """The coordinator's directory."""

    directory: Path
    address: str

    def public_key(self, site: str) -> Path:
        """The file whose presence says that a site is provisioned."""
        return self.directory / "sites" / f"{site}.pub"

    def keyed(self, site: str) -> str:
        """A name for the site with this very key, so that no file is taken for another key's."""
        return f"{site}-{sha256_file(self.public_key(site))[:16]}"

    def node(self, site: str) -> Path:
        """Where the node's id is noted once its key is registered."""
        return self.directory / "registered" / f"{self.keyed(site)}.json"

    def kit(self, site: str) -> Path:
        """The site's start-up kit."""
        return self.directory / "kits" / site

    def admit(self) -> str:
        """The command that has the SuperLink follow this directory, as a shell takes it."""
        return f"fedmermed-server admit {shlex.quote(str(self.directory))}"

    def flower(self, *words: object) -> str:
        """A command of Flower's, as a shell takes it: to this SuperLink, and to nobody else."""
        home = shlex.quote(str(self.directory / "flower"))
        quiet = "FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1"
        return f"FLWR_HOME={home} {quiet} flwr supernode {shlex.join(map(str, words))}"


def provision(
    directory: Path,
    *,
    address: str | None = None,
    sites: Sequence[str] = (),
    days: int = 365,
    renew_server: bool = False,
    rotate: str | None = None,
    revoke: str | None = None,
) -> Iterator[str]:
    """Make what is missing, and say what was made and what to run next.

    Args:
        directory: The coordinator's directory; made if missing.
        address: Where sites reach the coordinator, host:port; needed the first time.
        sites: Names of sites that take part; those that are provisioned already are left alone.
        days: Life of a server certificate made now.
        renew_server: Make a new server key and certificate, for `address` if it is given.
        rotate: A site that gets a new key.
        revoke: A site whose key is retired.

    Yields:
        Lines for the coordinator; none holds a secret.

    Raises:
        UserError: a name or address is bad, or the directory does not fit what is asked.

    Guarantees:
        A key that exists is replaced by `renew_server` and `rotate` alone.
        Killed at any instant and run again, the same call completes.
        Private keys have mode 0600 and directories 0700 from the moment they exist.
    """
    for site in (*sites, *filter(None, (rotate, revoke))):
        if not SITE_NAME.fullmatch(site):
            raise UserError(f"site name '{site}' is not of letters, digits, '.', '_' and '-'")
    if rotate is not None and rotate == revoke:
        raise UserError(f"site '{rotate}' can be rotated or revoked, not both; leave one out")
    _make_private(directory.absolute())
    place = Provisioned(directory.absolute(), _settle_address(directory, address, renew_server))
    for site in filter(None, (rotate, revoke)):
        if not place.public_key(site).exists():
            raise UserError(f"site '{site}' is not provisioned in '{directory}'; see its sites/")
    for name in ("sites", "registered", "retired", "kits", "flower"):
        _make_private(place.directory / name)
    authority = _authority(place)
    yield from _server(place, authority, days, renew_server)
    if revoke:
        yield from _retire(place, revoke)
        if place.kit(revoke).exists():
            shutil.rmtree(place.kit(revoke))
        place.public_key(revoke).unlink()
    if rotate:
        yield from _rotate(place, rotate, authority)
    for site in sites:
        if not place.public_key(site).exists():
            yield from _add(place, site, authority)
    yield from _to_register(place)


def _make_private(directory: Path) -> None:
    if not directory.exists():
        os.makedirs(directory.parent, exist_ok=True)
        os.mkdir(directory, 0o700)
    if (mode := directory.stat().st_mode & 0o777) & 0o077:
        raise UserError(
            f"'{directory}' will hold private keys and is open to others (mode {mode:o}); "
            "run: chmod 700 " + shlex.quote(str(directory))
        )


def _settle_address(directory: Path, given: str | None, renew_server: bool) -> str:
    file = directory / "provision.json"
    known = str(read_json(file)["address"]) if file.exists() else None
    if given is None:
        if known is None:
            raise UserError("--address is missing: where sites will reach you, as HOST:PORT")
        return known
    try:
        TypeAdapter(Address).validate_python(given)
    except ValidationError:
        raise UserError(f"address '{given}' is not HOST:PORT, such as fl.example.org:443") from None
    if known is not None and given != known and not renew_server:
        raise UserError(
            f"'{directory}' is provisioned for {known}, not {given}; leave --address out, or add "
            "--renew-server to move"
        )
    if given != known:
        write_json(file, {"address": given})
    return given


def _authority(place: Provisioned) -> x509.Certificate:
    """The CA's certificate; made, with its key, if there is none."""
    file, key_file = place.directory / "ca.crt", place.directory / "ca.key"
    if not file.exists():
        if not key_file.exists():
            write_atomically(key_file, private_pem(new_key()), mode=0o600)
        made = make_authority(read_key(key_file), dt.datetime.now(dt.UTC))
        write_atomically(file, made.public_bytes(Encoding.PEM))
    return read_certificate(file)


def _server(
    place: Provisioned, authority: x509.Certificate, days: int, renew: bool
) -> Iterator[str]:
    file, key_file = place.directory / "server.crt", place.directory / "server.key"
    host = split_address(place.address)[0]
    if (
        renew
        or not (file.exists() and key_file.exists())
        or not fits(read_certificate(file), read_key(key_file), host)
    ):
        authority_key = read_key(place.directory / "ca.key")  # before anything is replaced
        if renew or not key_file.exists():
            write_atomically(key_file, private_pem(new_key()), mode=0o600)
        made = make_server_certificate(
            authority, authority_key, read_key(key_file), host, dt.datetime.now(dt.UTC), days
        )
        write_atomically(file, made.public_bytes(Encoding.PEM))
        yield f"new server certificate for {host}; restart 'serve' with it"
    end = read_certificate(file).not_valid_after_utc
    yield f"server certificate: valid until {end:%d %B %Y}; renew it with --renew-server"


def _add(place: Provisioned, site: str, authority: x509.Certificate) -> Iterator[str]:
    kit = place.kit(site)
    if not kit.exists():  # a kit without its public key: we were stopped between the two
        make_kit(kit, place.address, authority.public_bytes(Encoding.PEM), new_key())
    _publish(place, site)
    yield f"site {site}: hand '{kit}' over by a safe way, then delete it here"


def _publish(place: Provisioned, site: str) -> None:
    key = read_key(place.kit(site) / "site.key")
    write_atomically(place.public_key(site), public_ssh(key, site))


def _rotate(place: Provisioned, site: str, authority: x509.Certificate) -> Iterator[str]:
    kit = place.kit(site)
    # Until the public key is replaced, the same command begins anew.
    make_kit(kit, place.address, authority.public_bytes(Encoding.PEM), new_key())
    yield from _retire(place, site)
    _publish(place, site)
    key = kit / "site.key"
    yield f"site {site}: hand '{key}' over in place of its old one, then delete the kit"


def _retire(place: Provisioned, site: str) -> Iterator[str]:
    """Keep the old public key aside, and say how to have it refused from now on."""
    aside = place.directory / "retired" / f"{place.keyed(site)}.pub"
    write_atomically(aside, place.public_key(site).read_bytes())
    yield f"site {site}: its old key is admitted until you run: {place.admit()}"


def _to_register(place: Provisioned) -> Iterator[str]:
    """The command for the sites whose keys the SuperLink does not know yet."""
    names = sorted(file.stem for file in (place.directory / "sites").glob("*.pub"))
    if waiting := [name for name in names if not place.node(name).exists()]:
        yield f"once the service runs, admit {', '.join(waiting)}: {place.admit()}"
