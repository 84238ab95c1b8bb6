"""An encoded image in a graph, and its windows pooled into vectors: `WindowPooling` as nodes.

Scales are chosen and windows projected by `sppnet.features.projection` itself, on values of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sppnet.features.projection import choose_scale, project_onto
from sppnet.onnx.pooling import pool_windows
from sppnet.onnx.preparation import PixelRules, prepare

if TYPE_CHECKING:
    from sppnet.features.backbone import Backbone
    from sppnet.features.geometry import Geometry
    from sppnet.features.windows import WindowPooling
    from sppnet.onnx.nodes import Nodes, Value


class Encoded(NamedTuple):
    """What `sppnet.features.encoded.EncodedImage` is, in a graph.

    Attributes
    ----------
    size : (2,) int64 value
        Height and width of the image.
    sizes : (S, 2) int64 value
        Height and width of the resized image at each scale.
    scales : list of lists of (1, C, h, w) float32 values
        The maps of each stage at each scale: only cells centred inside the image, never in its padding.
    geometry : sequence of Geometry
        Where each stage's cells lie in the resized image.
    channels : sequence of int
        Channels of each stage's map.
    answers : list of (1, A, h, w) float32 values
        What the cells of a pyramid say, level by level; none of other backbones.
    answered : int
        A, how many numbers each says.
    """

    size: Value
    sizes: Value
    scales: list[list[Value]]
    geometry: Sequence[Geometry]
    channels: Sequence[int]
    answers: list[Value]
    answered: int

    @property
    def factors(self) -> Value:
        """(S, 2) float64: pixels of each resized image per pixel of the original, in x and y."""
        factors = self.sizes.cast(np.float64) / self.size.cast(np.float64)
        return factors.nodes.node("Gather", factors, [1, 0], axis=1)

    @property
    def sides(self) -> Value:
        """(S,) float64: length of each resized image's shorter side."""
        return self.size.nodes.node("ReduceMin", self.sizes, [1], keepdims=0).cast(np.float64)

    @property
    def shorter(self) -> Value:
        """Length of the image's shorter side, float64."""
        return self.size.nodes.node("ReduceMin", self.size, keepdims=0).cast(np.float64)

    @property
    def limits(self) -> Value:
        """(4,) float32: the box of the image's right and lower border twice, where boxes are cut off."""
        return self.size.nodes.node("Gather", self.size, [1, 0, 1, 0]).cast(np.float32)


def encode(op: Nodes, image: Value, backbone: Backbone, scales: Sequence[int]) -> Encoded:
    """Compute the maps of an (H, W, 3) uint8 image at every scale; see `Backbone.encode`."""
    prepared, maps = prepare(op, image, PixelRules.of(backbone), scales), []
    for size, pixels in zip(prepared.sizes, prepared.images, strict=True):
        ends = [_cells(op, geometry, size).cast(np.int64) for geometry in backbone.geometry]
        padded = op.network(backbone.model, pixels)
        maps.append([op.Slice(m, [0, 0], end, [2, 3]) for m, end in zip(padded, ends, strict=True)])
    sizes = op.Concat(*(op.Unsqueeze(size, [0]) for size in prepared.sizes), axis=0)
    count, answers = len(backbone.channels), []
    if backbone.proposes:
        answers, maps = maps[0][count:], [maps[0][:count]]
    answered = 5 + len(backbone.graph.facts.kinds)
    places = backbone.geometry[:count]
    return Encoded(prepared.size, sizes, maps, places, backbone.channels, answers, answered)


def pooled(op: Nodes, encoded: Encoded, windows: Value, pooling: WindowPooling) -> Value:
    """Pool (R, 4) float32 windows of the image into (R, D) vectors; see `WindowPooling`."""
    assert pooling.reference is not None
    scale: Value = choose_scale(
        windows, encoded.shorter, encoded.sides, pooling.reference, pooling.scale_rule
    )
    factors, vectors = op.Gather(encoded.factors, scale), []
    for t, geometry in enumerate(encoded.geometry):
        cells = op.Gather(_cells(op, geometry, encoded.sizes), [1, 0], axis=1)
        limits = op.Gather(cells, scale) - 1.0
        places = project_onto(windows, factors, limits, geometry, pooling.projection)
        maps = [stages[t] for stages in encoded.scales]
        vectors.append(
            pool_windows(op, maps, places, scale, pooling.levels, pooling.mode, encoded.channels[t])
        )
    result: Value = vectors[0] if len(vectors) == 1 else op.Concat(*vectors, axis=1)
    return result


def _cells(op: Nodes, geometry: Geometry, lengths: Value) -> Value:
    """Return how many cells are centred inside lengths in pixels, float64; see `Geometry.cells`."""
    inside = (lengths.cast(np.float64) - 0.5 - geometry.offset) / geometry.stride
    return (op.node("Floor", inside) + 1.0).clip(min=1.0)
