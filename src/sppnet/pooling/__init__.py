"""Spatial pyramid pooling: maps, or windows of them, of any size become vectors of one length.

A level of side n divides a map or window into n x n bins and keeps one number of each bin and channel. The
bins follow one rule, `bin_bounds`, in both doors: `SpatialPyramidPooling` pools whole maps as a layer of a
network, `pool_regions` pools any number of windows of maps that were computed once.

The order of the numbers is the same, too: levels in the order given, and within a level channel-major,
``channel * n * n + row * n + column``.

Source: He, Zhang, Ren, Sun, "Spatial Pyramid Pooling in Deep Convolutional Networks for Visual Recognition"
(arXiv 1406.4729), section 2.2 and appendix A.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index as as_int
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from sppnet.boxes import IntArray

__all__ = ["SpatialPyramidPooling", "bin_bounds", "pool_regions", "pyramid_length", "valid_levels"]

LEVELS = (6, 3, 2, 1)
MODES = ("max", "average")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


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


def valid_levels(levels: Sequence[int]) -> tuple[int, ...]:
    """Return the levels as a tuple.

    Raises
    ------
    ValueError
        If they are not one or more positive integers.
    """
    try:
        sides = tuple(as_int(n) for n in levels if not isinstance(n, bool))
        if sides and min(sides) > 0 and len(sides) == len(levels):
            return sides
    except TypeError:
        pass
    raise ValueError(f"levels must be one or more positive integers such as {LEVELS}, found {levels!r}")


def pyramid_length(channels: int, levels: Sequence[int] = LEVELS) -> int:
    """Return the length of a pooled vector: ``channels`` times the number of bins.

    Examples
    --------
    >>> pyramid_length(256, (6, 3, 2, 1))
    12800
    """
    return channels * sum(n * n for n in valid_levels(levels))


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, found {mode!r}")


class SpatialPyramidPooling(nn.Module):
    """Pool maps of any size into vectors of one length; differentiable.

    Parameters
    ----------
    levels : sequence of int
        Sides of the levels, finest first in the paper (section 3.1).
    mode : {"max", "average"}
        What is kept of a bin; the paper keeps the maximum.

    Notes
    -----
    Maps (N, C, H, W) become (N, C * M) and a single map (C, H, W) becomes (C * M,), where M is the number of
    bins, for every H and W from 1 up. The bins are those of PyTorch's adaptive pooling. NaN in a bin wins.

    Examples
    --------
    >>> SpatialPyramidPooling((3, 2, 1))(torch.zeros(2, 256, 10, 17)).shape
    torch.Size([2, 3584])
    """

    def __init__(self, levels: Sequence[int] = LEVELS, mode: str = "max") -> None:
        super().__init__()
        _check_mode(mode)
        self.levels = valid_levels(levels)
        self.mode = mode

    def forward(self, maps: Tensor) -> Tensor:
        """Pool (N, C, H, W) to (N, C * M), or (C, H, W) to (C * M,)."""
        if maps.ndim not in (3, 4) or 0 in maps.shape[-3:]:
            raise ValueError(
                "maps must be of shape (C, H, W) or (N, C, H, W) with at least one channel, row and column, "
                f"found {tuple(maps.shape)}"
            )
        pool = functional.adaptive_max_pool2d if self.mode == "max" else functional.adaptive_avg_pool2d
        return torch.cat([pool(maps, n).flatten(-3) for n in self.levels], dim=-1)

    def extra_repr(self) -> str:
        """Return what `repr` shows between the parentheses."""
        return f"levels={self.levels}, mode={self.mode!r}"


def pool_regions(
    maps: Tensor | Sequence[Tensor],
    windows: npt.NDArray[np.integer[Any]] | Tensor,
    levels: Sequence[int] = LEVELS,
    *,
    mode: str = "max",
    index: npt.NDArray[np.integer[Any]] | Tensor | None = None,
    out: Tensor | npt.NDArray[np.float32] | None = None,
) -> Tensor:
    """Pool every window of maps into a vector, as `SpatialPyramidPooling` pools the maps cut out.

    Parameters
    ----------
    maps : (C, H, W) tensor, (N, C, H, W) tensor or sequence of (C, H, W) tensors
        float32, float16 or bfloat16 on the CPU, in any memory layout. The maps of a sequence may differ in
        height and width. Half precision is converted to float32 first.
    windows : (R, 4) integers
        ``x1, y1, x2, y2`` in cells of the map, 0-based and half-open; at least one cell wide and high.
    levels : sequence of int
        Sides of the levels.
    mode : {"max", "average"}
        What is kept of a bin. A NaN in it wins, as in PyTorch.
    index : (R,) integers, optional
        The map of each window; required if there are several maps.
    out : (R, C * M) float32 tensor or array, optional
        Contiguous memory to write to; saves the system from providing and zeroing new memory for every call.

    Returns
    -------
    (R, C * M) float32 tensor
        One vector per window. It is `out`, or shares its memory, where that is given.

    Raises
    ------
    ValueError
        If an argument is not as described; for windows and index, naming the first row that is wrong. Also if
        a gradient is wanted through the maps: none is computed.

    Notes
    -----
    As many threads work as ``torch.get_num_threads()`` says.

    Examples
    --------
    >>> maps = torch.arange(24.0).reshape(2, 3, 4)
    >>> pool_regions(maps, np.array([[0, 0, 4, 3], [1, 0, 3, 2]]), levels=(1,))
    tensor([[11., 23.],
            [ 6., 18.]])
    """
    _check_mode(mode)
    sides = valid_levels(levels)
    sources = _checked_maps(maps)
    places, which = _checked_windows(windows, index, sources)
    length = pyramid_length(sources[0].shape[0], sides)
    result = _new_output(len(places), length) if out is None else _checked_output(out, len(places), length)
    if len(places):
        # Imported here because the layer needs no compiler.
        from sppnet.pooling import cpu

        longest = int((places[:, 2:] - places[:, :2]).max())
        bounds = [bin_bounds(np.arange(longest + 1), n) for n in sides]
        starts, ends = (np.concatenate(table, axis=1) for table in zip(*bounds, strict=True))
        cpu.pool(sources, places, which, sides, (starts, ends), mode, result)
    return result


def _checked_maps(maps: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the maps as (C, H, W) float32 tensors."""
    sources = [maps] if isinstance(maps, Tensor) and maps.ndim == 3 else list(maps)
    if not sources:
        raise ValueError("maps must hold at least one map, found none")
    for i, m in enumerate(sources):
        if not isinstance(m, Tensor) or m.ndim != 3 or 0 in m.shape:
            found = tuple(m.shape) if isinstance(m, Tensor) else type(m).__name__
            raise ValueError(
                f"map {i} must be a tensor (C, H, W) with at least one channel, row and column, found {found}"
            )
        if m.shape[0] != sources[0].shape[0]:
            raise ValueError(f"map {i} has {m.shape[0]} channels, map 0 has {sources[0].shape[0]}")
        if m.dtype not in FLOATS:
            raise ValueError(f"map {i} must be float32, float16 or bfloat16, found {m.dtype}")
        if m.device.type != "cpu":
            raise ValueError(f"map {i} is on {m.device}; regions are pooled on the CPU only")
        if m.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"map {i} requires a gradient, which pool_regions does not compute; "
                "detach it or use torch.no_grad()"
            )
    return [m.float() for m in sources]


def _checked_integers(name: str, values: Any, shape: tuple[int | str, ...]) -> IntArray:
    """Return an integer array of the shape, in which a letter stands for any number of rows."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    fits = array.ndim == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(array.shape, shape, strict=True)
    )
    if not fits or not np.issubdtype(array.dtype, np.integer):
        wanted = str(shape).replace("'", "")
        raise ValueError(
            f"{name} must be integers of shape {wanted}, found {array.dtype} of shape {array.shape}"
        )
    return array.astype(np.int64)


def _checked_windows(windows: Any, index: Any, maps: Sequence[Tensor]) -> tuple[IntArray, IntArray]:
    """Return windows and the map of each, all inside."""
    places = _checked_integers("windows", windows, ("R", 4))
    if index is None and len(maps) > 1:
        raise ValueError(f"index must say which of the {len(maps)} maps each window belongs to, found None")
    which = (
        np.zeros(len(places), np.int64)
        if index is None
        else _checked_integers("index", index, (len(places),))
    )
    strays = np.flatnonzero((which < 0) | (which >= len(maps)))
    if len(strays):
        r = strays[0]
        raise ValueError(f"index[{r}] must be from 0 to {len(maps) - 1}, found {which[r]}")
    limits = np.array([m.shape[:0:-1] for m in maps], dtype=np.int64)[which]
    low, high = places[:, :2], places[:, 2:]
    strays = np.flatnonzero(((low < 0) | (low >= high) | (high > limits)).any(axis=1))
    if len(strays):
        r = strays[0]
        width, height = limits[r]
        raise ValueError(
            f"windows[{r}] must be x1, y1, x2, y2 with 0 <= x1 < x2 <= {width} and 0 <= y1 < y2 <= {height}, "
            f"found {places[r].tolist()}"
        )
    return places, which


def _new_output(rows: int, length: int) -> Tensor:
    """Return new memory that starts at a cache line.

    From NumPy, which asks for huge pages: for large outputs, torch's small ones take longer than the pooling.
    """
    line = 64 // np.dtype(np.float32).itemsize
    memory = np.empty(rows * length + line, dtype=np.float32)
    skip = -memory.ctypes.data // memory.itemsize % line
    return torch.from_numpy(memory[skip : skip + rows * length].reshape(rows, length))


def _checked_output(out: Any, rows: int, length: int) -> Tensor:
    """Return the tensor that shares the memory of `out`."""
    wanted = f"out must be contiguous float32 on the CPU, without gradient, of shape ({rows}, {length})"
    if not isinstance(out, Tensor | np.ndarray):
        raise ValueError(f"{wanted}, found {type(out).__name__}")
    if isinstance(out, np.ndarray):
        if out.dtype != np.float32 or not (out.flags.writeable and out.flags.c_contiguous):
            raise ValueError(
                f"{wanted}, found a strided, read-only or {out.dtype} array of shape {out.shape}"
            )
        tensor = torch.from_numpy(out)
    else:
        tensor = out
    plain = tensor.is_contiguous() and not tensor.requires_grad and tensor.device.type == "cpu"
    if not plain or tensor.dtype != torch.float32 or tensor.shape != (rows, length):
        raise ValueError(
            f"{wanted}, found {tensor.dtype} on {tensor.device} of shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()}"
        )
    return tensor
