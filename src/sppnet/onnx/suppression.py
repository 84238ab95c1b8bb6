"""Suppression of overlapping boxes, as nodes of a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sppnet.onnx.nodes import Nodes, Value


def suppress(
    op: Nodes, boxes: Value, scores: Value, nms_iou: float, threshold: float, limit: int
) -> tuple[Value, Value, Value]:
    """Keep the best of overlapping boxes class by class; see `sppnet.detection.postprocess`.

    Parameters
    ----------
    op : Nodes
        The graph.
    boxes : (R, K, 4) float32 value
    scores : (R, K) float32 value
    nms_iou : float
        Boxes of a class that overlap a better one by more are dropped.
    threshold : float
        Least score.
    limit : int
        Most boxes of a class.

    Returns
    -------
    (D, 4) float32, (D,) float32 and (D,) int64 values
        Boxes, scores and classes by falling score.
    """
    kept = best(op, op.Transpose(boxes, perm=[1, 0, 2]), op.Transpose(scores), nms_iou, threshold, limit)
    # Class, then window.
    places = op.Gather(kept, [1, 0], axis=1)
    values = op.GatherND(scores, places)
    falling, order = op.TopK(values, op.Shape(values), outputs=2)
    places = op.Gather(places, order)
    return op.GatherND(boxes, places), falling, places[:, 1]


def best(
    op: Nodes, boxes: Value, scores: Value, iou: float, threshold: float, limit: int, least_side: float = 0
) -> Value:
    """Suppress overlapping boxes group by group; see `sppnet.boxes.nms`.

    Parameters
    ----------
    op : Nodes
        The graph.
    boxes : (G, R, 4) float32 value
    scores : (G, R) float32 value
    iou, threshold, limit
        As in `suppress`; of each group.
    least_side : float
        Boxes that are lower or narrower are dropped, and those of no area.

    Returns
    -------
    (D, 2) int64 value
        The group and the row of what is left, group by group and there by falling score.
    """
    sides = op.ReduceMin(boxes[..., 2:] - boxes[..., :2], [2], keepdims=0)
    real = sides >= np.float32(least_side) if least_side else sides > np.float32(0)
    points = op.Unsqueeze(op.Where(real, scores, np.float32(-np.inf)), [1])
    # ONNX keeps what scores more than the threshold.
    below = np.nextafter(np.float32(threshold), np.float32(-np.inf))
    kept = op.NonMaxSuppression(boxes, points, [limit], np.array([iou], np.float32), np.array([below]))
    return op.node("Gather", kept, [0, 2], axis=1)
