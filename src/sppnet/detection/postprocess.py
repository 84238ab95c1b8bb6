"""From scored boxes to detections: threshold, suppression class by class, order (paper section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sppnet.arrays import FloatArray
from sppnet.boxes import Detections, batched_nms, clip

LEAST_SCORE = -1.5
"""Windows whose SVM gives less are no detections, as in the released code; at 0 it is undecided."""

LEAST_JOINT_SCORE = -6.0
"""The same where scores count how likely a window is an object at all: so low most are background."""


def postprocess(
    boxes: FloatArray,
    scores: FloatArray,
    classes: Sequence[str],
    shape: tuple[int, int],
    nms_iou: float,
    threshold: float,
    limit: int,
) -> Detections:
    """Suppress overlapping boxes class by class and put what is left in order (section 4.1).

    Parameters
    ----------
    boxes : (R, K, 4) float32
        Original-image pixels.
    scores : (R, K) float32
    classes : sequence of K str
    shape : (int, int)
        Height and width of the image, at whose borders boxes are cut off.
    nms_iou : float
        See `sppnet.boxes.nms`.
    threshold : float
        Least score.
    limit : int
        Most detections of a class.
    """
    height, width = shape
    inside = clip(boxes, width, height)
    real = (inside[..., 2:] > inside[..., :2]).all(axis=-1)
    kinds, rows = np.nonzero(((scores >= threshold) & real).T)
    found, points = inside[rows, kinds], scores[rows, kinds]
    kept = batched_nms(found, points, kinds, nms_iou, limit)
    return Detections(found[kept], points[kept], tuple(str(classes[k]) for k in kinds[kept]))
