"""Windows on a grid, the same for every image of a size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sppnet.arrays import FloatArray, Pixels
from sppnet.boxes import Windows
from sppnet.features.encoded import EncodedImage
from sppnet.proposals.method import Proposer, drop_small, ranked, square_side


@dataclass(frozen=True)
class DenseWindows(Proposer):
    """A grid of windows of several sizes and shapes, the large ones first; it does not look at the image.

    Attributes
    ----------
    sizes : tuple of float
        Sides of the windows as shares of the image's, both of the square of equal area.
    aspects : tuple of float
        Widths of the windows over their heights.
    step : float
        Greatest distance of neighbours, as a share of their width and height.
    min_side : int
        Lower or narrower windows are dropped; in pixels.
    """

    sizes: tuple[float, ...] = (0.71, 0.5, 0.35, 0.25)
    aspects: tuple[float, ...] = (0.5, 1.0, 2.0)
    step: float = 0.4
    min_side: int = 20

    def __call__(self, image: Pixels, encoded: EncodedImage | None = None) -> Windows:
        """Propose windows for one image; see `sppnet.proposals.method.Proposer`."""
        boxes = [np.zeros((0, 4))]
        for size in sorted(self.sizes, reverse=True):
            for aspect in self.aspects:
                side = size * square_side(image)
                width = min(side * math.sqrt(aspect), image.shape[1])
                height = min(side / math.sqrt(aspect), image.shape[0])
                x, y = np.meshgrid(
                    _grid(image.shape[1] - width, self.step * width),
                    _grid(image.shape[0] - height, self.step * height),
                )
                boxes.append(np.stack([x, y, x + width, y + height], axis=-1).reshape(-1, 4))
        return ranked(drop_small(np.concatenate(boxes), self.min_side), image.shape[:2])


def _grid(room: float, step: float) -> FloatArray:
    """Return evenly spaced positions from 0 to `room`, at most `step` apart."""
    return np.linspace(0, room, math.ceil(room / step) + 1)
