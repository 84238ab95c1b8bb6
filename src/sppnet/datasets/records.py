"""The records that every reader of detection data sets gives: samples, and the sequence of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from sppnet.arrays import Pixels
from sppnet.boxes import Target
from sppnet.errors import SppnetError

_ABSENT = -1  # the size of a file that is not there


@dataclass(frozen=True, eq=False)
class Sample:
    """An annotated image.

    Attributes
    ----------
    name : str
        Identifies the image in its data set: the file stem (VOC), the image id (COCO), the path without
        suffix relative to the folder or list of the split (YOLO), the path as it is written (CSV). Where two
        images would have one name, all have that of their path.
    image : Path or (H, W, 3) uint8
        The image file, as all readers give it; or the pixels of an image in memory, RGB and upright.
    target : Target
        The objects in it; none for a negative image.
    size : (height, width) or None
        Of the upright image in pixels, where the reader knows it.
    """

    name: str
    image: Path | Pixels
    target: Target
    size: tuple[int, int] | None = None

    @property
    def path(self) -> Path:
        """The image file.

        Raises
        ------
        SppnetError
            If the image is in memory.
        """
        if isinstance(self.image, Path):
            return self.image
        raise SppnetError(f"found an image in memory as {self.name!r}, expected a file")


class Contents(NamedTuple):
    """What a data set holds, in a few words that can be stored and compared later.

    Attributes
    ----------
    images, objects : int
        How many there are. Of labelled images each is one object.
    names, sizes, annotations : str
        Digests, of 16 hexadecimal digits each: of the names of the images, of the sizes of their files in
        bytes, and of their boxes, labels and flags, in their order.
    """

    images: int
    objects: int
    names: str
    sizes: str
    annotations: str

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that stand for all of it."""
        return digest([repr(tuple(self)).encode()])

    def difference(self, other: Contents) -> str:
        """Say in what another data set differs from this one.

        Returns
        -------
        str
            Such as "12 images instead of 10"; empty if nothing differs.
        """
        if self == other:
            return ""
        counts = [
            f"{new} {what} instead of {old}"
            for what, old, new in zip(("images", "objects"), self[:2], other[:2], strict=True)
            if new != old
        ]
        kinds = ("names of images", "sizes of image files", "annotations")
        changed = [kind for kind, old, new in zip(kinds, self[2:], other[2:], strict=True) if new != old]
        return ", ".join(counts or [f"other {' and '.join(changed)}"])


@dataclass(frozen=True, eq=False)
class Dataset(Sequence[Sample]):
    """A sequence of samples; a slice of it is again a data set.

    Attributes
    ----------
    samples : tuple of Sample
        The annotated images, in the order of the files that name them.
    classes : tuple of str
        The class names met, sorted.
    root : Path
        The folder or file that was read.
    split : str or None
        The part that was read; None for everything.
    notes : tuple of str
        What was put right or left out, each with its count.
    category_ids : mapping from str to int or str
        Class name to the number that stands for it in COCO results: the category id of a COCO data set and
        the index of a YOLO data set (also of classes not met), else the 1-based position in `classes`.
    image_ids : mapping from str to int or str
        Sample name to the image id in COCO results: that of a COCO data set, else the name itself.
    format : str
        The format that was read, such as ``"voc"``.
    """

    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    root: Path
    split: str | None
    notes: tuple[str, ...]
    category_ids: Mapping[str, int | str]
    image_ids: Mapping[str, int | str]
    format: str = ""

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> Sample | Dataset:
        if isinstance(index, slice):
            return replace(self, samples=self.samples[index])
        return self.samples[index]

    @cached_property
    def contents(self) -> Contents:
        """Number and digests of names, file sizes and annotations; computed when first asked for."""
        return Contents(
            len(self),
            sum(len(sample.target.labels) for sample in self),
            digest(packed(sample.name) for sample in self),
            digest([np.array([_bytes_of(sample.image) for sample in self], "<i8").tobytes()]),
            digest(_annotation(sample) for sample in self),
        )

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over names, file sizes and annotations of the images; no pixel is decoded."""
        return self.contents.fingerprint


def class_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return class names as a tuple.

    Raises
    ------
    SppnetError
        If it is one str, whose characters would count as names, or holds something else than names.
    """
    if isinstance(names, str):
        raise SppnetError(f"found the str {names!r}, expected a list of class names, such as [{names!r}]")
    listed = tuple(names)
    for name in listed:
        if not isinstance(name, str):
            raise SppnetError(f"found {name!r} in a list of class names, expected only str")
    return listed


def file_size(path: str | bytes | Path) -> int:
    """Return the size of a file in bytes, and -1 for one that is not there."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return _ABSENT


def packed(text: str) -> bytes:
    """Return text, also such as stands for a file name of any bytes, as bytes that end in NUL."""
    return text.encode("utf-8", "surrogateescape") + b"\0"


def digest(parts: Iterable[bytes]) -> str:
    """Return 16 hexadecimal digits over bytes in their order."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _bytes_of(image: Path | Pixels) -> int:
    """Return the size of an image file, or a number that stands for pixels in memory."""
    if isinstance(image, Path):
        return file_size(image)
    pixels = hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=7)
    return int.from_bytes(pixels.digest(), "little")


def _annotation(sample: Sample) -> bytes:
    target = sample.target
    numbers = target.boxes.astype("<f4").tobytes() + target.difficult.tobytes() + target.crowd.tobytes()
    return len(target.labels).to_bytes(8, "little") + b"".join(map(packed, target.labels)) + numbers
