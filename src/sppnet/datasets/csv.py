"""CSV files that list images: of boxes, a line each; and the reading of rows that all such files share."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from sppnet.datasets.findings import Annotation, Findings
from sppnet.datasets.records import Dataset, Sample
from sppnet.errors import DatasetError
from sppnet.images import image_size

_CORNERS = ("x1", "y1", "x2", "y2")
_UNNAMED = "box"  # the label of boxes without one
_SHOWN = 10


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
