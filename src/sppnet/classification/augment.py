"""What training does to a picture: one of five crops, a flip, another light (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
import numpy.typing as npt

from sppnet.arrays import IntArray, Pixels
from sppnet.images import resize, shorter_side_size, view_windows

Components = npt.NDArray[np.float64]

# Of the shorter side to the side of the crop: 256 to 224 in the paper.
MARGIN = 256 / 224
_STRENGTH = 0.1
_THUMBNAIL = 32


def colour_components(images: Iterable[Pixels]) -> Components:
    """Return the principal components of the colours of pictures, each as long as its deviation.

    Parameters
    ----------
    images : iterable of (H, W, 3) uint8
        A sample of the training images, at least one.

    Returns
    -------
    (3, 3) float64
        Components in columns, in grey levels.
    """
    pixels = np.concatenate([resize(image, _THUMBNAIL, _THUMBNAIL).reshape(-1, 3) for image in images])
    values, vectors = np.linalg.eigh(np.cov(pixels.astype(np.float64), rowvar=False))
    # The sign of an eigenvector is the library's choice; the shift is drawn symmetrically, but from one seed.
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), range(3)])
    components: Components = vectors * signs * np.sqrt(np.maximum(values, 0))
    return components


def shift_colours(image: Pixels, components: Components, rng: np.random.Generator) -> Pixels:
    """Add a random multiple of each colour component to all pixels (Krizhevsky et al. 2012, section 4.1).

    The multiples have deviation 0.1. Values are rounded, and cut off at 0 and 255.
    """
    shift = components @ rng.normal(scale=_STRENGTH, size=3)
    return np.asarray(cv2.transform(image, np.column_stack([np.eye(3), shift])), np.uint8)


def random_crop(
    image: Pixels, crop: int, size: int, components: Components | None, rng: np.random.Generator
) -> Pixels:
    """Return a training example of an image: a crop, flipped half the time, in another light.

    The shorter side is resized to `crop` times 256 / 224; the crop lies in the centre or a corner of the
    whole picture, and is resized to `size` (sections 3.1 and 2.3).

    Returns
    -------
    (size, size, 3) uint8
    """
    resized = resize_shorter(image, round(crop * MARGIN))
    views = _views(resized, crop)
    x1, y1, x2, y2 = views[rng.integers(len(views))]
    return _altered(resize(resized[y1:y2, x1:x2], size, size), components, rng)


def central_crop(image: Pixels, size: int) -> Pixels:
    """Return the central view of an image whose shorter side is resized to `size` times 256 / 224."""
    resized = resize_shorter(image, round(size * MARGIN))
    x1, y1, x2, y2 = _views(resized, size)[0]
    return resized[y1:y2, x1:x2]


def _views(image: Pixels, size: int) -> IntArray:
    height, width = image.shape[:2]
    return view_windows(height, width, size)


def resize_shorter(image: Pixels, side: int) -> Pixels:
    """Resize an image to a shorter side of `side` pixels."""
    height, width = image.shape[:2]
    new = shorter_side_size(height, width, side)
    return image if new == (height, width) else resize(image, *new)


def _altered(image: Pixels, components: Components | None, rng: np.random.Generator) -> Pixels:
    flipped = image[:, ::-1] if rng.random() < 0.5 else image
    whole = np.ascontiguousarray(flipped)
    return whole if components is None else shift_colours(whole, components, rng)
