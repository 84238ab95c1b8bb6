"""CreateML: a JSON list of images, whose boxes have a centre, a width and a height in pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sppnet.datasets.findings import Annotation, Findings, Record
from sppnet.datasets.shapes import field, numbers
from sppnet.datasets.splits import by_file, split_of_file
from sppnet.datasets.tree import Format, Layout, Tree
from sppnet.errors import DatasetError
from sppnet.storage import read_json

# Apple's own tools and Roboflow name the same things in these ways.
_FILE = ("image", "imagefilename", "filename")
_ROWS = ("annotations", "annotation")


def _fits(path: Path, head: bytes) -> bool:
    if not head.lstrip().startswith(b"[") or not any(f'"{key}"'.encode() in head for key in _ROWS):
        return False
    # An image may begin with many boxes, and Label Studio has annotations of tasks.
    content = path.read_bytes().replace(b"\0", b"")
    return b'"coordinates"' in content or not any(key in content for key in (b'"data"', b'"original_width"'))


def _locate(tree: Tree, names: Sequence[str]) -> Layout:
    """Understand JSON files in any folders; see `sppnet.datasets.tree.Format`."""
    return Layout(by_file(names), names, partial(_records, tree), names[0])


def _records(tree: Tree, names: Sequence[str], findings: Findings) -> Iterator[Record]:
    """Yield the images of files."""
    for name in names:
        path = tree.path(name)
        for number, image in enumerate(read_json(path)):
            with findings.collect():
                where = f"{path}: image {number}"
                file = field(where, image, _key(image, _FILE), str)
                rows = []
                for i, row in enumerate(field(where, image, _key(image, _ROWS), list)):
                    with findings.collect():
                        rows.append(_row(f"{where} ({file}), annotation {i}", row))
                yield Record(file, file, path, where, None, rows, None, split_of_file(name))


def _key(image: Any, keys: Sequence[str]) -> str:
    """Return the first of some keys that an image has; the first if none."""
    return next((key for key in keys if isinstance(image, dict) and key in image), keys[0])


def _row(where: str, row: Any) -> Annotation:
    """Return the box of an annotation."""
    label = field(where, row, "label", str).strip()
    if not label:
        raise DatasetError(f"{where}: found an empty label, expected a class name")
    x, y, w, h = numbers(where, field(where, row, "coordinates", dict), "x", "y", "width", "height")
    box = x - w / 2, y - h / 2, x + w / 2, y + h / 2
    return Annotation(box, label, f"{where}: box {x:g} {y:g} {w:g} {h:g} of {label!r}")


CREATEML = Format(
    (".json",), _fits, _locate, "a .json list of images with annotations and coordinates (CreateML)"
)
