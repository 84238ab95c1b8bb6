"""Windows of a map in few numbers: one bilinear sample in the middle of each of its bins."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sppnet.arrays import BoolArray, FloatArray, IntArray


class Samples(NamedTuple):
    """Where the bins of R windows are sampled: B of each, row by row, each from four cells.

    Attributes
    ----------
    cells : (R, B, 4) int64
        Numbers of the cells, counted row by row through the map.
    weights : (R, B, 4) float32
        What their values are multiplied with. A sample further than a cell outside the map is 0.
    """

    cells: IntArray
    weights: npt.NDArray[np.float32]


def sample_bins(windows: FloatArray, shape: tuple[int, int], bins: int) -> Samples:
    """Cut windows into `bins` x `bins` bins and sample each in its middle.

    As RoIAlign with a sampling ratio of 1 does it (He et al., "Mask R-CNN", arXiv 1703.06870).

    Parameters
    ----------
    windows : (R, 4) float array
        Corners in cells, of which cell u has its centre at u.
    shape : (int, int)
        Height and width of the map in cells.
    bins : int
        Bins along a side.
    """
    height, width = shape
    rows, of_rows = _between(windows[:, 1], windows[:, 3], height, bins)
    columns, of_columns = _between(windows[:, 0], windows[:, 2], width, bins)
    cells = rows[:, :, None, :, None] * width + columns[:, None, :, None, :]
    weights = of_rows[:, :, None, :, None] * of_columns[:, None, :, None, :]
    form = len(windows), bins * bins, 4
    return Samples(cells.reshape(form), weights.reshape(form).astype(np.float32))


def _between(start: FloatArray, end: FloatArray, size: int, bins: int) -> tuple[IntArray, FloatArray]:
    """Return the (R, bins, 2) cells before and behind the middle of each bin, and their weights."""
    at = start[:, None] + (end - start)[:, None] * ((np.arange(bins) + 0.5) / bins)
    inside: BoolArray = (at >= -1) & (at <= size)
    at = at.clip(0, size - 1)
    before = at.astype(np.int64)
    share = at - before
    pair = np.stack([before, np.minimum(before + 1, size - 1)], axis=-1)
    return pair, np.stack([1 - share, share], axis=-1) * inside[..., None]
