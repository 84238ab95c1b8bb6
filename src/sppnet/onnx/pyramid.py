"""What a feature pyramid proposes, as nodes of a graph: windows, and how likely each is an object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

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


class Told(NamedTuple):
    """What a network says of R windows: see `sppnet.features.encoded.OwnWindows`.

    Attributes
    ----------
    odds : (R,) float32 value
    kinds : (R, K) float32 value
    """

    odds: Value
    kinds: Value


# Less than the scores of all windows, more than that of one to be dropped.
_LEAST = -1e30


def own_windows(op: Nodes, encoded: Encoded) -> tuple[Value, Told]:
    """Return the (R, 4) float32 windows that the network itself proposes, and what it says of them.

    Parameters
    ----------
    op : Nodes
        The graph.
    encoded : Encoded
        The image, with the answers of the pyramid's cells.
    """
    boxes, odds, kinds = [], [], []
    for answers, stride in zip(encoded.answers, STRIDES, strict=True):
        cells = op.Shape(answers, start=2, end=4)
        rows = op.Transpose(op.Reshape(answers, [encoded.answered, -1]))
        x, y = (op.Range(0, cells[axis], 1).cast(np.float32) * stride + stride / 2 for axis in (1, 0))
        grid = op.Concat(cells, [1], axis=0)
        centres = op.Concat(op.Expand(x[None, :, None], grid), op.Expand(y[:, None, None], grid), axis=2)
        points, top = _top(op, rows[:, 0])
        places = op.Gather(op.Reshape(centres, [-1, 2]), top)
        away = op.Gather(rows, top)
        boxes.append(op.Concat(places - away[:, 1:3], places + away[:, 3:5], axis=1))
        odds.append(points)
        kinds.append(away[:, 5:])
    factors = op.Gather(encoded.factors[0], [0, 1, 0, 1]).cast(np.float32)
    points, first = _top(op, op.Concat(*odds, axis=0))
    found = (op.Gather(op.Concat(*boxes, axis=0), first) / factors).clip(0.0, encoded.limits)
    groups = op.Unsqueeze(found, [0]), op.Unsqueeze(points, [0])
    kept = best(op, *groups, WINDOW_IOU, _LEAST, WINDOWS, LEAST_SIDE)[:, 1]
    # As they come best first, those that are taken are the first.
    odds = op.Gather(points, kept)
    likely = op.ReduceSum((odds > np.float32(UNLIKELY)).cast(np.int64), keepdims=1)
    kept = op.Slice(kept, [0], likely.clip(min=SURE), [0])
    rows = op.Gather(op.Gather(op.Concat(*kinds, axis=0), first), kept)
    return op.Gather(found, kept), Told(op.Gather(points, kept), rows)


def with_told(op: Nodes, scores: Value, told: Told, columns: Sequence[int]) -> Value:
    """Return (R, K) scores that count what the network says; see `sppnet.proposals.odds.with_told`.

    Parameters
    ----------
    op : Nodes
        The graph.
    scores : (R, K) float32 value
        Of the SVMs.
    told : Told
        What the network says.
    columns : sequence of K int
        Place of each class among those that the network tells apart, -1 of others.
    """
    margins = scores.cast(np.float64)
    mine = 0.0 - _softplus(op, margins * -SLOPE)
    known = np.array(columns) >= 0
    if known.any():
        theirs = op.Gather(told.kinds, np.maximum(columns, 0), axis=1).cast(np.float64)
        shares = np.where(known, 0.5, 0.0)[None]
        mine = mine * (1.0 - shares) + theirs * shares
    chance = mine - _softplus(op, 0.0 - told.odds.cast(np.float64)[:, None])
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
