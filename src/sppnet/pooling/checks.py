"""What the doors of this room ask of the tensors that they are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sppnet.errors import SppnetError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def described(value: Any) -> str:
    """Return what an error says of a value that was found: dtype and shape of a tensor, else its type."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def is_integer(dtype: torch.dtype) -> bool:
    """Return whether a dtype holds whole numbers."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def checked_maps(maps: Sequence[Tensor]) -> list[Tensor]:
    """Return maps (C, H_i, W_i) that can be pooled together, as a list.

    Raises
    ------
    SppnetError
        If there are none, or they are not floats of one dtype, number of channels and device.
    """
    sources = list(maps)
    if not sources:
        raise SppnetError("maps must hold at least one map, found none")
    for i, m in enumerate(sources):
        if not isinstance(m, Tensor) or m.ndim != 3 or 0 in m.shape:
            found = tuple(m.shape) if isinstance(m, Tensor) else type(m).__name__
            raise SppnetError(
                f"map {i} must be a tensor (C, H, W) with at least one channel, row and column, found {found}"
            )
        if m.shape[0] != sources[0].shape[0]:
            raise SppnetError(f"map {i} has {m.shape[0]} channels, map 0 has {sources[0].shape[0]}")
        if m.dtype not in FLOATS:
            raise SppnetError(f"map {i} must be float32, float16, bfloat16 or float64, found {m.dtype}")
        if m.dtype != sources[0].dtype or m.device != sources[0].device:
            raise SppnetError(
                f"maps must be of one dtype and device, found {m.dtype} on {m.device} for map {i} and "
                f"{sources[0].dtype} on {sources[0].device} for map 0"
            )
    return sources


def checked_sizes(sizes: Tensor, count: int) -> Tensor:
    """Return the true heights and widths of `count` images in a padded batch.

    Raises
    ------
    SppnetError
        If they are not integers of shape (count, 2).
    """
    if not isinstance(sizes, Tensor) or sizes.shape != (count, 2) or not is_integer(sizes.dtype):
        raise SppnetError(
            f"sizes must be an integer tensor of shape ({count}, 2), height and width of each image, "
            f"found {described(sizes)}"
        )
    return sizes
