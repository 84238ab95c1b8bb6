"""CSV files that list images: of boxes, a line each; and the reading of rows that all such files share."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from sppnet.datasets.entries import Entry
from sppnet.datasets.findings import Annotation, Findings, Record
from sppnet.datasets.tree import Format, Layout, Tree
from sppnet.errors import DatasetError
from sppnet.storage import atomic_path, encoding_of

_CORNERS = ("x1", "y1", "x2", "y2")
_UNNAMED = "box"  # the label of boxes without one
_SHOWN = 10
# What a spreadsheet computes instead of showing it, and such names that were made safe.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def csv_rows(
    file: Path, required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield place (``file:line``) and fields of each row of a CSV file that is not blank.

    Names of files that are no UTF-8 come as surrogates, which `os.fsencode` turns back into their bytes.

    Parameters
    ----------
    file : Path
        UTF-8, with or without a byte order mark, or UTF-16 with one; its first line names the columns.
    required, optional : sequence of str
        Columns that must come once, and at most once; there may be others.

    Raises
    ------
    DatasetError
        If columns are missing or come twice, a row has another length than the first line, it is no CSV, or
        there are bytes that are neither text in the encoding nor the name of a file.
    """
    encoding = encoding_of(file)
    with file.open(encoding=encoding, errors="surrogateescape", newline="") as text:
        reader = csv.reader(text, skipinitialspace=True, strict=True)
        try:
            header = _header(file, next(reader, []), required, optional)
            for row in reader:
                where = f"{file}:{reader.line_num}"
                if row and len(row) != len(header):
                    expected = f"{len(header)} as in line 1"
                    raise DatasetError(f"{where}: found a row of length {len(row)}, expected {expected}")
                for field in row:
                    if not field.isprintable() and not _is_text(field, file.parent):
                        expected = "UTF-8, UTF-16 with its mark, or the name of a file"
                        found = "bytes that are no text in UTF-8"
                        raise DatasetError(f"{where}: found {found}, expected {expected}")
                if row:
                    yield where, dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise DatasetError(f"{file}:{reader.line_num}: found no CSV ({error}), expected CSV") from None
        except UnicodeError:
            line = reader.line_num + 1
            raise DatasetError(
                f"{file}:{line}: found bytes that are no text in UTF-16, expected text"
            ) from None


def _header(file: Path, names: Sequence[str], required: Sequence[str], optional: Sequence[str]) -> list[str]:
    """Return the names of columns, which must hold those that are required."""
    header = [name.strip() for name in names]
    missing = any(header.count(name) != 1 for name in required)
    if missing or any(header.count(name) > 1 for name in optional):
        expected = f"{_listing(required)} once each, and {_listing(optional)} at most once"
        raise DatasetError(f"{file}:1: found the columns {listed(header)}, expected {expected}")
    return header


def _is_text(field: str, folder: Path) -> bool:
    """Tell whether a field is text, or the name of a file, which may be of any bytes but 0."""
    if "\0" in field:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in field) or (folder / field).exists()


def _fits(path: Path, head: bytes) -> bool:
    columns = head.replace(b"\0", b"").partition(b"\n")[0].replace(b'"', b"").split(b",")
    return {b"path", b"x1", b"y1", b"x2", b"y2"} <= {
        name.strip(b" \r\xef\xbb\xbf\xff\xfe") for name in columns
    }


def _locate(tree: Tree, names: Sequence[str]) -> Layout:
    """Understand one file; see `sppnet.datasets.tree.Format`."""
    if len(names) > 1:
        raise DatasetError(
            f"{tree.root}: found {' and '.join(names[:2])}, expected one table of boxes; name it"
        )
    file = tree.path(names[0])
    splits = sorted({fields.get("split", "").strip() for _, fields in _box_rows(file)} - {""})
    return Layout({split: split for split in splits}, None, partial(_records, file), names[0])


def _records(file: Path, split: str | None, findings: Findings) -> Iterator[Record]:
    """Yield the images of a CSV file of boxes."""
    boxes: dict[tuple[str, str], list[Annotation]] = {}
    places: dict[tuple[str, str], str] = {}
    classes: set[str] = set()
    for where, fields in _box_rows(file):
        with findings.collect():
            row = _annotation(where, fields)
            classes.add(row.label)
            key = fields["path"], fields.get("split", "").strip()
            if split in (None, key[1]):
                boxes.setdefault(key, []).append(row)
                places.setdefault(key, where)
    findings.number({name: number for number, name in enumerate(sorted(classes), 1)}, str(file))
    for key, rows in boxes.items():
        yield Record(key[0], key[0], file, places[key], None, rows, split=key[1] or None)


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


CSV = Format((".csv",), _fits, _locate, "a .csv file of path, x1, y1, x2, y2")
