"""Runs the server: what the command line asks for becomes a project, a port and a page."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from sppnet.errors import SppnetError
from sppnet.serve.studio import PROJECT, Opened, Studio


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
    """Serve until Ctrl-C."""
    import uvicorn

    from sppnet.models import model_path
    from sppnet.serve.app import make_app

    if asked.folder is not None and not asked.folder.is_dir():
        raise SppnetError(f"{asked.folder}: found no such folder, expected a folder of photos")
    project = asked.project or (asked.folder or Path()) / PROJECT
    model = None if asked.model is None else model_path(asked.model)
    studio = Studio(Opened(asked.folder, project, model, asked.annotations, asked.demo))
    print(f"http://{asked.host}:{asked.port}/")
    uvicorn.run(make_app(studio), host=asked.host, port=asked.port, log_level="warning")
