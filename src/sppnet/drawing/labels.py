"""Where the labels of boxes go, so that they hide neither each other nor what is in the boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sppnet.arrays import Boxes, FloatArray
from sppnet.boxes import area, intersection

Size = tuple[float, float]

# What counts as hidden of a label: less is a border that touches another.
_TOUCH = 0.01


class Placed(NamedTuple):
    """Where a label goes.

    Attributes
    ----------
    form : int
        Which of its forms there is room for: 0 for the first.
    box : (4,) float64
        Where.
    """

    form: int
    box: npt.NDArray[np.float64]


def place_labels(
    boxes: Boxes, forms: Sequence[Sequence[Size]], picture: Size, taken: FloatArray
) -> list[Placed | None]:
    """Find a place for the label of each box, in their order: what comes first has the choice.

    A label stands above, below, beside or in a corner of its box, inside the picture. It never covers an
    earlier one; of the places that are left it takes the one that hides the least of the boxes, each measured
    by the share that is hidden: on a large object a label does no harm. If the first form of a label fits
    nowhere, the next one is tried.

    Parameters
    ----------
    boxes : (N, 4) float32
        In pixels of the picture, x1, y1, x2, y2.
    forms : sequence of N sequences of (float, float)
        Width and height in pixels of the forms of each label, the longest first.
    picture : (float, float)
        Width and height of the picture.
    taken : (T, 4) float array
        Where no label may lie.

    Returns
    -------
    list of N Placed or None
        None where no form fits.
    """
    width, height = picture
    places, covered = boxes.astype(np.float64), np.asarray(taken, np.float64).reshape(-1, 4)
    areas = np.maximum(area(places), 1)
    found: list[Placed | None] = []
    for i, sizes in enumerate(forms):
        placed = None
        for form, (w, h) in enumerate(sizes):
            if w > width or h > height:
                continue
            spots = _spots(places[i], w, h, width, height)
            free = np.flatnonzero(intersection(spots, covered).sum(axis=1) <= _TOUCH * w * h)
            if len(free):
                shares = intersection(spots[free], places) / np.minimum(areas, 25 * w * h)
                # Of equals the first; and rather a usual place than one that is a little better.
                cost = shares.sum(axis=1) + 0.01 * free
                placed = Placed(form, spots[free[cost.argmin()]])
                covered = np.concatenate([covered, placed.box[None]])
                break
        found.append(placed)
    return found


def _spots(
    box: npt.NDArray[np.float64], w: float, h: float, width: float, height: float
) -> npt.NDArray[np.float64]:
    """Return the (P, 4) places of a label around and in its box, the usual ones first, inside the picture."""
    x1, y1, x2, y2 = box
    middle = (x1 + x2 - w) / 2
    corners = [
        *((x1, y1 - h), (x2 - w, y1 - h), (middle, y1 - h)),  # above
        *((x1, y2), (x2 - w, y2), (middle, y2)),  # below
        *((x1, y1), (x2 - w, y1), (x1, y2 - h), (x2 - w, y2 - h)),  # inside
        *((x2, y1), (x2, y2 - h), (x1 - w, y1), (x1 - w, y2 - h)),  # beside
    ]
    low = np.clip(np.array(corners), 0, [width - w, height - h])
    return np.concatenate([low, low + np.array([w, h])], axis=1)
