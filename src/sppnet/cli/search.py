"""The commands that search by region: an index of a folder of images, and what is like a region."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sppnet.cli.console import (
    Device,
    Json,
    Out,
    Weights,
    check_places,
    make_folder,
    print_failures,
    print_table,
    track,
    write_json,
)
from sppnet.cli.embedder import (
    BACKBONE,
    STAGES,
    BackboneName,
    Flip,
    Levels,
    Mode,
    Power,
    Scales,
    Seed,
    Stages,
    Stride,
    embedder_of,
)
from sppnet.errors import SppnetError

if TYPE_CHECKING:
    from sppnet.arrays import Boxes, Pixels


def index(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder of images, at any depth.")],
    out: Annotated[Path, typer.Option(help="Folder of the index; brought up to date if it is there.")],
    proposals: Annotated[
        str, typer.Option(help="Windows of an image besides the whole: see sppnet propose --help; or none.")
    ] = "edge-boxes",
    windows: Annotated[int, typer.Option(min=1, help="Most regions of an image.")] = 60,
    backbone: BackboneName = BACKBONE,
    stages: Stages = STAGES,
    stride: Stride = 16,
    weights: Weights = None,
    scales: Scales = "320",
    levels: Levels = "2,1",
    mode: Mode = "max",
    flip: Flip = False,
    power: Power = 0.5,
    pca: Annotated[int, typer.Option(min=1, help="Components of the vectors.")] = 256,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Index the regions of all images of a folder, for sppnet search.

    Started again, it adds new and changed images and removes those that are gone; the rest stays.
    """
    from sppnet.retrieval.index import Index

    embedder = embedder_of(context)
    built = Index.build(folder, out, embedder=embedder, proposals=proposals, windows=windows, track=track)
    assert built.update is not None
    update = built.update
    print_failures(update.failures, update.found)
    if not built.images:
        raise typer.Exit(1)
    print(
        f"{out}: {len(built)} regions of {len(built.images)} images; "
        f"{len(update.new)} new, {len(update.changed)} changed, {len(update.gone)} gone"
    )
    raise typer.Exit(int(bool(update.failures)))


def search(
    store: Annotated[Path, typer.Argument(metavar="INDEX", help="Folder that sppnet index made.")],
    image: Annotated[Path, typer.Option(help="Image to search with.")],
    box: Annotated[
        str | None, typer.Option(help="Region of it: x1,y1,x2,y2 in pixels; default: the whole image.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Most images.")] = 20,
    images: Annotated[
        Path | None, typer.Option(help="Folder that was indexed, for pictures; default: where it was.")
    ] = None,
    out: Out = None,
    json_file: Json = None,
    weights: Weights = None,
    device: Device = "cpu",
) -> None:
    """Find the images with the regions most like a region of an image; --out draws them."""
    import numpy as np
    from rich.table import Table

    from sppnet.drawing import draw_hits
    from sppnet.images import read_image, write_image
    from sppnet.retrieval.index import Index

    check_places(json_file, out, [image], [] if out is None else [out / "search.png"])
    pixels = read_image(image)
    region = _region(box, pixels)
    known = Index.open(store, weights=weights, device=device)
    encoded = known.embedder.encode(pixels)
    start = time.perf_counter()
    hits = known.search(encoded, box=region, top=top)
    seconds = time.perf_counter() - start
    table = Table("image", "score", "box (x1, y1, x2, y2)", title=f"of {len(known)} regions, {seconds:.3f} s")
    for hit in hits:
        table.add_row(hit.image, f"{hit.score:.3f}", ", ".join(f"{edge:.0f}" for edge in hit.box))
    print_table(table)
    if json_file is not None:
        found = [{"image": h.image, "score": h.score, "box": np.asarray(h.box).tolist()} for h in hits]
        content = {"query": {"image": str(image), "box": region.tolist()}, "hits": found, "seconds": seconds}
        write_json(json_file, content)
    if out is not None:
        make_folder(out)
        sheet, failures = draw_hits(pixels, region, hits, images or Path(known.source))
        write_image(out / "search.png", sheet)
        print(f"contact sheet in {out / 'search.png'}")
        print_failures(failures, len(hits))
        raise typer.Exit(int(bool(failures)))


def _region(text: str | None, pixels: Pixels) -> Boxes:
    """Read a box, by default that of the whole image."""
    import numpy as np

    if text is None:
        return np.array([0, 0, pixels.shape[1], pixels.shape[0]], np.float32)
    try:
        x1, y1, x2, y2 = map(float, text.split(","))
    except ValueError:
        raise SppnetError(f"--box {text}: expected four numbers between commas: x1,y1,x2,y2") from None
    return np.array([x1, y1, x2, y2], np.float32)
