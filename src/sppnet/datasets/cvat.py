"""CVAT for images: one XML file of images and the shapes in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

from sppnet.datasets.findings import Annotation, Corners, Findings, Record
from sppnet.datasets.shapes import around, around_ellipse, around_turned, numbers, size_of
from sppnet.datasets.splits import split_of_file
from sppnet.datasets.tree import Format, Layout, Tree
from sppnet.errors import DatasetError

_ALSO = ("attribute", "tag")  # what an image or a shape may have besides shapes


class _Shape(NamedTuple):
    """A shape as it is written: its line, its kind, its attributes."""

    line: int
    kind: str
    attributes: Mapping[str, str]


class _Image(NamedTuple):
    """An image as it is written, with its shapes and its split."""

    path: Path
    line: int
    attributes: Mapping[str, str]
    shapes: list[_Shape]
    split: str | None


def _fits(path: Path, head: bytes) -> bool:
    return b"<annotations" in head and any(tag in head for tag in (b"<meta", b"<image", b"<version"))


def _locate(tree: Tree, names: Sequence[str]) -> Layout:
    """Understand XML files in any folders; see `sppnet.datasets.tree.Format`."""
    images = [image for name in names for image in _images(tree.path(name), split_of_file(name))]
    splits: dict[str, list[_Image]] = {}
    for image in images:
        if image.split is not None:
            splits.setdefault(image.split, []).append(image)
    return Layout(splits, images, _records, names[0])


def _images(path: Path, split: str | None) -> list[_Image]:
    """Return the images of a file; those of a task with subsets name their splits."""
    images: list[_Image] = []
    within: list[str] = []
    parser = expat.ParserCreate()

    def start(tag: str, attributes: dict[str, str]) -> None:
        line = parser.CurrentLineNumber
        if len(within) == 1 and tag == "track":
            raise DatasetError(f"{path}:{line}: found a <track> of a video, expected CVAT for images")
        if len(within) == 1 and tag == "image":
            images.append(_Image(path, line, attributes, [], attributes.get("subset") or split))
        if within[1:] == ["image"] and tag not in _ALSO:
            images[-1].shapes.append(_Shape(line, tag, attributes))
        within.append(tag)

    def end(tag: str) -> None:
        within.pop()

    parser.StartElementHandler, parser.EndElementHandler = start, end
    try:
        parser.Parse(path.read_bytes(), True)
    except (expat.ExpatError, ValueError, LookupError) as error:  # the latter two: an unknown encoding
        if isinstance(error, DatasetError):
            raise
        line = getattr(error, "lineno", 1)
        raise DatasetError(f"{path}:{line}: found malformed XML ({error}), expected XML") from None
    return images


def _records(images: Sequence[_Image], findings: Findings) -> Iterator[Record]:
    """Yield images."""
    for image in images:
        with findings.collect():
            where = f"{image.path}:{image.line}"
            name = image.attributes.get("name", "")
            if not name:
                raise DatasetError(f"{where}: found an image without a name, expected one")
            rows = []
            for shape in image.shapes:
                with findings.collect():
                    rows += _rows(f"{image.path}:{shape.line}", shape, findings)
            values = {key: _number(where, image.attributes, key) for key in ("height", "width")}
            size = size_of(values, "height", "width")
            yield Record(name, name, image.path, where, size, rows, None, image.split)


def _rows(where: str, shape: _Shape, findings: Findings) -> list[Annotation]:
    """Return the box around a shape, or none around a point or a line."""
    label = shape.attributes.get("label", "").strip()
    if not label:
        raise DatasetError(f"{where}: found a <{shape.kind}> without a label, expected a class name")
    box = _box(where, shape)
    if box is None:
        findings.leave_out(shape.kind)
        return []
    return [Annotation(box, label, f"{where}: {shape.kind} {box} of {label!r}")]


def _box(where: str, shape: _Shape) -> Corners | None:
    """Return the box around a shape; one that is turned is turned about its centre."""

    def get(*keys: str) -> list[float]:
        return [_number(where, shape.attributes, key) for key in keys]

    degrees = get("rotation")[0] if "rotation" in shape.attributes else 0.0
    if shape.kind == "box":
        x1, y1, x2, y2 = get("xtl", "ytl", "xbr", "ybr")
        return around_turned((x1, y1, x2, y2), degrees, (x1 + x2) / 2, (y1 + y2) / 2)
    if shape.kind == "ellipse":
        x, y, rx, ry = get("cx", "cy", "rx", "ry")
        return around_ellipse(x, y, rx, ry, degrees)
    if shape.kind == "mask":
        x, y, width, height = get("left", "top", "width", "height")
        return x, y, x + width, y + height
    if shape.kind == "polygon":
        text = shape.attributes.get("points", "")
        try:
            corners = [tuple(map(float, pair.split(","))) for pair in text.split(";") if pair.strip()]
            return around([(x, y) for x, y in corners])
        except ValueError:
            raise DatasetError(f"{where}: found the points {text[:80]!r}, expected x,y;x,y;...") from None
    return None


def _number(where: str, attributes: Mapping[str, str], key: str) -> float:
    """Return a finite number in an attribute."""
    try:
        return numbers(where, {key: float(attributes[key])}, key)[0]
    except KeyError:
        raise DatasetError(f"{where}: found no {key}, expected a number") from None
    except ValueError as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{where}: found {attributes[key]!r} as {key}, expected a number") from None


CVAT = Format((".xml",), _fits, _locate, "an .xml file of <annotations> with <image> (CVAT for images)")
