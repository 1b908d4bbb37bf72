"""`fedmermed-server page`: the live page until it is stopped."""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import uvicorn
from starlette.middleware.gzip import GZipMiddleware

from core.errors import UserError
from server.access import check_listen, read_token
from server.page.app import PageApp
from server.page.studies import Studies

MOST_CONNECTIONS: Final = 200
CLOSING_SECONDS: Final = 5


def serve_page(paths: Sequence[Path], listen: str, token_file: Path | None) -> None:
    """Answer until stopped.

    Args:
        paths: Run directories, or directories of such.
        listen: host:port.
        token_file: Its one line is what readers must show, as a browser asks for a password.

    Raises:
        UserError: there is no such study, the token cannot be used, or the address is taken or
            needs a token.
    """
    token = read_token(token_file) if token_file else None
    host, port = check_listen(listen, token, "the page names")
    studies = Studies(paths)
    try:
        # Bound here: uvicorn would end with a status of its own where the address is taken.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        bound = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"cannot listen on '{listen}': {error.strerror or error}; give another --listen"
        ) from None
    with bound:
        studies.front().look()  # the first reader does not wait for the history to be read
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{bound.getsockname()[1]}/", flush=True)
        app = GZipMiddleware(PageApp(studies, token, lambda: server.should_exit))
        config = uvicorn.Config(
            app, log_level="error", access_log=False, server_header=False, lifespan="off",
            ws="none", limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=CLOSING_SECONDS,
        )  # fmt: skip
        server = uvicorn.Server(config)
        server.run(sockets=[bound])
