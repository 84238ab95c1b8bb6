"""LabelMe: a JSON file beside each photo, with shapes of many kinds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from sppnet.datasets.findings import Annotation, Corners, Findings, Record
from sppnet.datasets.shapes import around, around_ellipse, field, points, rows_of, size_of
from sppnet.datasets.splits import by_folder, split_of_folders
from sppnet.datasets.tree import Format, Layout, Tree
from sppnet.errors import DatasetError
from sppnet.storage import read_json

_KEYS = (b'"shapes"', b'"imagePath"', b'"imageData"')
_OUTLINES = ("polygon", "rectangle", "rotation", "oriented_rectangle", "quadrilateral")


def _fits(path: Any, head: bytes) -> bool:
    return head.lstrip().startswith(b"{") and any(key in head for key in _KEYS)


def _locate(tree: Tree, names: Sequence[str]) -> Layout:
    """Understand JSON files in any folders; see `sppnet.datasets.tree.Format`."""
    return Layout(by_folder(names), names, partial(_records, tree), names[0])


def _records(tree: Tree, names: Sequence[str], findings: Findings) -> Iterator[Record]:
    """Yield what JSON files say."""
    for name in names:
        with findings.collect():
            path = tree.path(name)
            content = read_json(path)
            rows = rows_of(path, content, "shapes", _rows, findings)
            stem = name[: name.rindex(".")]
            file = content.get("imagePath")
            size = size_of(content, "imageHeight", "imageWidth")
            written = file if isinstance(file, str) else ""
            split = split_of_folders(name)
            yield Record(stem.rpartition("/")[2], written, path, str(path), size, rows, None, split, stem)


def _rows(where: str, shape: Any, findings: Findings) -> list[Annotation]:
    """Return the box around a shape, or none around a point or a line."""
    label = field(where, shape, "label", str).strip()
    if not label:
        raise DatasetError(f"{where}: found a shape without a label, expected a class name")
    kind = shape.get("shape_type") or "polygon"  # files of before version 3 have polygons only
    box = _box(where, shape, kind)
    if box is None:
        findings.leave_out(kind)
        return []
    return [Annotation(box, label, f"{where}: {kind} {box} of {label!r}", bool(shape.get("difficult")))]


def _box(where: str, shape: Any, kind: str) -> Corners | None:
    """Return the box around a shape of some kind."""
    if kind == "circle":
        (x, y), (u, v) = points(where, shape, "points", 2)[:2]
        radius = ((x - u) ** 2 + (y - v) ** 2) ** 0.5
        return around_ellipse(x, y, radius, radius)
    if kind == "mask":  # its corners are pixels that it covers
        x1, y1, x2, y2 = around(points(where, shape, "points", 2))
        return x1, y1, x2 + 1, y2 + 1
    if kind in _OUTLINES:
        return around(points(where, shape, "points", 2))
    return None


LABELME = Format(
    (".json",), _fits, _locate, "a .json file beside each photo, with shapes and imagePath (LabelMe)"
)
