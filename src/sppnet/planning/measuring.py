"""What a unit of work costs, measured in a process of one core: ``python -m sppnet.planning.measuring``.

Reads what to measure from its input as JSON and prints what it measured as JSON. It is a process of its own,
so that its time to start and its memory are those of a command.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from sppnet.images import pixels_of
from sppnet.planning.costs import FOLDS
from sppnet.progress import StageTimer, peak_memory

Units = dict[str, float]

# Two numbers of windows, and two of classes: lines are drawn between what they take.
_WINDOWS, _CLASSES = (250, 2000), (10, 60)
# Windows of which a class has detections before suppression, of all (benchmarks/plan.py).
_SHOWN = 0.02
# Examples of the SVMs that are trained to take the time, and their classes.
_EXAMPLES, _TRAINED = 3000, 4
# Windows that teach the box regressions that are fitted to take the time.
_MOVED = (250, 1250)
_LEAST_PHOTOS = 3
# Seconds that a process waits for disks until it is ready, at most.
_WAITING = 0.5


def main() -> None:
    """Measure what is asked for."""
    asked = json.loads(sys.stdin.read())
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[asked["core"] % len(cores)]})
    kinds: dict[str, Callable[[Mapping[str, Any]], Units]] = {
        "embed": _embed,
        "detect": _detect,
        "learn": _learn,
    }
    print(json.dumps(kinds[asked["kind"]](asked)))


def _photos(asked: Mapping[str, Any]) -> Iterator[Path]:
    """Yield photos over and over until the time is up, but some in any case."""
    end = time.perf_counter() + asked["seconds"]
    for count, photo in enumerate(cycle(asked["photos"])):
        if count >= _LEAST_PHOTOS and time.perf_counter() > end:
            return
        yield Path(photo)


class _Share:
    """What this process had of its core since it began: others may have been at work there, too."""

    def __init__(self) -> None:
        self._wall, self._own = time.perf_counter(), time.process_time()

    def __call__(self) -> float:
        wall, own = time.perf_counter() - self._wall, time.process_time() - self._own
        return float(min(own / wall, 1.0))


def _memory() -> float:
    return (peak_memory() or 0.0) * 1e9


def _ready(asked: Mapping[str, Any]) -> float:
    """Return the seconds from the start of this process until now, less what others had of its core."""
    return float(min(time.time() - asked["started"], time.process_time() + _WAITING))


def _embed(asked: Mapping[str, Any]) -> Units:
    """Embed photos by the default embedder."""
    from sppnet.retrieval.embedder import Embedder

    embedder, timer, seen = Embedder(), StageTimer(), 0
    embedder(asked["photos"][0])
    ready, share = _ready(asked), _Share()
    for path in _photos(asked):
        with timer("read"):
            pixels = pixels_of(path)
        with timer("embed"):
            embedder(pixels)
        seen += 1
    had = share()
    each = {name: had * seconds / seen for name, seconds in timer.seconds.items()}
    return {
        "start_embed": max(ready - sum(each.values()), 0.0),
        "embed": each["embed"],
        "vector": 4.0 * embedder.length,
        "memory_embed": _memory(),
    }


def _detect(asked: Mapping[str, Any]) -> Units:
    """Take photos through what the default detector does with one, but for the scores."""
    from sppnet.detection.detector import PROPOSALS, Detector
    from sppnet.features.backbone import Backbone
    from sppnet.features.cache import MapCache
    from sppnet.proposals.choosing import parse

    like, method = Detector(), parse(PROPOSALS)
    backbone, pooling = Backbone.shared(like.backbone, like.stages, like.output_stride), like.pooling
    timer, pixels, windows = StageTimer(), [], []

    def look(path: Path, store: MapCache) -> None:
        with timer("read"):
            image = pixels_of(path)
        with timer("propose"):
            boxes = method(image).boxes
        store(image, timer)  # computes and keeps the maps
        encoded = store(image, timer)
        for count in _WINDOWS:
            with timer(f"pool {count}"):
                pooling(encoded, np.resize(boxes, (count, 4)))
        pixels.append(image.shape[0] * image.shape[1])
        windows.append(len(boxes))
        for entry in store.folder.iterdir():
            entries.append(entry.stat().st_size)
            entry.unlink()

    entries: list[int] = []
    with TemporaryDirectory(prefix="sppnet-plan-") as folder:
        store = MapCache(Path(folder), backbone, pooling.scales)
        look(Path(asked["photos"][0]), store)
        ready, share = _ready(asked), _Share()
        timer.seconds.clear()
        for path in _photos(asked):
            look(path, store)
        had = share()
    seen = len(pixels) - 1
    each = {name: had * seconds / seen for name, seconds in timer.seconds.items()}
    pool, pool_window = _line(_WINDOWS, [each[f"pool {count}"] for count in _WINDOWS])
    return {
        "start_detect": max(ready - sum(each.values()), 0.0),
        "read": each["read"] * seen / sum(pixels[1:]) * 1e6,
        "propose": each["propose"],
        "encode": each["backbone"],
        "keep": each["maps to cache"],
        "fetch": each["maps from cache"],
        "pool": pool,
        "pool_window": pool_window,
        "windows": float(np.mean(windows)),
        "entry": float(np.mean(entries)),
        "pooled": 2.0 * sum(backbone.channels) * sum(n * n for n in pooling.levels),
        "memory_detect": _memory(),
    }


def _line(places: tuple[int, int], values: list[float]) -> tuple[float, float]:
    """Return offset and slope of the line through two values, neither below 0."""
    slope = max(values[1] - values[0], 0.0) / (places[1] - places[0])
    return max(values[0] - slope * places[0], 0.0), slope


def _learn(asked: Mapping[str, Any]) -> Units:
    """Score and train on random vectors of windows: nothing of it depends on what they show."""
    rng, length = np.random.default_rng(0), int(asked["length"])
    vectors = rng.normal(size=(_WINDOWS[1], length)).astype(np.float32) * np.float32(20 / length**0.5)
    scored = [_score_seconds(vectors, count, rng) for count in _CLASSES]
    window, pair = _line(_CLASSES, [seconds / len(vectors) for seconds, _ in scored])
    _, mined = _line(_CLASSES, [seconds / len(vectors) for _, seconds in scored])
    # From n windows, their inner products and what is solved take n^2, all else n.
    few, many = (_ridge_seconds(vectors, count, rng) / count for count in _MOVED)
    ridge_window, ridge_square = _line(_MOVED, [few, many])
    return {
        "score_window": window,
        "score_pair": pair,
        "mine_pair": mined,
        "visit": _visit_seconds(rng, length),
        "ridge_window": ridge_window,
        "ridge_square": ridge_square,
    }


def _score_seconds(
    vectors: npt.NDArray[np.float32], classes: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Return the seconds of all that is done with the vectors of a photo, and of the SVMs alone."""
    from sppnet.detection.postprocess import LEAST_SCORE, postprocess
    from sppnet.detection.svm import LinearSVMs
    from sppnet.regression import BoxRegression

    count, length = vectors.shape
    weights = rng.normal(size=(classes, length)).astype(np.float32)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    spread = float(np.std(vectors[:200] @ weights[0]))
    # So few windows score enough to come to suppression.
    shift = LEAST_SCORE - spread * 2.05
    svms = LinearSVMs(weights, np.full(classes, shift, np.float32))
    moves = BoxRegression(np.repeat(weights[:, None] / 100, 4, axis=1), np.zeros((classes, 4), np.float32))
    corner = rng.uniform(0, 300, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(20, 200, (count, 2))], axis=1).astype(np.float32)
    seconds = []
    for _ in range(2):
        start = time.process_time()
        scores = svms(vectors)
        mined = time.process_time() - start
        names = [str(k) for k in range(classes)]
        postprocess(moves.moved(boxes, vectors), scores, names, (500, 500), 0.3, LEAST_SCORE, 100)
        seconds.append((time.process_time() - start, mined))
    return min(seconds)


def _visit_seconds(rng: np.random.Generator, length: int) -> float:
    """Return the seconds of training SVMs for each example of a class."""
    from sppnet.detection.svm import MiningSettings, TrainingSet

    signs = np.full((_EXAMPLES, _TRAINED), -1, np.int8)
    signs[: _EXAMPLES // 10] = 1
    features = rng.normal(size=(_EXAMPLES, length)).astype(np.float32)
    features[: _EXAMPLES // 10, : length // 100] += 0.7
    features *= np.float32(20 / length**0.5)
    TrainingSet(features[:100], signs[:100, :1], MiningSettings()).fit()  # compiles
    training = TrainingSet(features, signs, MiningSettings())
    start = time.process_time()
    training.fit()
    return (time.process_time() - start) / signs.size


def _ridge_seconds(vectors: npt.NDArray[np.float32], count: int, rng: np.random.Generator) -> float:
    """Return the seconds of the box regression of a class from so many windows, with its folds."""
    from sppnet.regression import fit_ridges

    targets = rng.normal(size=(count, 4)).astype(np.float32)
    folds = [np.arange(count) % FOLDS != fold for fold in range(FOLDS)]
    start = time.process_time()
    wide = np.concatenate(
        [vectors[:count].astype(np.float16).astype(np.float32), np.ones((count, 1), np.float32)], 1
    )
    fit_ridges(wide, targets, 1000.0, [np.ones(count, bool), *folds])
    return time.process_time() - start


if __name__ == "__main__":
    main()
