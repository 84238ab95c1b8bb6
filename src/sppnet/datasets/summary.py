"""What a data set holds: objects and box sizes of each class, what looks odd, and which photos are equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sppnet.boxes import area
from sppnet.datasets.records import Dataset, Sample, file_size
from sppnet.images import photo_keys

SMALL = 8
"""Length in pixels, of the square of a box's area, below which a box is called small."""
_LISTED = 12  # classes that a short form names


class ClassSummary(NamedTuple):
    """What a data set holds of a class.

    Attributes
    ----------
    name : str
        The class.
    objects, images : int
        How many objects there are, and in how many images.
    ignored : int
        How many of the objects are difficult or crowds.
    sides : tuple of 3 float
        Quartiles of the lengths of the boxes: of the side of a square of the same area, in pixels.
    share : float
        Median share of the image that a box covers, from 0 to 1; NaN where no size is known.
    """

    name: str
    objects: int
    images: int
    ignored: int
    sides: tuple[float, float, float]
    share: float


class Summary(NamedTuple):
    """What a data set holds.

    Attributes
    ----------
    images, objects : int
        How many there are.
    empty : int
        Images without objects.
    classes : tuple of ClassSummary
        Of each class, in the order of `Dataset.classes`.
    warnings : tuple of str
        A line for each thing that may be a mistake.
    """

    images: int
    objects: int
    empty: int
    classes: tuple[ClassSummary, ...]
    warnings: tuple[str, ...]

    @property
    def short(self) -> str:
        """What there is in one line: photos, objects, and those of the classes with the most."""
        most = sorted(self.classes, key=lambda one: -one.objects)
        listed = [f"{one.name} {one.objects}" for one in most[:_LISTED]]
        rest = [f"{len(most) - _LISTED} more classes"] if len(most) > _LISTED else []
        empty = f"; {self.empty} photos without objects" if self.empty else ""
        return f"{self.images} photos, {self.objects} objects: {', '.join(listed + rest)}{empty}"


class Place(NamedTuple):
    """Where a photo lies: the split that holds it, and its file."""

    split: str
    path: Path


def summarise(data: Dataset) -> Summary:
    """Count what a data set holds, and say what looks odd.

    Parameters
    ----------
    data : Dataset
        As `sppnet.read_dataset` gives it.

    Returns
    -------
    Summary
        Its warnings tell of a class with one box, of classes whose names differ in capitals or spaces only,
        and of boxes smaller than 8 pixels. What a reader put right or left out is told by
        `Dataset.notes`.
    """
    counts = [len(sample.target.labels) for sample in data]
    owner = np.repeat(np.arange(len(data)), counts)
    areas = area(np.concatenate([np.zeros((0, 4), np.float32), *(sample.target.boxes for sample in data)]))
    ignored = np.concatenate([np.zeros(0, bool), *(sample.target.ignored for sample in data)])
    whole = np.array([_pixels(sample) for sample in data], np.float64)[owner]
    classes = []
    numbers = {name: number for number, name in enumerate(data.classes)}
    kinds = np.array([numbers[label] for sample in data for label in sample.target.labels], np.int64)
    rows = np.split(np.argsort(kinds, kind="stable"), np.cumsum(np.bincount(kinds, minlength=len(numbers))))
    for name, mine in zip(data.classes, rows, strict=False):
        if not len(mine):
            continue
        low, middle, high = np.percentile(np.sqrt(areas[mine]), (25, 50, 75)).tolist()
        share = float(np.median(areas[mine] / whole[mine]))
        images = len(np.unique(owner[mine]))
        classes.append(
            ClassSummary(name, len(mine), images, int(ignored[mine].sum()), (low, middle, high), share)
        )
    small = int((np.sqrt(areas) < SMALL).sum())
    warnings = _warnings(classes, small)
    return Summary(len(data), len(kinds), counts.count(0), tuple(classes), tuple(warnings))


def equal_photos(places: Sequence[Place]) -> list[list[Place]]:
    """Return those photos together whose files are equal, two or more each, in their order.

    Files of the same length are read.
    """
    sizes = [file_size(place.path) for place in places]
    times = Counter(sizes)
    found: dict[int, list[Place]] = {}
    for place, size in zip(places, sizes, strict=True):
        if size >= 0 and times[size] > 1:
            found.setdefault(int(photo_keys([place.path])[0]), []).append(place)
    return [group for group in found.values() if len(group) > 1]


def _pixels(sample: Sample) -> float:
    """Return the area of an image in pixels; NaN if it is not known without opening its file."""
    if sample.size is not None:
        return float(sample.size[0] * sample.size[1])
    return float("nan") if isinstance(sample.image, Path) else float(sample.image[:, :, 0].size)


def _warnings(classes: Sequence[ClassSummary], small: int) -> list[str]:
    """Return a line for each thing that may be a mistake in classes and boxes."""
    found = [f"the class {one.name!r} has one box" for one in classes if one.objects == 1]
    alike: dict[str, list[str]] = {}
    for one in classes:
        alike.setdefault("".join(one.name.casefold().split()), []).append(one.name)
    for names in alike.values():
        if len(names) > 1:
            listed = " and ".join(map(repr, names))
            found.append(f"the classes {listed} differ in capitals or spaces only")
    if small:
        found.append(f"boxes of less than {SMALL} x {SMALL} pixels: {small}")
    return found
