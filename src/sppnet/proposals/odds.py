"""What a network that proposes windows says of them: how likely they are objects, and of which class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sppnet.arrays import Boxes, FloatArray
from sppnet.boxes import iou
from sppnet.features.encoded import OwnWindows

NONE = -12.0
"""Log-odds of a window that overlaps nothing that the network proposes."""

SLOPE = 2.0
"""What a score of an SVM is worth in log-odds: its margin is two wide."""


def told(
    boxes: Boxes, own: OwnWindows, kinds: Sequence[str], classes: Sequence[str]
) -> tuple[FloatArray, FloatArray]:
    """Return what the network says of boxes, by its own window that each overlaps most.

    Parameters
    ----------
    boxes : (R, 4) float32
    own : OwnWindows
        What it proposes.
    kinds : sequence of str
        The classes that it tells apart.
    classes : sequence of K str
        Those that are asked for.

    Returns
    -------
    (R,) float
        Log-odds of an object.
    (R, K) float
        Logarithms of the probabilities of the classes; nan of those that the network does not know.
    """
    probabilities = np.full((len(boxes), len(classes)), np.nan)
    if not len(own.boxes):
        return np.full(len(boxes), NONE), probabilities
    overlap = iou(boxes, own.boxes)
    nearest = overlap.argmax(axis=1)
    odds = np.where(overlap.max(axis=1) > 0, own.scores[nearest], NONE)
    for k, name in enumerate(classes):
        if name in kinds:
            probabilities[:, k] = own.kinds[nearest, kinds.index(name)]
    return odds, probabilities


def with_told(scores: FloatArray, odds: FloatArray, probabilities: FloatArray) -> FloatArray:
    """Return scores of SVMs that count what the network says.

    A class's probability is the geometric mean of the SVM's and the network's, or the SVM's alone where the
    network does not know the class; that of an object multiplies it. So a score stays where all are sure.

    Parameters
    ----------
    scores : (R, K) float32
    odds, probabilities
        What `told` gives.
    """
    mine = -np.logaddexp(0, -SLOPE * scores.astype(np.float64))
    both = np.where(np.isnan(probabilities), mine, (mine + probabilities) / 2)
    chance = np.minimum(both - np.logaddexp(0, -odds)[:, None], -1e-12)
    together: FloatArray = (chance - np.log(-np.expm1(chance))) / SLOPE
    return together.astype(np.float32)
