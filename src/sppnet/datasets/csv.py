"""CSV: tables of boxes, a row each, as we and several tools write them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sppnet.datasets.entries import Entry, decimals
from sppnet.datasets.findings import Annotation, Findings, Record
from sppnet.datasets.rows import cells_of, csv_bytes, csv_rows, first_line, name_in, safe_path, table_text
from sppnet.datasets.splits import split_of_file
from sppnet.datasets.tree import Format, Layout, Tree, head_of, suffix_of
from sppnet.errors import DatasetError
from sppnet.images import SUFFIXES
from sppnet.storage import atomic_path

_CORNERS = ("x1", "y1", "x2", "y2")
_UNNAMED = "box"  # the label of boxes without one
_YES = ("1", "true", "yes")
_SEPARATORS = (",", ";", "\t")
# What tables of boxes call their columns, in small letters: ours, those of TensorFlow, DeepForest and others.
_COLUMNS = {
    "path": (
        "path",
        "filename",
        "file_name",
        "image_path",
        "image_name",
        "image",
        "img_path",
        "imageid",
        "image_id",
        "file",
    ),
    "x1": ("x1", "xmin", "x_min"),
    "y1": ("y1", "ymin", "y_min"),
    "x2": ("x2", "xmax", "x_max"),
    "y2": ("y2", "ymax", "y_max"),
    "label": ("label", "class", "class_name", "classname", "labelname", "label_name", "name", "category"),
    "width": ("width", "image_width", "img_width"),
    "height": ("height", "image_height", "img_height"),
    "split": ("split",),
    "difficult": ("difficult",),
    "crowd": ("crowd", "isgroupof"),
}
_REQUIRED = ("path", *_CORNERS)


class _Table(NamedTuple):
    """How a table of boxes is written.

    Attributes
    ----------
    separator : str
        What stands between cells.
    columns : mapping from str to str
        Our name of each column to the one in its first line.
    header : sequence of str, optional
        The columns of a table whose first line does not name them.
    """

    separator: str
    columns: Mapping[str, str]
    header: Sequence[str] | None = None

    @property
    def is_relative(self) -> bool:
        """Whether corners are shares of the image: Open Images, and no other, calls images by an id."""
        return self.columns["path"].lower() == "imageid"


def _fits(path: Path, head: bytes) -> bool:
    return _table(head) is not None


def _table(head: bytes) -> _Table | None:
    """Tell how a table of boxes is written by the first bytes of its file; None if it is none."""
    line = first_line(head)
    for separator in _SEPARATORS:
        cells = [cell.strip() for cell in cells_of(line, separator)]
        small = {cell.lower(): cell for cell in reversed(cells)}
        columns = {
            ours: small[next(name for name in names if name in small)]
            for ours, names in _COLUMNS.items()
            if not small.keys().isdisjoint(names)
        }
        if columns.keys() >= set(_REQUIRED):
            return _Table(separator, columns)
        # The tables of keras-retinanet do not name their columns.
        if len(cells) == 6 and suffix_of(cells[0]) in SUFFIXES and _are_corners(cells[1:5]):
            names = (*_REQUIRED, "label")
            return _Table(separator, dict(zip(names, names, strict=True)), names)
    return None


def _are_corners(cells: Sequence[str]) -> bool:
    """Tell whether cells are four numbers, or all empty, as those of an image without boxes."""
    try:
        return not any(cells) or len([float(cell.replace(",", ".")) for cell in cells]) == 4
    except ValueError:
        return False


def _locate(tree: Tree, names: Sequence[str]) -> Layout:
    """Understand tables in any folders; see `sppnet.datasets.tree.Format`."""
    splits: dict[str, list[tuple[str, str | None]]] = {}
    for name in names:
        held = sorted({fields.get("split", "").strip() for _, fields in _box_rows(tree.path(name))} - {""})
        own = split_of_file(name)
        for split in held or filter(None, [own]):
            splits.setdefault(split, []).append((name, split if held else None))
        if len(names) > 1 and not held and own is None:
            both = " and ".join(names[:2])
            raise DatasetError(f"{tree.root}: found {both}, expected one table of boxes; name it")
    return Layout(splits, [(name, None) for name in names], partial(_records, tree), names[0])


def _records(tree: Tree, part: Sequence[tuple[str, str | None]], findings: Findings) -> Iterator[Record]:
    """Yield the images of tables, of each all or those of a split."""
    for name, split in part:
        file = tree.path(name)
        # By size, too: rows of one photo that state two were drawn at two scales.
        images: dict[tuple[str, str, tuple[int, int] | None], _Image] = {}
        classes: set[str] = set()
        is_relative = _table_of(file).is_relative
        for where, fields in _box_rows(file):
            with findings.collect():
                row = _annotation(where, fields)
                classes |= {row.label} if row else set()
                key = fields["path"], fields.get("split", "").strip(), _size(where, fields)
                findings.counts["rows without a split, left out"] += split is not None and not key[1]
                if split in (None, key[1]):
                    images.setdefault(key, _Image(where, key[2], []))
                    images[key].rows.extend([row] if row else [])
        if len(part) == 1:
            findings.number({label: number for number, label in enumerate(sorted(classes), 1)})
        for (path, own, _), image in images.items():
            shared = (path, path, file, image.where, image.size, image.rows, None, own or split_of_file(name))
            yield Record(*shared, stem=path if is_relative else "", relative=is_relative)


class _Image(NamedTuple):
    """An image of a table: the place of its first row, its annotated size, its boxes."""

    where: str
    size: tuple[int, int] | None
    rows: list[Annotation]


def _table_of(file: Path) -> _Table:
    """Return how a file is written that is a table of boxes."""
    table = _table(head_of(file))
    if table is None:
        raise DatasetError(f"{file}: found no table of boxes, expected {CSV.looks}")
    return table


def _box_rows(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield place and fields of each row of a table of boxes, by our names of columns."""
    table = _table_of(file)
    theirs = table.columns
    required = [theirs[name] for name in _REQUIRED]
    optional = [name for ours, name in theirs.items() if ours not in _REQUIRED] or ["label"]
    for where, fields in csv_rows(file, required, optional, table.separator, table.header):
        found = {ours: fields[name] for ours, name in theirs.items()}
        if table.separator != ",":  # where a comma may stand for the point
            found |= {name: found[name].replace(",", ".") for name in _CORNERS}
        yield where, found


def _annotation(where: str, fields: Mapping[str, str]) -> Annotation | None:
    """Return the box of a row; None of one that says only that there is an image."""
    texts = [fields[name].strip() for name in _CORNERS]
    if not any(texts):
        return None
    try:
        x1, y1, x2, y2 = map(float, texts)
    except ValueError:
        raise DatasetError(
            f"{where}: found {', '.join(texts)}, expected the numbers x1, y1, x2, y2"
        ) from None
    label = name_in(fields.get("label", "").strip()) or _UNNAMED
    difficult, crowd = (fields.get(name, "").strip().lower() in _YES for name in ("difficult", "crowd"))
    place = f"{where}: box {', '.join(texts)} of {label!r}"
    return Annotation((x1, y1, x2, y2), label, place, difficult, crowd)


def _size(where: str, fields: Mapping[str, str]) -> tuple[int, int] | None:
    """Return the annotated height and width of a row; None where they are empty or 0."""
    texts = [fields.get(name, "").strip() for name in ("height", "width")]
    try:
        height, width = (int(float(text or 0)) for text in texts)
    except (ValueError, OverflowError):
        found = f"the height {texts[0]!r} and the width {texts[1]!r}"
        raise DatasetError(f"{where}: found {found}, expected numbers") from None
    return (height, width) if height > 0 and width > 0 else None


def write_csv(file: Path, entries: Sequence[Entry]) -> list[Path]:
    """Write a CSV file of boxes, as `csv_text` has it."""
    with atomic_path(file) as temporary:
        temporary.write_bytes(csv_bytes(csv_text(entries)))
    return [file]


def csv_text(entries: Sequence[Entry]) -> str:
    """Return the boxes of images as a table, a row each; an image without boxes has a row without box.

    The columns are ``path, x1, y1, x2, y2, label``, ``score`` where the boxes were detected, ``width`` and
    ``height`` of the image, ``split`` where there are splits, ``frame`` and ``seconds`` where there are
    videos, and ``difficult`` and ``crowd`` where a box is marked so. Numbers are the shortest that come back
    equal.
    """
    scored = any(entry.scores is not None for entry in entries)
    optional = {
        "score": scored,
        "width": True,
        "height": True,
        "split": any(entry.split for entry in entries),
        "frame": any(entry.frame is not None for entry in entries),
        "seconds": any(entry.seconds is not None for entry in entries),
        "difficult": any(entry.target.difficult.any() for entry in entries),
        "crowd": any(entry.target.crowd.any() for entry in entries),
    }
    columns = ["path", *_CORNERS, "label", *(name for name, used in optional.items() if used)]
    rows = []
    for entry in entries:
        shared: dict[str, object] = {
            "path": safe_path(entry.place),
            "width": entry.width,
            "height": entry.height,
        }
        shared |= {"split": entry.split, "frame": entry.frame, "seconds": entry.seconds}
        target = entry.target
        for k, label in enumerate(target.labels):
            flags = {"difficult": int(target.difficult[k]), "crowd": int(target.crowd[k])}
            corners = dict(zip(_CORNERS, _shortest(target.boxes[k]), strict=True))
            score = {} if entry.scores is None else {"score": _shortest(entry.scores[k : k + 1])[0]}
            rows.append({**shared, **corners, **flags, **score, "label": label})
        if not target.labels:
            rows.append(shared)
    return table_text(columns, ([row.get(name, "") for name in columns] for row in rows))


def _shortest(values: npt.NDArray[np.float32]) -> list[float]:
    """Return numbers with as few digits as come back equal, whole ones without a point."""
    return [int(value) if value.is_integer() else value for value in decimals(values)]


CSV = Format(
    (".csv", ".tsv"),
    _fits,
    _locate,
    "a .csv file of boxes: path, x1, y1, x2, y2, label; or filename, width, height, class, xmin, ...",
)
