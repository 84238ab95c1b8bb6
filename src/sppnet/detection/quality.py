"""How good a detector is, as far as its fit could tell: measured on photos that it did not learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sppnet.arrays import FloatArray, IntArray
from sppnet.boxes import Detections, Target
from sppnet.detection.calibration import Calibration, fit_calibration
from sppnet.evaluation.detection import Counts, voc_detection

PERCENTS = 101
"""Thresholds at which detections are counted: 0, 1 ... 100 %."""

SMOOTHING = 30
"""Hits are taken half as counted and half as promised, for thresholds, where there are so many objects."""


@dataclass(frozen=True)
class Quality:
    """What was found of each of K classes on photos that were not learned from.

    Attributes
    ----------
    average_precision : (K,) float32
        VOC 2007's, at an overlap of 0.5; nan of a class that could not be measured.
    curve : (K, 101, 2) int32
        How many detections have a probability of at least 0, 1 ... 100 %, and how many of them are right.
    objects : (K,) int64
        Number of objects to find, difficult ones and crowds aside.
    photos : (K,) int64
        Number of photos that the class was looked for in.
    folds : (K,) int64
        Number of folds: 1 of photos held out, 0 where nothing was measured.
    """

    average_precision: npt.NDArray[np.float32]
    curve: npt.NDArray[np.int32]
    objects: IntArray
    photos: IntArray
    folds: IntArray

    @property
    def mean_ap(self) -> float:
        """Mean of the average precisions that are known; nan without any."""
        known = self.average_precision[np.isfinite(self.average_precision)]
        return float(known.mean()) if len(known) else float("nan")

    def joined(self, other: Quality) -> Quality:
        """Return the quality of these classes and, after them, of others."""
        return Quality(
            *(np.concatenate([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self))
        )

    def at(self, k: int, threshold: float) -> Counts:
        """Return what is found of class k from a probability on, counted at the nearest per cent."""
        found, hits = self.curve[k, round(100 * threshold)].tolist()
        return Counts(hits, found, int(self.objects[k]))

    def threshold_of(self, k: int, precision: float) -> float | None:
        """Return the least threshold, in whole per cents, at which class k is as precise; None without one.

        Of all thresholds that reach the precision, this one finds the most.
        """
        found, hits = self.curve[k, :, 0], self.curve[k, :, 1]
        enough = (found > 0) & (hits >= precision * found)
        return int(enough.argmax()) / 100 if enough.any() else None

    def sentence(self, k: int, threshold: float) -> str:
        """Say what is found of class k: ``"finds 8 of 10, one false alarm in 12 photos"``."""
        counts, photos = self.at(k, threshold), int(self.photos[k])
        if not counts.objects:
            return "not measured: too few photos show it" if photos else "not measured"
        wrong, often = counts.false_alarms, counts.false_alarms / photos
        alarms = f"{often:.1f} false alarms in a photo" if often > 1 else "no false alarm"
        if 0 < often <= 1:
            each = round(photos / wrong)
            alarms = f"one false alarm in {f'{each} photos' if each > 1 else 'each photo'}"
        return f"finds {counts.hits} of {counts.objects}, {alarms}"


class Learned(NamedTuple):
    """What out-of-fold detections teach: see `sppnet.detection.fit.Fitted`."""

    calibration: Calibration
    thresholds: npt.NDArray[np.float32]
    quality: Quality

    def where(self, chosen: npt.NDArray[np.bool_], other: Learned) -> Learned:
        """Return this of the classes that are chosen, and another one of the rest."""

        def mixed(mine: Any, theirs: Any) -> Any:
            parts = {name: choose(value, getattr(theirs, name)) for name, value in vars(mine).items()}
            return type(mine)(**parts)

        def choose(mine: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.where(chosen.reshape(-1, *[1] * (mine.ndim - 1)), mine, theirs)

        return Learned(
            mixed(self.calibration, other.calibration),
            choose(self.thresholds, other.thresholds),
            mixed(self.quality, other.quality),
        )


def learn_scores(
    found: Sequence[Detections],
    targets: Sequence[Target],
    classes: Sequence[str],
    measured: npt.NDArray[np.bool_],
    folds: int,
) -> Learned:
    """Learn from out-of-fold detections what their scores mean, and how good they are.

    Parameters
    ----------
    found : sequence of n Detections
        With the scores of SVMs, of photos that these did not learn from.
    targets : sequence of n Target
        What is there.
    classes : sequence of K str
    measured : (n, K) bool
        Whether a class could be learned without a photo; it is measured on these photos only.
    folds : int
        Number of folds.
    """
    results, photos = [], measured.sum(axis=0)
    for k, name in enumerate(classes):
        rows = np.flatnonzero(measured[:, k]).tolist()
        result = voc_detection([found[i] for i in rows], [targets[i] for i in rows], [name])[name]
        results.append(result)
    hits = [result.hits for result in results]
    calibration = fit_calibration([result.scores for result in results], hits)
    chances = [calibration(r.scores, np.full(len(r.scores), k)) for k, r in enumerate(results)]
    quality = Quality(
        np.array([r.average_precision for r in results], np.float32),
        np.stack([curve(p, h) for p, h in zip(chances, hits, strict=True)]).astype(np.int32),
        np.array([r.positives for r in results], np.int64),
        photos.astype(np.int64),
        np.where(photos > 0, folds, 0).astype(np.int64),
    )
    expected = np.stack([curve(p, p) for p in chances])
    return Learned(calibration, best_thresholds(quality, expected), quality)


def unmeasured(count: int) -> Learned:
    """Return what is known of the scores of so many classes before anything was measured."""
    return learn_scores([], [], [str(k) for k in range(count)], np.zeros((0, count), bool), 0)


def curve(chances: FloatArray, weights: FloatArray | npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Return number and sum of weights of detections of at least 0, 1 ... 100 %, as (101, 2)."""
    # In double precision, as a threshold that is compared is rounded up to the next float32.
    least = (np.arange(PERCENTS) / 100).astype(np.float32)
    order = np.argsort(chances)
    totals = np.concatenate([[0.0], np.cumsum(np.asarray(weights, np.float64)[order][::-1])])
    counts = len(chances) - np.searchsorted(chances[order], least)
    return np.stack([counts, totals[counts]], axis=1)


def best_thresholds(quality: Quality, expected: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Return the threshold of the best F1 of each class, in whole per cents.

    F1 of few detections jumps with each of them. So hits are a mean of those that were counted, weighted by
    the number n of objects, and of those that the probabilities promise, weighted by `SMOOTHING`. A class
    without any object takes the threshold that is best for all others together.

    Parameters
    ----------
    quality : Quality
        What was counted.
    expected : (K, 101, 2) float64
        As the curve of `quality`, with sums of probabilities in place of hits.
    """
    objects = quality.objects[:, None]
    weight = objects / (objects + SMOOTHING)
    hits = weight * quality.curve[:, :, 1] + (1 - weight) * expected[:, :, 1]
    totals = quality.curve[:, :, 0] + objects
    inner = slice(1, PERCENTS - 1)
    f1 = 2 * hits / np.maximum(totals, 1)
    pooled = 2 * hits.sum(axis=0) / np.maximum(totals.sum(axis=0), 1)
    common = _middle(pooled[inner]) if quality.objects.any() else 49
    best = [_middle(row[inner]) if n else common for row, n in zip(f1, quality.objects, strict=True)]
    return ((np.array(best) + 1) / 100).astype(np.float32)


def _middle(values: FloatArray) -> int:
    """Return the middle of the places of the largest value."""
    places = np.flatnonzero(values == values.max())
    return int(places[len(places) // 2])
