"""Where the cells of a feature map lie in the network's input."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """Where the cells of a map lie in the network's input.

    Cell ``u`` is centred at ``stride * u + offset``, with pixel 0 centred at 0; the same in x and y.

    Attributes
    ----------
    stride : float
        Distance of neighbouring cells in input pixels.
    offset : float
        Centre of cell 0 in input pixels: the sum over the layers of ``((k - 1) / 2 - padding)`` times the
        product of the earlier strides.
    """

    stride: float
    offset: float

    def through(self, kernel: int, stride: int, padding: int, dilation: int = 1) -> Geometry:
        """Return the geometry after a convolution or pooling of these settings."""
        shift = (kernel - 1) * dilation / 2 - padding
        return Geometry(self.stride * stride, self.offset + shift * self.stride)

    def cells(self, length: int) -> int:
        """Return how many cells are centred inside an input of `length` pixels, at least 1."""
        return max(1, math.floor((length - 0.5 - self.offset) / self.stride) + 1)
