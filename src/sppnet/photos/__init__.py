"""The photo that comes with sppnet; ``LICENSE.md`` beside it says where it is from."""

from __future__ import annotations

from pathlib import Path


def demo_photo() -> Path:
    """Return the path of a JPEG of three cows in a meadow, 600 x 333 pixels, in the public domain.

    Examples
    --------
    >>> from sppnet import read_image
    >>> read_image(demo_photo()).shape
    (333, 600, 3)
    """
    return Path(__file__).parent / "cows.jpg"
