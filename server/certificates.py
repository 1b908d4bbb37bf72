"""Keys and certificates of a federation: a CA, the server's certificate, a key pair a site.

NIST P-384 throughout: the curve that `flwr supernode register` names first.
"""

import datetime as dt
import ipaddress
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from core.errors import UserError

Key = ec.EllipticCurvePrivateKey

CA_DAYS: Final = 3650
CLOCK_SLACK: Final = dt.timedelta(hours=1)
"""A site's clock may be behind: certificates are valid from this long ago."""
LOCAL: Final = ("localhost", "127.0.0.1", "superlink")
"""The coordinator's own commands reach the SuperLink by these."""


def new_key() -> Key:
    """Draw a private key from the operating system's randomness."""
    return ec.generate_private_key(ec.SECP384R1())


def private_pem(key: Key) -> bytes:
    """A private key as TLS servers read it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def private_ssh(key: Key) -> bytes:
    """A private key as `flower-supernode --auth-supernode-private-key` reads it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def public_ssh(key: Key, comment: str) -> bytes:
    """A public key as `flwr supernode register` reads it."""
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return line + f" {comment}\n".encode()


def read_key(path: Path) -> Key:
    """Read a private key that `private_pem` or `private_ssh` wrote.

    Raises:
        UserError: the file is missing or holds no such key; the message never quotes it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"private key '{path}' cannot be read: {error.strerror}; put it back from your backup"
        ) from None
    load = load_ssh_private_key if b"OPENSSH" in data else load_pem_private_key
    try:
        key = load(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # damaged; locked by a passphrase
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(
            f"'{path}' holds no unencrypted elliptic-curve private key; put it back from "
            "your backup"
        )
    return key


def read_certificate(path: Path) -> x509.Certificate:
    """Read a certificate in PEM.

    Raises:
        UserError: the file is missing or holds none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        raise UserError(
            f"certificate '{path}' cannot be read as PEM; put it back from your backup"
        ) from None


def make_authority(key: Key, now: dt.datetime) -> x509.Certificate:
    """The CA's own certificate, for ten years; it can sign no CA below it."""
    # A name of its own, so that a site that holds two studies' CAs tells them apart.
    number = x509.random_serial_number()
    name = _name(f"FedMerMED CA {number:x}"[:32])
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    return (
        _builder(name, name, key, now, now + dt.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )


def make_server_certificate(
    authority: x509.Certificate,
    authority_key: Key,
    key: Key,
    host: str,
    now: dt.datetime,
    days: int,
) -> x509.Certificate:
    """A server's certificate under the CA.

    Args:
        authority: The CA's certificate.
        authority_key: The CA's private key.
        key: The server's private key.
        host: The name or IP address by which sites reach the server; `LOCAL` is added.
        now: Start of its life, less an hour.
        days: Length of its life; it ends with the CA's at the latest.
    """
    end = min(now + dt.timedelta(days=days), authority.not_valid_after_utc)
    names = [_general_name(each) for each in dict.fromkeys((host, *LOCAL))]
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    return (
        _builder(_name("FedMerMED server"), authority.subject, key, now, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(usage, critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority_key, hashes.SHA384())
    )


def fits(certificate: x509.Certificate, key: Key, host: str) -> bool:
    """Whether a server certificate is of this key and for this host."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return certificate.public_key() == key.public_key() and _general_name(host) in list(names)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: Key, start: dt.datetime, end: dt.datetime
) -> x509.CertificateBuilder:
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - CLOCK_SLACK)
        .not_valid_after(end)
        .add_extension(identifier, critical=False)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general_name(host: str) -> x509.GeneralName:
    """IP addresses and names are compared with different kinds of entries."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
