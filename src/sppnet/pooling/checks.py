"""What the doors of this room ask of the arrays and tensors that they are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from sppnet.arrays import FloatArray, is_tensor, like
from sppnet.errors import SppnetError

if TYPE_CHECKING:
    from torch import Tensor

Maps = TypeVar("Maps", bound="FloatArray | Tensor")
"""Maps of one kind, NumPy arrays or PyTorch tensors: the kind that the result has."""

Integers: TypeAlias = "npt.NDArray[np.integer[Any]] | Tensor"

ARRAY_FLOATS = ("float32", "float16", "float64")
TENSOR_FLOATS = ("torch.float32", "torch.float16", "torch.bfloat16", "torch.float64")


def is_float(dtype: Any) -> bool:
    """Return whether maps of this dtype of NumPy or PyTorch can be pooled."""
    return str(dtype) in ARRAY_FLOATS + TENSOR_FLOATS


def is_integer(dtype: Any) -> bool:
    """Return whether a dtype of NumPy or PyTorch holds whole numbers."""
    if isinstance(dtype, np.dtype):
        return dtype.kind in "iu"
    return not (dtype.is_floating_point or dtype.is_complex or str(dtype) == "torch.bool")


def described(value: Any) -> str:
    """Return what an error says of a value: dtype and shape of an array or tensor, else its type."""
    if isinstance(value, np.ndarray) or is_tensor(value):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def _kind(maps: Any) -> str:
    return f"{maps.dtype} on {maps.device}" if is_tensor(maps) else f"{maps.dtype} in an array"


def checked_batches(maps: Any) -> list[Any]:
    """Return maps that can be pooled together as batches (N, C, H, W).

    Parameters
    ----------
    maps : (C, H, W) or (N, C, H, W) array or tensor, or sequence of (C, H_i, W_i) ones

    Raises
    ------
    SppnetError
        If they are not floats of one dtype, number of channels and device.
    """
    if isinstance(maps, np.ndarray) or is_tensor(maps):
        if maps.ndim not in (3, 4) or 0 in maps.shape[-3:] or not is_float(maps.dtype):
            raise SppnetError(
                "maps must be floats of shape (C, H, W) or (N, C, H, W) with at least one channel, row and "
                f"column, found {described(maps)}"
            )
        return [maps[None] if maps.ndim == 3 else maps]
    sources = list(maps)
    if not sources:
        raise SppnetError("maps must hold at least one map, found none")
    for i, m in enumerate(sources):
        known = isinstance(m, np.ndarray) or is_tensor(m)
        if not known or m.ndim != 3 or 0 in m.shape or not is_float(m.dtype):
            raise SppnetError(
                f"map {i} must be floats of shape (C, H, W) with at least one channel, row and column, "
                f"found {described(m)}"
            )
        if m.shape[0] != sources[0].shape[0]:
            raise SppnetError(f"map {i} has {m.shape[0]} channels, map 0 has {sources[0].shape[0]}")
        if _kind(m) != _kind(sources[0]):
            raise SppnetError(
                f"maps must be of one dtype and device, found {_kind(m)} for map {i} and "
                f"{_kind(sources[0])} for map 0"
            )
    return [m[None] for m in sources]


def check_inside(maps: Sequence[Any], windows: Any, index: Any) -> None:
    """Raise a `SppnetError` for the first window that is no part of its map.

    Parameters
    ----------
    maps : sequence of batches (N, C, H, W)
    windows, index : (R, 4) and (R,) int64, both arrays, or both tensors on one device
    """
    sides = [[m.shape[3], m.shape[2]] for m in maps for _ in range(len(m))]
    wrong = (index < 0) | (index >= len(sides))
    if bool(wrong.any()):
        r = wrong.tolist().index(True)
        raise SppnetError(f"index[{r}] must be from 0 to {len(sides) - 1}, found {int(index[r])}")
    limits = like(np.array(sides, dtype=np.int64).reshape(-1, 2), windows)[index]
    low, high = windows[:, :2], windows[:, 2:]
    wrong = ((low < 0) | (low >= high) | (high > limits)).any(1)
    if bool(wrong.any()):
        r = wrong.tolist().index(True)
        width, height = limits[r].tolist()
        raise SppnetError(
            f"windows[{r}] must be x1, y1, x2, y2 with 0 <= x1 < x2 <= {width} and 0 <= y1 < y2 <= {height}, "
            f"found {windows[r].tolist()}"
        )
