"""Names for the arrays that travel: their forms are fixed in docs/conventions.md."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

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
