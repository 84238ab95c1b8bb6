"""The commands that search by region: an index of a folder of images, and what is like a region."""

from __future__ import annotations

import glob
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sppnet.cli.console import (
    Device,
    Json,
    Out,
    Weights,
    check_folder,
    check_places,
    make_folder,
    print_failures,
    print_table,
    track,
    write_json,
)
from sppnet.cli.embed import (
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
    check_kind,
    make_embedder,
)
from sppnet.errors import SppnetError

if TYPE_CHECKING:
    from sppnet.arrays import Boxes, Pixels
    from sppnet.retrieval.embedder import Embedder, Vectors
    from sppnet.retrieval.index import Hit, Index

# What an index is made of unless told otherwise (benchmarks/search.py).
REGIONS, SIDES, PYRAMID, COMPONENTS = 60, "320", "2,1", 256
PROPOSALS = "edge-boxes"
# Seconds after which an index that grows is written.
SAVE_EVERY = 300.0
_TILE = 480


def index(
    folder: Annotated[Path, typer.Argument(help="Folder of images, at any depth.")],
    out: Annotated[Path, typer.Option(help="Folder of the index; brought up to date if it is there.")],
    proposals: Annotated[
        str, typer.Option(help="Windows of an image besides the whole: see sppnet propose --help; or none.")
    ] = PROPOSALS,
    windows: Annotated[int, typer.Option(min=1, help="Most regions of an image.")] = REGIONS,
    backbone: BackboneName = BACKBONE,
    stages: Stages = STAGES,
    stride: Stride = 16,
    weights: Weights = None,
    scales: Scales = SIDES,
    levels: Levels = PYRAMID,
    mode: Mode = "max",
    flip: Flip = False,
    power: Power = 0.5,
    pca: Annotated[int, typer.Option(min=1, help="Components of the vectors.")] = COMPONENTS,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Index the regions of all images of a folder, for sppnet search.

    Started again, it adds new and changed images and removes those that are gone; the rest stays.
    """
    from sppnet.images import image_files
    from sppnet.retrieval.index import MANIFEST, Index, changes

    check_folder(out)
    paths = image_files([f"{glob.escape(str(folder))}/**/*"])
    found = {str(path.relative_to(folder)): _stamp(path) for path in paths}
    asked = make_embedder(
        *(backbone, stages, scales, levels),
        output_stride=stride,
        weights=weights,
        device=device,
        mode=mode,
        flip=flip,
        power=power,
        pca=pca,
        seed=seed,
    )
    propose, source = _regions(proposals, windows), str(folder.resolve())
    chosen = f"{proposals}, at most {windows}"
    if (out / MANIFEST).exists():
        store = Index.open(out, weights=weights, device=device)
        check_kind(out, store.embedder, asked)
        if store.regions != chosen:
            raise SppnetError(f"{out}: made of regions by {store.regions}; expected {chosen}")
        if store.source != source and not store.images.keys() & found.keys():
            raise SppnetError(f"{out}: the index of {store.source}, expected that folder, found {source}")
        store.source = source
    else:
        learnt = _learn_regions(asked, [folder / name for name in found], propose)
        store = Index.create(out, learnt, source, chosen)
    new, changed, gone = changes(store.images, found)
    store.remove([*changed, *gone])
    try:
        failures = _fill(store, folder, {name: found[name] for name in [*new, *changed]}, propose)
    finally:
        # What was done stays, also when it is stopped.
        if store.images:
            store.save()
    print_failures(failures, len(found))
    if not store.images:
        raise typer.Exit(1)
    print(
        f"{out}: {len(store)} regions of {len(store.images)} images; "
        f"{len(new)} new, {len(changed)} changed, {len(gone)} gone"
    )
    raise typer.Exit(int(bool(failures)))


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

    from sppnet.images import read_image
    from sppnet.retrieval.index import Index

    sheet = [] if out is None else [out / "search.png"]
    check_places(json_file, out, [image], sheet)
    pixels = read_image(image)
    region = _region(box, pixels)
    known = Index.open(store, weights=weights, device=device)
    vector = known.embedder(pixels, region[None])[0]
    start = time.perf_counter()
    hits = known.search(vector, top)
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
        failures = _draw_hits(out / "search.png", pixels, region, hits, images or Path(known.source))
        print(f"contact sheet in {out / 'search.png'}")
        print_failures(failures, len(hits))
        raise typer.Exit(int(bool(failures)))


Regions = Callable[["Pixels"], "Boxes"]


def _regions(proposals: str, count: int) -> Regions:
    """Return what gives the regions of an image: the whole, which comes first, and the best windows."""
    from sppnet.proposals import parse

    if proposals == "none":
        return lambda pixels: _whole(pixels)[None]
    method = parse(proposals)
    return lambda pixels: method(pixels)[0][:count]


def _whole(pixels: Pixels) -> Boxes:
    """Return the (4,) box of a whole image."""
    import numpy as np

    return np.array([0, 0, pixels.shape[1], pixels.shape[0]], np.float32)


def _stamp(path: Path) -> str:
    """Return text that changes when a file does."""
    facts = path.stat()
    return f"{facts.st_size} {facts.st_mtime_ns}"


def _prepared(paths: Sequence[Path], propose: Regions) -> Iterator[tuple[Pixels, Boxes] | Exception]:
    """Return each image with its regions, or the error that it gave; the next ones are prepared meanwhile."""
    from sppnet.images import read_image
    from sppnet.parallel import in_order

    def prepare(path: Path) -> tuple[Pixels, Boxes] | Exception:
        try:
            pixels = read_image(path)
            return pixels, propose(pixels)
        except (SppnetError, OSError) as error:
            return error if str(path) in str(error) else ValueError(f"{path}: {error}")

    return in_order(prepare, paths, 2)


def _learn_regions(embedder: Embedder, paths: Sequence[Path], propose: Regions) -> Embedder:
    """Learn the projection of an index from regions of a sample of the images."""
    import numpy as np

    from sppnet.retrieval.embedder import SAMPLE

    order = np.random.default_rng(embedder.seed).permutation(len(paths))[: SAMPLE // 8]
    chosen, raw = [paths[i] for i in order.tolist()], embedder.unprojected()
    each = -(-SAMPLE // len(chosen))
    rows: list[Vectors] = []
    failed: list[Exception] = []
    for ready in track(_prepared(chosen, propose), "Sampling", len(chosen)):
        if isinstance(ready, Exception):
            failed.append(ready)
        else:
            pixels, boxes = ready
            rows.append(raw(pixels, boxes[:: max(1, len(boxes) // each)]))
    if not rows:
        raise failed[0]
    return embedder.fit_vectors(rows)


def _fill(store: Index, folder: Path, stamps: Mapping[str, str], propose: Regions) -> list[str]:
    """Add images to an index, save it now and then, and return what could not be read."""
    failures: list[str] = []
    saved = time.monotonic()
    ready = _prepared([folder / name for name in stamps], propose)
    for (name, stamp), found in zip(stamps.items(), track(ready, "Indexing", len(stamps)), strict=True):
        if isinstance(found, Exception):
            failures.append(str(found))
            continue
        pixels, boxes = found
        store.add(name, stamp, boxes, store.embedder(pixels, boxes))
        if time.monotonic() - saved > SAVE_EVERY:
            store.save()
            saved = time.monotonic()
    return failures


def _region(text: str | None, pixels: Pixels) -> Boxes:
    import numpy as np

    if text is None:
        return _whole(pixels)
    try:
        x1, y1, x2, y2 = map(float, text.split(","))
    except ValueError:
        raise SppnetError(f"--box {text}: expected four numbers between commas: x1,y1,x2,y2") from None
    return np.array([x1, y1, x2, y2], np.float32)


def _draw_hits(path: Path, query: Pixels, region: Boxes, hits: Sequence[Hit], folder: Path) -> list[str]:
    """Draw the query and what was found, each with its region; return what could not be read."""
    from sppnet.drawing import contact_sheet
    from sppnet.images import read_image, write_image

    pictures, titles, failures = [_tile(query, region)], ["query"], []
    for rank, hit in enumerate(hits, 1):
        try:
            pictures.append(_tile(read_image(folder / hit.image), hit.box))
        except (SppnetError, OSError) as error:
            failures.append(str(error))
        else:
            titles.append(f"{rank}  {hit.score:.3f}  {hit.image}")
    write_image(path, contact_sheet(pictures, titles))
    return failures


def _tile(pixels: Pixels, box: Boxes) -> Pixels:
    """Draw a region on a small copy of an image: a sheet of large ones would fill the memory."""
    from sppnet.drawing import draw_region
    from sppnet.images import resize

    height, width = pixels.shape[:2]
    scale = min(1.0, _TILE / max(height, width))
    small = resize(pixels, max(1, round(scale * height)), max(1, round(scale * width)))
    return draw_region(small, box * scale)
