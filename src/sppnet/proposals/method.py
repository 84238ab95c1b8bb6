"""What a proposal method is, and what those that look at pixels share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from sppnet.arrays import FloatArray, Image, Pixels
from sppnet.boxes import Windows, area, clip
from sppnet.errors import SppnetError
from sppnet.features.encoded import EncodedImage

VERSION = 1  # to be raised whenever equal settings come to give other windows


class Proposer(Protocol):
    """A proposal method: settings that show in its `repr`, and a call that proposes windows.

    Equal pixels and settings give equal windows.
    """

    @property
    def signature(self) -> str:
        """Text that differs wherever the windows might: part of the key in the cache of `propose_all`."""
        return f"{self!r}, version {VERSION}"

    def __call__(self, image: Pixels, encoded: EncodedImage | None = None) -> Windows:
        """Propose windows for one image.

        Parameters
        ----------
        image : (H, W, 3) uint8
            The image, RGB and upright.
        encoded : EncodedImage, optional
            What a backbone made of the image, for methods that look at its maps.

        Returns
        -------
        Windows
            Best first: no box twice, every box inside the image, the whole image always the first. The scores
            tell the rank and nothing more: they fall evenly from 1 towards 0, so that the windows of several
            methods can be merged.
        """
        ...


def propose_for(image: Image, pixels: Pixels, method: Proposer) -> Windows:
    """Propose windows for the pixels of an image; an error names its file, which a method does not know."""
    try:
        return method(pixels)
    except SppnetError as error:
        raise SppnetError(f"{image}: {error}") if isinstance(image, str | Path) else error from None


def ranked(boxes: FloatArray, size: tuple[int, int]) -> Windows:
    """Finish boxes that come best first: inside the image, the whole image before them, no box twice.

    Parameters
    ----------
    boxes : (R, 4) float array
        Boxes in pixels of the image, 0-based and half-open, that may reach beyond it.
    size : (int, int)
        Height and width of the image in pixels.
    """
    height, width = size
    inside = clip(np.concatenate([[[0, 0, width, height]], boxes]), width, height)
    inside = inside[area(inside) > 0]
    _, first = np.unique(inside, axis=0, return_index=True)
    unique = inside[np.sort(first)]
    return Windows(unique, np.linspace(1, 0, len(unique), endpoint=False, dtype=np.float32))


def drop_small(boxes: FloatArray, min_side: float) -> FloatArray:
    """Return those of (R, 4) boxes whose width and height are both at least `min_side`."""
    return boxes[(boxes[:, 2:] - boxes[:, :2] >= min_side).all(axis=1)]


def square_side(image: Pixels) -> float:
    """Return the side of the square as large as the image, but at least a tenth of the longer side.

    That bounds the work on strips.
    """
    height, width = image.shape[:2]
    side: float = max(math.sqrt(height * width), height / 10, width / 10)
    return side


def shrink(image: Pixels, side: int) -> Pixels:
    """Return an image shrunk to about `side` x `side` pixels in area, or as it is if it is no larger."""
    scale = min(1.0, side / square_side(image))
    height, width = image.shape[:2]
    size = max(1, round(scale * width)), max(1, round(scale * height))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def enlarge(boxes: npt.NDArray[Any], small: Pixels, image: Pixels) -> FloatArray:
    """Return boxes of the shrunk image in pixels of the original."""
    scale = np.array(image.shape[1::-1]) / small.shape[1::-1]
    result: FloatArray = boxes * np.tile(scale, 2)
    return result


def ximgproc() -> Any:
    """Return OpenCV's module of contributed image processing.

    Raises
    ------
    SppnetError
        If the OpenCV that is installed has none.
    """
    if not hasattr(cv2, "ximgproc"):
        raise SppnetError(
            "found OpenCV without ximgproc, expected the package opencv-contrib-python-headless "
            "and no other of OpenCV beside it"
        )
    return cv2.ximgproc
