"""Have a site take part: its kit checked, its two parts started and kept running."""

import datetime as dt
import fcntl
import json
import os
import shlex
import ssl
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Final, NoReturn

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from client.check.connection import secure, target_of, within
from client.check.network import untrusted
from client.guard import check_flower
from client.parts import (
    Meeting,
    await_secret,
    become,
    make_secret,
    make_state_directory,
    supernode_environment,
    supernode_words,
    trainer_environment,
    trainer_words,
)
from client.site import SiteConfig, load_site
from client.supervisor import Program
from core.errors import UserError

MEANINGS: Final = {
    "[code: 2004]": "the coordinator does not let this site in yet: its key is not registered "
    "there (ask the coordinator), or counts as still in use, which after a crash lasts about a "
    "minute; trying again until it is let in",
    "[code: 2001]": "the coordinator asks for a key and got none that it can read; ask it for a "
    "new start-up kit",
    "CERTIFICATE_VERIFY_FAILED": "the coordinator's certificate is not to be trusted; "
    "'fedmermed-site check' says why; trying again",
    "Exit Code: 606": "the coordinator runs another version of Flower; install the one that it "
    "names, and join again",
    "Connection attempt failed": "the coordinator does not answer; trying again until it does",
    "Runtime HTTP API failed to start": "the port where the two parts meet is taken; it may be "
    "free in some seconds, or give another by --port",
    "SuperNode ID:": "connected to the coordinator; waiting for messages",
}
"""What the SuperNode prints -> what it means."""


def join(site_file: Path, meet: Meeting, part: str | None = None, parent: int = 0) -> NoReturn:
    """Become what keeps both parts of a site running until stopped, or one of them.

    Args:
        site_file: The site's file.
        meet: Where the parts meet.
        part: Become this part; None: run both, and start again which ends.
        parent: Process with which a part shall end; 0: none.

    Raises:
        UserError: something of the kit is missing, expired, damaged or readable by others, the
            coordinator's certificate is not to be trusted, or this site has joined already.
    """
    site = load_site(site_file)
    if part == "supernode":
        words = supernode_words(check_kit(site_file, site), site_file, meet)
        make_secret(meet.secret)
        become(words, supernode_environment(site, os.environ), parent)
    if part == "trainer":
        await_secret(meet.secret)
        words = trainer_words(site_file, meet)
        if parent:
            words += ["--parent-pid", str(parent)]
        become(words, trainer_environment(site, os.environ), parent)
    check_kit(site_file, site)
    check_flower()
    make_state_directory(site)
    hold_alone(site)
    same = [*(sys.executable, "-P", "-m", "client", "join", str(site_file.absolute()))]
    same += ["--host", meet.host, "--port", str(meet.port), "--runtime", meet.runtime]
    same += ["--secret", str(meet.secret.absolute()), "--parent", str(os.getpid()), "--part"]
    parts = [
        Program("supernode", [*same, "supernode"], MEANINGS),
        Program("trainer", [*same, "trainer"]),
    ]
    words = [
        sys.executable,
        "-P",
        "-m",
        "client.supervisor",
        json.dumps([asdict(p) for p in parts]),
    ]
    become(words, supernode_environment(site, os.environ))


def hold_alone(site: SiteConfig) -> int:
    """Hold that no other `join` runs for this site; a killed one does not count.

    Returns:
        The descriptor that stands for it until this process ends, whatever it becomes.

    Raises:
        UserError: another runs.
    """
    path = site.state_path / "join.lock"
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(
            f"site '{site.name}' has joined already, by another process that holds '{path}'; stop "
            "that one first"
        ) from None
    os.set_inheritable(lock, True)
    return lock


def check_kit(site_file: Path, site: SiteConfig) -> dict[str, str]:
    """Hold that everything by which the coordinator is reached is there and sound.

    Returns:
        superlink, root_certificates and private_key.

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
    given = {key: str(value) for key, value in needed.items()}
    check_certificates(Path(given["root_certificates"]))
    check_private_key(Path(given["private_key"]))
    _check_coordinator(given["superlink"], given["root_certificates"])
    return given


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
