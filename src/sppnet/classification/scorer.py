"""SPP-net as it runs: a backbone, a pyramid and fully connected layers, on arrays alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sppnet.arrays import FloatArray, IntArray, Pixels, channels_first, to_numpy
from sppnet.errors import SppnetError
from sppnet.linear import Linear
from sppnet.pooling.bins import LEVELS
from sppnet.pooling.pyramid import spatial_pyramid
from sppnet.pooling.regions import pool_regions

if TYPE_CHECKING:
    from sppnet.features.backbone import Backbone


class NetworkSettings(NamedTuple):
    """What a network is built from; stored in its file.

    Attributes
    ----------
    name : str
        A network of the paper's (see `sppnet.features.architectures`), or the name or file of a backbone.
    classes : tuple of str
        Names of the classes.
    levels : tuple of int or None
        The pyramid; None is the paper's last pooling instead.
    mode : {"max", "average"}
        What is kept of a bin.
    hidden : tuple of int or None
        Widths of the hidden fully connected layers; by default the paper's 4096, 4096 times `width` for its
        networks, none for others.
    width : float
        Factor on all numbers of filters and units of the paper's networks.
    dropout : float
        Share of hidden units left out in training.
    norm : float or None
        Euclidean norm to which pooled vectors are scaled; None leaves them.
    size : int
        Side of the square images that the network is made for.
    """

    name: str
    classes: tuple[str, ...]
    levels: tuple[int, ...] | None = LEVELS
    mode: str = "max"
    hidden: tuple[int, ...] | None = None
    width: float = 1.0
    dropout: float = 0.5
    norm: float | None = None
    size: int = 224


@dataclass(frozen=True)
class Scorer:
    """A fitted network: class scores of images of any size, or of one if there is no pyramid.

    Attributes
    ----------
    settings : NetworkSettings
        What it was built from.
    backbone : Backbone
        Where its maps come from: those of the stage head.
    layers : tuple of Linear
        The fully connected layers; the last gives a score for each class. There is ReLU between them.
    """

    settings: NetworkSettings
    backbone: Backbone
    layers: tuple[Linear, ...]

    @property
    def takes_any_size(self) -> bool:
        """Whether there is a pyramid."""
        return self.settings.levels is not None

    @property
    def map_side(self) -> int:
        """Rows, and columns, of the map of an image of its own size."""
        return self.backbone.sides(self.settings.size)[0]

    def maps(self, images: Pixels) -> Any:
        """Compute the last maps of equally large images.

        Parameters
        ----------
        images : (N, H, W, 3) uint8 RGB

        Returns
        -------
        (N, C, h, w) float32 array
            Channels last in memory; on a device other than the CPU, a tensor there.

        Raises
        ------
        SppnetError
            If the images are too small for the network.
        """
        (maps,) = self.backbone.maps(images)
        return channels_first(maps)

    def windows(self, maps: Any, cells: IntArray, index: IntArray) -> FloatArray:
        """Pool windows of maps that were computed once, as whole maps are pooled.

        Parameters
        ----------
        maps : (N, C, h, w) array or tensor
            What `maps` gave; the network must have a pyramid.
        cells : (R, 4) int64
            Windows in cells of the map, half-open.
        index : (R,) int64
            The map of each window.

        Returns
        -------
        (R, D) float32
        """
        assert self.settings.levels is not None
        return to_numpy(pool_regions(maps, cells, self.settings.levels, mode=self.settings.mode, index=index))

    def scores(self, images: Pixels) -> FloatArray:
        """Compute class scores of equally large images.

        Parameters
        ----------
        images : (N, H, W, 3) uint8 RGB

        Returns
        -------
        (N, K) float32
            Unbounded; their softmax is the probability of each class.

        Raises
        ------
        SppnetError
            If the images are too small, or of another size than the network's, and there is no pyramid.
        """
        levels, size = self.settings.levels, self.settings.size
        if levels is None and images.shape[1:3] != (size, size):
            found = " x ".join(map(str, images.shape[1:3]))
            raise SppnetError(f"a network without a pyramid takes {size} x {size} images, found {found}")
        maps = self.maps(images)
        pooled = (
            maps.reshape(len(maps), -1)
            if levels is None
            else spatial_pyramid(maps, levels, mode=self.settings.mode)
        )
        return self.head(to_numpy(pooled))

    def head(self, vectors: FloatArray) -> FloatArray:
        """Compute the (R, K) class scores of (R, D) pooled vectors."""
        if self.settings.norm is not None:
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = vectors * np.float32(self.settings.norm) / np.maximum(lengths, np.float32(1e-12))
        for layer in self.layers[:-1]:
            vectors = np.maximum(layer(vectors), 0)
        scores: FloatArray = self.layers[-1](vectors)
        return scores
