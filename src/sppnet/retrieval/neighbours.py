"""The vectors of an index, and which of them are nearest to another: by a look at all, or by a graph.

Both keep half precision, number their vectors alike and have the same methods. `Listed` is exact and needs
NumPy alone; `Graph`, of usearch, is for so many vectors that a look at all would take too long.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from sppnet.arrays import IntArray
from sppnet.errors import check_extra
from sppnet.parallel import thread_count
from sppnet.retrieval.manifest import FORMAT, VERSION
from sppnet.storage import atomic_path, map_tensors, write_tensors

MOST_LISTED = 200_000
"""So many vectors are listed at most: with 256 numbers each, one core looks at them in 0.07 seconds."""

# Neighbours per vector, and how many candidates are kept while adding and searching: recall@10 of 0.95 and
# more among a million regions (benchmarks/search.py).
_CONNECTIVITY, _ADD, _SEARCH = 16, 96, 128
# Vectors that are looked at together: so many are in single precision at a time.
_BLOCK = 4096

Vectors = npt.NDArray[np.float32]
HalfVectors = npt.NDArray[np.float16]


class Listed:
    """Vectors in one array: a search looks at all of them.

    Parameters
    ----------
    rows : (n,) int64
        The number of each vector.
    vectors : (n, D) float16
        The vectors.
    """

    suffix: ClassVar = ".vectors.safetensors"

    def __init__(self, rows: IntArray, vectors: HalfVectors) -> None:
        self.length = vectors.shape[1]
        self._rows, self._vectors = [rows], [vectors]

    def __len__(self) -> int:
        """Return the number of vectors."""
        return sum(map(len, self._rows))

    @property
    def memory(self) -> int:
        """Bytes that the vectors and their numbers take in memory."""
        rows, vectors = self.arrays()
        return rows.nbytes + vectors.nbytes

    def arrays(self) -> tuple[IntArray, HalfVectors]:
        """Return what the constructor takes."""
        if len(self._rows) > 1:
            self._rows, self._vectors = [np.concatenate(self._rows)], [np.concatenate(self._vectors)]
        return self._rows[0], self._vectors[0]

    def add(self, rows: IntArray, vectors: Vectors | HalfVectors) -> None:
        """Add (R, D) vectors under (R,) numbers that are not there yet."""
        self._rows.append(rows)
        self._vectors.append(vectors.astype(np.float16))

    def remove(self, rows: IntArray) -> None:
        """Remove the vectors of these numbers."""
        known, vectors = self.arrays()
        kept = ~np.isin(known, rows)
        self._rows, self._vectors = [known[kept]], [vectors[kept]]

    def nearest(self, vector: Vectors, count: int, *, exact: bool = False) -> tuple[IntArray, Vectors]:
        """Return the numbers and inner products of the nearest vectors; see `Index.nearest`.

        Of equal inner products the vector that was added first comes first; it is exact in any case.
        """
        rows, vectors = self.arrays()
        scores = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), _BLOCK):
            block = slice(start, start + _BLOCK)
            scores[block] = vectors[block].astype(np.float32) @ vector
        count = min(count, len(rows))
        least = np.partition(scores, -count)[-count] if count else np.inf
        best = np.flatnonzero(scores >= least)
        best = best[np.argsort(-scores[best], kind="stable")][:count]
        return rows[best], scores[best]

    def of(self, rows: IntArray) -> HalfVectors:
        """Return the vectors of these numbers, which must be there."""
        known, vectors = self.arrays()
        # Numbers are given in the order in which vectors come, and so rise.
        return vectors[np.searchsorted(known, rows)]

    def save(self, path: Path) -> None:
        """Write the vectors and their numbers to a safetensors file, whole or not at all."""
        rows, vectors = self.arrays()
        write_tensors(path, {"rows": rows, "vectors": vectors}, {"format": FORMAT, "version": VERSION})


class Graph:
    """Vectors in a graph of neighbours (usearch), which a search follows: it finds nearly all of the nearest.

    Parameters
    ----------
    length : int
        Numbers in a vector.

    Raises
    ------
    SppnetError
        If usearch is not installed.
    """

    suffix: ClassVar = ".usearch"

    def __init__(self, length: int) -> None:
        check_count(MOST_LISTED + 1)
        from usearch.index import Index as Neighbours

        self.length = length
        self._graph: Any = Neighbours(
            ndim=length,
            metric="ip",
            dtype="f16",
            connectivity=_CONNECTIVITY,
            expansion_add=_ADD,
            expansion_search=_SEARCH,
        )

    def __len__(self) -> int:
        """Return the number of vectors."""
        return len(self._graph)

    @property
    def memory(self) -> int:
        """Bytes that the graph and its vectors take in memory."""
        return int(self._graph.memory_usage)

    def add(self, rows: IntArray, vectors: Vectors | HalfVectors) -> None:
        """Add (R, D) vectors under (R,) numbers that are not there yet."""
        self._graph.add(rows.astype(np.uint64), vectors.astype(np.float16), threads=thread_count())

    def remove(self, rows: IntArray) -> None:
        """Remove the vectors of these numbers."""
        self._graph.remove(rows.astype(np.uint64), compact=False)

    def nearest(self, vector: Vectors, count: int, *, exact: bool = False) -> tuple[IntArray, Vectors]:
        """Return the numbers and inner products of the nearest vectors; see `Index.nearest`."""
        # The graph looks at no more candidates than it keeps.
        self._graph.expansion_search = max(_SEARCH, count)
        found = self._graph.search(vector.astype(np.float16), min(count, len(self)), exact=exact)
        return found.keys.astype(np.int64), 1 - found.distances.astype(np.float32)

    def of(self, rows: IntArray) -> HalfVectors:
        """Return the vectors of these numbers, which must be there."""
        found = self._graph.get(rows.astype(np.uint64), dtype="f16")
        return np.array(found, np.float16).reshape(-1, self.length)

    def load(self, path: Path, *, mapped: bool = False) -> None:
        """Take what `save` wrote, of vectors of the same length; see `read_neighbours`."""
        if mapped:
            self._graph.view(str(path))
        else:
            self._graph.load(str(path))

    def save(self, path: Path) -> None:
        """Write the graph and its vectors to a file, whole or not at all."""
        try:
            with atomic_path(path) as temporary:
                self._graph.save(str(temporary))
                # usearch does not notice that the last bytes found no room.
                if temporary.stat().st_size != self._graph.serialized_length:
                    raise OSError(f"{path}: cannot write (the disk is full)")
        except RuntimeError as error:  # what usearch makes of a full disk
            raise OSError(f"{path}: cannot write ({error})") from None


def read_neighbours(path: Path, length: int, *, mapped: bool = False) -> Listed | Graph:
    """Read a file that `save` of either wrote, of vectors of `length` numbers.

    Those that are `mapped` stay on disk and come into memory as they are looked at; a graph of them cannot be
    changed.
    """
    if not path.name.endswith(Graph.suffix):
        return Listed(**(map_tensors(path) if mapped else load_file(path)))
    graph = Graph(length)
    graph.load(path, mapped=mapped)
    return graph


def check_count(count: int) -> None:
    """Raise now, before long work, an error if so many vectors need a graph and usearch is not installed."""
    if count > MOST_LISTED:
        check_extra("search", f"an index of more than {MOST_LISTED} regions")


def with_room(known: Listed | Graph, count: int) -> Listed | Graph:
    """Return what holds the vectors, or a graph of them if they are too many to list with `count` others."""
    if isinstance(known, Graph) or len(known) + count <= MOST_LISTED:
        return known
    graph = Graph(known.length)
    graph.add(*known.arrays())
    return graph
