"""The command that writes vectors of images and of boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import sppnet.cli.console as console
import sppnet.cli.options as opt
from sppnet.errors import SppnetError

_OUT = "File of vectors to write (.safetensors), or folder of shards (.parquet)."
_SOURCES = "Image files, folders, patterns, one folder of class folders, or shards (.parquet) to join."
_JOIN = "Join a box's vectors of all scales, instead of taking one scale."
_BOXES = "Boxes to embed: VOC folder, COCO JSON, YOLO folder, CSV of path,x1,y1,x2,y2."


def embed(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help=_OUT)],
    sources: Annotated[list[str] | None, typer.Argument(metavar="PHOTO", help=_SOURCES)] = None,
    boxes: Annotated[Path | None, typer.Option(help=_BOXES)] = None,
    split: opt.Split = None,
    append: Annotated[bool, typer.Option("--append", help="Add to OUT the images that it lacks.")] = False,
    like: Annotated[Path | None, typer.Option(help="Vectors whose settings and projection to take.")] = None,
    backbone: opt.BackboneName = opt.BACKBONE,
    stages: opt.Stages = opt.STAGES,
    stride: opt.Stride = opt.STRIDE,
    scales: opt.Scales = opt.SCALES,
    join_scales: Annotated[bool, opt.network("--join-scales", help=_JOIN)] = False,
    levels: opt.Levels = opt.LEVELS,
    mode: opt.Mode = "max",
    view: opt.View = "full",
    flip: opt.Flip = False,
    power: opt.Power = 0.5,
    norm: Annotated[Literal["l2", "none"], opt.network(help="l2 makes vectors of length 1.")] = "l2",
    pca: Annotated[int | None, opt.network(min=1, help="Project to so many components.")] = None,
    per_shard: Annotated[int, typer.Option("--per-shard", min=1, help="Images of a shard.")] = 256,
    half: Annotated[bool, typer.Option("--half", help="Write half precision.")] = False,
    max_bad: opt.MaxBad = opt.BAD,
    max_pixels: opt.MaxPixels = None,
    cluster: opt.Cluster = None,
    workers: opt.Workers = None,
    device: opt.Device = "cpu",
    seed: opt.Seed = 0,
) -> None:
    """Write a vector for each image, or each of your boxes; a run that was stopped goes on."""
    from sppnet.retrieval.embed import embed
    from sppnet.retrieval.embedder import Embedder
    from sppnet.retrieval.shards import is_shards
    from sppnet.retrieval.vectors import join_shards

    if sources and is_shards(sources[0]):
        print(f"{out}: {join_shards(sources[0], out)} vectors of {sources[0]}")
        return
    embedder = opt.embedder_of(context)
    if like is not None:
        if embedder.get_params() != Embedder(backbone, device=device).get_params():
            raise SppnetError(f"--like {like}: found other settings beside it, expected it alone")
        moved = None if backbone == opt.BACKBONE else backbone
        embedder = Embedder.load(like, backbone=moved, device=device)
    with console.cluster_of(cluster, workers) as runner:
        result = embed(
            sources or [],
            out,
            boxes=boxes,
            split=split,
            embedder=embedder,
            append=append,
            half=half,
            per_shard=per_shard,
            track=console.track,
            cluster=runner,
        )
    console.notes_of(result)
    if result.earlier:
        console.note(f"{result.earlier} of {result.images} images are there already")
    if result.vectors:
        done = result.images - result.earlier
        speed = f", {done / result.seconds:.3g} images per second" if done else ""
        print(f"{out}: {result.vectors} vectors of {result.length} numbers{speed}")
    console.end(result.failures, result.images, max_bad)
