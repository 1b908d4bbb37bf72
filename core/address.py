"""Network addresses as Flower takes them: host:port."""

from typing import Annotated, Final

from pydantic import AfterValidator, Field

PATTERN: Final = r"^(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$"


def split_address(address: str) -> tuple[str, int]:
    """Take 'host:port' apart; the brackets of an IPv6 host go."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _has_port(address: str) -> str:
    if not 1 <= split_address(address)[1] <= 65_535:
        raise ValueError("the port must be from 1 to 65535")
    return address


Address = Annotated[str, Field(pattern=PATTERN), AfterValidator(_has_port)]
"""host:port, without https:// before or a path after it; an IPv6 host stands in brackets."""
