"""What the network made of an image, as a value: its maps at every scale, and where their cells lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sppnet.arrays import Boxes
from sppnet.features.geometry import Geometry


class OwnWindows(NamedTuple):
    """What a network with a pyramid proposes in an image, best first.

    Attributes
    ----------
    boxes : (R, 4) float32
        Boxes, 0-based half-open pixels of the original image.
    scores : (R,) float32
        Log-odds that a window is an object.
    kinds : (R, K) float32
        Logarithms of the probabilities of the classes that the network tells apart; K may be 0.
    """

    boxes: Boxes
    scores: npt.NDArray[np.float32]
    kinds: npt.NDArray[np.float32]


@dataclass(frozen=True)
class FeatureMaps:
    """The maps of one image at one scale.

    Attributes
    ----------
    stages : tuple of (C, h, w) float32 arrays
        One map per stage of the backbone; only cells centred inside the image, never in its padding. Tensors
        where the backbone runs on another device than the CPU, or learns.
    geometry : tuple of Geometry
        Where each stage's cells lie in the resized image.
    factors : (float, float)
        Pixels of the resized image per pixel of the original, in x and y.
    side : int
        Length of the resized image's shorter side in pixels. A strip gets a smaller one than was asked for;
        see `sppnet.images.whole_image_size`.
    """

    stages: tuple[Any, ...]
    geometry: tuple[Geometry, ...]
    factors: tuple[float, float]
    side: int


@dataclass(frozen=True)
class EncodedImage:
    """The maps of one image at every scale: the one expensive step is done, any window can be asked for.

    `sppnet.features.backbone.Backbone.encode` makes one (paper section 4.1).

    Attributes
    ----------
    size : (int, int)
        Height and width of the original image in pixels, in which windows are given.
    scales : tuple of FeatureMaps
        The maps at each scale, in the order in which the scales were asked for.
    flipped : EncodedImage or None
        What the network made of the image with left and right exchanged, where that was asked for: windows
        are then pooled from both.
    windows : OwnWindows or None
        What the network itself proposes, if it does (`sppnet.features.pyramid`).
    """

    size: tuple[int, int]
    scales: tuple[FeatureMaps, ...]
    flipped: EncodedImage | None = None
    windows: OwnWindows | None = None

    @property
    def sides(self) -> tuple[int, ...]:
        """Length of the resized image's shorter side at each scale, in pixels."""
        return tuple(maps.side for maps in self.scales)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage's map."""
        return tuple(stage.shape[0] for stage in self.scales[0].stages)

    def at(self, scale: int) -> EncodedImage:
        """Return the image with the maps of one of its scales alone, given by its place."""
        other = None if self.flipped is None else self.flipped.at(scale)
        return EncodedImage(self.size, (self.scales[scale],), other, self.windows)
