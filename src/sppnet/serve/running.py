"""Runs the server: what the command line asks for becomes a project, a port and a page."""

from __future__ import annotations

import errno
import json
import os
import socket
import tempfile
import threading
import urllib.request
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sppnet.errors import SppnetError
from sppnet.models import model_path
from sppnet.serve.security import LOOPBACK, Rules
from sppnet.serve.studio import PROJECT, Opened, Studio

if TYPE_CHECKING:
    import uvicorn

# Seconds that a client may keep a connection open that it does not use.
_IDLE = 30


@dataclass(frozen=True)
class Asked:
    """What is asked for on the command line; see ``sppnet serve --help``."""

    folder: Path | None = None
    project: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    model: str | None = None
    annotations: str | None = None
    demo: bool = False
    browser: bool = False


def run(asked: Asked) -> None:
    """Serve until Ctrl-C.

    Raises
    ------
    SppnetError
        If another machine could reach the server and there is no token, the port is taken (it says by whom),
        the folder is none, or another server has its project open.
    """
    rules = _rules(asked)
    if asked.folder is not None and not asked.folder.is_dir():
        raise SppnetError(f"{asked.folder}: found no such folder, expected a folder of photos")
    model = None if asked.model is None else model_path(asked.model)
    with _bound(asked.host, asked.port) as place, _opened(asked, model) as opened:
        studio = Studio(opened)
        port = place.getsockname()[1]
        _announce(asked, rules, port)
        server_of(studio, rules).run([place])


def server_of(studio: Studio, rules: Rules) -> uvicorn.Server:
    """Return what answers requests."""
    import uvicorn

    from sppnet.serve.app import make_app

    config = uvicorn.Config(
        make_app(studio, rules),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=3,
        ws="none",
    )
    return uvicorn.Server(config)


def _rules(asked: Asked) -> Rules:
    """Return who may ask what."""
    local = asked.host.lower() in LOOPBACK
    if not local and asked.token is None:
        expected = "--token TOKEN, which whoever opens the page must then know"
        raise SppnetError(f"--host {asked.host}: found no token, expected {expected}")
    if asked.token is not None and len(asked.token) < 8:
        raise SppnetError(f"--token: found {len(asked.token)} characters, expected 8 or more")
    if asked.token is None:
        return Rules(asked.host)
    return Rules(asked.host, asked.token, closed=True)


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """Lend a socket that listens at an address."""
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


@contextmanager
def _opened(asked: Asked, model: Path | None) -> Iterator[Opened]:
    """Yield what is to be opened; the demonstration's project is removed at the end unless it has a place."""
    if not asked.demo:
        project = asked.project or (asked.folder or Path()) / PROJECT
        yield Opened(asked.folder, project, model, asked.annotations)
        return
    from sppnet.serve.demo import demo_folder

    with tempfile.TemporaryDirectory(prefix="sppnet-demo-", ignore_cleanup_errors=True) as place:
        project = asked.project or Path(place)
        yield Opened(asked.folder or demo_folder(), project, model, "project", True)


def _announce(asked: Asked, rules: Rules, port: int) -> None:
    """Say where the page is, and open it if that is asked for."""
    name = "127.0.0.1" if asked.host in ("0.0.0.0", "::") else asked.host
    page = f"http://{f'[{name}]' if ':' in name else name}:{port}/"
    address = f"{page}?token={rules.token}" if rules.closed else page
    print(f"sppnet serve: {address}", flush=True)
    print(f"for programs: {page}openapi.json, Authorization: Bearer {rules.token}", flush=True)
    print("Ctrl-C ends it; every box is saved when it is drawn", flush=True)
    if asked.browser:
        threading.Timer(0.5, webbrowser.open, [address]).start()
