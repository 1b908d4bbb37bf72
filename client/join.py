"""Start Flower's SuperNode for a site: over TLS, with the site's key, silent towards others."""

import datetime as dt
import json
import os
import shlex
import ssl
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from client.check.connection import secure, target_of, within
from client.check.network import untrusted
from client.site import SiteConfig, load_site
from core.errors import UserError

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def join(site_file: Path, port: int) -> NoReturn:
    """Become the site's SuperNode; this process ends when it ends.

    Args:
        site_file: The site's file.
        port: Loopback port of the SuperNode's own programs.

    Raises:
        UserError: something of the kit is missing, expired, damaged or readable by others, or the
            coordinator's certificate is not to be trusted.
    """
    site = load_site(site_file)
    command = supernode_command(site_file, site, port)
    program = Path(sys.executable).parent / command[0]
    if not program.exists():
        raise UserError(f"'{program}' does not exist; install flwr beside this Python")
    environment = _environment(site, os.environ)
    os.execve(program, [str(program), *command[1:]], environment)


def supernode_command(site_file: Path, site: SiteConfig, port: int) -> list[str]:
    """The SuperNode's command line, once everything it names is sound.

    Raises:
        UserError: as `join`.
    """
    coordinator, where = site.coordinator, f"site file '{site_file}'"
    needed = {
        "superlink": coordinator.superlink,
        "root_certificates": coordinator.root_certificates,
        "private_key": coordinator.private_key,
    }
    for key, value in needed.items():
        if value is None:
            raise UserError(
                f"{where}: [coordinator] {key} is missing; take it from the start-up kit that the "
                "coordinator gave you"
            )
    superlink, certificates, private_key = (str(value) for value in needed.values())
    check_certificates(Path(certificates))
    check_private_key(Path(private_key))
    _check_coordinator(superlink, certificates)
    config = json.dumps(str(site_file.absolute()), ensure_ascii=False)
    return [
        "flower-supernode",
        *("--superlink", superlink, "--root-certificates", certificates),
        *("--auth-supernode-private-key", private_key),
        *("--host", "127.0.0.1", "--port", str(port), "--node-config", f"site={config}"),
    ]


def check_private_key(file: Path) -> None:
    """Hold that the site's key can be used, and by its owner alone.

    Raises:
        UserError: it cannot; the message never quotes it.
    """
    try:
        mode, data = file.stat().st_mode & 0o777, file.read_bytes()
    except OSError as error:
        raise UserError(
            f"private key '{file}' cannot be read: {error.strerror}; put site.key of the start-up "
            "kit there, or ask the coordinator for a new one"
        ) from None
    if mode & 0o077:
        raise UserError(
            f"private key '{file}' is open to others on this machine (mode {mode:o}); run: "
            f"chmod 600 {shlex.quote(str(file))}"
        )
    try:
        key = load_ssh_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # damaged; locked by a passphrase
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(
            f"'{file}' holds no unencrypted elliptic-curve key in OpenSSH's format; put site.key "
            "of the start-up kit there, or ask the coordinator for a new one"
        )


def check_certificates(file: Path) -> None:
    """Hold that a certificate of the coordinator's CA is there and valid.

    Raises:
        UserError: none is.
    """
    try:
        found = x509.load_pem_x509_certificates(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"root certificates '{file}' cannot be read as PEM: "
            f"{getattr(error, 'strerror', None) or error}; put ca.crt of the start-up kit there"
        ) from None
    end = max(each.not_valid_after_utc for each in found)
    if end < dt.datetime.now(dt.UTC):
        raise UserError(
            f"root certificates '{file}' expired on {end:%d %B %Y}; ask the coordinator for a "
            "valid ca.crt"
        )


def _check_coordinator(superlink: str, certificates: str) -> None:
    """A bad certificate ends it here, in plain words; a coordinator that is away does not."""
    target = target_of(superlink, certificates)
    try:
        within(secure, target).close()
    except ssl.SSLCertVerificationError as error:
        finding = untrusted(error, target)
        raise UserError(f"{superlink}: {finding.found}; {finding.remedy}") from None
    except OSError:
        return  # the SuperNode tries again until it gets through


def _environment(site: SiteConfig, outer: Mapping[str, str]) -> dict[str, str]:
    """No call home, our Python's programs first, and Flower's files beside the site's state."""
    site.state_path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return {
        "FLWR_HOME": str(site.state_path / "flower"),
        **outer,
        **QUIET,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), outer.get("PATH", os.defpath)]),
    }
