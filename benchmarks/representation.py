"""Caltech101 by the paper's protocol, in the form of its table 7; and how fast vectors are made. Run as::

    python benchmarks/representation.py caltech101 DATA --splits 3 --final 10 --json F
    python benchmarks/representation.py throughput FOLDER --json F

``caltech101`` compares crop, warp and full image, scales, stages, pyramids and norms, on the same random
splits; the row of the defaults is measured on ``--final`` splits. ``throughput`` times `Embedder.transform`,
files to vectors, against the bare backbone, run by as many threads on images that are decoded already.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from common import commit, machine
from sppnet import Embedder, read_image
from sppnet.datasets.image_folder import read_image_folder
from sppnet.evaluation.protocols import caltech101_results, gram_matrix
from sppnet.features.encoded import EncodedImage
from sppnet.images import find_images
from sppnet.parallel import thread_count
from sppnet.storage import atomic_path

STDERR = Console(stderr=True)
PYRAMID, GLOBAL, PAPER = (3, 2, 1), (1,), (6, 3, 2, 1)


@dataclass(frozen=True)
class Row:
    title: str
    view: str = "full"
    side: int = 224
    stage: str = "head"
    levels: tuple[int, ...] = PYRAMID
    mode: str = "max"
    power: float = 0.5
    paper: str = ""


# The paper's numbers: ZF-5, column b (crop) and c (full); its best, of Overfeat-7, is 93.42.
ROWS = (
    Row("full, pyramid (the default)", paper="91.44"),
    Row("crop, pyramid", view="crop", paper="89.47"),
    Row("warp, pyramid", view="warp", paper="89.91"),
    Row("full, global maximum", levels=GLOBAL),
    Row("full, global average", levels=GLOBAL, mode="average"),
    Row("full, pyramid of averages", mode="average"),
    Row("full, pyramid, no square root", power=1),
    Row("full, pyramid 6, 3, 2, 1", levels=PAPER),
    Row("full, pyramid, stage 4", stage="4"),
    Row("full, pyramid, scale 320", side=320),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["caltech101", "throughput"])
    parser.add_argument("data", type=Path)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--final", type=int, default=10, help="splits of the default")
    parser.add_argument("--images", type=int, default=400, help="for throughput")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    facts = {"machine": machine(), "commit": commit()}
    found = facts | (tables if arguments.what == "caltech101" else throughput)(arguments)
    print(json.dumps(found, indent=1))
    if arguments.json is not None:
        with atomic_path(arguments.json) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")


def tables(arguments) -> dict:
    images = read_image_folder(arguments.data)
    labels = np.array([label for _, label in images])
    found = {}
    for row, vectors in embedded([path for path, _ in images]):
        splits = arguments.final if row is ROWS[0] else arguments.splits
        results = list(caltech101_results(gram_matrix(vectors), labels, splits=splits))
        values = 100 * np.array([result.accuracy for result in results])
        print(f"{row.title:32} {values.mean():.2f} ± {values.std(ddof=1):.2f}, {splits} splits", flush=True)
        found[row.title] = {
            "mean": values.mean(),
            "std": values.std(ddof=1),
            "accuracies": values.tolist(),
            "C": [result.C for result in results],
            "length": vectors.shape[1],
            "paper_zf5": row.paper,
        }
    return {"images": len(images), "rows": found}


def embedded(paths: list[Path]):
    """Yield rows with their vectors; rows of one view and scale share the maps."""
    for view, side in dict.fromkeys((row.view, row.side) for row in ROWS):
        rows = [row for row in ROWS if (row.view, row.side) == (view, side)]
        stages = tuple(dict.fromkeys(row.stage for row in rows))
        backbone = Embedder(stages=stages, scales=(side,), view=view)
        makers = [
            Embedder(
                stages=(row.stage,),
                scales=(side,),
                view=view,
                levels=row.levels,
                mode=row.mode,
                power=row.power,
            )
            for row in rows
        ]
        vectors = [np.empty((len(paths), maker.length), np.float16) for maker in makers]
        for i, path in enumerate(track(paths, f"{view} {side}", console=STDERR)):
            encoded = backbone.encode(path)
            for row, maker, into in zip(rows, makers, vectors, strict=True):
                into[i] = maker(one_stage(encoded, stages.index(row.stage)))
        while rows:
            yield rows.pop(0), vectors.pop(0)


def one_stage(encoded: EncodedImage, place: int) -> EncodedImage:
    one = slice(place, place + 1)
    scales = (replace(m, stages=m.stages[one], geometry=m.geometry[one]) for m in encoded.scales)
    return replace(encoded, scales=tuple(scales))


def throughput(arguments) -> dict:
    paths = find_images([arguments.data]).paths[: arguments.images]
    embedder, threads = Embedder(), thread_count()
    backbone = embedder.network.for_threads(threads)
    pictures = [read_image(path) for path in paths]
    (side,) = embedder.scales

    def bare(image) -> None:
        backbone(image, side)

    with ThreadPoolExecutor(threads) as pool:
        ways = {
            "backbone, one image after the other": lambda: [embedder.network(p, side) for p in pictures],
            "backbone, an image for each thread": lambda: list(pool.map(bare, pictures)),
            "files to vectors": lambda: embedder.transform(paths),
        }
        for way in ways.values():
            way()
        rounds = [{name: len(paths) / timed(way) for name, way in ways.items()} for _ in range(5)]
    ratios = [{name: found["files to vectors"] / speed for name, speed in found.items()} for found in rounds]
    return {
        "images": len(paths),
        "images_per_second": {name: float(np.median([r[name] for r in rounds])) for name in ways},
        "files_to_vectors_of": {name: float(np.median([r[name] for r in ratios])) for name in ways},
    }


def timed(way) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
