"""Entries: images with their boxes, as the writers of all formats take them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sppnet.boxes import Target
from sppnet.errors import SppnetError

DEFAULT_SPLIT = "default"
"""What a format that must name a split calls everything, as CVAT does."""

_DIGITS = 9  # decimals of a pixel to which sums of coordinates are rounded
# What XML 1.0 has no place for, lone surrogates of names that are no UTF-8 among it.
_NO_XML = re.compile("[^\\t\\n\\r\\x20-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")


class Entry(NamedTuple):
    """An image to write, with what is annotated or was found in it.

    Attributes
    ----------
    name : str
        Path of the photo below the folder of the photos of its split, ``/`` between folders.
    place : str
        Path by which the files written name the photo, where they name its path: relative to the folder that
        is written, or absolute.
    height, width : int
        Of the upright photo, in pixels.
    target : Target
        Boxes, labels and flags.
    scores : (G,) float32, optional
        Of each box, where the boxes were detected.
    split : str, optional
        The part of the data set that it belongs to.
    frame, seconds : int and float, optional
        Number and time of a frame of a video, where `place` names the video.
    """

    name: str
    place: str
    height: int
    width: int
    target: Target
    scores: npt.NDArray[np.float32] | None = None
    split: str | None = None
    frame: int | None = None
    seconds: float | None = None

    @property
    def stem(self) -> str:
        """The name without its suffix, by which formats with a file for each photo find that."""
        return stem(self.name)


def stem(name: str) -> str:
    """Return the path of a photo without its suffix."""
    return os.path.splitext(name)[0]


def decimals(values: npt.NDArray[np.float32]) -> list[float]:
    """Return float32 values as the shortest decimals that come back equal: 13.345, not 13.345000267."""
    return [float(str(value)) for value in np.asarray(values, np.float32)]


def rounded(value: float) -> float:
    """Return a sum or difference of `decimals` without what binary fractions add to it, in 9 decimals."""
    return round(value, _DIGITS)


def by_split(entries: Iterable[Entry]) -> dict[str | None, list[Entry]]:
    """Return the entries of each split, in their order."""
    found: dict[str | None, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.split, []).append(entry)
    return found


def names_below(paths: Sequence[Path]) -> list[str]:
    """Return the paths of files relative to the deepest folder that holds them all, ``/`` between folders."""
    places = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(place) for place in places]) if places else ""
    return [Path(os.path.relpath(place, root)).as_posix() for place in places]


def check_stems(names: Iterable[str], what: str) -> None:
    """Raise a `SppnetError` where two photos would share one file of their boxes.

    Parameters
    ----------
    names : iterable of str
        Of all photos whose annotations go to one folder.
    what : str
        The format, for the message.
    """
    met: dict[str, str] = {}
    for name in names:
        # Also where file systems do not tell capitals apart.
        key = stem(name).casefold()
        if key in met:
            both = f"found the photos {met[key]} and {name}"
            raise SppnetError(f"{both}, whose names {what} cannot tell apart, expected different ones")
        met[key] = name


def check_lines(names: Iterable[str], what: str) -> None:
    """Raise a `SppnetError` for a name that does not fit on a line of a text file of that format."""
    for name in names:
        if name.strip() != name or name.splitlines() != [name]:
            raise SppnetError(f"found the name {name!r}, which {what} cannot hold, expected one line")


def check_xml(names: Iterable[str], what: str) -> None:
    """Raise a `SppnetError` for a name with a character that XML, and so that format, cannot hold."""
    for name in names:
        odd = _NO_XML.search(name)
        if odd:
            found = f"found the character {odd[0]!r} in the name {name!r}"
            raise SppnetError(f"{found}, which {what} cannot hold, expected another name")
