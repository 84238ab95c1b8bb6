"""What the default detector takes, for a plan."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from sppnet.detection.detector import PROPOSALS, Detector
from sppnet.detection.postprocess import LEAST_SCORE, postprocess
from sppnet.detection.svm import LinearSVMs, MiningSettings, TrainingSet
from sppnet.features.backbone import DEFAULT, Backbone
from sppnet.features.cache import MapCache
from sppnet.images import pixels_of
from sppnet.measuring.process import Share, Units, line, memory, photos, ready
from sppnet.planning.costs import FOLDS
from sppnet.progress import StageTimer
from sppnet.proposals.choosing import parse
from sppnet.regression import BoxRegression, fit_ridges

# Two numbers of windows, and two of classes: lines are drawn between what they take.
_WINDOWS, _CLASSES = (250, 2000), (10, 60)
# Windows of which a class has detections before suppression, of all (benchmarks/plan.py).
_SHOWN = 0.02
# Examples of the SVMs that are trained to take the time, and their classes.
_EXAMPLES, _TRAINED = 3000, 4
# Windows that teach the box regressions that are fitted to take the time.
_MOVED = (250, 1250)


@dataclass
class _Looks:
    """Takes photos through what the detector does with one, but for the scores, and keeps what it took."""

    detector: Detector
    store: MapCache
    timer: StageTimer = field(default_factory=StageTimer)
    pixels: list[int] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)

    def __call__(self, path: Path) -> None:
        with self.timer("read"):
            image = pixels_of(path)
        with self.timer("propose"):
            boxes = parse(PROPOSALS)(image).boxes
        self.store(image, self.timer)  # computes and keeps the maps
        encoded = self.store(image, self.timer)
        for count in _WINDOWS:
            with self.timer(f"pool {count}"):
                self.detector.pooling(encoded, np.resize(boxes, (count, 4)))
        self.pixels.append(image.shape[0] * image.shape[1])
        self.windows.append(len(boxes))
        for entry in self.store.folder.iterdir():
            self.entries.append(entry.stat().st_size)
            entry.unlink()


def detect(asked: Mapping[str, Any]) -> Units:
    """Look at photos as the default detector does."""
    like = Detector()
    backbone = Backbone.shared(DEFAULT, like.stages, like.output_stride)
    with TemporaryDirectory(prefix="sppnet-plan-") as folder:
        looks = _Looks(like, MapCache(Path(folder), backbone, like.scales))
        looks(Path(asked["photos"][0]))
        started, share = ready(asked), Share()
        looks.timer.seconds.clear()
        for path in photos(asked):
            looks(path)
        had = share()
    seen = len(looks.pixels) - 1
    each = {name: had * seconds / seen for name, seconds in looks.timer.seconds.items()}
    pool, pool_window = line(_WINDOWS, [each[f"pool {count}"] for count in _WINDOWS])
    return {
        "start_detect": max(started - sum(each.values()), 0.0),
        "read": each["read"] * seen / sum(looks.pixels[1:]) * 1e6,
        "propose": each["propose"],
        "encode": each["backbone"],
        "keep": each["maps to cache"],
        "fetch": each["maps from cache"],
        "pool": pool,
        "pool_window": pool_window,
        "windows": float(np.mean(looks.windows)),
        "entry": float(np.mean(looks.entries)),
        "pooled": 2.0 * sum(backbone.channels) * sum(n * n for n in like.levels),
        "memory_detect": memory(),
    }


def learn(asked: Mapping[str, Any]) -> Units:
    """Score and train on random vectors of windows: nothing of it depends on what they show."""
    rng, length = np.random.default_rng(0), int(asked["length"])
    vectors = rng.normal(size=(_WINDOWS[1], length)).astype(np.float32) * np.float32(20 / length**0.5)
    scored = [_score_seconds(vectors, count, rng) for count in _CLASSES]
    window, pair = line(_CLASSES, [seconds / len(vectors) for seconds, _ in scored])
    _, mined = line(_CLASSES, [seconds / len(vectors) for _, seconds in scored])
    # From n windows, their inner products and what is solved take n^2, all else n.
    few, many = (_ridge_seconds(vectors, count, rng) / count for count in _MOVED)
    ridge_window, ridge_square = line(_MOVED, [few, many])
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
    targets = rng.normal(size=(count, 4)).astype(np.float32)
    folds = [np.arange(count) % FOLDS != fold for fold in range(FOLDS)]
    start = time.process_time()
    wide = np.concatenate(
        [vectors[:count].astype(np.float16).astype(np.float32), np.ones((count, 1), np.float32)], 1
    )
    fit_ridges(wide, targets, 1000.0, [np.ones(count, bool), *folds])
    return time.process_time() - start
