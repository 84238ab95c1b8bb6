"""The command that writes vectors of images and of boxes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sppnet.cli.console import (
    Device,
    Split,
    Weights,
    print_failures,
    track,
)
from sppnet.cli.embedder import (
    BACKBONE,
    LEVELS,
    SCALES,
    STAGES,
    STRIDE,
    BackboneName,
    Flip,
    Levels,
    Mode,
    Power,
    Scales,
    Seed,
    Stages,
    Stride,
    View,
    embedder_of,
)
from sppnet.errors import SppnetError


def embed(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="File of vectors to write (.safetensors).")],
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="Image files, folders, patterns, or one folder of class folders."),
    ] = None,
    boxes: Annotated[
        Path | None,
        typer.Option(help="Boxes to embed: VOC folder, COCO JSON, YOLO folder, CSV of path,x1,y1,x2,y2."),
    ] = None,
    split: Split = None,
    append: Annotated[bool, typer.Option(help="Add images to OUT; those it has are not done again.")] = False,
    like: Annotated[
        Path | None, typer.Option(help="File of vectors whose settings and projection to take.")
    ] = None,
    backbone: BackboneName = BACKBONE,
    stages: Stages = STAGES,
    stride: Stride = STRIDE,
    weights: Weights = None,
    scales: Scales = SCALES,
    join_scales: Annotated[
        bool, typer.Option(help="Join a box's vectors of all scales, instead of taking one scale.")
    ] = False,
    levels: Levels = LEVELS,
    mode: Mode = "max",
    view: View = "full",
    flip: Flip = False,
    power: Power = 0.5,
    norm: Annotated[str, typer.Option(help="l2: vectors of length 1; none: as they are.")] = "l2",
    pca: Annotated[int | None, typer.Option(min=1, help="Project to so many components.")] = None,
    half: Annotated[bool, typer.Option(help="Write half precision.")] = False,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Write a vector for each image, or each of your boxes; a run that was stopped goes on."""
    from sppnet.retrieval.embed import embed
    from sppnet.retrieval.embedder import Embedder

    embedder = embedder_of(context)
    if like is not None:
        if embedder.get_params() != Embedder(weights=weights, device=device).get_params():
            raise SppnetError(f"--like {like}: found other settings beside it, expected it alone")
        embedder = Embedder.load(like, weights=weights, device=device)
    result = embed(
        sources or [],
        out,
        boxes=boxes,
        split=split,
        embedder=embedder,
        append=append,
        half=half,
        track=track,
    )
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if result.earlier:
        print(f"note: {result.earlier} of {result.images} images are there already", file=sys.stderr)
    print_failures(result.failures, result.images)
    if not result.vectors:
        raise typer.Exit(1)
    done = result.images - result.earlier
    speed = f", {done / result.seconds:.3g} images per second" if done else ""
    print(f"{out}: {result.vectors} vectors of {result.length} numbers{speed}")
    raise typer.Exit(int(bool(result.failures)))
