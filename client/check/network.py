"""Checks of the way to the coordinator, as its SuperNode will go: TCP, TLS, the fleet path, health.

Only GET requests on paths that take POST: they reach no handler of the coordinator's.
"""

import socket
import ssl
import time
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from urllib.parse import urlsplit

from client.check.connection import (
    SECONDS,
    Target,
    connect,
    get,
    proxy_for,
    secure,
    speaks_plain_http,
    within,
)
from client.check.findings import Finding, duration, green, red, yellow

FLEET = "/v1/fleet/pull-messages"
CLOSED = ("/v1/control/list-runs", "/v1/runtime/acquire-task")
"""Paths of Flower 1.41 that take POST alone; sites need the first and should not see the others."""
AHEAD_SECONDS, BEHIND_SECONDS = 5.0, 60.0
"""Flower refuses a SuperNode that signs more than 5 s ahead, or more than 305 s behind."""
EXPIRY_DAYS = 14
NOT_YET_VALID, EXPIRED, OTHER_NAME, OTHER_ADDRESS = 9, 10, 62, 64
"""OpenSSL's results of a verification (x509_vfy.h)."""


def reach(target: Target) -> Finding:
    """Does the port accept a connection?"""
    try:
        within(connect, target).close()
    except socket.gaierror:
        return red(
            f"the name '{target.host}' is not known here",
            "Correct [coordinator] superlink in the site file, or ask your IT to resolve the name.",
        )
    except ConnectionRefusedError:
        return red(
            f"{target} is closed: connection refused",
            "Correct the port in [coordinator] superlink, or ask the coordinator whether the "
            "gateway runs.",
        )
    except TimeoutError:
        return red(
            f"{target} did not answer in {SECONDS:g} s",
            f"Ask your IT to allow outgoing TCP to {target}: a firewall seems to drop it.",
        )
    except OSError as error:
        return red(
            f"{target} cannot be reached: {error.strerror or error}",
            f"Ask your IT for a route to {target}; if it goes through a proxy, set HTTPS_PROXY.",
        )
    proxy = (
        f" through the proxy {urlsplit(via).hostname}" if (via := proxy_for(target.host)) else ""
    )
    return green(f"{target} is open{proxy}")


def certificate(target: Target) -> Finding:
    """Does TLS stand, by the root certificates of the site file?"""
    try:
        with within(secure, target) as connection:
            details, version = connection.getpeercert(), connection.version()
    except ssl.SSLCertVerificationError as error:
        return untrusted(error, target)
    except OSError as error:  # SSLError is one too
        if speaks_plain_http(target):
            return red(
                f"{target} speaks plain HTTP, without TLS",
                "Ask the coordinator for the gateway's TLS port, and put it into [coordinator] "
                "superlink; never send updates over plain HTTP.",
            )
        return red(
            f"the TLS handshake failed: {getattr(error, 'reason', None) or error}",
            "Ask the coordinator whether this port speaks TLS 1.2 or later, and your IT whether "
            "a firewall cuts TLS.",
        )
    assert details is not None  # the context demands a certificate
    until = str(details["notAfter"])
    days = int((ssl.cert_time_to_seconds(until) - time.time()) / 86_400)
    found = f"verified for '{target.host}', {version}, certificate valid for {days:,} more days"
    if days < EXPIRY_DAYS:
        return yellow(found, "Remind the coordinator to renew the certificate.", days=days)
    return green(found, days=days)


def fleet(target: Target) -> Finding:
    """Does Flower answer on the path that the SuperNode will use?"""
    answer = get(target, FLEET)
    said = f"HTTP {answer.status}"
    if answer.status == HTTPStatus.METHOD_NOT_ALLOWED and "POST" in answer.allow:
        return green("Flower answers below /v1/fleet/", status=answer.status)
    if answer.status in (502, 503, 504):
        return red(
            f"the gateway answers, but nothing behind it: {said}",
            "Ask the coordinator to start the SuperLink, then check again.",
        )
    return red(
        f"something answers, but not Flower's fleet service: {said}",
        "Ask the coordinator whether [coordinator] superlink is the gateway's address, and "
        "whether it forwards /v1/fleet/ to a SuperLink of Flower 1.41.",
    )


def control(target: Target) -> Finding:
    """The control and runtime services have no login: a site should not be able to reach them."""
    for path in CLOSED:
        status = get(target, path).status
        if status not in (HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND):
            return yellow(
                f"the coordinator exposes {path.rpartition('/')[0]}/ (HTTP {status}): whoever "
                "reaches it can start runs at all sites",
                "Tell the coordinator to put a gateway in front that forwards /v1/fleet/ alone.",
            )
    return green("control and runtime services are closed to sites")


def clock(target: Target) -> Finding:
    """Does this machine's clock agree with the coordinator's?"""
    answer = get(target, FLEET)
    try:
        theirs = parsedate_to_datetime(answer.date).timestamp() + 0.5  # the header has whole s
    except (TypeError, ValueError):
        return yellow("the coordinator's answer holds no date", "Compare the two clocks by hand.")
    ahead = answer.asked_at - theirs
    side = "ahead of" if ahead > 0 else "behind"
    if not -BEHIND_SECONDS <= ahead <= AHEAD_SECONDS:
        return red(
            f"this clock is {duration(abs(ahead))} {side} the coordinator's; Flower refuses "
            "messages signed at another time",
            "Type: timedatectl set-ntp true   (or ask your IT for a time server), and ask the "
            "coordinator to do the same.",
            seconds_ahead=round(ahead, 1),
        )
    return green(f"within {max(1, round(abs(ahead)))} s of the coordinator's",
                 seconds_ahead=round(ahead, 1))  # fmt: skip


def health(address: str) -> Finding:
    """Does the SuperLink's gRPC health service say that it serves?"""
    import grpc  # type: ignore[import-untyped]

    # grpc.health.v1: the request for the whole server is an empty message; field 1 of the reply,
    # a varint, is the status, and 1 is SERVING.
    with grpc.insecure_channel(address) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            reply: bytes = check(b"", timeout=SECONDS)
        except grpc.RpcError as error:
            return red(
                f"{address} does not answer gRPC: {error.code().name.lower()}",
                "Correct [coordinator] health, or leave it out if sites cannot reach it; else ask "
                "the coordinator whether the SuperLink runs with --health-server-address.",
            )
    if reply != b"\x08\x01":
        return red(f"{address} is not serving", "Ask the coordinator to look at the SuperLink.")
    return green(f"{address} is serving")


def untrusted(error: ssl.SSLCertVerificationError, target: Target) -> Finding:
    """Why the certificate was not accepted, and who can mend it."""
    renew = "Ask the coordinator for a certificate"
    code, by = error.verify_code, f"'{target.root_certificates}'"
    if code in (OTHER_NAME, OTHER_ADDRESS):
        return red(
            f"the certificate is for another name than '{target.host}'",
            "Put a name that the certificate holds into [coordinator] superlink, or ask the "
            f"coordinator to add '{target.host}' to its subjectAltName.",
        )
    if code == EXPIRED:
        return red(
            "the certificate has expired",
            f"{renew} that is valid now; this machine's clock says {time.strftime('%d %B %Y')}.",
        )
    if code == NOT_YET_VALID:
        return red(
            "the certificate is not valid yet",
            f"Look at this machine's clock, which says {time.strftime('%d %B %Y %H:%M')}; if it is "
            "right, ask the coordinator for a certificate that is valid now.",
        )
    if target.root_certificates is None:
        return red(
            f"no public authority vouches for the certificate: {error.verify_message}",
            "Put the CA file that the coordinator gave you into [coordinator] root_certificates.",
        )
    return red(
        f"the certificate was not issued by a CA in {by}: {error.verify_message}",
        "Ask the coordinator for the CA file of this address, and put it into [coordinator] "
        "root_certificates.",
    )
