"""What a server needs before it runs: a port, rules, words to whoever started it."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import urllib.request
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sppnet.errors import SppnetError
from sppnet.serve.security import LOOPBACK, Rules

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

# Seconds that a client may keep a connection open that it does not use.
_IDLE = 30
_SHORTEST = 8


def server_of(app: ASGIApp, at_end: Callable[[], None]) -> uvicorn.Server:
    """Return what answers requests with an application; its ``run`` takes the sockets to listen at.

    Parameters
    ----------
    app : ASGI application
    at_end : callable
        Called when the server is told to end, before it waits for what it is still answering.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            at_end()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=3,
        ws="none",
    )
    return Server(config)


def rules_of(host: str, token: str | None) -> Rules:
    """Return who may ask what of a server at an address.

    Raises
    ------
    SppnetError
        If another machine could reach it and there is no token, or the token is too short.
    """
    local = host.lower() in LOOPBACK
    if not local and token is None:
        expected = "--token TOKEN, which whoever opens the page must then know"
        raise SppnetError(f"--host {host}: found no token, expected {expected}")
    if token is not None and len(token) < _SHORTEST:
        raise SppnetError(f"--token: found {len(token)} characters, expected {_SHORTEST} or more")
    return Rules(host) if token is None else Rules(host, token, closed=True)


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """Lend a socket that listens at an address.

    Raises
    ------
    SppnetError
        If it cannot; where the port is taken, it says by whom.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Of this protocol by name: asyncio sends short answers at once only then, and 40 ms later otherwise.
    place = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind((host, port))
        place.listen(1024)
    except OSError as error:
        place.close()
        if error.errno == errno.EADDRINUSE:
            expected = f"a free port, such as --port {port + 1}, or --port 0 for any"
            raise SppnetError(f"--port {port}: found {_who(host, port)} there, expected {expected}") from None
        raise SppnetError(f"--host {host}: cannot listen there ({error.strerror or error})") from None
    with place:
        yield place


def _who(host: str, port: int) -> str:
    """Say what answers at a port that is taken."""
    name = f"[{host}]" if ":" in host else host
    try:
        with urllib.request.urlopen(f"http://{name}:{port}/api/v1/health", timeout=2) as answer:
            facts = json.loads(answer.read(4096))
        return f"sppnet serve {facts['version']} with the project {facts['name']!r}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another program"


def announce(rules: Rules, port: int, *, browser: bool) -> None:
    """Say where the page is, and open it if that is asked for."""
    name = "127.0.0.1" if rules.host in ("0.0.0.0", "::") else rules.host
    page = f"http://{f'[{name}]' if ':' in name else name}:{port}/"
    address = f"{page}?token={rules.token}" if rules.closed else page
    print(f"sppnet serve: {address}", flush=True)
    print(f"for programs: {page}openapi.json, Authorization: Bearer {rules.token}", flush=True)
    print("Ctrl-C ends it; every box is saved when it is drawn", flush=True)
    if browser:
        threading.Timer(0.5, webbrowser.open, [address]).start()
