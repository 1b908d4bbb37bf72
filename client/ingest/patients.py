"""Whose images they are, without saying who: a keyed hash of an identity, and the split it decides.

The key is a secret that stays at the site. Without it nobody can try out identifiers against the
hashes; with it the same patient gets the same hash in every later run, so the file is worth a
backup.
"""

import hashlib
import hmac
import os
import secrets
import shlex
import stat
from pathlib import Path
from typing import Final

from core.checkpoint import sync_directory
from core.errors import UserError

SECRET_BYTES: Final = 32
NOTE: Final = "# Secret that turns patient identifiers into hashes. Never send it; do back it up."
PATIENT: Final = b"fedmermed patient 1\0"
CHECK: Final = b"fedmermed secret check 1\0"
TRAIN_SHARE: Final = 0.70
VAL_SHARE: Final = 0.15


def load_secret(path: Path, create: bool = True) -> bytes:
    """Read the site's secret, and draw one first where there is none.

    The file is text: one line that says what it is, then 64 hexadecimal digits. It appears whole
    or not at all; of two processes that start at once, both use the one that came first.

    Args:
        path: Where it is kept.
        create: Whether to draw one if the file does not exist.

    Returns:
        32 bytes of the operating system's randomness.

    Raises:
        UserError: the file can be read by others than its owner, holds something else, cannot be
            read or written, or is missing and may not be created.
    """
    try:
        if create and not os.path.lexists(path):
            _create(path)
        return _read(path)
    except FileNotFoundError:
        raise UserError(
            f"secret file '{path}' does not exist; copy it back from its backup, "
            "or check the path: another secret makes other patients of the same people"
        ) from None
    except OSError as error:
        raise UserError(
            f"secret file '{path}' cannot be read or written: {error.strerror}; "
            "give another place with --secret"
        ) from None


def patient_key(secret: bytes, identity: str) -> str:
    """The 32 hexadecimal digits that stand for a patient.

    Args:
        secret: From `load_secret`.
        identity: Who it is, with its kind in front ("dicom:...", "folder:...").

    **Guarantees**: equal identities have equal keys under one secret, and unrelated ones under
    another; without the secret a key tells nothing about the identity (HMAC-SHA256).
    """
    # A path may hold bytes that are no text; Python keeps them as lone surrogates.
    return _digest(secret, PATIENT + identity.encode("utf-8", "surrogatepass"))


def key_check(secret: bytes) -> str:
    """A fingerprint of the secret, to notice that it has changed; it gives nothing of it away."""
    return _digest(secret, CHECK)


def split_of(patient: str) -> str:
    """The split of a patient, fixed by the key alone: about 70 % train, 15 % val, 15 % test."""
    digest = hashlib.sha256(patient.encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < TRAIN_SHARE:
        return "train"
    return "val" if share < TRAIN_SHARE + VAL_SHARE else "test"


def _digest(secret: bytes, message: bytes) -> str:
    return hmac.digest(secret, message, "sha256").hex()[:32]


def _create(path: Path) -> None:
    """Write a new secret aside and link it into place, which fails if another came first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(f"{NOTE}\n{os.urandom(SECRET_BYTES).hex()}\n")
            file.flush()
            os.fsync(descriptor)
        try:
            os.link(aside, path)
        except FileExistsError:
            return
        sync_directory(path.parent)
    finally:
        os.unlink(aside)


def _read(path: Path) -> bytes:
    # Without O_NONBLOCK a pipe of that name would wait for a writer for ever.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"secret file '{path}' is not a file; give another with --secret")
        if status.st_mode & 0o077:
            raise UserError(
                f"secret file '{path}' can be read or changed by others (mode "
                f"{stat.S_IMODE(status.st_mode):04o}); type: chmod 600 {shlex.quote(str(path))}"
            )
        lines = file.read(4096).decode("ascii", "replace").splitlines()
    digits = "".join(line.strip() for line in lines if not line.startswith("#"))
    if len(digits) != 2 * SECRET_BYTES or set(digits) - set("0123456789abcdefABCDEF"):
        raise UserError(
            f"secret file '{path}': expected {2 * SECRET_BYTES} hexadecimal digits, found "
            f"{len(digits)} characters; copy it back from its backup"
        )
    return bytes.fromhex(digits)
