"""From scored boxes to detections: threshold, suppression class by class, order (paper section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from sppnet.boxes import Detections, batched_nms


def postprocess(
    boxes: Tensor,
    scores: Tensor,
    classes: Sequence[str],
    shape: tuple[int, int],
    nms_iou: float,
    threshold: float,
    limit: int,
) -> Detections:
    """Suppress overlapping boxes class by class and put what is left in order (section 4.1).

    Parameters
    ----------
    boxes : (R, K, 4) float32 tensor
        Original-image pixels.
    scores : (R, K) float32 tensor
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
    inside = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    real = (inside[..., 2:] > inside[..., :2]).all(dim=-1)
    kinds, rows = ((scores >= threshold) & real).T.nonzero(as_tuple=True)
    found, value = inside[rows, kinds], scores[rows, kinds]
    kept = batched_nms(found, value, kinds, nms_iou)
    chosen, points, labels = (t[kept].cpu().numpy() for t in (found, value, kinds))
    # Already by falling score: the first ones of each class are its best.
    rank = np.empty(len(labels), dtype=np.int64)
    for k in np.unique(labels):
        rank[labels == k] = np.arange((labels == k).sum())
    best = np.flatnonzero(rank < limit)
    return Detections(chosen[best], points[best], tuple(str(classes[k]) for k in labels[best]))
