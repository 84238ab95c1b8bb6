"""The one binning rule: where the bins of a pyramid lie (section 2.2, appendix A)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import index as as_int

import numpy as np
import numpy.typing as npt

from sppnet.arrays import IntArray
from sppnet.errors import SppnetError

LEVELS = (6, 3, 2, 1)
MODES = ("max", "average")


def bin_bounds(size: npt.ArrayLike, n: int) -> tuple[IntArray, IntArray]:
    """Return where each of n bins along a side of `size` cells starts, and where it ends.

    Bin i covers the cells from ``floor(i * size / n)`` up to, not including, ``ceil((i + 1) * size / n)``.
    Neighbours share a cell where n does not divide the size, and no bin is ever empty: below n cells, bins
    repeat them.

    Parameters
    ----------
    size : int or array of int
        Number of cells, at least 1.
    n : int
        Number of bins.

    Returns
    -------
    starts, ends : int64 arrays of shape ``(*size.shape, n)``

    Examples
    --------
    >>> bin_bounds(13, 3)
    (array([0, 4, 8]), array([ 5,  9, 13]))
    """
    cells = np.asarray(size, dtype=np.int64)[..., None]
    i = np.arange(n, dtype=np.int64)
    return i * cells // n, -(-(i + 1) * cells // n)


@lru_cache(maxsize=64)
def bounds_up_to(longest: int, levels: tuple[int, ...]) -> tuple[IntArray, IntArray]:
    """Return the starts and ends of all levels' bins for every side from 0 to `longest` cells.

    Returns
    -------
    starts, ends : (longest + 1, sum of levels) int64
    """
    bounds = [bin_bounds(np.arange(longest + 1), n) for n in levels]
    starts, ends = (np.concatenate(table, axis=1) for table in zip(*bounds, strict=True))
    return starts, ends


def valid_levels(levels: Sequence[int]) -> tuple[int, ...]:
    """Return the levels as a tuple.

    Raises
    ------
    SppnetError
        If they are not one or more positive integers.
    """
    try:
        sides = tuple(as_int(n) for n in levels if not isinstance(n, bool))
        if sides and min(sides) > 0 and len(sides) == len(levels):
            return sides
    except TypeError:
        pass
    raise SppnetError(f"levels must be one or more positive integers such as {LEVELS}, found {levels!r}")


def valid_mode(mode: str) -> str:
    """Return the mode.

    Raises
    ------
    SppnetError
        If there is no such mode.
    """
    if mode not in MODES:
        raise SppnetError(f"mode must be one of {MODES}, found {mode!r}")
    return mode


def pyramid_length(channels: int, levels: Sequence[int] = LEVELS) -> int:
    """Return the length of a pooled vector: ``channels`` times the number of bins.

    Examples
    --------
    >>> pyramid_length(256, (6, 3, 2, 1))
    12800
    """
    return channels * sum(n * n for n in valid_levels(levels))
