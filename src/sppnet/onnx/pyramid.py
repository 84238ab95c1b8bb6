"""What a feature pyramid proposes, as nodes of a graph: windows, and how likely each is an object."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sppnet.features.graph import STRIDES
from sppnet.features.pyramid import (
    LEAST_SIDE,
    LOOKED_AT,
    SURE,
    UNLIKELY,
    WINDOW_IOU,
    WINDOWS,
)
from sppnet.onnx.suppression import best
from sppnet.proposals.odds import SLOPE

if TYPE_CHECKING:
    from sppnet.onnx.nodes import Nodes, Value
    from sppnet.onnx.windows import Encoded

# Less than the scores of all windows, more than that of one to be dropped.
_LEAST = -1e30


def own_windows(op: Nodes, encoded: Encoded) -> tuple[Value, Value]:
    """Return the (R, 4) float32 windows that the network itself proposes, and their (R,) log-odds.

    Parameters
    ----------
    op : Nodes
        The graph.
    encoded : Encoded
        The image, with the answers of the pyramid's cells.
    """
    boxes, odds = [], []
    for answers, stride in zip(encoded.answers, STRIDES, strict=True):
        cells = op.Shape(answers, start=2, end=4)
        rows = op.Transpose(op.Reshape(answers, [5, -1]))
        x, y = (op.Range(0, cells[axis], 1).cast(np.float32) * stride + stride / 2 for axis in (1, 0))
        grid = op.Concat(cells, [1], axis=0)
        centres = op.Concat(op.Expand(x[None, :, None], grid), op.Expand(y[:, None, None], grid), axis=2)
        points, top = _top(op, rows[:, 0])
        places = op.Gather(op.Reshape(centres, [-1, 2]), top)
        away = op.Gather(rows, top)
        boxes.append(op.Concat(places - away[:, 1:3], places + away[:, 3:], axis=1))
        odds.append(points)
    factors = op.Gather(encoded.factors[0], [0, 1, 0, 1]).cast(np.float32)
    points, first = _top(op, op.Concat(*odds, axis=0))
    found = (op.Gather(op.Concat(*boxes, axis=0), first) / factors).clip(0.0, encoded.limits)
    groups = op.Unsqueeze(found, [0]), op.Unsqueeze(points, [0])
    kept = best(op, *groups, WINDOW_IOU, _LEAST, WINDOWS, LEAST_SIDE)[:, 1]
    # As they come best first, those that are taken are the first.
    odds = op.Gather(points, kept)
    likely = op.ReduceSum((odds > np.float32(UNLIKELY)).cast(np.int64), keepdims=1)
    kept = op.Slice(kept, [0], likely.clip(min=SURE), [0])
    return op.Gather(found, kept), op.Gather(points, kept)


def with_objectness(op: Nodes, scores: Value, odds: Value) -> Value:
    """Return (R, K) scores that count (R,) log-odds; see `sppnet.proposals.odds.with_objectness`."""
    known, margins = odds.cast(np.float64)[:, None], scores.cast(np.float64)
    chance = 0.0 - _softplus(op, 0.0 - known) - _softplus(op, margins * -SLOPE)
    chance = chance.clip(max=-1e-12)
    together: Value = (chance - op.Log(1.0 - op.Exp(chance))) / SLOPE
    return together.cast(np.float32)


def _softplus(op: Nodes, values: Value) -> Value:
    """Return log(1 + exp(x)), which no double of ONNX's own has in every runtime."""
    away = op.Exp(0.0 - op.Abs(values))
    result: Value = values.clip(min=0.0) + op.Log(away + 1.0)
    return result


def _top(op: Nodes, scores: Value) -> tuple[Value, Value]:
    """Return the largest of (R,) scores, falling, and their places: of as many cells as are looked at."""
    points, places = op.TopK(scores, op.Shape(scores).clip(max=LOOKED_AT), outputs=2)
    return points, places
