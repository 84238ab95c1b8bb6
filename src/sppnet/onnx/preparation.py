"""What is done to the pixels of an image before a network sees them, as nodes of a graph.

The steps are those of `sppnet.images` and `sppnet.features.backbone`, for images of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sppnet.images import MAX_ASPECT

if TYPE_CHECKING:
    from sppnet.features.backbone import Backbone
    from sppnet.onnx.nodes import Nodes, Value


class PixelRules(NamedTuple):
    """How a network takes pixels.

    Attributes
    ----------
    mean, std : (float, float, float)
        What the channels are standardised by, for pixels of 0 to 255.
    multiple : int
        Height and width are padded to multiples of this, with what becomes 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    multiple: int

    @classmethod
    def of(cls, backbone: Backbone) -> PixelRules:
        """Return those of a backbone."""
        return cls(backbone.mean, backbone.std, backbone.multiple)


class Prepared(NamedTuple):
    """An image in a graph, ready for the network.

    Attributes
    ----------
    size : (2,) int64 value
        Height and width of the image.
    sizes : sequence of (2,) int64 values
        Height and width of the resized image at each scale.
    images : sequence of (1, 3, H', W') float32 values
        The resized images, standardised and padded: what the network takes.
    """

    size: Value
    sizes: list[Value]
    images: list[Value]


def prepare(op: Nodes, image: Value, rules: PixelRules, scales: Sequence[int]) -> Prepared:
    """Resize an image to several scales, standardise and pad it.

    Parameters
    ----------
    op : Nodes
        The graph.
    image : (H, W, 3) uint8 value
    rules : PixelRules
        How the network behind takes pixels.
    scales : sequence of int
        Shorter sides of the resized image, in pixels.
    """
    size = op.Shape(image, start=0, end=2)
    # Whole numbers, exact in float32 for 65,000 rows.
    sums = op.CumSum(image.cast(np.float32), 0)
    sizes = [_target(op, size, side) for side in scales]
    images = [_standardised(op, _resize(op, image, sums, size, target), target, rules) for target in sizes]
    return Prepared(size, sizes, images)


def _target(op: Nodes, size: Value, side: int) -> Value:
    """Return the height and width to resize to; see `sppnet.images.whole_image_size`."""
    shorter = op.ReduceMin(size, keepdims=0)
    # ONNX divides integers without the rest.
    target = (size * side + shorter - 1) / shorter
    shortest, longest = (reduce(target, keepdims=0) for reduce in (op.ReduceMin, op.ReduceMax))
    exact = target.cast(np.float64)
    shrink = side * op.Sqrt(MAX_ASPECT / (exact[0] * exact[1]))
    shrunk = op.Round(exact * shrink).cast(np.int64).clip(min=1)
    return op.node("Where", longest > shortest * MAX_ASPECT, shrunk, target)


def _standardised(op: Nodes, pixels: Value, target: Value, rules: PixelRules) -> Value:
    mean, std = (np.asarray(values, np.float32) for values in (rules.mean, rules.std))
    standard = (pixels.cast(np.float32) - mean) / std
    beyond = op.Mod(rules.multiple - op.Mod(target, rules.multiple), rules.multiple)
    pads = op.Concat([0, 0, 0, 0, 0, 0], beyond, axis=0)
    return op.node("Pad", op.Unsqueeze(op.Transpose(standard, perm=[2, 0, 1]), [0]), pads)


def _resize(op: Nodes, image: Value, sums: Value, size: Value, target: Value) -> Value:
    """Return what `sppnet.images.resize` does, in float64, given the sums of the image's rows."""
    # One of the two has no pixels, and so costs nothing.
    shrinks = op.ReduceMin((size > target * 2).cast(np.int64), keepdims=0)
    count = target * shrinks
    by_area = _resize_area(op, image, sums, size, target, count)
    linear = _resize_linear(op, image, size, target, target - count)
    pixels = op.Concat(op.Reshape(by_area, [-1, 3]), op.Reshape(linear, [-1, 3]), axis=0)
    return op.node("Reshape", pixels, op.Concat(target, [3], axis=0))


def _resize_linear(op: Nodes, image: Value, size: Value, target: Value, count: Value) -> Value:
    """Resize as OpenCV's INTER_LINEAR does, to the bit: in fixed point, its weights in steps of 1 / 2048."""

    def taps(axis: int) -> list[tuple[Value, Value]]:
        old, new = size[axis], target[axis].cast(np.float64)
        place = op.Range(0, count[axis], 1).cast(np.float64)
        place = ((place + 0.5) * (1.0 / (new / old.cast(np.float64))) - 0.5).cast(np.float32)
        first = op.Floor(place)
        part = place - first
        weights = (op.Round(w * 2048.0) for w in (1.0 - part, part))
        cells = ((first.cast(np.int64) + k).clip(0, old - 1) for k in (0, 1))
        return list(zip(cells, weights, strict=True))

    # Whole numbers below 2 ** 24 so far.
    left, right = (op.Gather(image, cell, axis=1).cast(np.float32) * w[:, None] for cell, w in taps(1))
    rows = op.Floor((left + right) / 16.0).cast(np.float64)
    above, below = (
        op.Floor(op.Gather(rows, cell) * w.cast(np.float64)[:, None, None] / 65536.0) for cell, w in taps(0)
    )
    return op.node("Floor", (above + below + 2.0) / 4.0)


def _resize_area(op: Nodes, image: Value, sums: Value, size: Value, target: Value, count: Value) -> Value:
    """Resize as OpenCV's INTER_AREA does: differences of running sums at the edges of the new pixels."""

    def means(values: Value, sums: Value, axis: int) -> Any:
        scale = size[axis].cast(np.float64) / target[axis].cast(np.float64)
        edges = op.Range(0, count[axis] + 1, 1).cast(np.float64) * scale
        cell = edges.cast(np.int64).clip(max=size[axis] - 1)
        share = (cell + 1).cast(np.float64) - edges
        beyond = share[:, None, None] * op.Gather(values, cell).cast(np.float64)
        until = op.Gather(sums, cell).cast(np.float64) - beyond
        return (until[1:] - until[:-1]) / scale

    rows = op.Transpose(means(image, sums, 0), perm=[1, 0, 2])
    return op.node("Transpose", op.Round(means(rows, op.CumSum(rows, 0), 1)), perm=[1, 0, 2])
