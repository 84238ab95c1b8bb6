"""What labelling tools draw, as the boxes around it; and the values in their JSON, which are checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppnet.errors import DatasetError

if TYPE_CHECKING:
    from sppnet.datasets.findings import Annotation, Corners, Findings


_WORDS = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number"}
_SHORT = 80


def field(where: str, record: Any, key: str, *kinds: type) -> Any:
    """Return a value of a record, which must be of one of some types.

    Raises
    ------
    DatasetError
        If it is missing or of another type, or the record is none.
    """
    if not isinstance(record, dict):
        raise DatasetError(f"{where}: found {_short(record)}, expected an object with {key!r}")
    value = record.get(key)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        found = _short(value) if key in record else "nothing"
        expected = " or ".join(dict.fromkeys(_WORDS.get(kind, kind.__name__) for kind in kinds))
        raise DatasetError(f"{where}: found {found} as {key!r}, expected {expected}")
    return value


def rows_of(
    file: Path,
    content: Any,
    key: str,
    read: Callable[[str, Any, Findings], list[Annotation]],
    findings: Findings,
) -> list[Annotation]:
    """Return what is read of the shapes in a list of a JSON file; what is wrong with one is noted."""
    rows = []
    for i, shape in enumerate(field(str(file), content, key, list)):
        with findings.collect():
            rows += read(f"{file}: {key}[{i}]", shape, findings)
    return rows


def numbers(where: str, record: Mapping[str, Any], *keys: str) -> list[float]:
    """Return finite numbers of a record."""
    return [_finite(where, field(where, record, key, int, float), key) for key in keys]


def points(where: str, record: Mapping[str, Any], key: str, least: int = 1) -> list[tuple[float, float]]:
    """Return the points of a record, at least so many, each a pair of numbers."""
    found = []
    for point in field(where, record, key, list):
        if not (isinstance(point, list) and len(point) == 2 and all(_is_number(value) for value in point)):
            raise DatasetError(f"{where}: found {_short(point)} in {key!r}, expected x, y")
        found.append((_finite(where, point[0], key), _finite(where, point[1], key)))
    if len(found) < least:
        raise DatasetError(f"{where}: found {len(found)} points in {key!r}, expected at least {least}")
    return found


def size_of(record: Mapping[str, Any], height: str, width: str) -> tuple[int, int] | None:
    """Return the height and width that a record states under these keys; None if it does not."""
    h, w = record.get(height), record.get(width)
    if isinstance(h, int | float) and isinstance(w, int | float) and 0 < h < math.inf and 0 < w < math.inf:
        return int(h), int(w)
    return None


def around(corners: Sequence[tuple[float, float]]) -> Corners:
    """Return the box around points."""
    x, y = zip(*corners, strict=True)
    return min(x), min(y), max(x), max(y)


def around_ellipse(x: float, y: float, rx: float, ry: float, degrees: float = 0) -> Corners:
    """Return the box around an ellipse of that centre and these radii, turned by some degrees."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    w, h = math.hypot(rx * cos, ry * sin), math.hypot(rx * sin, ry * cos)
    return x - w, y - h, x + w, y + h


def around_turned(box: Corners, degrees: float, x: float, y: float) -> Corners:
    """Return the box around another one that is turned clockwise about a point."""
    if degrees % 360 == 0:
        return box
    x1, y1, x2, y2 = box
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    corners = [(u - x, v - y) for u in (x1, x2) for v in (y1, y2)]
    return around([(x + cos * u - sin * v, y + sin * u + cos * v) for u, v in corners])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(where: str, value: float, key: str) -> float:
    if not math.isfinite(value):
        raise DatasetError(f"{where}: found {value} as {key!r}, expected a finite number")
    return float(value)


def _short(value: Any) -> str:
    """Return a value as it is shown in an error."""
    text = repr(value)
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}..."
