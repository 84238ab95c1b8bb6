"""Pictures for the page, in a process of their own: upright, no larger than asked for, without metadata."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import JpegImagePlugin

from sppnet.arrays import Pixels
from sppnet.errors import ImageError
from sppnet.images import image_header, pixels_of, read_image, resize

_QUALITY = 85
_MOST = 50_000_000


class Pictures:
    """What the process of pictures answers."""

    def jpeg(self, path: Path, side: int) -> bytes:
        """Return a photo as a JPEG file whose longer side has at most so many pixels.

        Only pixels are in it: no place, no time, no name of a camera.

        Raises
        ------
        ImageError
            If it cannot be read, or has too many pixels.
        """
        pixels = _reduced(path, side)
        height, width = pixels.shape[:2]
        shrink = min(1.0, side / max(height, width))
        if shrink < 1:
            pixels = resize(pixels, max(1, round(shrink * height)), max(1, round(shrink * width)))
        done, content = cv2.imencode(".jpg", pixels[:, :, ::-1], (cv2.IMWRITE_JPEG_QUALITY, _QUALITY))
        assert done
        return np.asarray(content).tobytes()


def _reduced(path: Path, side: int) -> Pixels:
    """Return the pixels of a photo; of a JPEG file no more of them are decoded than are needed."""
    header = image_header(path)
    if header.height * header.width > _MOST:
        raise ImageError(f"found {header.width} x {header.height} pixels, expected at most {_MOST}")
    try:
        with path.open("rb") as file:
            image = JpegImagePlugin.JpegImageFile(file)
            image.draft("RGB", (side, side))
            return pixels_of(image)
    except (SyntaxError, OSError):  # No JPEG, or one that may lack its end alone.
        return read_image(path)
