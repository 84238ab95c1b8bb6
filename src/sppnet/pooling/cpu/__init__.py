"""The pooling operator on the CPU. What its kernels are given stands here: naming it loads no compiler."""

from __future__ import annotations

from typing import Any, NamedTuple

LANES = 64
"""Channels that are pooled at once."""

TILE = 16
"""Side of the squares that are transposed at once."""

LINE = 64
"""Bytes of a cache line."""


class Block(NamedTuple):
    """Some channels of some images of a batch of maps, as they lie in flat memory.

    Attributes
    ----------
    flat : 1-D array
        All numbers of the batch.
    at : int
        Where the first number of the block lies in it.
    images, channels : int
        How many images and channels the block has.
    first : int
        Number of its first channel.
    cells : int
        Cells of an image.
    image : int
        Distance of two images.
    stride : int
        Distance of two channels, where cells lie next to each other; where it is negative, the cells lie that
        far apart and the channels next to each other.
    """

    flat: Any
    at: Any
    images: Any
    channels: Any
    first: Any
    cells: Any
    image: Any
    stride: Any


class Windows(NamedTuple):
    """Windows of the images of a block, and where their bins lie.

    Attributes
    ----------
    places : (R, 5) int64
        For each window: cell where it begins, row step of its map, height, width, row of the output.
    low, high : (longest side + 1, sum of levels) int64
        Where the bins of a side of so many cells start and end, level after level.
    plan : (levels, 6) int64
        For each level, finest first: its side, its first column in the bounds, its first row in the bins,
        side and first row of the finer level that it is derived from (0 when it is pooled from the cells),
        its first column in the output.
    """

    places: Any
    low: Any
    high: Any
    plan: Any


class Scratch(NamedTuple):
    """Memory of a thread.

    Attributes
    ----------
    rows : 1-D array
        For packed cells.
    bins : (bins + TILE, LANES) array
        For the bins of a window.
    page : array
        For the transposed bins of a level, or for the spots of the bins' maxima, shaped as `bins`.
    """

    rows: Any
    bins: Any
    page: Any
