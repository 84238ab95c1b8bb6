"""What a reader meets in the files of a data set: records of photos, annotations and errors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sppnet.errors import DatasetError, SppnetError

if TYPE_CHECKING:
    from sppnet.datasets.sizes import Size

Corners = tuple[float, float, float, float]
"""x1, y1, x2, y2 of a box in pixels, 0-based and half-open."""

Place = str | Callable[[], str]
"""File, line and what is written there; or what finds that out, where it takes time and is seldom asked."""

_SHOWN = 10


class Annotation(NamedTuple):
    """An annotated box, as it was met in a file.

    Attributes
    ----------
    box : tuple of 4 float
        Corners, 0-based half-open pixels of the image that was annotated.
    label : str
        Class name.
    where : Place
        File, line and the coordinates as they are written there, for what is said of it.
    difficult, crowd : bool
        As in `sppnet.boxes.Target`.
    """

    box: Corners
    label: str
    where: Place
    difficult: bool = False
    crowd: bool = False


class Record(NamedTuple):
    """An annotated image as a file of some format has it, before its photo was looked for.

    Attributes
    ----------
    name : str
        What identifies it in the data set.
    file : str
        The photo as it is written in the file: a name, or a path of any tool's making. May be empty.
    source : Path
        The file.
    where : str
        The place in it, for errors.
    size : (height, width) or None
        The annotated size; None where none is written.
    rows : sequence of Annotation
        The objects.
    id : int, str or None
        The id of the image; None in formats without ids.
    split : str or None
        The split that it is of.
    stem : str
        Where the annotations have a file for each image: this file's own path from the folder of the data
        set, with ``/`` and without suffix. A photo of the same stem is preferred to `file`.
    relative : bool
        Whether the boxes count in widths and heights of the photo, from 0 to 1, and not in pixels.
    photo : str
        The path of the photo, where the format itself has found it.
    """

    name: str
    file: str
    source: Path
    where: str
    size: Size | None
    rows: Sequence[Annotation]
    id: int | str | None = None
    split: str | None = None
    stem: str = ""
    relative: bool = False
    photo: str = ""


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
        self._numbers: dict[str, int | str] = {}
        self._disagree = False

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Note an error and go on behind the ``with`` block."""
        try:
            yield
        except (SppnetError, OSError) as error:
            self.errors.append(str(error))

    def number(self, classes: Mapping[str, int | str]) -> None:
        """Take over the numbers of the classes of one of the files of a data set.

        Where another file has given one of the classes another number, none of the numbers count.
        """
        for name, number in classes.items():
            if self._numbers.setdefault(name, number) != number:
                self.counts["files that number the classes otherwise, numbers not kept"] += 1
                self._disagree = True
                break

    @property
    def numbers(self) -> dict[str, int | str]:
        """The numbers of the classes; none where files disagree or the format has none."""
        return {} if self._disagree else self._numbers

    def leave_out(self, kind: str) -> None:
        """Count a shape around which there is no box, such as a point or a line."""
        self.counts[f"shapes of the kind {kind}, left out"] += 1

    def check(self, root: Path) -> None:
        """Raise the errors, if there are any, as one `DatasetError`."""
        if self.errors:
            raise DatasetError(
                several(self.errors, f"{root}: found {len(self.errors)} errors, expected none")
            )


def several(lines: Sequence[str], title: str) -> str:
    """Return one line as it is; of more the first 10, under a title."""
    if len(lines) == 1:
        return lines[0]
    rest = len(lines) - _SHOWN
    return "\n".join([title, *lines[:_SHOWN], *([f"and {rest} more"] if rest > 0 else [])])


def text_of(place: Place) -> str:
    """Return the words for a place."""
    return place if isinstance(place, str) else place()


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
