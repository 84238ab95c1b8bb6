"""The command that writes candidate windows to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import sppnet.cli.console as console
import sppnet.cli.options as opt


def propose(
    images: opt.Images,
    out: Annotated[Path, typer.Option(help="File for the windows (.npz).")],
    method: Annotated[
        str, typer.Option("--proposals", help="Method, or several joined by +.", autocompletion=opt.methods)
    ] = opt.PROPOSALS,
) -> None:
    """Compute candidate windows and write them to a file, for --proposals FILE.

    Methods: selective-search, selective-search-quality, edge-boxes, dense; joined by +.
    """
    from sppnet.proposals import writing

    proposed = writing.propose(images, method, out, track=console.track)
    if proposed.images:
        print(f"{out}: {proposed.windows} windows of {proposed.images} images")
    console.end(proposed.failures, proposed.images + len(proposed.failures))
