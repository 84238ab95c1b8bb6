"""Search by region: how good (same class), how fast and how large. Run as::

    python benchmarks/search.py quality DATA --json F      # DATA: VOC folder with the splits train and val
    python benchmarks/search.py speed FOLDER --json F      # FOLDER: images, at any depth

``quality`` asks for objects by their boxes and ranks the images of train by their best region; an image is
right if it shows an object of the same class. Queries from train (their own images left out) are there to
choose settings by, those from val to report. ``speed`` builds an index of a million regions, random boxes of
the images, and compares its answers with a search through all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console
from rich.progress import track

from common import commit, machine
from sppnet import Embedder, Index, read_dataset, read_image
from sppnet.evaluation.detection import average_precision
from sppnet.images import find_images
from sppnet.progress import peak_memory
from sppnet.proposals import parse
from sppnet.storage import atomic_path

STDERR = Console(stderr=True)
PYRAMIDS = ((1,), (2, 1), (3, 2, 1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["quality", "speed"])
    parser.add_argument("data", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", type=int, default=320)
    parser.add_argument("--pca", type=int, default=256)
    parser.add_argument("--windows", type=int, default=60, help="of an image, for quality")
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--regions", type=int, default=1_000_000, help="in all, for speed")
    arguments = parser.parse_args()
    facts = {"machine": machine(), "commit": commit(), "side": arguments.side, "pca": arguments.pca}
    found = facts | (quality if arguments.what == "quality" else speed)(arguments)
    print(json.dumps(found, indent=1))
    if arguments.json is not None:
        with atomic_path(arguments.json) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")


def embedders(arguments) -> dict[str, Embedder]:
    settings = {"scales": (arguments.side,), "output_stride": 16, "pca": arguments.pca}
    return {",".join(map(str, levels)): Embedder(levels=levels, **settings) for levels in PYRAMIDS}


def quality(arguments) -> dict:
    rng = np.random.default_rng(0)
    stored, asked = read_dataset(arguments.data, "train"), read_dataset(arguments.data, "val")
    known, propose = embedders(arguments), parse("edge-boxes")
    learn(known, [s.path for s in stored], lambda pixels: propose(pixels).boxes[: arguments.windows])
    queries = {"train": drawn(stored, arguments.queries, rng), "val": drawn(asked, arguments.queries, rng)}
    regions: dict[str, list] = {name: [] for name in known}
    vectors: dict[str, dict[str, list]] = {split: {name: [] for name in known} for split in queries}
    for i, sample in enumerate(track(stored, "Images of train", console=STDERR)):
        pixels = read_image(sample.path)
        boxes = propose(pixels).boxes[: arguments.windows]
        each(known, pixels, boxes, regions)
        if i in queries["train"]:
            each(known, pixels, queries["train"][i][0], vectors["train"])
    for i, (box, _) in track(queries["val"].items(), "Queries of val", console=STDERR):
        each(known, read_image(asked[i].path), box, vectors["val"])
    found = {}
    for split, chosen in queries.items():
        shown = np.array([[label in s.target.labels for s in stored] for _, label in chosen.values()])
        own = np.array([i if split == "train" else -1 for i in chosen])
        for name in known:
            for what, parts in (
                ("windows", regions[name]),
                ("whole", [r[:1] for r in regions[name]]),
            ):
                scores = best_scores(np.concatenate(vectors[split][name]), parts)
                value = mean_precision(scores, shown, own)
                found[f"{split}/{name}/{what}"] = value
                print(f"{split:6} pyramid {name:6} {what:8} {100 * value:.2f} mAP", flush=True)
    return {"images": len(stored), "queries": arguments.queries, "mAP": found}


def drawn(dataset, count: int, rng) -> dict[int, tuple[np.ndarray, str]]:
    """Return an object, box and class, of each of some random images."""
    chosen = {}
    for i in sorted(rng.permutation(len(dataset))[:count].tolist()):
        target = dataset[i].target
        plain = np.flatnonzero(~target.ignored)
        if len(plain):
            k = int(rng.choice(plain))
            chosen[i] = target.boxes[k : k + 1], target.labels[k]
    return chosen


def learn(known: dict[str, Embedder], paths: list[Path], propose, count: int = 256) -> None:
    rng = np.random.default_rng(0)
    rows: dict[str, list] = {name: [] for name in known}
    plain = {name: embedder.unprojected() for name, embedder in known.items()}
    for i in track(rng.permutation(len(paths))[:count].tolist(), "Sampling", console=STDERR):
        pixels = read_image(paths[i])
        boxes = propose(pixels)
        each(plain, pixels, boxes[:: max(1, len(boxes) // 16)], rows)
    for name, embedder in known.items():
        embedder.fit_vectors(rows[name])


def each(known: dict[str, Embedder], pixels, boxes, into: dict[str, list]) -> None:
    """Embed boxes by several embedders, on maps that are computed once."""
    encoded = next(iter(known.values())).encode(pixels)
    for name, embedder in known.items():
        into[name].append(embedder(encoded, boxes))


def best_scores(queries: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
    """Return (Q, images) scores of the best region of every image."""
    starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
    return np.maximum.reduceat(queries @ np.concatenate(parts).T, starts, axis=1)


def mean_precision(scores: np.ndarray, shown: np.ndarray, own: np.ndarray) -> float:
    values = []
    for score, right, left_out in zip(scores, shown, own, strict=True):
        order = [i for i in np.argsort(-score, kind="stable").tolist() if i != left_out]
        hits = right[order]
        if hits.any():
            counted = np.cumsum(hits)
            recall, precision = counted / counted[-1], counted / np.arange(1, len(hits) + 1)
            values.append(average_precision(recall, precision, "area"))
    return float(np.mean(values))


def speed(arguments) -> dict:
    rng = np.random.default_rng(0)
    paths = find_images([arguments.data]).paths
    share = -(-arguments.regions // len(paths))
    known = {"2,1": embedders(arguments)["2,1"]}
    learn(known, paths, lambda pixels: random_boxes(pixels, 60, rng))
    (embedder,) = known.values()
    with TemporaryDirectory() as folder:
        index = Index.create(Path(folder) / "index", embedder, str(arguments.data))
        kept, spent = [], {"embed": 0.0, "add": 0.0}
        for path in track(paths, "Indexing", console=STDERR):
            start = time.perf_counter()
            pixels = read_image(path)
            boxes = random_boxes(pixels, min(share, arguments.regions - len(index)), rng)
            vectors = embedder(pixels, boxes)
            spent["embed"] += time.perf_counter() - start
            start = time.perf_counter()
            index.add(str(path), "", boxes, vectors)
            spent["add"] += time.perf_counter() - start
            kept.append(vectors.astype(np.float16))
        stored = np.concatenate(kept)
        # Regions that are not in the index, of images that are: people search for what is there.
        queries = []
        for path in [paths[i] for i in rng.permutation(len(paths))[:200].tolist()]:
            pixels = read_image(path)
            queries.append(embedder(pixels, random_boxes(pixels, 1, rng))[0])
        seconds, hits = [], []
        for query in track(queries, "Searching", console=STDERR):
            start = time.perf_counter()
            rows, _ = index.nearest(query, 10)
            seconds.append(time.perf_counter() - start)
            exact = query.astype(np.float16).astype(np.float32)
            scores = np.concatenate(
                [
                    exact @ part.astype(np.float32).T
                    for part in np.array_split(stored, 1 + len(stored) // 100_000)
                ]
            )
            hits.append(len(set(rows.tolist()) & set(np.argsort(-scores)[:10].tolist())) / 10)
        whole = []
        for query in queries[:50]:
            start = time.perf_counter()
            index.search_vector(query, 20)
            whole.append(time.perf_counter() - start)
        start = time.perf_counter()
        index.save()
        saved = time.perf_counter() - start
        bytes_on_disk = sum(path.stat().st_size for path in index.folder.iterdir())
        start = time.perf_counter()
        Index.open(index.folder)
        opened = time.perf_counter() - start
    return {
        "regions": len(stored),
        "images": len(paths),
        "recall_at_10": float(np.mean(hits)),
        "seconds_nearest_10": {"median": float(np.median(seconds)), "max": float(np.max(seconds))},
        "seconds_search_20_images": {"median": float(np.median(whole)), "max": float(np.max(whole))},
        "seconds_embedding": spent["embed"],
        "seconds_adding": spent["add"],
        "seconds_save": saved,
        "seconds_open": opened,
        "bytes_per_region_in_memory": index.memory / len(stored),
        "bytes_per_region_on_disk": bytes_on_disk / len(stored),
        "peak_memory_gb_of_this_process": peak_memory(),
    }


def random_boxes(pixels: np.ndarray, count: int, rng) -> np.ndarray:
    """Return boxes of a tenth to all of the image's sides, anywhere in it."""
    height, width = pixels.shape[:2]
    sizes = rng.uniform(0.1, 1, (count, 2)) * (width, height)
    starts = rng.uniform(0, 1, (count, 2)) * ((width, height) - sizes)
    return np.concatenate([starts, starts + sizes], axis=1).astype(np.float32)


if __name__ == "__main__":
    main()
