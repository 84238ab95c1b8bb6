"""Localisation again from where windows were moved to: pooling is cheap once the maps are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sppnet.boxes import clip

if TYPE_CHECKING:
    from sppnet.arrays import Boxes
    from sppnet.detection.fit import Fitted

# So many windows that score best are looked at again, class by class: classes do not count for each other.
_MOST = 100

Scored = tuple["Boxes", npt.NDArray[np.float32]]
"""(R, K, 4) boxes as each class moves them, and (R, K) scores."""


def moved_again(
    look: Callable[[Boxes], Scored], found: Scored, size: tuple[int, int], model: Fitted, times: int
) -> Scored:
    """Pool the best windows where their class moved them, score and move them once more.

    The first score is of what was proposed, the others of where the object is thought to be: their mean
    counts. The paper moves boxes once (section 4.1).

    Parameters
    ----------
    look : callable
        Scores and moves (R, 4) windows of the image.
    found : Scored
        What that gave for the proposed windows.
    size : (int, int)
        Height and width of the image, at whose borders boxes are cut off.
    model : Fitted
        What scores less than its least is no detection, and not looked at again; nor are classes that it
        does not move.
    times : int
        How often; at 0 or less all stays as it is found.
    """
    if times <= 0:
        return found
    boxes, scores = found
    looks = np.ones(scores.shape, np.float32)
    for _ in range(times):
        places = clip(boxes, size[1], size[0])
        real = (places[..., 2:] > places[..., :2] + 1).all(axis=-1) & (scores >= model.least_score)
        rows, kinds = _best(np.where(real & model.regression.moves, scores, -np.inf))
        if not len(rows):
            break
        moved, values = look(places[rows, kinds])
        each = np.arange(len(rows))
        boxes, scores = boxes.copy(), scores.copy()
        boxes[rows, kinds] = moved[each, kinds]
        looks[rows, kinds] += 1
        scores[rows, kinds] += (values[each, kinds] - scores[rows, kinds]) / looks[rows, kinds]
    return boxes, scores


def _best(scores: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return rows and columns of the highest (R, K) scores of each column, none of which is infinite."""
    order = np.argsort(-scores, axis=0, kind="stable")[:_MOST]
    kinds = np.broadcast_to(np.arange(scores.shape[1]), order.shape)
    there = np.take_along_axis(scores, order, axis=0) > -np.inf
    return order[there], kinds[there]
