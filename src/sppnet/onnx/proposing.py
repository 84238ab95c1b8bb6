"""Candidate windows as nodes of a graph: from the maps, by what a detector learned, or from a grid.

The rules are those of `sppnet.proposals.maps` and `sppnet.proposals.dense`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sppnet.arrays import to_numpy
from sppnet.features.projection import choose_scale
from sppnet.linear import Linear
from sppnet.onnx.pooling import in_parts
from sppnet.onnx.suppression import best
from sppnet.proposals.maps import ANCHOR_IOU, ANCHORS, BINS, GROWTH, LEAST_SIDE
from sppnet.regression import decode_deltas

if TYPE_CHECKING:
    from sppnet.onnx.nodes import Nodes, Value
    from sppnet.onnx.windows import Encoded
    from sppnet.proposals.dense import DenseWindows
    from sppnet.proposals.maps import Objectness

# Less than the scores of all windows, more than that of one to be dropped.
_LEAST = -1e30


def from_maps(op: Nodes, objectness: Objectness, encoded: Encoded) -> Value:
    """Return the (R, 4) float32 windows, best first, that `Objectness.propose` gives.

    Parameters
    ----------
    op : Nodes
        The graph.
    objectness : Objectness
        A fitted one.
    encoded : Encoded
        The image; of several stages the last is used.
    """
    state = {name: to_numpy(value) for name, value in objectness.state().items()}
    boxes, scores, hidden = [], [], []
    for s, stages in enumerate(encoded.scales):
        inner = op.Relu(_layer(op, "reduce", state, stages[-1]))
        hidden.append(inner)
        answers = op.Transpose(_layer(op, "answer", state, _spread(op, state, inner)), perm=[0, 2, 3, 1])
        answers = op.Reshape(answers, [-1, 5])
        points, top = _top(op, answers[:, 0])
        scores.append(points)
        anchors = op.Gather(_anchors(op, objectness, encoded, s), top)
        boxes.append(decode_deltas(anchors, op.Gather(answers, top)[:, 1:]))
    points, first = _top(op, op.Concat(*scores, axis=0))
    moved: Value = op.Gather(op.Concat(*boxes, axis=0), first).clip(0.0, encoded.limits)
    windows = _best(op, objectness, moved, points, ANCHOR_IOU)
    pooled = _pooled(op, objectness, encoded, hidden, windows)
    answers = Linear(state["weights"], state["offsets"])(pooled)
    moved = decode_deltas(windows, answers[:, 1:]).clip(0.0, encoded.limits)
    return _best(op, objectness, moved, answers[:, 0], objectness.nms_iou)


def _layer(op: Nodes, name: str, state: dict[str, Any], maps: Value) -> Value:
    """Return what a fully connected layer makes of every cell of maps (1, C, h, w)."""
    weights = state[f"network.{name}.weight"][:, :, None, None]
    return op.node("Conv", maps, weights, state[f"network.{name}.bias"])


def _spread(op: Nodes, state: dict[str, Any], maps: Value) -> Value:
    """Return what the layer that looks at the cells about each, channel by channel, makes of maps."""
    weights = state["network.spread.weight"]
    pads = [weights.shape[-1] // 2] * 4
    spread = op.Conv(maps, weights, state["network.spread.bias"], group=len(weights), pads=pads)
    return op.node("Relu", spread)


def _top(op: Nodes, scores: Value) -> tuple[Value, Value]:
    """Return the largest of (R,) scores, falling, and their places: of as many anchors as are looked at."""
    count = op.Shape(scores).clip(max=ANCHORS)
    points, places = op.TopK(scores, count, outputs=2)
    return points, places


def _best(op: Nodes, objectness: Objectness, boxes: Value, scores: Value, iou: float) -> Value:
    """Return which of (R, 4) boxes are left of those that overlap and are large enough, best first."""
    groups = op.Unsqueeze(boxes, [0]), op.Unsqueeze(scores, [0])
    kept = best(op, *groups, iou, _LEAST, objectness.limit, LEAST_SIDE)
    return op.node("Gather", boxes, kept[:, 1])


def _anchors(op: Nodes, objectness: Objectness, encoded: Encoded, scale: int) -> Value:
    """Return the (h * w * A, 4) float32 anchors of a scale in pixels of the image, row by row."""
    geometry, factors = encoded.geometry[-1], encoded.factors[scale]
    shapes = np.array(
        [
            (size * math.sqrt(aspect), size / math.sqrt(aspect))
            for size in objectness.sizes
            for aspect in objectness.aspects
        ]
    )
    cells = op.Shape(encoded.scales[scale][-1], start=2, end=4)
    height, width, ends = cells[0], cells[1], []
    for axis, count in enumerate((width, height)):
        place = op.Range(0, count, 1).cast(np.float64) * geometry.stride
        # Resizing keeps pixel areas, and the centre of pixel p is at p + 1/2 in half-open coordinates.
        centre = (place + (geometry.offset + 0.5)) / factors[axis]
        half = objectness.reference * shapes[:, axis] / factors[axis] / 2.0
        centre = centre[None, :, None] if axis == 0 else centre[:, None, None]
        ends.append((centre - half, centre + half))
    shape = op.Concat(cells, [len(shapes)], axis=0)
    corners = (ends[0][0], ends[1][0], ends[0][1], ends[1][1])
    full = [op.Unsqueeze(op.Expand(corner, shape), [3]) for corner in corners]
    return op.node("Reshape", op.Concat(*full, axis=3), [-1, 4]).cast(np.float32)


def _pooled(op: Nodes, objectness: Objectness, encoded: Encoded, hidden: list[Value], boxes: Value) -> Value:
    """Return the (R, D) features of windows, each at the scale where its size suits the backbone best."""
    geometry, factors = encoded.geometry[-1], encoded.factors
    scale = choose_scale(boxes, encoded.shorter, encoded.sides, objectness.reference, "released")
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2.0
    half = (boxes[:, 2:] - boxes[:, :2]) / 2.0 * GROWTH

    def pool(s: int, rows: Value) -> Value:
        middle, reach = (op.Gather(part, rows).cast(np.float64) * factors[s] for part in (centre, half))
        corners = op.Concat(middle - reach, middle + reach, axis=1)
        # RoiAlign takes the centre of cell u to be at u + 1/2.
        cells = ((corners - (geometry.offset + 0.5)) / geometry.stride + 0.5).cast(np.float32)
        size = {"output_height": BINS, "output_width": BINS, "sampling_ratio": 1}
        mode = {"mode": "avg", "coordinate_transformation_mode": "half_pixel"}
        bins = op.RoiAlign(hidden[s], cells, rows * 0, **size, **mode)
        return op.node("Flatten", bins, axis=1)

    masks = [scale == s for s in range(len(hidden))]
    pooled: Value = in_parts(op, masks, pool)
    return pooled


def from_grid(op: Nodes, method: DenseWindows, size: Value) -> Value:
    """Return the (R, 4) float32 windows that `DenseWindows` gives for an image, equal ones not left out.

    Of equal windows suppression keeps one.

    Parameters
    ----------
    op : Nodes
        The graph.
    method : DenseWindows
        Its settings.
    size : (2,) int64 value
        Height and width of the image.
    """
    sides = size.cast(np.float64)
    height, width = sides[0], sides[1]
    square = op.Max(op.Sqrt(height * width), height / 10.0, width / 10.0)
    boxes = []
    for share in sorted(method.sizes, reverse=True):
        for aspect in method.aspects:
            wide = (share * square * math.sqrt(aspect)).clip(max=width)
            high = (share * square / math.sqrt(aspect)).clip(max=height)
            x = _grid(op, width - wide, wide * method.step)
            y = _grid(op, height - high, high * method.step)
            shape = op.Concat(op.Shape(y), op.Shape(x), axis=0)
            x, y = (op.Reshape(op.Expand(v, shape), [-1, 1]) for v in (x, y[:, None]))
            boxes.append(op.Concat(x, y, x + wide, y + high, axis=1))
    found = op.Concat(*boxes, axis=0)
    short = op.ReduceMin(found[:, 2:] - found[:, :2], [1], keepdims=0)
    found = op.Compress(found, short >= float(method.min_side), axis=0)
    limits = op.Gather(sides, [1, 0, 1, 0])
    whole = op.Unsqueeze(op.Concat(np.zeros(2), op.Gather(sides, [1, 0]), axis=0), [0])
    return op.node("Concat", whole, found, axis=0).clip(0.0, limits).cast(np.float32)


def _grid(op: Nodes, room: Value, step: Value) -> Value:
    """Return evenly spaced positions from 0 to `room`, at most `step` apart, float64."""
    steps = op.node("Ceil", room / step)
    places: Value = op.Range(0, steps.cast(np.int64) + 1, 1).cast(np.float64)
    return places * (room / steps.clip(min=1.0))
