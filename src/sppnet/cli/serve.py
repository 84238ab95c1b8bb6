"""The command that serves the page and the API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

_FOLDER = "Folder of photos, at any depth; without one, photos are dropped on the page."
_PROJECT = "Folder that keeps boxes, models and maps; default: sppnet-project in FOLDER."
_HOST = "Address to answer at; another than this machine's own needs --token."
_TOKEN = "What who is not on the page must know; default: a new one each time, which is printed."
_MODEL = "Detector to begin with: a file, or animals."
_ANNOTATIONS = "Where VOC XML files of the boxes go: into the project, or beside the photos."


def serve(
    folder: Annotated[Path | None, typer.Argument(metavar="[FOLDER]", help=_FOLDER)] = None,
    project: Annotated[Path | None, typer.Option(help=_PROJECT)] = None,
    host: Annotated[str, typer.Option(help=_HOST)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    token: Annotated[str | None, typer.Option(help=_TOKEN)] = None,
    model: Annotated[str | None, typer.Option(help=_MODEL)] = None,
    annotations: Annotated[Literal["project", "beside"] | None, typer.Option(help=_ANNOTATIONS)] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Open photos that come with sppnet.")] = False,
    no_open: Annotated[bool, typer.Option("--no-open", help="Open no browser.")] = False,
) -> None:
    """Serve a page on which a person makes a detector, and an API for programs."""
    from sppnet.errors import check_extra

    check_extra("serve", "the page")

    from sppnet.serve.running import Asked, run

    run(Asked(folder, project, host, port, token, model, annotations, demo, not no_open))
