"""The commands that search by region: an index of a folder of images, and what is like a region."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import sppnet.cli.console as console
import sppnet.cli.options as opt
from sppnet.errors import SppnetError

if TYPE_CHECKING:
    from sppnet.retrieval.embedder import Embedder
    from sppnet.retrieval.index import Index

_FOLDER = "Folder of images, at any depth, or of shards that sppnet embed wrote (.parquet)."
_WINDOWS = "Windows of an image besides the whole: a method (see sppnet propose --help), or none."
_LIKE = "Index whose settings and projection to take, to be searched side by side with it."
_EXPORT = (
    "Write the regions as vector databases import them: a file (.parquet), or a new folder of such files."
)
_SETTINGS = ("backbone", "stages", "stride", "scales", "levels", "mode", "flip", "power", "pca", "seed")
_STORE = "Folder that sppnet index made, or one with several of these in it, which are searched side by side."
_MOVED = "Where the backbone file of the index lies now, if it is not where it was."


def index(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help=_FOLDER)],
    out: Annotated[Path, typer.Option(help="Folder of the index; brought up to date if it is there.")],
    like: Annotated[Path | None, typer.Option(help=_LIKE)] = None,
    export: Annotated[Path | None, typer.Option(help=_EXPORT)] = None,
    proposals: Annotated[str, opt.windows(help=_WINDOWS, autocompletion=opt.methods)] = "edge-boxes",
    windows: Annotated[int, opt.windows(min=1, help="Most regions of an image.")] = 60,
    backbone: opt.BackboneName = opt.BACKBONE,
    stages: opt.Stages = opt.STAGES,
    stride: opt.Stride = 16,
    scales: opt.Scales = "320",
    levels: opt.Levels = "2,1",
    mode: opt.Mode = "max",
    flip: opt.Flip = False,
    power: opt.Power = 0.5,
    pca: Annotated[int, opt.network(min=1, help="Components of the vectors.")] = 256,
    max_bad: opt.MaxBad = opt.BAD,
    max_pixels: opt.MaxPixels = None,
    cluster: opt.Cluster = None,
    workers: opt.Workers = None,
    device: opt.Device = "cpu",
    seed: opt.Seed = 0,
) -> None:
    """Index the regions of all images of a folder, for sppnet search.

    Started again, it adds new and changed images and removes those that are gone; the rest stays.
    """
    from sppnet.retrieval.index import Index
    from sppnet.retrieval.shards import is_shards

    if export is not None:
        from sppnet.retrieval.export import check_export

        check_export(export)
    if is_shards(folder):
        if like is not None:
            raise SppnetError(
                f"--like {like}: found shards, whose vectors are what they are, expected images"
            )
        shards = Index.of_shards(folder, out)
        print(f"{out}: {len(shards)} regions of {len(shards.images)} images")
        _export(shards, export)
        return
    embedder = opt.embedder_of(context) if like is None else _like(like, context, device)
    with console.cluster_of(cluster, workers) as runner:
        built = Index.build(
            folder,
            out,
            embedder=embedder,
            proposals=proposals,
            windows=windows,
            track=console.track,
            cluster=runner,
        )
    assert built.update is not None
    update = console.notes_of(built.update)
    if built.images:
        print(
            f"{out}: {len(built)} regions of {len(built.images)} images; "
            f"{len(update.new)} new, {len(update.changed)} changed, {len(update.gone)} gone"
        )
    _export(built, export)
    console.end(update.failures, update.found, max_bad)


def _export(index: Index, place: Path | None) -> None:
    if place is not None and index.images:
        from sppnet.retrieval.export import export_parquet

        print(f"{place}: {export_parquet(index, place)} regions for a vector database")


def _like(index: Path, context: typer.Context, device: str) -> Embedder:
    """Return the embedder of another index; settings beside it are an error."""
    from sppnet.retrieval.index import embedder_of

    sources = {name: context.get_parameter_source(name) for name in _SETTINGS}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        raise SppnetError(f"--like {index}: found --{given[0]} beside it, expected it alone")
    return embedder_of(index, device=device)


def search(
    store: Annotated[Path, typer.Argument(metavar="INDEX", help=_STORE)],
    image: Annotated[Path, typer.Option(help="Image to search with.")],
    box: Annotated[str | None, typer.Option(help="Region of it: x1,y1,x2,y2; default: the whole.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Most images.")] = 20,
    images: Annotated[Path | None, typer.Option(help="Where the images of the index lie now.")] = None,
    out: opt.Out = None,
    json_file: opt.Json = None,
    backbone: Annotated[str | None, opt.network(help=_MOVED)] = None,
    max_pixels: opt.MaxPixels = None,
    device: opt.Device = "cpu",
) -> None:
    """Find the images with the regions most like a region of an image; --out draws them."""
    corners = _corners(box) if box else None

    import numpy as np

    from sppnet.drawing import draw_hits
    from sppnet.images import read_image, write_image
    from sppnet.retrieval.index import open_index

    console.check_places(json_file, out, [image], [] if out is None else [out / "search.png"])
    pixels = read_image(image)
    region = np.array(_inside(corners, *pixels.shape[:2]), np.float32)
    known = open_index(store, backbone=backbone, device=device)
    encoded = known.embedder.encode(pixels)
    start = time.perf_counter()
    hits = known.search(encoded, box=region, top=top)
    seconds = time.perf_counter() - start
    rows = [(h.image, f"{h.score:.3f}", ", ".join(f"{edge:.0f}" for edge in h.box)) for h in hits]
    title = f"of {len(known)} regions, {seconds:.3f} s"
    console.print_rows(("image", "score", "box (x1, y1, x2, y2)"), rows, title)
    found = [{"image": h.image, "score": h.score, "box": np.asarray(h.box).tolist()} for h in hits]
    query = {"image": str(image), "box": region.tolist()}
    console.write_json(json_file, {"query": query, "hits": found, "seconds": seconds})
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        sheet, failures = draw_hits(pixels, region, hits, images or Path(known.source))
        write_image(out / "search.png", sheet)
        print(f"contact sheet in {out / 'search.png'}")
        console.end(failures, len(hits))


def _inside(corners: tuple[float, ...] | None, height: int, width: int) -> tuple[float, ...]:
    """Return the part of a box that lies in the image, or the whole image; say what is cut off."""
    if corners is None:
        return 0, 0, width, height
    x1, y1, x2, y2 = corners
    inside = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    given = ",".join(f"{edge:g}" for edge in corners)
    # Written so that NaN fails, too.
    if not (x1 < x2 and y1 < y2 and inside[0] < inside[2] and inside[1] < inside[3]):
        expected = f"x1 < x2 and y1 < y2, in the image of {width} x {height} pixels"
        raise SppnetError(f"--box {given}: expected {expected}")
    if inside != corners:
        cut = ",".join(f"{edge:g}" for edge in inside)
        console.note(f"--box {given} reaches beyond the image of {width} x {height} pixels, cut to {cut}")
    return inside


def _corners(text: str) -> tuple[float, ...]:
    """Read the corners of a box."""
    try:
        x1, y1, x2, y2 = map(float, text.split(","))
    except ValueError:
        raise SppnetError(f"--box {text}: expected four numbers between commas: x1,y1,x2,y2") from None
    return x1, y1, x2, y2
