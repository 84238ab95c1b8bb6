"""How likely a window is an object, whatever its class, as the network that proposed it says."""

from __future__ import annotations

import numpy as np

from sppnet.arrays import Boxes, FloatArray
from sppnet.boxes import Windows, iou

NONE = -12.0
"""Log-odds of a window that overlaps nothing that the network proposes."""

SLOPE = 2.0
"""What a score of an SVM is worth in log-odds: its margin is two wide."""


def odds_of(boxes: Boxes, own: Windows) -> FloatArray:
    """Return the (R,) log-odds of (R, 4) boxes: those of the network's window that each overlaps most."""
    if not len(own.boxes):
        return np.full(len(boxes), NONE)
    overlap = iou(boxes, own.boxes)
    nearest = overlap.argmax(axis=1)
    return np.where(overlap.max(axis=1) > 0, own.scores[nearest], NONE).astype(np.float64)


def with_objectness(scores: FloatArray, odds: FloatArray) -> FloatArray:
    """Return scores of SVMs that count how likely windows are objects.

    Where that is certain, a score stays; else it falls to what stands for the product of both probabilities.

    Parameters
    ----------
    scores : (R, K) float32
    odds : (R,) float
        Log-odds of an object.
    """
    chance = -np.logaddexp(0, -odds)[:, None] - np.logaddexp(0, -SLOPE * scores.astype(np.float64))
    chance = np.minimum(chance, -1e-12)
    together: FloatArray = (chance - np.log(-np.expm1(chance))) / SLOPE
    return together.astype(np.float32)
