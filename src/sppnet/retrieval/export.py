"""An index as Parquet files, which vector databases import."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sppnet.errors import check_extra
from sppnet.storage import atomic_folder, atomic_path, check_new_folder, check_writable

if TYPE_CHECKING:
    from sppnet.retrieval.index import Index

# Regions that are in memory at a time, and those of a file of a folder.
_BLOCK, _FILE = 1 << 16, 1 << 20


def check_export(path: Path) -> None:
    """Raise now, before long work, what `export_parquet` would raise after it.

    Raises
    ------
    SppnetError
        If pyarrow is not installed.
    OSError
        If there is no place for the file, or the folder is there and holds something.
    """
    check_extra("ray", "writing Parquet")
    if path.suffix == ".parquet":
        check_writable(path)
    else:
        check_new_folder(path)


def export_parquet(index: Index, path: str | Path) -> int:
    """Write the regions of an index as Parquet, a row each, whole or not at all.

    The columns are id (int64, from 0), image (string: its path below the folder that was indexed), x1, y1,
    x2, y2 (float32, in pixels of the image, 0-based and half-open) and vector (a list of D float32, of
    length 1: cosine and inner product are the same). Metadata of the schema tell embedder and folder.

    Parameters
    ----------
    index : Index
        What is written.
    path : path
        A file that ends in ``.parquet``, replaced if it exists; or a folder to be made, for files of a
        million rows each.

    Returns
    -------
    int
        Number of rows.

    Raises
    ------
    SppnetError
        If pyarrow is not installed.
    OSError
        If it cannot be written, or the folder holds something.
    """
    path = Path(path)
    check_export(path)
    if path.suffix == ".parquet":
        with atomic_path(path) as temporary:
            _write(index, temporary, 0, len(index))
        return len(index)
    with atomic_folder(path) as folder:
        for number, start in enumerate(range(0, max(len(index), 1), _FILE)):
            _write(index, folder / f"part-{number:06}.parquet", start, _FILE)
    return len(index)


def _write(index: Index, path: Path, start: int, count: int) -> None:
    """Write some rows to a file."""
    schema = _schema(index)
    with _writer(path, schema) as writer:
        end = min(start + count, len(index))
        for first in range(start, end, _BLOCK):
            writer.write_batch(_batch(index, schema, first, min(_BLOCK, end - first)))


@contextmanager
def _writer(path: Path, schema: Any) -> Iterator[Any]:
    """Open a file of Parquet to write."""
    from pyarrow.parquet import ParquetWriter

    with ParquetWriter(path, schema, compression="zstd") as writer:
        yield writer


def _schema(index: Index) -> Any:
    import pyarrow as pa

    columns = [("id", pa.int64()), ("image", pa.string())]
    columns += [(edge, pa.float32()) for edge in ("x1", "y1", "x2", "y2")]
    columns.append(("vector", pa.list_(pa.float32(), index.embedder.length)))
    about = {"sppnet.embedder": index.embedder.signature, "sppnet.source": index.source}
    return pa.schema(columns, metadata=about)


def _batch(index: Index, schema: Any, start: int, count: int) -> Any:
    """Return some rows as Arrow has them."""
    import pyarrow as pa

    images, boxes, vectors = index.regions_from(start, count)
    # Names of files may be of any bytes, Parquet holds text.
    shown = [name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in images]
    ids = np.arange(start, start + len(images), dtype=np.int64)
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    edges = [pa.array(np.ascontiguousarray(edge)) for edge in boxes.T]
    lists = pa.FixedSizeListArray.from_arrays(flat, index.embedder.length)
    return pa.record_batch([pa.array(ids), pa.array(shown, pa.string()), *edges, lists], schema=schema)
