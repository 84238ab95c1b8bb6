"""Training pictures: crops and mosaics of photos, scaled, flipped and recoloured by chance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from sppnet.arrays import Boxes, IntArray, Pixels
from sppnet.boxes import Target, flip
from sppnet.rpn.settings import Joint

SIDES = (256, 320, 384, 448, 512, 576, 640)
"""Shorter sides to choose from."""

# One object in five may be smaller than so many pixels.
_SMALL, _SHARE = 24.0, 0.2
# What lies beyond a photo, in place of a colour of its own.
_GREY = 124
# An object that is cut off stays one if so much of its area is seen, and so many pixels of each side.
_SEEN, _LEAST = 0.3, 2.0
# Hue, saturation and brightness vary by such factors about 1.
_COLOURS = (0.015, 0.6, 0.4)
# Corners of four photos meet in this part of a mosaic.
_MIDDLE = (0.3, 0.7)


class Photo(NamedTuple):
    """A photo as it is kept for training: no larger than is needed.

    Attributes
    ----------
    pixels : (H, W, 3) uint8
    boxes : (G, 4) float32
        Its objects, and what is ignored, in its pixels.
    kinds : (G,) int64
        Their classes; -1 of what is ignored.
    """

    pixels: Pixels
    boxes: Boxes
    kinds: IntArray


@dataclass(frozen=True)
class Pictures:
    """A source of training pictures.

    Attributes
    ----------
    photos : sequence of Photo
    side : int
        Shorter side of a photo in pixels before it is scaled by chance.
    settings : Joint
    """

    photos: Sequence[Photo]
    side: int
    settings: Joint

    @property
    def canvas(self) -> int:
        """Height and width of a picture."""
        return canvas(self.side)

    def draw(self, rng: np.random.Generator, mosaics: bool) -> Photo:
        """Draw a picture: of four photos, or of one."""
        size = self.canvas
        pixels = np.full((size, size, 3), _GREY, np.uint8)
        parts: list[tuple[int, int, int, int]] = [(0, 0, size, size)]
        if mosaics and rng.random() < self.settings.mosaic:
            x, y = (int(size * rng.uniform(*_MIDDLE)) for _ in range(2))
            parts = [(0, 0, x, y), (x, 0, size, y), (0, y, x, size), (x, y, size, size)]
        placed = []
        for part in parts:
            photo = self.photos[int(rng.integers(len(self.photos)))]
            placed.append(self._place(pixels, part, photo, rng))
        boxes, kinds = (np.concatenate(values) for values in zip(*placed, strict=True))
        return Photo(_recoloured(pixels, rng), boxes, kinds)

    def _place(
        self, canvas: Pixels, part: tuple[int, int, int, int], photo: Photo, rng: np.random.Generator
    ) -> tuple[Boxes, IntArray]:
        """Draw a photo into a part of a picture; return what is seen of its objects."""
        left, top, right, bottom = part
        height, width = photo.pixels.shape[:2]
        scale = self.side / min(height, width) * np.exp(rng.uniform(*np.log(self.settings.jitter)))
        w, h = max(2, round(width * scale)), max(2, round(height * scale))
        turned = rng.random() < 0.5
        x, y = _offset(right - left, w, rng), _offset(bottom - top, h, rng)
        # The part of the scaled photo that is seen; only that is computed.
        seen = np.array([max(0, -x), max(0, -y), min(w, right - left - x), min(h, bottom - top - y)])
        shown = seen[2:] - seen[:2]
        fit = np.array([w / width, h / height] * 2)
        cut = seen / fit
        x1, y1 = np.floor(cut[:2]).astype(int)
        x2, y2 = np.minimum(np.ceil(cut[2:]).astype(int), [width, height])
        how = cv2.INTER_AREA if scale < 0.7 else cv2.INTER_LINEAR
        drawn = cv2.resize(photo.pixels[y1:y2, x1:x2], tuple(shown.tolist()), interpolation=how)
        corner = np.array([left + x, top + y]) + seen[:2]
        canvas[corner[1] : corner[1] + shown[1], corner[0] : corner[0] + shown[0]] = (
            drawn[:, ::-1] if turned else drawn
        )
        whole = photo.boxes * fit
        boxes = np.clip(whole - np.tile(seen[:2], 2), 0, np.tile(shown, 2)).astype(np.float32)
        sides = boxes[:, 2:] - boxes[:, :2]
        enough = sides.prod(axis=1) > _SEEN * (whole[:, 2:] - whole[:, :2]).prod(axis=1)
        kept = (sides >= _LEAST).all(axis=1) & (enough | (photo.kinds < 0))
        boxes = flip(boxes, int(shown[0])) if turned else boxes
        return (boxes + np.tile(corner, 2).astype(np.float32))[kept], photo.kinds[kept]


def canvas(side: int) -> int:
    """Return height and width of the pictures of photos of this shorter side: a third more."""
    return round(side * 4 / 3 / 32) * 32


def kept_photo(pixels: Pixels, target: Target, classes: Sequence[str]) -> Photo:
    """Return a photo as it is kept: no larger than training ever needs."""
    height, width = pixels.shape[:2]
    scale = min(1.0, SIDES[-1] / min(height, width))
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
    fit = np.array([pixels.shape[1] / width, pixels.shape[0] / height] * 2, np.float32)
    number = {name: k for k, name in enumerate(classes)}
    kinds = [
        -1 if skip else number.get(label, -1)
        for label, skip in zip(target.labels, target.ignored, strict=True)
    ]
    return Photo(pixels, target.boxes * fit, np.array(kinds, np.int64))


def on_disk(photos: Iterable[Photo], file: BinaryIO) -> list[Photo]:
    """Return photos whose pixels lie in a file, mapped into memory: thousands of them need not fit there.

    Parameters
    ----------
    photos : iterable of Photo
    file : binary file
        An empty one, to read and to write; the photos outlive it.
    """
    kept = []
    for photo in photos:
        file.write(photo.pixels.tobytes())
        kept.append((photo.pixels.shape, photo.boxes, photo.kinds))
    file.flush()
    if not kept:
        return []
    pixels, found, start = np.memmap(file, np.uint8, "r"), [], 0
    for shape, boxes, kinds in kept:
        end = start + math.prod(shape)
        found.append(Photo(pixels[start:end].reshape(shape), boxes, kinds))
        start = end
    return found


def side_for(sizes: Sequence[tuple[int, int]], targets: Sequence[Target]) -> int:
    """Return the shorter side that photos need for their smaller objects to be seen.

    The least of `SIDES` at which four objects of five have an area of 24 x 24 pixels or more.

    Parameters
    ----------
    sizes : sequence of (int, int)
        Height and width of each photo.
    targets : sequence of Target
    """
    shares = [
        np.sqrt((t.boxes[:, 2:] - t.boxes[:, :2]).prod(axis=1)) / min(size)
        for size, t in zip(sizes, targets, strict=True)
    ]
    found = np.concatenate(shares) if shares else np.zeros(0)
    if not len(found):
        return SIDES[0]
    needed = _SMALL / max(float(np.quantile(found, _SHARE)), 1e-6)
    return next((side for side in SIDES if side >= needed), SIDES[-1])


def _offset(room: int, length: int, rng: np.random.Generator) -> int:
    """Draw where a photo starts: anywhere inside if it is shorter than the room, all over it if longer."""
    return int(rng.integers(min(0, room - length), max(0, room - length) + 1))


def _recoloured(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Vary hue, saturation and brightness by chance."""
    hue, saturation, value = 1 + rng.uniform(-1, 1, 3) * _COLOURS
    levels = np.arange(256)
    tables = [levels * hue % 180, np.clip(levels * saturation, 0, 255), np.clip(levels * value, 0, 255)]
    table = np.stack(tables, axis=-1).astype(np.uint8)[None]
    varied = cv2.LUT(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV), table)
    return np.asarray(cv2.cvtColor(varied, cv2.COLOR_HSV2RGB), np.uint8)


def standardised(
    pictures: Sequence[Pixels], mean: Sequence[float], std: Sequence[float]
) -> npt.NDArray[np.float32]:
    """Return the (N, 3, H, W) float32 values of pictures, in the memory layout of (N, H, W, 3)."""
    values = np.stack(pictures).astype(np.float32)
    values -= np.array(mean, np.float32)
    values /= np.array(std, np.float32)
    return values.transpose(0, 3, 1, 2)
