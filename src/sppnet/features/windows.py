"""Windows of an encoded image become vectors: each pooled at the scale that suits it (paper section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from sppnet.arrays import Boxes, IntArray
from sppnet.boxes import flip
from sppnet.errors import SppnetError, check_choice
from sppnet.features.encoded import EncodedImage
from sppnet.features.projection import PROJECTIONS, SCALE_RULES, choose_scale, project, responses
from sppnet.pooling.bins import pyramid_length, valid_levels, valid_mode
from sppnet.pooling.regions import pool_regions


@dataclass(frozen=True)
class WindowPooling:
    """How windows of an image become vectors; call it on an encoded image and boxes.

    Attributes
    ----------
    scales : tuple of int
        Shorter sides in pixels to which an image is resized before the network sees it (paper: 480, 576, 688,
        864, 1200). Every window is pooled at one of them.
    levels : tuple of int
        The pyramid: level n cuts a window into n x n bins (paper: 6, 3, 2, 1).
    mode : {"max", "average"}
        What is kept of a bin; the paper keeps the maximum.
    projection : {"released", "paper"}
        Which cells of a map a window covers; see `sppnet.features.projection.project`.
    scale_rule : {"released", "paper"}
        Which scale suits a window; see `sppnet.features.projection.choose_scale`. The paper's measured
        better.
    reference : float
        Side in pixels that a window should have at its scale; None stands for the scale rule's own, 224 of
        the paper and 208 of the released code.

    Raises
    ------
    SppnetError
        If there is no scale, or a value is none of its kind.
    """

    scales: tuple[int, ...] = (240, 336, 480, 672)
    levels: tuple[int, ...] = (3, 2, 1)
    mode: str = "max"
    projection: str = "released"
    scale_rule: str = "paper"
    reference: float | None = None

    def __post_init__(self) -> None:
        check_choice("projection", self.projection, PROJECTIONS)
        check_choice("scale rule", self.scale_rule, SCALE_RULES)
        if not self.scales or min(self.scales) < 1:
            raise SppnetError(f"found the scales {self.scales}, expected shorter sides from 1 pixel up")
        reference = SCALE_RULES[self.scale_rule] if self.reference is None else self.reference
        # Plain tuples and the reference itself: equal settings are equal records, also after JSON.
        for name, value in {
            "scales": tuple(self.scales),
            "levels": valid_levels(self.levels),
            "mode": valid_mode(self.mode),
            "reference": reference,
        }.items():
            object.__setattr__(self, name, value)

    def __call__(self, encoded: EncodedImage, boxes: Boxes) -> Any:
        """Pool windows of an image.

        Parameters
        ----------
        encoded : EncodedImage
            The image's maps at these scales, or at some of them.
        boxes : (R, 4) float32
            Windows in pixels of the original image, 0-based and half-open.

        Returns
        -------
        (R, D) float32 array, or tensor where the maps are tensors
            For each stage of the backbone in turn, the pyramid in the order of
            `sppnet.pooling.regions.pool_regions`. Where the flipped image was
            encoded, too, the mean of both, the flipped one's bins turned back.
        """
        pooled = self._pool(encoded, boxes)
        if encoded.flipped is None:
            return pooled
        other = self._pool(encoded.flipped, flip(boxes, encoded.size[1]))
        return (pooled + self.flipped(other, encoded.channels)) / 2

    def _pool(self, encoded: EncodedImage, boxes: Boxes) -> Any:
        scale, pooled = self.choose(encoded, boxes), []
        for t in range(len(encoded.scales[0].stages)):
            cells = np.zeros((len(boxes), 4), dtype=np.int64)
            for s in np.unique(scale):
                cells[scale == s] = project(boxes[scale == s], encoded.scales[s], t, self.projection)
            stages = [maps.stages[t] for maps in encoded.scales]
            pooled.append(pool_regions(stages, cells, self.levels, mode=self.mode, index=scale))
        return side_by_side(pooled)

    def choose(self, encoded: EncodedImage, boxes: Boxes) -> IntArray:
        """Return the (R,) place, among the encoded image's scales, of the one that suits each box."""
        assert self.reference is not None
        chosen: IntArray = choose_scale(
            boxes, min(encoded.size), encoded.sides, self.reference, self.scale_rule
        )
        return chosen

    def distinct(self, encoded: EncodedImage, boxes: Boxes) -> IntArray:
        """Return which windows are the first with their cells at their scale: the others are duplicates.

        A window and its duplicates are pooled into the same vector.

        Returns
        -------
        (U,) int64
            Rising indices into `boxes`.
        """
        scale, kept = self.choose(encoded, boxes), [np.zeros(0, np.int64)]
        for s in np.unique(scale):
            here = np.flatnonzero(scale == s)
            rows = responses(boxes[here], encoded.scales[s], self.projection)
            _, first = np.unique(rows, axis=0, return_index=True)
            kept.append(here[first])
        return np.sort(np.concatenate(kept))

    def length(self, channels: Sequence[int]) -> int:
        """Return the length of a vector, given the channels of each stage's map."""
        return sum(pyramid_length(count, self.levels) for count in channels)

    def flipped(self, pooled: Any, channels: Sequence[int]) -> Any:
        """Exchange left and right in (R, D) pooled windows: reverse the columns of every level's bins.

        Parameters
        ----------
        pooled : (R, D) array or tensor
            Windows as a call pools them.
        channels : sequence of int
            Channels of each stage's map.
        """
        xp = array_namespace(pooled)
        shapes = [(count, n, n) for count in channels for n in self.levels]
        parts, start = [], 0
        for shape in shapes:
            end = start + math.prod(shape)
            part = xp.flip(xp.reshape(pooled[:, start:end], (-1, *shape)), axis=3)
            parts.append(xp.reshape(part, (-1, end - start)))
            start = end
        return xp.concat(parts, axis=1)


def side_by_side(parts: Sequence[Any]) -> Any:
    """Join (R, D_i) arrays or tensors to (R, sum of D_i); a single one is not copied."""
    return parts[0] if len(parts) == 1 else array_namespace(parts[0]).concat(list(parts), axis=1)
