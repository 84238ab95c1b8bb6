"""Whether the size that an annotation states is that of its photo, and how its boxes come to what is seen.

Tools that ignore the EXIF orientation annotate the pixels as they are stored, others the picture as it is
seen; and photos are shrunk after they were annotated. Sizes tell which, mostly.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import numpy as np
import numpy.typing as npt

from sppnet.images import ImageHeader

Size = tuple[int, int]
"""Height and width in pixels."""


class Frame(Enum):
    """What the boxes of a photo were drawn on."""

    SEEN = "the photo as it is seen"
    STORED = "the photo as it is stored, before its EXIF orientation turns it"
    EITHER = "one of these: the sizes do not tell"


def frame_of(annotated: Size | None, header: ImageHeader) -> Frame | None:
    """Tell by an annotated size what was annotated; None if it is not this photo, at any scale."""
    if header.orientation == 1:
        return Frame.SEEN if annotated is None or _alike(annotated, header.size) else None
    stored, seen = header[:2], header.size
    if annotated is None:
        return Frame.EITHER
    for fits in (annotated.__eq__, lambda size: _alike(annotated, size)):
        if fits(seen) and fits(stored):
            return Frame.EITHER
        if fits(seen) or fits(stored):
            return Frame.SEEN if fits(seen) else Frame.STORED
    return None


def decided(frames: Sequence[Frame], headers: Sequence[ImageHeader]) -> Frame:
    """Return what the photos that tell have in common: how those are meant that do not; EITHER if unknown."""
    told = {
        frame
        for frame, header in zip(frames, headers, strict=True)
        if header.orientation > 1 and frame != Frame.EITHER
    }
    return told.pop() if len(told) == 1 else Frame.EITHER


def turned(
    boxes: npt.NDArray[np.float64],
    orientation: int,
    heights: npt.NDArray[np.float64],
    widths: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Turn boxes with their photos from how these are stored to how they are seen.

    Parameters
    ----------
    boxes : (R, 4) float64
        0-based half-open pixels of the stored photos.
    orientation : int
        EXIF orientation, 1 to 8.
    heights, widths : (R,) float64
        Of the stored photo of each box.
    """
    x1, y1, x2, y2 = boxes.T
    left, right, top, bottom = widths - x2, widths - x1, heights - y2, heights - y1
    sides = {
        1: (x1, y1, x2, y2),
        2: (left, y1, right, y2),
        3: (left, top, right, bottom),
        4: (x1, top, x2, bottom),
        5: (y1, x1, y2, x2),
        6: (top, x1, bottom, x2),
        7: (top, left, bottom, right),
        8: (y1, left, y2, right),
    }
    return np.stack(sides[orientation], axis=1)


def _alike(one: Size, other: Size) -> bool:
    """Tell whether two sizes are of one picture at two scales, up to the rounding of a pixel."""
    (h, w), (height, width) = one, other
    # The larger picture shrunk to the smaller by one side: how far the other one is off, in smaller pixels.
    return abs(h * width - w * height) <= max(h, w, height, width)
