"""What a reader meets in the files of a data set: annotations and errors, until they make a data set."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sppnet.boxes import Target, clip
from sppnet.datasets.records import Dataset, Sample
from sppnet.errors import DatasetError, SppnetError

Corners = tuple[float, float, float, float]
"""x1, y1, x2, y2 of a box in pixels, 0-based and half-open."""

_ERRORS_SHOWN = 10
_ROUNDING = 0.01  # pixels by which a box may pass the border without being counted


class Annotation(NamedTuple):
    """An annotated box, as it was met in a file.

    Attributes
    ----------
    box : tuple of 4 float
        Corners, 0-based half-open pixels of the image.
    label : str
        Class name.
    where : str
        File, line and the coordinates as they are written there, for what is said of it.
    difficult, crowd : bool
        As in `sppnet.boxes.Target`.
    """

    box: Corners
    label: str
    where: str
    difficult: bool = False
    crowd: bool = False


class Scored(NamedTuple):
    """A detection, as a file of results holds it: box (0-based half-open pixels), score and class name."""

    box: Corners
    score: float
    label: str


class Findings:
    """What a reader met on its way: errors, any of which forbids the data set, and things that are counted.

    Attributes
    ----------
    errors : list of str
        A line for each thing that is wrong.
    counts : Counter of str
        How often something odd was put right or left out, by what it was; `Dataset.notes` tells them.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.counts: Counter[str] = Counter()

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Note an error and go on behind the ``with`` block."""
        try:
            yield
        except (SppnetError, OSError) as error:
            self.errors.append(str(error))

    def target(self, rows: Sequence[Annotation], height: int, width: int) -> Target:
        """Judge the boxes of an image of that size and clip them to it."""
        boxes = np.array([row.box for row in rows], np.float64).reshape(-1, 4)
        inside = clip(boxes, width, height)
        proper = np.isfinite(boxes).all(axis=1) & np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
        seen = proper & np.all(inside[:, 2:] > inside[:, :2], axis=1)
        for i in map(int, np.flatnonzero(~seen)):
            what = f"lies outside the image of {width} x {height}" if proper[i] else "is inverted or empty"
            self.errors.append(f"{rows[i].where} {what}, expected a box with an area inside the image")
        clipped = seen & np.any(np.abs(inside - boxes) > _ROUNDING, axis=1)
        self.counts["boxes that reached beyond their image, clipped"] += int(clipped.sum())
        labels = [row.label for row in rows]
        return Target.of(inside, labels, [row.difficult for row in rows], [row.crowd for row in rows])

    def dataset(
        self,
        root: Path,
        split: str | None,
        samples: Sequence[Sample],
        category_ids: Mapping[str, int] | None = None,
        image_ids: Mapping[str, int | str] | None = None,
    ) -> Dataset:
        """Close the reading and return the samples with what was counted.

        Raises
        ------
        DatasetError
            If anything was wrong, or there is no sample.
        """
        if len(self.errors) == 1:
            raise DatasetError(self.errors[0])
        if self.errors:
            rest = len(self.errors) - _ERRORS_SHOWN
            shown = [f"{root}: found {len(self.errors)} errors, expected none", *self.errors[:_ERRORS_SHOWN]]
            raise DatasetError("\n".join([*shown, f"and {rest} more"] if rest > 0 else shown))
        if not samples:
            part = f" in split {split!r}" if split else ""
            raise DatasetError(f"{root}: found no image{part}, expected at least one")
        self.counts["images without objects"] = sum(not sample.target.labels for sample in samples)
        classes = tuple(sorted({label for sample in samples for label in sample.target.labels}))
        return Dataset(
            tuple(samples),
            classes,
            root,
            split,
            tuple(f"{what}: {count}" for what, count in self.counts.items() if count),
            category_ids or {name: i for i, name in enumerate(classes, 1)},
            image_ids or {sample.name: sample.name for sample in samples},
        )


@contextmanager
def as_dataset_error() -> Iterator[None]:
    """Raise a `SppnetError` of the ground as one of the data set that it forbids to read."""
    try:
        yield
    except SppnetError as error:
        raise DatasetError(str(error)) from None


def finite_numbers(where: str, values: Sequence[Any], count: int) -> list[float]:
    """Return values of a file of results as numbers.

    Raises
    ------
    SppnetError
        If they are not `count` finite numbers.
    """
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise SppnetError(f"{where}: found {values}, expected {count} numbers")
    return numbers


def expected_classes(names: Collection[str]) -> str:
    """Return the end of an error that names the classes there may be."""
    return f"expected one of {', '.join(sorted(names))}"
