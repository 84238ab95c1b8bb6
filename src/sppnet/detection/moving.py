"""Localisation again from where windows were moved to: pooling is cheap once the maps are there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sppnet.arrays import Boxes
from sppnet.boxes import clip

# So many pairs of window and class that score best are looked at again.
_MOST = 600

Scored = tuple[Boxes, npt.NDArray[np.float32]]
"""(R, K, 4) boxes as each class moves them, and (R, K) scores."""


def moved_again(
    look: Callable[[Boxes], Scored], found: Scored, size: tuple[int, int], least: float, times: int
) -> Scored:
    """Pool the best windows where each class moved them, score and move them once more.

    The first score is of what was proposed, the second of where the object is thought to be: their mean
    counts. The paper moves boxes once (section 4.1).

    Parameters
    ----------
    look : callable
        Scores and moves (R, 4) windows of the image.
    found : Scored
        What that gave for the proposed windows.
    size : (int, int)
        Height and width of the image, at whose borders boxes are cut off.
    least : float
        What scores less is no detection, and not looked at again.
    times : int
        How often.
    """
    boxes, scores = found
    for _ in range(times):
        places = clip(boxes, *size[::-1])
        real = (places[..., 2:] > places[..., :2] + 1).all(axis=-1) & (scores >= least)
        rows, kinds = np.nonzero(real)
        best = np.argsort(-scores[rows, kinds], kind="stable")[:_MOST]
        rows, kinds = rows[best], kinds[best]
        if not len(rows):
            break
        moved, values = look(places[rows, kinds])
        each = np.arange(len(rows))
        boxes, scores = boxes.copy(), scores.copy()
        boxes[rows, kinds] = moved[each, kinds]
        scores[rows, kinds] = (scores[rows, kinds] + values[each, kinds]) / 2
    return boxes, scores
