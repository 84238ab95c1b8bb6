"""Files of vectors: rows with the name of their image, their box and their label, and how they were made.

One safetensors file per run; while the run goes on, its parts lie in a folder beside it, so that it can be
stopped at any moment and goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sppnet.arrays import Boxes, IntArray
from sppnet.errors import SppnetError
from sppnet.retrieval.embedder import Embedder
from sppnet.storage import read_metadata, write_tensors

FORMAT, VERSION = "sppnet-vectors", "2"

# Bytes of vectors after which a part is written.
_PART = 1 << 26

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class VectorTable:
    """Vectors of images or of boxes in them, a row each.

    Attributes
    ----------
    vectors : (n, D) float32 or float16
    names : tuple of n str
        The image of each row, as it was named.
    boxes : (n, 4) float32
        What of the image the vector stands for, in its pixels; the whole image for whole images.
    labels : tuple of n str
        Class names where the boxes or images had some, else empty.
    """

    vectors: Floats
    names: tuple[str, ...]
    boxes: Boxes
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


def join_tables(tables: Sequence[VectorTable]) -> VectorTable:
    """Put tables together, in their order.

    Raises
    ------
    SppnetError
        If there is none, or their vectors differ in length or type.
    """
    kinds = {(table.vectors.shape[1], table.vectors.dtype.name) for table in tables}
    if len(kinds) != 1:
        found = ", ".join(f"{length} of {kind}" for length, kind in sorted(kinds)) or "no vectors"
        raise SppnetError(f"found vectors of {found}, expected one length and type")
    return VectorTable(
        np.concatenate([table.vectors for table in tables]),
        sum((table.names for table in tables), ()),
        np.concatenate([table.boxes for table in tables]),
        sum((table.labels for table in tables), ()),
    )


def write_vectors(
    path: str | Path, table: VectorTable, embedder: Embedder, *, projection: bool = True
) -> None:
    """Write vectors and the embedder that made them, whole or not at all.

    Without its `projection`, `Embedder.load` cannot read the embedder back, only `check_embedder` its name.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    facts, tensors = embedder.state()
    names, image = pack_names(table.names)
    labels, label = pack_names(table.labels)
    content: dict[str, Tensor] = {
        "vectors": torch.from_numpy(np.ascontiguousarray(table.vectors)),
        "boxes": torch.from_numpy(np.ascontiguousarray(table.boxes)),
        **{"names": names, "image": image, "labels": labels, "label": label},
    }
    if projection:
        content |= tensors
    write_tensors(path, content, {"format": FORMAT, "version": VERSION, **facts})


def read_vectors(path: str | Path) -> VectorTable:
    """Read a file that `write_vectors` wrote; `Embedder.load` reads the embedder from it.

    Raises
    ------
    SppnetError
        If it is another file, or a damaged one.
    FileNotFoundError
        If there is no such file.
    """
    read_metadata(path, FORMAT, VERSION)
    try:
        with safe_open(path, "np") as file:
            names = unpack_names(file.get_tensor("names"), file.get_tensor("image"))
            labels = unpack_names(file.get_tensor("labels"), file.get_tensor("label"))
            table = VectorTable(file.get_tensor("vectors"), names, file.get_tensor("boxes"), labels)
    except (SafetensorError, ValueError, IndexError) as error:
        raise SppnetError(f"{path}: {error}, expected a file of vectors, {FORMAT} {VERSION}") from None
    return table


def pack_names(names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return distinct names as bytes, each ended by NUL, and the (n,) int64 place of each among them."""
    places = {name: i for i, name in enumerate(dict.fromkeys(names))}
    text = b"".join(name.encode("utf-8", "surrogateescape") + b"\0" for name in places)
    index = torch.tensor([places[name] for name in names], dtype=torch.int64)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.zeros(
        0, dtype=torch.uint8
    ), index


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
        self._old = [self._read(path)] if append and path.exists() else []
        self._count = 0
        self.done = _boxes_by_name(self._old)
        self.part_names: set[str] = set()
        for part in sorted(self.folder.glob("part-*.safetensors")):
            table = self._read(part)
            self._count = int(part.stem.removeprefix("part-")) + 1
            if table.names and set(table.names) <= self.done.keys() - self.part_names:
                part.unlink()  # It is in the file already: the run ended between the two.
                continue
            self.done |= _boxes_by_name([table])
            self.part_names |= set(table.names)

    def add(self, name: str, vectors: Floats, boxes: Boxes, labels: Sequence[str]) -> None:
        """Add the rows of an image."""
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

        Raises
        ------
        SppnetError
            If there is no row, or old ones differ from the new in length or type.
        """
        self.flush()
        parts = [read_vectors(part) for part in sorted(self.folder.glob("part-*.safetensors"))]
        table = join_tables([*self._old, *parts])
        write_vectors(self.path, table, self.embedder)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        return len(table)

    def _read(self, path: Path) -> VectorTable:
        check_embedder(path, self.embedder)
        table = read_vectors(path)
        if table.vectors.dtype != self.dtype:
            raise SppnetError(f"{path}: found vectors of {table.vectors.dtype}, expected {self.dtype}")
        return table


def _boxes_by_name(tables: Sequence[VectorTable]) -> dict[str, Boxes]:
    """Return the boxes of each image; its rows lie together."""
    found: dict[str, Boxes] = {}
    for table in tables:
        starts = [i for i, name in enumerate(table.names) if not i or name != table.names[i - 1]]
        for start, end in zip(starts, [*starts[1:], len(table)], strict=True):
            found[table.names[start]] = table.boxes[start:end]
    return found


def parts_folder(path: Path) -> Path:
    """Return where the parts of a file in the making lie."""
    return path.with_name(f"{path.name}.parts")


def check_embedder(path: Path, embedder: Embedder) -> None:
    """Raise a ValueError, with both names, if a file was made by another embedder."""
    known = Embedder.stored_signature(path)
    if known != embedder.signature:
        raise SppnetError(f"{path}: made by another embedder, {known}; expected {embedder.signature}")
