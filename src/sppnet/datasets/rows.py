"""The rows of CSV files: read with their places, written so that a spreadsheet takes them as they are."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from sppnet.errors import DatasetError
from sppnet.storage import encoding_of

_SHOWN = 10
# What a spreadsheet computes instead of showing it, and such names that were made safe.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def csv_rows(
    file: Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
    separator: str = ",",
    header: Sequence[str] | None = None,
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield place (``file:line``) and fields of each row of a CSV file that is not blank.

    Names of files that are no UTF-8 come as surrogates, which `os.fsencode` turns back into their bytes.

    Parameters
    ----------
    file : Path
        UTF-8, with or without a byte order mark, or UTF-16 with one; its first line names the columns.
    required, optional : sequence of str
        Columns that must come once, and at most once; there may be others.
    separator : str
        What stands between cells.
    header : sequence of str, optional
        The columns, where the first line does not name them.

    Raises
    ------
    DatasetError
        If columns are missing or come twice, a row has another length than the first line, it is no CSV, or
        there are bytes that are neither text in the encoding nor the name of a file.
    """
    with file.open("rb") as start:
        encoding = encoding_of(start.read(2))
    with file.open(encoding=encoding, errors="surrogateescape", newline="") as text:
        reader = csv.reader(text, delimiter=separator, skipinitialspace=True, strict=True)
        try:
            header = header or _header(file, next(reader, []), required, optional)
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


def header_fits(head: bytes, columns: Collection[str]) -> bool:
    """Tell by the beginning of a file whether its first line names these columns."""
    return set(columns) <= {cell.strip() for cell in cells_of(first_line(head), ",")}


def first_line(head: bytes) -> str:
    """Return the first line with something in it, by the first bytes of a file."""
    return next((line for line in head.decode("utf-8", "replace").splitlines() if line.strip()), "")


def cells_of(line: str, separator: str) -> list[str]:
    """Return the cells of a line; none of one that is no CSV."""
    try:
        return next(csv.reader([line], delimiter=separator, skipinitialspace=True))
    except csv.Error:
        return []


def name_in(cell: str) -> str:
    """Return the name in a cell, without the apostrophe that `_cell` puts in front."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def listed(names: Iterable[str]) -> str:
    """Return up to 10 quoted names, and how many more there are."""
    quoted = [repr(name) for name in names]
    rest = [f"and {len(quoted) - _SHOWN} more"] if len(quoted) > _SHOWN else []
    return ", ".join([*quoted[:_SHOWN], *rest]) or "(none)"


def _listing(names: Sequence[str]) -> str:
    """Return names as words: ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


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


def _cell(text: str) -> str:
    """Return a name as a cell: one that a spreadsheet would compute gets an apostrophe in front."""
    return f"'{text}" if _FORMULA.match(text) else text


def safe_path(place: str) -> str:
    """Return a path that no spreadsheet computes and no reader strips, and that leads to the same file."""
    return f"./{place}" if _FORMULA.match(place) or place[:1] in (" ", "'") else place
