"""The command that serves the page and the API."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import sppnet.cli.options as opt
from sppnet.errors import SppnetError, check_extra

if TYPE_CHECKING:
    from sppnet.serve.studio import Opened

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
    max_pixels: opt.MaxPixels = None,
    no_open: Annotated[bool, typer.Option("--no-open", help="Open no browser.")] = False,
) -> None:
    """Serve a page on which a person makes a detector, and an API for programs."""
    check_extra("serve", "the page")

    from sppnet.models import model_path
    from sppnet.serve.app import make_app
    from sppnet.serve.running import announce, bound, rules_of, server_of
    from sppnet.serve.studio import Studio

    rules = rules_of(host, token)
    if folder is not None and not folder.is_dir():
        raise SppnetError(f"{folder}: found no such folder, expected a folder of photos")
    given = None if model is None else model_path(model)
    with bound(host, port) as place, _opened(folder, project, demo) as opened:
        studio = Studio(replace(opened, model=given, annotations=annotations or opened.annotations))
        announce(rules, place.getsockname()[1], browser=not no_open)
        server_of(make_app(studio, rules), studio.hub.end).run([place])


@contextmanager
def _opened(folder: Path | None, project: Path | None, demo: bool) -> Iterator[Opened]:
    """Yield what is opened; the demonstration's project is removed at the end unless it has a place."""
    from sppnet.datasets.tree import PROJECT
    from sppnet.serve.studio import Opened

    if not demo:
        yield Opened(folder, project or (folder or Path()) / PROJECT)
        return
    from sppnet.serve.demo import demo_folder

    with tempfile.TemporaryDirectory(prefix="sppnet-demo-", ignore_cleanup_errors=True) as place:
        yield Opened(folder or demo_folder(), project or Path(place), annotations="project", demo=True)
