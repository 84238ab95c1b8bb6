"""Labelled images for classification: folders named after classes, or a CSV file, as one list.

A list of a million images holds their names in one buffer and their labels in one array, and no Python object
for any of them: worker processes made by fork share its memory, as nothing in it is counted when it is read.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from sppnet.errors import SppnetError
from sppnet.images import SUFFIXES

_SUFFIXES = frozenset(os.fsencode(suffix) for suffix in SUFFIXES)
_SHOWN = 10
# Where ImageNet keeps its splits and Caltech101 its classes, below the folder that their archives unpack to.
_PUBLISHED = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "101_ObjectCategories")
# A folder of such a name that holds folders is taken for a split until the caller says otherwise.
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


@dataclass(frozen=True, eq=False, repr=False, slots=True)
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
        start = int(self._starts[index])
        name = self._names[start : self._names.index(b"\0", start)]
        return self.root / os.fsdecode(name), int(self.labels[index])

    def __repr__(self) -> str:
        return f"LabelledImages({len(self)} images, {len(self.classes)} classes, {str(self.root)!r})"

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
            If the class of an image is missing from `classes`, or a name comes twice in it.
        """
        positions = {name: i for i, name in enumerate(classes)}
        if len(positions) < len(classes):
            again = sorted({name for i, name in enumerate(classes) if positions[name] != i})
            raise SppnetError(f"found the classes {_listed(again)} more than once, expected each once")
        used = [self.classes[i] for i in np.unique(self.labels)]
        unknown = [name for name in used if name not in positions]
        if unknown:
            expected = f"only the {len(positions)} given: {_listed(positions)}"
            raise SppnetError(f"{self.root}: found the classes {_listed(unknown)}, expected {expected}")
        # Classes without images may be unknown; their -1 is never looked up.
        table = np.array([positions.get(name, -1) for name in self.classes], np.int32)
        return replace(self, classes=tuple(classes), labels=table[self.labels])


def read_labelled_images(
    root: str | Path, split: str | None = None, classes: Sequence[str] | None = None
) -> LabelledImages:
    """List labelled images; none of them is opened.

    - A folder with a folder for each class, in which images lie at any depth: ``<root>/<class>/**/*.jpg``, or
      ``<root>/<split>/<class>/**/*.jpg``. ImageNet as it is published is such a folder, as are those above
      its ``ILSVRC/Data/CLS-LOC``, which is then the `root` of the result. An image is a file with one of the
      suffixes jpg, jpeg, png, bmp, tif, tiff, webp, gif; hidden files and folders are not looked at, and
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
    SppnetError
        If there is no such split, none was chosen of several, a class has no image or is not in `classes`, a
        link leads back to a folder that holds it, the data is of another kind (such as Parquet), or a row of
        the CSV file is wrong: names the folder, or file and line.
    FileNotFoundError
        If there is no `root`.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"{root}: found no such folder or file, expected labelled images")
    notes: tuple[str, ...] = ()
    if root.is_dir():
        root = next((root / below for below in _PUBLISHED if (root / below).is_dir()), root)
        names, notes = _read_folder(root, split)
    elif root.suffix.lower() == ".csv":
        names = _read_csv(root, split)
        root = root.parent
    else:
        found = "a Parquet file" if root.suffix.lower() == ".parquet" else "a file of unknown type"
        raise SppnetError(f"{root}: found {found}, expected a folder of class folders or a .csv file")
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


class _LeftOut:
    """What was passed over: of each kind how many, and the first by name."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, bytes]] = {}

    def add(self, kind: str, name: bytes) -> None:
        count, first = self.found.get(kind, (0, name))
        self.found[kind] = count + 1, min(first, name)

    def notes(self) -> tuple[str, ...]:
        return tuple(
            f"{kind}, left out: {count} (first: {_shown(first)})"
            for kind, (count, first) in sorted(self.found.items())
        )


def _read_folder(root: Path, split: str | None) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Return the packed names of each class, relative to `root`, and what was left out."""
    base, left = os.fsencode(root), _LeftOut()
    prefix = _split_prefix(base, split)
    place = _shown(base, prefix)
    loose, folders = _scan(base, prefix, left)
    for name in loose:
        left.add("images outside the class folders", name)
    if not folders:
        found = "images but no class folder" if loose else "no class folder"
        raise SppnetError(f"{place}: found {found}, expected <class>/*.jpg in it")
    packed = {}
    for folder in sorted(folders):
        names = _walk(base, folder, left)
        if not names:
            raise SppnetError(f"{_shown(base, folder)}: found no image, expected some in each class folder")
        packed[os.fsdecode(folder[len(prefix) : -1])] = _pack(names)
    return packed, left.notes()


def _split_prefix(base: bytes, split: str | None) -> bytes:
    """Return the folder of a split as the beginning of names: ``train/``, or nothing without splits."""
    folders = {os.fsdecode(name[:-1]): name for name in sorted(_scan(base, b"", _LeftOut())[1])}
    if not folders.keys() - {"data"} and _parquet(base):
        raise SppnetError(f"{_shown(base)}: found Parquet files, expected class folders of image files")
    if split == ".":
        return b""
    if split is not None:
        if split not in folders:
            raise SppnetError(f"{_shown(base)}: found no split {split!r}, expected one of {_listed(folders)}")
        return folders[split]
    if not any(_scan(base, folders[name], _LeftOut())[1] for name in _SPLITS & folders.keys()):
        return b""
    if len(folders) == 1:
        return next(iter(folders.values()))
    splits = [name for name, folder in folders.items() if _scan(base, folder, _LeftOut())[1]]
    expected = "split= to name one, or split='.' if these are classes"
    raise SppnetError(f"{_shown(base)}: found the splits {_listed(splits)}, none chosen; expected {expected}")


def _parquet(base: bytes) -> bool:
    folder = Path(os.fsdecode(base))
    return any(path for pattern in ("*.parquet", "data/*.parquet") for path in folder.glob(pattern))


def _scan(base: bytes, prefix: bytes, left: _LeftOut) -> tuple[list[bytes], list[bytes]]:
    """Return the images and the folders (ending in ``/``) in the folder `prefix` of `base`, unsorted."""
    images, folders = [], []
    place = os.path.join(base, prefix)
    try:
        with os.scandir(place) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(b"."):
                    continue
                try:
                    is_file, is_folder = entry.is_file(), entry.is_dir()
                except OSError:  # links in a circle, or into a folder that may not be entered
                    is_file = is_folder = False
                if is_folder:
                    if entry.is_symlink() and _holds_itself(entry.path):
                        expected = "no link to a folder that holds the link"
                        raise SppnetError(f"{_shown(entry.path)}: found a circle, expected {expected}")
                    folders.append(prefix + name + b"/")
                elif not is_file:
                    kind = "links that lead nowhere" if entry.is_symlink() else "neither files nor folders"
                    left.add(kind, prefix + name)
                elif name[name.rfind(b".") :].lower() in _SUFFIXES:
                    images.append(prefix + name)
                else:
                    left.add("files that are no images", prefix + name)
    except OSError as error:
        reason = f"{_shown(place)}: cannot list ({error.strerror}), expected a readable folder"
        raise type(error)(reason) from None
    return images, folders


def _holds_itself(link: bytes) -> bool:
    """Tell whether a link leads to a folder on its own path, by which a walk would never end."""
    return any(os.path.samefile(link, parent) for parent in Path(os.fsdecode(link)).absolute().parents)


def _walk(base: bytes, prefix: bytes, left: _LeftOut) -> list[bytes]:
    """Return the images at any depth below the folder `prefix` of `base`, unsorted."""
    names: list[bytes] = []
    waiting = [prefix]
    while waiting:
        images, folders = _scan(base, waiting.pop(), left)
        names += images
        waiting += folders
    return names


def _pack(names: list[bytes]) -> bytes:
    """Return sorted names as one string, each ended by NUL."""
    names.sort()
    return b"\0".join(names) + b"\0"


class _Row(NamedTuple):
    line: int
    path: str
    label: str
    split: str | None


def _read_csv(file: Path, split: str | None) -> dict[str, bytes]:
    """Return the packed names of each class, as they are written in the file."""
    splits = {row.split for row in _csv_rows(file)}
    if not splits:
        raise SppnetError(f"{file}: found no row, expected at least one image")
    named = sorted(name for name in splits if name is not None)
    if split is not None and split not in splits:
        expected = f"one of {_listed(named)}" if named else "a column 'split'"
        raise SppnetError(f"{file}: found no split {split!r}, expected {expected}")
    if split is None and len(splits) > 1:
        expected = "split= to name one"
        raise SppnetError(f"{file}: found the splits {_listed(named)}, none chosen; expected {expected}")
    folder = os.fsencode(file.parent)
    names: dict[str, list[bytes]] = {}
    lines: dict[bytes, int] = {}
    for row in _csv_rows(file):
        if split in (None, row.split):
            name = os.fsencode(row.path)
            path = os.path.join(folder, name)
            where = f"{file}:{row.line}"
            if not row.label:
                raise SppnetError(f"{where}: found an empty label, expected a class name")
            if not row.path or not os.path.isfile(path):
                raise SppnetError(f"{where}: found no file {row.path!r}, expected the path of an image")
            first = lines.setdefault(os.path.normpath(path), row.line)
            if first != row.line:
                raise SppnetError(f"{where}: found {row.path!r} as in line {first}, expected each image once")
            names.setdefault(row.label, []).append(name)
    return {label: _pack(paths) for label, paths in names.items()}


def _csv_rows(file: Path) -> Iterator[_Row]:
    # Names that are not UTF-8 come as surrogates, which os.fsencode turns back into their bytes.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.reader(text, skipinitialspace=True, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            counts = [header.count(name) for name in ("path", "label", "split")]
            if counts not in ([1, 1, 0], [1, 1, 1]):
                expected = "path and label once each, and split at most once"
                raise SppnetError(f"{file}:1: found the columns {_listed(header)}, expected {expected}")
            for row in reader:
                where = f"{file}:{reader.line_num}"
                if not row:
                    continue
                if len(row) != len(header):
                    expected = f"{len(header)} as in line 1"
                    raise SppnetError(f"{where}: found a row of length {len(row)}, expected {expected}")
                fields = dict(zip(header, row, strict=True))
                split = fields["split"].strip() if "split" in fields else None
                if split == "":
                    raise SppnetError(f"{where}: found an empty split, expected a name")
                yield _Row(reader.line_num, fields["path"], fields["label"].strip(), split)
        except csv.Error as error:
            raise SppnetError(f"{file}:{reader.line_num}: found no CSV ({error}), expected CSV") from None


def _listed(names: Mapping[str, object] | Iterable[str]) -> str:
    """Return up to 10 quoted names, and how many more there are."""
    quoted = [repr(name) for name in names]
    rest = [f"and {len(quoted) - _SHOWN} more"] if len(quoted) > _SHOWN else []
    return ", ".join([*quoted[:_SHOWN], *rest]) or "(none)"


def _shown(*parts: bytes) -> str:
    """Return a path as text that any terminal takes, whatever its bytes."""
    return os.path.normpath(os.path.join(*parts)).decode("utf-8", "backslashreplace")
