"""Labelled images for classification: folders named after classes, or a CSV file, as one list.

A list of a million images holds their names in one buffer and their labels in one array, and no Python object
for any of them: worker processes made by fork share its memory, as nothing in it is counted when it is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from sppnet.datasets.records import Contents, class_names, digest, file_size, packed
from sppnet.datasets.rows import csv_rows, listed
from sppnet.errors import DatasetError, SppnetError
from sppnet.images import images_among
from sppnet.walking import LeftOut, list_folder, shown, walk

# Where ImageNet keeps its splits and Caltech101 its classes, below the folder that their archives unpack to.
_PUBLISHED = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "101_ObjectCategories")
# A folder of such a name that holds folders is taken for a split until the caller says otherwise.
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


@dataclass(frozen=True, eq=False, repr=False)
class LabelledImages(Sequence[tuple[Path, int]]):
    """A sequence of image paths and labels, sorted by class name and then by path.

    Attributes
    ----------
    classes : tuple of str
        The class names.
    labels : (n,) int32
        For each image the position of its class in `classes`.
    root : Path
        The folder that the paths start from.
    notes : tuple of str
        What was left out on reading, each with its count.
    """

    classes: tuple[str, ...]
    labels: npt.NDArray[np.int32]
    root: Path
    notes: tuple[str, ...]
    _names: bytes  # relative to root unless absolute, each ended by NUL, which no path can hold
    _starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> tuple[Path, int]: ...
    @overload
    def __getitem__(self, index: slice) -> LabelledImages: ...
    def __getitem__(self, index: int | slice) -> tuple[Path, int] | LabelledImages:
        if isinstance(index, slice):
            return self.subset(index)
        return self.root / os.fsdecode(self._name(self._starts[index])), int(self.labels[index])

    def _name(self, start: np.int64) -> bytes:
        """Return the name that begins at a place of the buffer."""
        return self._names[start : self._names.index(b"\0", start)]

    def __repr__(self) -> str:
        return f"LabelledImages({len(self)} images, {len(self.classes)} classes, {str(self.root)!r})"

    @cached_property
    def contents(self) -> Contents:
        """Number and digests of names, file sizes and labels; computed when first asked for."""
        root = os.fsencode(self.root)
        names = (self._name(start) for start in self._starts)
        sizes = np.fromiter((file_size(os.path.join(root, name)) for name in names), "<i8", len(self))
        return Contents(
            len(self),
            len(self),
            digest(self._name(start) + b"\0" for start in self._starts),
            digest([sizes.tobytes()]),
            digest([*map(packed, self.classes), self.labels.astype("<i4").tobytes()]),
        )

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over names, file sizes and labels of the images; no image is opened."""
        return self.contents.fingerprint

    def subset(self, indices: slice | npt.ArrayLike) -> LabelledImages:
        """Return some of the images, in the order of `indices`, with the same classes.

        The names of all images stay with it, also in a pickle of it.

        Parameters
        ----------
        indices : slice, sequence of int or (n,) bool
            Which images; some may come more than once.
        """
        if not isinstance(indices, slice):
            indices = np.asarray(indices)
            if indices.size == 0:
                indices = indices.astype(np.int64)  # an empty list would count as floats
            if indices.ndim != 1 or indices.dtype.kind not in "iub":
                found = f"{indices.ndim}-dimensional indices of type {indices.dtype}"
                raise SppnetError(f"found {found}, expected a slice, or a list of integers or booleans")
        return replace(self, labels=self.labels[indices], _starts=self._starts[indices])

    def relabelled(self, classes: Sequence[str]) -> LabelledImages:
        """Return the same images in the same order, with labels that index another list of class names.

        Parameters
        ----------
        classes : sequence of str
            Must hold the class of every image; classes without images are allowed.

        Raises
        ------
        SppnetError
            If the class of an image is missing from `classes`, a name comes twice in it, or it is one str.
        """
        classes = class_names(classes)
        positions = {name: i for i, name in enumerate(classes)}
        if len(positions) < len(classes):
            again = sorted({name for i, name in enumerate(classes) if positions[name] != i})
            raise SppnetError(f"found the classes {listed(again)} more than once, expected each once")
        used = [self.classes[i] for i in np.unique(self.labels)]
        unknown = [name for name in used if name not in positions]
        if unknown:
            expected = f"only the {len(positions)} given: {listed(positions)}"
            raise SppnetError(f"{self.root}: found the classes {listed(unknown)}, expected {expected}")
        # Classes without images may be unknown; their -1 is never looked up.
        table = np.array([positions.get(name, -1) for name in self.classes], np.int32)
        return replace(self, classes=classes, labels=table[self.labels])


def read_image_folder(
    root: str | Path, split: str | None = None, classes: Sequence[str] | None = None
) -> LabelledImages:
    """List labelled images; none of them is opened.

    - A folder with a folder for each class, in which images lie at any depth: ``<root>/<class>/**/*.jpg``, or
      ``<root>/<split>/<class>/**/*.jpg``. ImageNet as it is published is such a folder, as are those above
      its ``ILSVRC/Data/CLS-LOC``, which is then the `root` of the result. An image is a file with one of
      `sppnet.images.SUFFIXES`; hidden files and folders are not looked at, and
      whatever else is there is counted in `LabelledImages.notes`. Links are followed.
    - A CSV file with the columns ``path`` (absolute, or relative to the folder of the file) and ``label`` (a
      class name), and possibly ``split``; further columns are ignored. Files count whatever their suffix.

    Parameters
    ----------
    root : path
        Folder or file.
    split : str, optional
        Name of the part to read; needed where there is more than one. A folder such as ``train`` that holds
        folders is taken for a split; ``"."`` says that it is a class.
    classes : sequence of str, optional
        Class names in the order that labels shall count them; by default those found, sorted. All that are
        found must be among them.

    Raises
    ------
    DatasetError
        If there is no such split, none was chosen of several, a class has no image, a link leads
        back to a folder that holds it, the data is of another kind (such as Parquet), or a row of the CSV
        file is wrong: names the folder, or file and line.
    SppnetError
        If a class is not in `classes`.
    FileNotFoundError
        If there is no `root`.
    """
    root = _existing(root)
    notes: tuple[str, ...] = ()
    if root.is_dir():
        root = _home(root)
        names, notes = _from_folder(root, split)
    else:
        names = _from_csv(_csv_file(root), split)
        root = root.parent
    found_classes = tuple(sorted(names))
    counts = [names[name].count(b"\0") for name in found_classes]
    buffer = b"".join(names[name] for name in found_classes)
    ends = np.flatnonzero(np.frombuffer(buffer, np.uint8) == 0)
    images = LabelledImages(
        found_classes,
        np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        root,
        notes,
        buffer,
        np.concatenate([[0], ends[:-1] + 1]).astype(np.int64),
    )
    return images if classes is None else images.relabelled(classes)


def image_folder_splits(root: str | Path) -> tuple[str, ...]:
    """List the splits of labelled images, without listing these.

    Parameters
    ----------
    root : path
        Folder or CSV file, as `read_image_folder` takes it.

    Returns
    -------
    tuple of str
        Names that `read_image_folder` takes as `split`, sorted; empty if there are no splits.
        `default_training_split` chooses the one to learn from.

    Raises
    ------
    DatasetError
        If the data is of another kind (such as Parquet), or a row of the CSV file is wrong.
    FileNotFoundError
        If there is no `root`.
    """
    root = _existing(root)
    if root.is_dir():
        return tuple(_split_folders(_home(root)))
    return tuple(sorted({row.split for row in _listed_images(_csv_file(root)) if row.split is not None}))


def _existing(root: str | Path) -> Path:
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"{root}: found no such folder or file, expected labelled images")
    return root


def _home(root: Path) -> Path:
    """Return the folder of splits or classes: `root`, or one below it in which published data has them."""
    return next((root / below for below in _PUBLISHED if (root / below).is_dir()), root)


def _csv_file(file: Path) -> Path:
    """Return a file that is not a folder, if it is a CSV file."""
    if file.suffix.lower() != ".csv":
        found = "a Parquet file" if file.suffix.lower() == ".parquet" else "a file of unknown type"
        raise DatasetError(f"{file}: found {found}, expected a folder of class folders or a .csv file")
    return file


def _from_folder(root: Path, split: str | None) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Return the packed names of each class, relative to `root`, and what was left out."""
    base, left = os.fsencode(root), LeftOut()
    prefix = _split_prefix(root, split)
    place = shown(base, prefix)
    files, folders = list_folder(root, prefix, left)
    loose = images_among(files, left)
    for name in loose:
        left.add("outside the class folders", name)
    if not folders:
        if not loose:
            raise DatasetError(f"{place}: found no class folder, expected <class>/*.jpg in it")
        found = f"{len(loose)} image{'s' * (len(loose) > 1)} but no class folder"
        advice = "move the images of each class into a folder of its name, or list them in a .csv file"
        raise DatasetError(f"{place}: found {found}, expected <class>/*.jpg in it; {advice}")
    classes = {}
    for folder in sorted(folders):
        names = images_among(walk(root, left, folder), left)
        if not names:
            raise DatasetError(f"{shown(base, folder)}: found no image, expected some in each class folder")
        classes[os.fsdecode(folder[len(prefix) : -1])] = _pack(names)
    return classes, left.notes()


def _split_prefix(root: Path, split: str | None) -> bytes:
    """Return the folder of a split as the beginning of names: ``train/``, or nothing without splits."""
    folders = _folders(root)
    if split == ".":
        return b""
    if split is not None:
        if split not in folders:
            expected = f"one of {listed(folders)}"
            raise DatasetError(f"{_place(root)}: found no split {split!r}, expected {expected}")
        return folders[split]
    splits = _split_folders(root)
    if not splits:
        return b""
    if len(folders) == 1:
        return next(iter(folders.values()))
    expected = "split= to name one, or split='.' if these are classes"
    raise DatasetError(f"{_place(root)}: found the splits {listed(splits)}, none chosen; expected {expected}")


def _place(root: Path) -> str:
    return shown(os.fsencode(root))


def _folders_in(root: Path, below: bytes = b"") -> list[bytes]:
    return sorted(list_folder(root, below, LeftOut())[1])


def _folders(root: Path) -> dict[str, bytes]:
    """Return the folders in `root` by name, sorted, as the beginnings of names: ``train/``."""
    folders = {os.fsdecode(name[:-1]): name for name in _folders_in(root)}
    if not folders.keys() - {"data"} and _parquet(root):
        raise DatasetError(f"{_place(root)}: found Parquet files, expected class folders of image files")
    return folders


def _split_folders(root: Path) -> list[str]:
    """Return the names of the folders that hold folders, if one of them is named as splits are."""
    folders = _folders(root)
    # Classes may be many, and are looked into only if there are splits.
    if not any(_folders_in(root, folders[name]) for name in _SPLITS & folders.keys()):
        return []
    return [name for name, folder in folders.items() if _folders_in(root, folder)]


def _parquet(root: Path) -> bool:
    return any(path for pattern in ("*.parquet", "data/*.parquet") for path in root.glob(pattern))


def _pack(names: list[bytes]) -> bytes:
    """Return names as one string, sorted and each ended by NUL."""
    names.sort()
    return b"\0".join(names) + b"\0"


class _Row(NamedTuple):
    where: str
    path: str
    label: str
    split: str | None


def _from_csv(file: Path, split: str | None) -> dict[str, bytes]:
    """Return the packed names of each class, as they are written in the file."""
    # The file is read twice, or the rows of a million images would fill the memory.
    splits = {row.split for row in _listed_images(file)}
    if not splits:
        raise DatasetError(f"{file}: found no row, expected at least one image")
    named = sorted(name for name in splits if name is not None)
    if split is not None and split not in splits:
        expected = f"one of {listed(named)}" if named else "a column 'split'"
        raise DatasetError(f"{file}: found no split {split!r}, expected {expected}")
    if split is None and len(splits) > 1:
        expected = "split= to name one"
        raise DatasetError(f"{file}: found the splits {listed(named)}, none chosen; expected {expected}")
    folder = os.fsencode(file.parent)
    names: dict[str, list[bytes]] = {}
    lines: dict[bytes, str] = {}
    for row in _listed_images(file):
        if split in (None, row.split):
            name = os.fsencode(row.path)
            path = os.path.join(folder, name)
            if not row.label:
                raise DatasetError(f"{row.where}: found an empty label, expected a class name")
            if not row.path or not os.path.isfile(path):
                found = f"no file {row.path!r}"
                raise DatasetError(f"{row.where}: found {found}, expected the path of an image")
            line = row.where.rpartition(":")[2]
            first = lines.setdefault(os.path.normpath(path), line)
            if first != line:
                found = f"{row.path!r} as in line {first}"
                raise DatasetError(f"{row.where}: found {found}, expected each image once")
            names.setdefault(row.label, []).append(name)
    return {label: _pack(paths) for label, paths in names.items()}


def _listed_images(file: Path) -> Iterator[_Row]:
    """Yield the rows of a CSV file of labelled images."""
    for where, fields in csv_rows(file, ("path", "label"), ("split",)):
        split = fields["split"].strip() if "split" in fields else None
        if split == "":
            raise DatasetError(f"{where}: found an empty split, expected a name")
        yield _Row(where, fields["path"], fields["label"].strip(), split)
