"""VGG Image Annotator: the regions of many photos in a project, in its JSON export or its CSV export."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sppnet.datasets.findings import Annotation, Corners, Findings, Record
from sppnet.datasets.rows import csv_rows, header_fits
from sppnet.datasets.shapes import around, around_ellipse, field, numbers
from sppnet.datasets.splits import by_file, split_of_file
from sppnet.datasets.tree import Format, Layout, Tree
from sppnet.errors import DatasetError, SppnetError
from sppnet.storage import read_json

_METADATA = "_via_img_metadata"
_REGION = ("region_shape_attributes", "region_attributes")
_LIKELY = ("class", "label", "name", "type", "category", "object")
_UNNAMED = "box"  # the class of regions without attributes


class _Region(NamedTuple):
    """A region of a photo as it is written: the photo, the place in the file, shape and attributes."""

    file: str
    where: str
    shape: Any
    attributes: Any


def _fits(path: Path, head: bytes) -> bool:
    if path.suffix.lower() == ".csv":
        return header_fits(head, ("filename", *_REGION)) or header_fits(head, ("#filename", *_REGION))
    if not head.lstrip().startswith(b"{"):
        return False
    return b'"_via_' in head or (b'"filename"' in head and b'"regions"' in head and b'"images"' not in head)


def _locate(tree: Tree, names: Sequence[str]) -> Layout:
    """Understand files in any folders; see `sppnet.datasets.tree.Format`."""
    return Layout(by_file(names), names, partial(_records, tree), names[0])


def _records(tree: Tree, names: Sequence[str], findings: Findings) -> Iterator[Record]:
    """Yield what files say, of which all name the class of a region by one attribute."""
    for name in names:
        path = tree.path(name)
        read = _table if path.suffix.lower() == ".csv" else _project
        files, regions = read(path)
        key = _class_key(path, regions)
        rows: dict[str, list[Annotation]] = {file: [] for file in files}
        for region in regions:
            with findings.collect():
                rows[region.file] += _rows(region, key, findings)
        split = split_of_file(name)
        for file, where in files.items():
            yield Record(file, file, path, where, None, rows[file], None, split)


def _project(path: Path) -> tuple[dict[str, str], list[_Region]]:
    """Return the photos of a JSON file, each with its place, and their regions."""
    content = read_json(path)
    images = content.get(_METADATA, content) if isinstance(content, dict) else content
    if not isinstance(images, dict):
        raise DatasetError(f"{path}: found no photos, expected an object with one for each")
    files: dict[str, str] = {}
    regions = []
    for number, image in enumerate(images.values()):
        where = f"{path}: image {number}"
        file = field(where, image, "filename", str)
        files.setdefault(file, where)
        listed = field(where, {"regions": image.get("regions") or []}, "regions", list, dict)
        # The first version of the tool numbers the regions in an object.
        for i, region in enumerate(listed.values() if isinstance(listed, dict) else listed):
            place = f"{path}: {file}, region {i}"
            shape, attributes = (field(place, region, key, dict) for key in ("shape_attributes", _REGION[1]))
            regions.append(_Region(file, place, shape, attributes))
    return files, regions


def _table(path: Path) -> tuple[dict[str, str], list[_Region]]:
    """Return the photos of a CSV file, each with its place, and their regions."""
    files: dict[str, str] = {}
    regions = []
    for where, row in csv_rows(path, _REGION, ("filename", "#filename")):
        file = row.get("filename", row.get("#filename", ""))
        files.setdefault(file, where)
        shape, attributes = (_cell(where, row[key], key) for key in _REGION)
        if shape:
            regions.append(_Region(file, where, shape, attributes))
    return files, regions


def _cell(where: str, text: str, column: str) -> dict[str, Any]:
    """Return the object in a cell."""
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise DatasetError(f"{where}: found {text[:80]!r} in {column}, expected a JSON object")
    return value


def _class_key(path: Path, regions: Sequence[_Region]) -> str | None:
    """Return the attribute that is the class: the one that all regions have; None if none has any.

    Raises
    ------
    SppnetError
        If no attribute is in all regions, or several are whose names do not tell.
    """
    counts = Counter(key for region in regions for key in _texts(region.attributes))
    if not counts:
        return None
    everywhere = [key for key, count in counts.items() if count == len(regions)]
    fitting = everywhere if everywhere else [key for key in counts if key.lower() in _LIKELY]
    likely = [word for word in _LIKELY if word in {key.lower() for key in fitting}]
    if len(fitting) > 1 and likely:
        fitting = [key for key in fitting if key.lower() == likely[0]]
    if len(fitting) != 1:
        shown = ", ".join(f"{key!r} ({count})" for key, count in counts.items())
        found = f"the attributes {shown} of {len(regions)} regions"
        raise SppnetError(f"{path}: found {found}, expected one in all of them, which is the class")
    return fitting[0]


def _texts(attributes: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the attributes that are set: a text, or what is ticked of several."""
    found = {}
    for key, value in attributes.items():
        ticked: Iterable[str] = [value] if isinstance(value, str) else ()
        if isinstance(value, dict):
            ticked = (name for name, is_set in value.items() if is_set)
        names = [name.strip() for name in ticked if name.strip()]
        if names:
            found[key] = names
    return found


def _rows(region: _Region, key: str | None, findings: Findings) -> list[Annotation]:
    """Return the box around a region, or none around a point or a line."""
    kind = field(region.where, region.shape, "name", str)
    box = _box(region, kind)
    if box is None:
        findings.leave_out(kind)
        return []
    labels = [_UNNAMED] if key is None else _texts(region.attributes).get(key, [])
    if len(labels) != 1:
        found = f"{len(labels)} values of the attribute {key!r}"
        raise DatasetError(f"{region.where}: found {found}, expected one, the class")
    return [Annotation(box, labels[0], f"{region.where}: {kind} {box} of {labels[0]!r}")]


def _box(region: _Region, kind: str) -> Corners | None:
    """Return the box around a region of some kind."""
    get = partial(numbers, region.where, region.shape)
    if kind == "rect":
        x, y, width, height = get("x", "y", "width", "height")
        return x, y, x + width, y + height
    if kind == "circle":
        x, y, radius = get("cx", "cy", "r")
        return around_ellipse(x, y, radius, radius)
    if kind == "ellipse":
        radians = get("theta")[0] if "theta" in region.shape else 0.0
        x, y, rx, ry = get("cx", "cy", "rx", "ry")
        return around_ellipse(x, y, rx, ry, math.degrees(radians))
    if kind == "polygon":
        lists = [field(region.where, region.shape, name, list) for name in ("all_points_x", "all_points_y")]
        if not len(lists[0]) == len(lists[1]) > 0:
            found = f"{len(lists[0])} and {len(lists[1])} coordinates of a polygon"
            raise DatasetError(f"{region.where}: found {found}, expected as many x as y")
        pairs = [{"x": x, "y": y} for x, y in zip(*lists, strict=True)]
        return around([(x, y) for x, y in (numbers(region.where, pair, "x", "y") for pair in pairs)])
    return None


VIA = Format(
    (".json", ".csv"), _fits, _locate, "a .json or .csv file with region_attributes (VGG Image Annotator)"
)
