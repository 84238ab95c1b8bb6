"""The arrays that travel: names for their forms, fixed in docs/conventions.md, and ways between two kinds.

Most functions take NumPy arrays and PyTorch tensors alike: the type decides, by the array API standard. Only
code that gets a tensor imports PyTorch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace

if TYPE_CHECKING:
    import PIL.Image

Pixels = npt.NDArray[np.uint8]
"""An image, (H, W, 3) uint8, RGB and upright."""

Boxes = npt.NDArray[np.float32]
"""Boxes, (R, 4) float32: x1, y1, x2, y2 in pixels of the original image, 0-based and half-open."""

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

Image: TypeAlias = "str | Path | Pixels | PIL.Image.Image"
"""What stands for one image wherever one is asked for: a file, pixels, or an image of Pillow's."""


def is_tensor(value: Any) -> bool:
    """Return whether a value is a PyTorch tensor, which nothing is before PyTorch is imported.

    That of array_api_compat asks behind a cache, of which `torch.compile` warns.
    """
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def to_numpy(values: Any) -> npt.NDArray[Any]:
    """Return a NumPy array as it is, and a tensor of any device as one, without its gradient."""
    return np.asarray(values.detach().cpu() if is_tensor(values) else values)


def like(array: npt.NDArray[Any], other: Any) -> Any:
    """Return a NumPy array as what `other` is: itself, or a tensor on the same device."""
    if not is_tensor(other):
        return array
    import torch

    return torch.from_numpy(array).to(other.device)


def placed(array: npt.NDArray[Any], device: str) -> Any:
    """Return an array as it is for the device ``"cpu"``, and as a tensor on any other."""
    if device == "cpu":
        return array
    import torch

    return torch.from_numpy(array).to(device)


def channels_first(maps: Any) -> Any:
    """Return (..., h, w, C) maps as (..., C, h, w), on the same memory."""
    return array_namespace(maps).moveaxis(maps, -1, -3)
