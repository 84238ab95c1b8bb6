"""Pictures for the page, in a process of their own: upright, no larger than asked for, without metadata."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from sppnet.images import read_image, resize

_QUALITY = 85


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
        pixels = read_image(path, side=side)
        height, width = pixels.shape[:2]
        shrink = min(1.0, side / max(height, width))
        if shrink < 1:
            pixels = resize(pixels, max(1, round(shrink * height)), max(1, round(shrink * width)))
        done, content = cv2.imencode(".jpg", pixels[:, :, ::-1], (cv2.IMWRITE_JPEG_QUALITY, _QUALITY))
        assert done
        return np.asarray(content).tobytes()
