"""Test-time augmentation: an image is looked at several times, at other sizes and flipped.

For networks that propose windows themselves. What the looks find is fused: boxes that overlap become one, at
their mean weighted by probability, as likely as they are on average over all looks (weighted boxes fusion:
Solovyev, Wang, Gabruseva, arXiv 1910.13302). Scores of the union of all windows, or means of each window's
scores, measured worse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sppnet.arrays import Boxes, FloatArray, IntArray, Pixels
from sppnet.boxes import Detections, flip, iou
from sppnet.proposals.odds import SLOPE

VIEWS = ((1.0, False), (1.0, True), (1.25, False), (1.25, True))
"""How an image is looked at: times its usual size, and whether flipped."""

FUSED_IOU = 0.55
"""Boxes of two looks are of one object if they overlap by more."""


def views(image: Pixels, side: int) -> Iterator[tuple[Pixels, int, bool]]:
    """Yield what is looked at of an (H, W, 3) image, at which shorter side, and whether it is flipped."""
    for times, flipped in VIEWS:
        yield np.ascontiguousarray(image[:, ::-1]) if flipped else image, round(times * side), flipped


def turned(found: Detections, width: int) -> Detections:
    """Return detections of a flipped image of that width where they lie in the image itself."""
    return Detections(flip(found.boxes, width), found.scores, found.labels)


def fused(looks: Sequence[Detections], limit: int) -> Detections:
    """Fuse what several looks at an image found.

    Parameters
    ----------
    looks : sequence of Detections
        What each found, after suppression, with scores of SVMs.
    limit : int
        Most detections of a class.

    Returns
    -------
    Detections
        By falling score, again as SVMs score.
    """
    every = np.concatenate([found.boxes for found in looks])
    scores = np.concatenate([found.scores for found in looks]).astype(np.float64)
    labels = np.array([label for found in looks for label in found.labels], dtype=object)
    look = np.repeat(np.arange(len(looks)), [len(found) for found in looks])
    chances = 1 / (1 + np.exp(-SLOPE * scores))
    boxes, means, names = [np.zeros((0, 4))], [], []
    for name in dict.fromkeys(labels):
        rows = np.flatnonzero(labels == name)
        here = list(_objects(every[rows], chances[rows], look[rows]))
        places, likely = zip(*(_mean(every[rows[o]], chances[rows[o]]) for o in here), strict=True)
        best = np.argsort(-np.array(likely), kind="stable")[:limit]
        boxes.append(np.array(places)[best])
        means += (np.array(likely)[best] / len(looks)).tolist()
        names += [str(name)] * len(best)
    odds = np.log(means) - np.log1p(-np.array(means)) if means else np.zeros(0)
    order = np.argsort(-odds, kind="stable")
    found = np.concatenate(boxes)[order].astype(np.float32)
    return Detections(found, (odds / SLOPE)[order].astype(np.float32), tuple(names[i] for i in order))


def _objects(boxes: Boxes, chances: FloatArray, look: IntArray) -> Iterator[IntArray]:
    """Yield the rows of each object of a class: the likeliest left, and at most one of each other look."""
    overlap, free = iou(boxes, boxes), np.ones(len(boxes), bool)
    for first in np.argsort(-chances, kind="stable"):
        if not free[first]:
            continue
        rows = [first]
        suits = free & (overlap[first] > FUSED_IOU)
        for other in np.unique(look[suits]):
            mine = np.flatnonzero(suits & (look == other))
            if other != look[first]:
                rows.append(mine[np.argmax(overlap[first, mine] * chances[mine])])
        free[rows] = False
        yield np.array(rows)


def _mean(boxes: Boxes, chances: FloatArray) -> tuple[FloatArray, float]:
    """Return the mean of boxes, weighted by their probabilities, and the sum of these."""
    total = float(chances.sum())
    return chances @ boxes / total, total
