"""Masks as COCO stores them: lengths of runs over the columns of an image, in turn outside and inside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def run_lengths(counts: str | Sequence[int], height: int, width: int) -> tuple[float, float, float, float]:
    """Return the box around a mask.

    Parameters
    ----------
    counts : str or sequence of int
        Lengths of runs of pixels down one column after the other, the first of them outside; as numbers, or
        in the compressed form of the COCO tools: 6 bits from each character, of which one says that more
        follow, and from the fourth number on the difference to the last but one.
    height, width : int
        Of the mask, in pixels.

    Returns
    -------
    tuple of 4 float
        x1, y1, x2, y2, 0-based and half-open; all 0 if nothing is inside.

    Raises
    ------
    ValueError
        If the runs are not of a mask of this size.
    """
    runs = np.array(_unpacked(counts) if isinstance(counts, str) else counts, np.int64)
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width or height <= 0:
        raise ValueError(f"found {runs.sum()} pixels, expected {height} x {width}")
    ends = np.cumsum(runs)
    first, last = ends[:-1:2], ends[1::2] - 1  # pixels at which the runs inside begin and end
    inside = last >= first
    first, last = first[inside], last[inside]
    if not len(first):
        return 0.0, 0.0, 0.0, 0.0
    # A run that goes on into the next column touches top and bottom.
    wraps = bool((first // height != last // height).any())
    top = 0 if wraps else int((first % height).min())
    bottom = height - 1 if wraps else int((last % height).max())
    return float(first[0] // height), float(top), float(last[-1] // height + 1), float(bottom + 1)


def _unpacked(text: str) -> list[int]:
    """Return the numbers in a compressed string."""
    numbers: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"found {character!r} in run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift  # the sign
            numbers.append(value + (numbers[-2] if len(numbers) > 2 else 0))
            value = shift = 0
    return numbers
