"""`python -m server.gateway_server LISTEN SUPERLINK DIR`: the gateway, served over TLS.

A process of its own, with little in it: it is what the world can reach.

**Guarantees**: a connection that brings no whole request in `IDLE_SECONDS` is closed; there are at
most `MAX_CONNECTIONS`; a head of more than 64 KiB, or one that is not HTTP, is answered with 400.
"""

import logging
import sys
from pathlib import Path
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from core.address import split_address
from server import gateway
from server.gateway import LOG, make_gateway

MAX_CONNECTIONS: Final = 1024


class Protocol(H11Protocol):
    """Closes a connection on which no request has come; uvicorn would keep it for ever."""

    def connection_made(self, transport: Any) -> None:
        """Start the clock."""
        super().connection_made(transport)
        self.loop.call_later(gateway.IDLE_SECONDS, self._close_without_request)

    def _close_without_request(self) -> None:
        if self.cycle is None:
            self.transport.close()


def run_gateway(listen: str, superlink: str, directory: Path) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        listen: The public address, host:port.
        superlink: Where the SuperLink listens, host:port.
        directory: The coordinator's directory, with ca.crt, server.crt and server.key.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    host, port = split_address(listen)
    LOG.info("gateway: sites are served at %s, through it at %s", listen, superlink)
    uvicorn.run(
        make_gateway(superlink, directory / "ca.crt"),
        host=host,
        port=port,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=20,
        timeout_graceful_shutdown=5,
        ssl_certfile=str(directory / "server.crt"),
        ssl_keyfile=str(directory / "server.key"),
    )


if __name__ == "__main__":
    run_gateway(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
