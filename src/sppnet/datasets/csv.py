"""CSV files that list images: of boxes, a line each; and the reading of rows that all such files share."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from sppnet.datasets.entries import Entry
from sppnet.datasets.findings import Annotation, Findings
from sppnet.datasets.records import Dataset, Sample
from sppnet.errors import DatasetError
from sppnet.images import image_size
from sppnet.storage import atomic_path

_CORNERS = ("x1", "y1", "x2", "y2")
_UNNAMED = "box"  # the label of boxes without one
_SHOWN = 10
# What a spreadsheet computes instead of showing it, and such names that were made safe.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def csv_rows(
    file: Path, required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield place (``file:line``) and fields of each row of a CSV file that is not blank.

    Names that are not UTF-8 come as surrogates, which `os.fsencode` turns back into their bytes.

    Parameters
    ----------
    file : Path
        UTF-8, with or without a byte order mark; its first line names the columns.
    required, optional : sequence of str
        Columns that must come once, and at most once; there may be others.

    Raises
    ------
    DatasetError
        If columns are missing or come twice, a row has another length than the first line, or it is no CSV.
    """
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.reader(text, skipinitialspace=True, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            missing = any(header.count(name) != 1 for name in required)
            if missing or any(header.count(name) > 1 for name in optional):
                expected = f"{_listing(required)} once each, and {_listing(optional)} at most once"
                raise DatasetError(f"{file}:1: found the columns {listed(header)}, expected {expected}")
            for row in reader:
                where = f"{file}:{reader.line_num}"
                if row and len(row) != len(header):
                    expected = f"{len(header)} as in line 1"
                    raise DatasetError(f"{where}: found a row of length {len(row)}, expected {expected}")
                if row:
                    yield where, dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise DatasetError(f"{file}:{reader.line_num}: found no CSV ({error}), expected CSV") from None


def csv_files(root: Path) -> list[Path]:
    """Return the file if it may be a CSV file of boxes."""
    return [root] if root.is_file() and root.suffix.lower() == ".csv" else []


def csv_splits(root: Path) -> tuple[str, ...]:
    """Return the names in the column ``split`` of a CSV file of boxes, sorted; none without such a column."""
    found = {fields.get("split", "").strip() for _, fields in _box_rows(root)}
    return tuple(sorted(found - {""}))


def read_csv(root: Path, split: str | None) -> Dataset:
    """Read a CSV file of boxes, as `read_dataset` says."""
    findings = Findings()
    boxes: dict[str, list[Annotation]] = {}
    places: dict[str, str] = {}
    splits: set[str] = set()
    for where, fields in _box_rows(root):
        own = fields.get("split", "").strip()
        splits.add(own)
        if split in (None, own):
            with findings.collect():
                row = _annotation(where, fields)
                boxes.setdefault(fields["path"], []).append(row)
                places.setdefault(fields["path"], where)
    if split is not None and split not in splits:
        known = ", ".join(sorted(splits - {""})) or "(none)"
        raise DatasetError(f"{root}: found no split {split!r}, expected one of: {known}")
    samples = []
    for name, rows in boxes.items():
        with findings.collect():
            path = root.parent / name
            if not path.is_file():
                raise DatasetError(f"{places[name]}: found no image file {path}, expected one")
            samples.append(Sample(name, path, findings.target(rows, *image_size(path))))
    return findings.dataset(root, split, samples)


def listed(names: Iterable[str]) -> str:
    """Return up to 10 quoted names, and how many more there are."""
    quoted = [repr(name) for name in names]
    rest = [f"and {len(quoted) - _SHOWN} more"] if len(quoted) > _SHOWN else []
    return ", ".join([*quoted[:_SHOWN], *rest]) or "(none)"


def _box_rows(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    return csv_rows(file, ("path", *_CORNERS), ("label", "split"))


def _listing(names: Sequence[str]) -> str:
    """Return names as words: ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _annotation(where: str, fields: Mapping[str, str]) -> Annotation:
    """Return the box of a row."""
    texts = [fields[name] for name in _CORNERS]
    try:
        x1, y1, x2, y2 = map(float, texts)
    except ValueError:
        raise DatasetError(
            f"{where}: found {', '.join(texts)}, expected the numbers x1, y1, x2, y2"
        ) from None
    label = fields.get("label", "").strip() or _UNNAMED
    return Annotation((x1, y1, x2, y2), label, f"{where}: box {', '.join(texts)} of {label!r}")


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
        shared: dict[str, object] = {"path": _path(entry.place), "width": entry.width, "height": entry.height}
        shared |= {"split": entry.split, "frame": entry.frame, "seconds": entry.seconds}
        target = entry.target
        for k, label in enumerate(target.labels):
            flags = {"difficult": int(target.difficult[k]), "crowd": int(target.crowd[k])}
            corners = dict(zip(_CORNERS, map(_shortest, target.boxes[k]), strict=True))
            score = {} if entry.scores is None else {"score": _shortest(entry.scores[k])}
            rows.append({**shared, **corners, **flags, **score, "label": label})
        if not target.labels:
            rows.append(shared)
    return table_text(columns, ([row.get(name, "") for name in columns] for row in rows))


def table_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as CSV text whose cells a spreadsheet takes as they are, and none as a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_cell(name) for name in columns)
    writer.writerows([_cell(value) if isinstance(value, str) else value for value in row] for row in rows)
    return text.getvalue()


def csv_bytes(text: str) -> bytes:
    """Return CSV text as bytes: UTF-8, with the mark by which spreadsheets tell it where it is not ASCII."""
    return text.encode("utf-8" if text.isascii() else "utf-8-sig", "surrogateescape")


def _shortest(value: np.float32) -> str:
    """Return a number with as few digits as come back equal, a whole one without a point."""
    return np.format_float_positional(value, trim="-")


def _path(place: str) -> str:
    """Return a path that no spreadsheet computes and no reader strips, and that leads to the same file."""
    return f"./{place}" if _FORMULA.match(place) or place[:1] in (" ", "'") else place


def _cell(text: str) -> str:
    """Return a name as a cell: one that a spreadsheet would compute gets an apostrophe in front."""
    return f"'{text}" if _FORMULA.match(text) else text


def _name(cell: str) -> str:
    """Return the name in a cell, without the apostrophe that `_cell` puts in front."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
