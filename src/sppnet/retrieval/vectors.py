"""Files of vectors: rows with the name of their image, their box and their label, and how they were made.

One safetensors file per run; while the run goes on, its parts lie in a folder beside it, so that it can be
stopped at any moment and goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sppnet.arrays import Boxes, FloatArray, IntArray
from sppnet.errors import SppnetError
from sppnet.retrieval.embedder import Embedder
from sppnet.retrieval.shards import EMBEDDER, shard_tables
from sppnet.retrieval.tables import VectorTable, check_kinds, join_tables, rows_by_name
from sppnet.storage import atomic_path, read_metadata, write_tensors

FORMAT, VERSION = "sppnet-vectors", "2"

# Bytes of vectors after which a part is written.
_PART = 1 << 26


def write_vectors(
    path: str | Path, table: VectorTable, embedder: Embedder, *, projection: bool = True
) -> None:
    """Write vectors and the embedder that made them, whole or not at all.

    Parameters
    ----------
    path : path
        A safetensors file; replaced if it exists.
    table : VectorTable
        The vectors, and what they stand for.
    embedder : Embedder
        What made them.
    projection : bool
        Whether the embedder's projection is written, too. Without it `Embedder.load` cannot read the embedder
        back from the file, and `check_embedder` only compares its name.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    arrays, facts = _content(table, embedder, projection)
    write_tensors(path, {"vectors": table.vectors, **arrays}, facts)


def _content(
    table: VectorTable, embedder: Embedder, projection: bool
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Return the arrays of a file but for the vectors, and its metadata."""
    facts, fitted = embedder.state()
    names, image = pack_names(table.names)
    labels, label = pack_names(table.labels)
    arrays: dict[str, npt.NDArray[Any]] = {"boxes": table.boxes, "names": names, "image": image}
    arrays |= {"labels": labels, "label": label}
    return arrays | (fitted if projection else {}), {"format": FORMAT, "version": VERSION, **facts}


def join_files(path: Path, files: Sequence[Path], embedder: Embedder) -> int:
    """Put files of vectors together, in their order, whole or not at all, without holding their vectors.

    The file is, byte for byte, what `write_vectors` writes of the joined tables.

    Returns
    -------
    int
        Number of rows.

    Raises
    ------
    SppnetError
        If there is none, or their vectors differ in length or type.
    OSError
        If it cannot be written.
    """
    tables = [_mapped(file) for file in files]
    check_kinds(tables)
    none = [VectorTable(table.vectors[:0], table.names, table.boxes, table.labels) for table in tables]
    rest = join_tables(none)
    arrays, facts = _content(rest, embedder, projection=True)
    # safetensors itself orders the arrays: the file of no vectors shows where they go.
    empty = save({"vectors": rest.vectors, **arrays}, facts)
    start = 8 + int.from_bytes(empty[:8], "little")
    header = json.loads(empty[8:start])
    before = start + header["vectors"]["data_offsets"][0]
    text = _header(header, len(rest), sum(table.vectors.nbytes for table in tables))
    with atomic_path(path) as temporary:
        try:
            with temporary.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text + empty[start:before])
                for table in tables:
                    file.write(table.vectors.data)
                file.write(empty[before:])
        except OSError as error:
            raise OSError(f"{path}: cannot write ({error.strerror})") from None
        # Where files that are mapped cannot be replaced, they must not be mapped any more.
        tables.clear()
    return len(rest)


def join_shards(folder: str | Path, out: str | Path) -> int:
    """Make a file of vectors of a folder of shards, one after the other, and return the number of rows.

    Raises
    ------
    SppnetError
        As `read_shards`.
    OSError
        If it cannot be written.
    """
    out, tables = Path(out), shard_tables(folder)
    embedder = Embedder.load(Path(folder) / EMBEDDER)
    with TemporaryDirectory(prefix=".sppnet-", dir=out.parent) as place:
        parts = []
        for i, table in enumerate(tables):
            parts.append(Path(place) / f"{i}.safetensors")
            write_vectors(parts[-1], table, embedder, projection=False)
        return join_files(out, parts, embedder)


def _header(header: dict[str, Any], rows: int, size: int) -> bytes:
    """Return the header of a safetensors file of no vectors as that of a file of some, of `size` bytes."""
    metadata = dict(sorted(header.pop("__metadata__").items()))
    header["vectors"]["shape"][0], end = rows, 0
    for name, about in header.items():
        first, last = about["data_offsets"]
        about["data_offsets"] = [end, end + (size if name == "vectors" else last - first)]
        end = about["data_offsets"][1]
    whole = {"__metadata__": metadata, **header}
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
    return text.ljust(-(-len(text) // 8) * 8)


def _mapped(path: Path) -> VectorTable:
    """Read a file of vectors, but for the vectors: they stay in it until they are looked at."""
    read_metadata(path, FORMAT, VERSION)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        about = json.loads(file.read(length))["vectors"]
    kind = np.float16 if about["dtype"] == "F16" else np.float32
    start = 8 + length + about["data_offsets"][0]
    vectors = np.memmap(path, kind, "r", start, tuple(about["shape"]))
    with _reading(path) as content:
        return _table(content, vectors)


def read_vectors(path: str | Path) -> VectorTable:
    """Read a file of vectors; `Embedder.load` reads the embedder that made them from it.

    Parameters
    ----------
    path : path
        A file that `write_vectors` or `sppnet.retrieval.embed.embed` wrote.

    Returns
    -------
    VectorTable
        All of it, in memory.

    Raises
    ------
    SppnetError
        If it is another file, or a damaged one.
    FileNotFoundError
        If there is no such file.
    """
    read_metadata(path, FORMAT, VERSION)
    with _reading(Path(path)) as file:
        return _table(file, file.get_tensor("vectors"))


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Open a file of vectors; what is wrong in it becomes an error that names it."""
    try:
        with safe_open(path, "np") as file:
            yield file
    except (SafetensorError, UnicodeDecodeError, IndexError) as error:
        raise SppnetError(f"{path}: {error}, expected a file of vectors, {FORMAT} {VERSION}") from None


def _table(file: Any, vectors: FloatArray) -> VectorTable:
    """Return vectors with what an open file tells of them."""
    names = unpack_names(file.get_tensor("names"), file.get_tensor("image"))
    labels = unpack_names(file.get_tensor("labels"), file.get_tensor("label"))
    return VectorTable(vectors, names, file.get_tensor("boxes"), labels)


def pack_names(names: Sequence[str]) -> tuple[npt.NDArray[np.uint8], IntArray]:
    """Return distinct names as bytes, each ended by NUL, and the (n,) int64 place of each among them."""
    places = {name: i for i, name in enumerate(dict.fromkeys(names))}
    text = b"".join(name.encode("utf-8", "surrogateescape") + b"\0" for name in places)
    return np.frombuffer(text, np.uint8), np.array([places[name] for name in names], np.int64)


def unpack_names(text: npt.NDArray[np.uint8], index: IntArray) -> tuple[str, ...]:
    """Return the names that `pack_names` packed."""
    distinct = [name.decode("utf-8", "surrogateescape") for name in text.tobytes().split(b"\0")[:-1]]
    return tuple(distinct[i] for i in index.tolist())


class VectorWriter:
    """A file of vectors in the making.

    Rows are kept in parts in the folder ``<path>.parts``, and become one file at the end. A writer that finds
    such a folder of the same embedder goes on from it.

    Parameters
    ----------
    path : path
        The file; replaced at the end, or with `append` added to.
    embedder : Embedder
        Ready to embed. What stands there must come from an equal one.
    half : bool
        Keep vectors in half precision.
    append : bool
        Keep the rows that the file has.
    part_bytes : int
        A part is written when its vectors take so much memory.

    Attributes
    ----------
    done : dict of str to (R, 4) float32
        Names of the images that need not be embedded any more, and the boxes that were embedded of each.
    part_names : set of str
        Those of them that lie in the parts of an earlier run.

    Raises
    ------
    SppnetError
        If the file or its parts come from another embedder (names both), or are of another precision.
    """

    def __init__(
        self,
        path: Path,
        embedder: Embedder,
        *,
        half: bool = False,
        append: bool = False,
        part_bytes: int = _PART,
    ) -> None:
        self.path, self.embedder, self.part_bytes = path, embedder, part_bytes
        self.dtype = np.dtype(np.float16 if half else np.float32)
        self.folder = parts_folder(path)
        self._waiting: list[VectorTable] = []
        self._old = [path] if append and path.exists() else []
        self._count = 0
        self.done = _boxes_by_name([self._read(old) for old in self._old])
        self.part_names: set[str] = set()
        for part in sorted(self.folder.glob("part-*.safetensors")):
            table = self._read(part)
            self._count = int(part.stem.removeprefix("part-")) + 1
            if table.names and set(table.names) <= self.done.keys() - self.part_names:
                part.unlink()  # It is in the file already: the run ended between the two.
                continue
            self.done |= _boxes_by_name([table])
            self.part_names |= set(table.names)

    def add(self, name: str, vectors: FloatArray, boxes: Boxes, labels: Sequence[str]) -> None:
        """Add the rows of an image.

        Parameters
        ----------
        name : str
            Name of the image.
        vectors : (R, D) float32 or float16
            Its rows, kept in the precision of the writer.
        boxes : (R, 4) float32
            What of the image each row stands for, in its pixels.
        labels : sequence of R str
            Class of each row, or empty.
        """
        rows = VectorTable(vectors.astype(self.dtype), (name,) * len(vectors), boxes, tuple(labels))
        self._waiting.append(rows)
        if sum(table.vectors.nbytes for table in self._waiting) >= self.part_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet as a part."""
        if self._waiting:
            self.folder.mkdir(exist_ok=True)
            part = self.folder / f"part-{self._count:06}.safetensors"
            write_vectors(part, join_tables(self._waiting), self.embedder, projection=False)
            self._count, self._waiting = self._count + 1, []

    def finish(self) -> int:
        """Put everything into one file, remove the parts, and return the number of rows.

        The vectors are copied from file to file: they need not fit into memory together.

        Raises
        ------
        SppnetError
            If there is no row, or old ones differ from the new in length or type.
        """
        self.flush()
        parts = sorted(self.folder.glob("part-*.safetensors"))
        count = join_files(self.path, [*self._old, *parts], self.embedder)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        return count

    def _read(self, path: Path) -> VectorTable:
        check_embedder(path, self.embedder)
        table = _mapped(path)
        if table.vectors.dtype != self.dtype:
            raise SppnetError(f"{path}: found vectors of {table.vectors.dtype}, expected {self.dtype}")
        return table


def _boxes_by_name(tables: Sequence[VectorTable]) -> dict[str, Boxes]:
    """Return the boxes of each image."""
    return {name: table.boxes[rows] for table in tables for name, rows in rows_by_name(table).items()}


def parts_folder(path: Path) -> Path:
    """Return where the parts of a file in the making lie."""
    return path.with_name(f"{path.name}.parts")


def check_embedder(path: Path, embedder: Embedder) -> None:
    """Raise an error, with both names, if a file was made by another embedder."""
    known = Embedder.stored_signature(path)
    if known != embedder.signature:
        raise SppnetError(f"{path}: made by another embedder, {known}; expected {embedder.signature}")
