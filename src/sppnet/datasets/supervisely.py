"""Supervisely: a JSON file ``ann/<photo>.json`` for each ``img/<photo>``, with objects of several kinds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sppnet.datasets.findings import Annotation, Corners, Findings, Record
from sppnet.datasets.shapes import around, field, points, rows_of, size_of
from sppnet.datasets.splits import by_folder, split_of_folders
from sppnet.datasets.tree import Format, Layout, Tree
from sppnet.errors import DatasetError
from sppnet.storage import read_json


def _fits(path: Path, head: bytes) -> bool:
    is_object = head.lstrip().startswith(b"{")
    return is_object and all(key in head for key in (b'"objects"', b'"size"', b'"height"', b'"width"'))


def _locate(tree: Tree, names: Sequence[str]) -> Layout:
    """Understand JSON files in any folders; see `sppnet.datasets.tree.Format`."""
    return Layout(by_folder(names), names, partial(_records, tree), names[0])


def _records(tree: Tree, names: Sequence[str], findings: Findings) -> Iterator[Record]:
    """Yield what JSON files say."""
    for name in names:
        with findings.collect():
            path = tree.path(name)
            content = read_json(path)
            rows = rows_of(path, content, "objects", _rows, findings)
            size = size_of(field(str(path), content, "size", dict), "height", "width")
            # The folder of the photo is img, that of its annotation ann.
            folder, _, file = name.removesuffix(path.suffix).rpartition("/")
            written = f"{folder.rpartition('/')[0]}/img/{file}".lstrip("/")
            yield Record(file, written, path, str(path), size, rows, None, split_of_folders(name))


def _rows(where: str, shape: Any, findings: Findings) -> list[Annotation]:
    """Return the box around an object, or none around a point, a line or a mask."""
    label = field(where, shape, "classTitle", str).strip()
    if not label:
        raise DatasetError(f"{where}: found an object without a class, expected its classTitle")
    kind = field(where, shape, "geometryType", str)
    if kind not in ("rectangle", "polygon"):
        findings.leave_out(kind)
        return []
    corners = points(where, field(where, shape, "points", dict), "exterior", 2)
    box = _box(corners) if kind == "rectangle" else around(corners)
    return [Annotation(box, label, f"{where}: {kind} {box} of {label!r}")]


def _box(corners: Sequence[tuple[float, float]]) -> Corners:
    """Return a rectangle as a box: whole numbers are the first and the last pixel that it covers.

    So the width of the SDK's ``Rectangle`` is ``right - left + 1``; with fractions, corners are places.
    """
    x1, y1, x2, y2 = around(corners)
    covers = all(value.is_integer() for value in (x1, y1, x2, y2))
    return (x1, y1, x2 + 1, y2 + 1) if covers else (x1, y1, x2, y2)


SUPERVISELY = Format((".json",), _fits, _locate, "ann/*.json with size and objects (Supervisely)")
