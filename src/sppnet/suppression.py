"""The compiled loop of greedy non-maximum suppression; `sppnet.boxes.nms` is how to call it."""

from __future__ import annotations

from typing import Any

import numpy as np

from sppnet.compiling import compiled


@compiled("i8[::1](f4[:, ::1], f8, i8)")
def suppress(boxes: Any, threshold: Any, limit: Any) -> Any:
    """Return which boxes are kept: the first, and each that overlaps no kept one by more than the threshold.

    Parameters
    ----------
    boxes : (R, 4) float32
        The best first. Overlaps are computed in double precision, in which those of whole pixels are exact.
    threshold : float64
        Greatest intersection over union of two kept boxes.
    limit : int64
        Most boxes to keep.

    Returns
    -------
    (K,) int64
        Rising indices.
    """
    count = len(boxes)
    x1, y1, x2, y2 = (np.empty(count), np.empty(count), np.empty(count), np.empty(count))
    for j in range(count):
        x1[j], y1[j], x2[j], y2[j] = boxes[j, 0], boxes[j, 1], boxes[j, 2], boxes[j, 3]
    areas, dropped = (x2 - x1) * (y2 - y1), np.zeros(count, np.bool_)
    kept, found = np.empty(min(count, limit), np.int64), 0
    for i in range(count):
        if found == limit:
            break
        if dropped[i]:
            continue
        kept[found] = i
        found += 1
        left, top, right, bottom, own = x1[i], y1[i], x2[i], y2[i], areas[i]
        # Without branches, so that several boxes are compared at once.
        for j in range(i + 1, count):
            width = max(min(right, x2[j]) - max(left, x1[j]), 0.0)
            height = max(min(bottom, y2[j]) - max(top, y1[j]), 0.0)
            shared = width * height
            # 0 / 0 of two boxes without area is no overlap: NaN is not greater.
            dropped[j] |= shared / (own + areas[j] - shared) > threshold
    return kept[:found]
