"""Search by region: an index of the vectors of images and of windows in them, kept on disk.

An index is a folder: a graph of neighbours with the vectors in half precision (usearch), the rows behind it,
and a manifest that names both with their checksums. The manifest is replaced last, so that what is on disk is
always one whole index, the old or the new.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file

from sppnet.arrays import Boxes
from sppnet.errors import SppnetError
from sppnet.retrieval.embedder import Embedder, Vectors
from sppnet.retrieval.vectors import pack_names, unpack_names
from sppnet.storage import atomic_path, read_json, write_tensors

FORMAT, VERSION = "sppnet-index", "2"
MANIFEST = "index.json"

# Neighbours per vector, and how many candidates are kept while adding and searching: recall@10 of 0.95 and
# more among a million regions (benchmarks/search.py).
_CONNECTIVITY, _ADD, _SEARCH = 16, 96, 128
# So many regions are looked at one by one, in less than a millisecond.
_EXACT = 5000
_CHUNK = 1 << 24
_KEYS = {"generation", "source", "rows", "graph", "regions", "images", "files"}


@dataclass(frozen=True)
class Hit:
    """What a search found in one image.

    Attributes
    ----------
    image : str
        Its name in the index.
    box : (4,) float32
        The region of it that matches best, in its pixels.
    score : float
        Inner product of the vectors: 1 for equal ones.
    """

    image: str
    box: npt.NDArray[np.float32]
    score: float


class Index:
    """Vectors of regions, found by likeness; `create` or `open` one.

    Attributes
    ----------
    folder : Path
    source : str
        Where the images lie.
    regions : str
        How the regions of an image were chosen, in words.
    embedder : Embedder
        Makes the vectors, those of the queries, too; they have length 1.
    images : dict of str to str
        Name of each image to its stamp: any text that changes when the image does.
    """

    def __init__(
        self,
        folder: Path,
        source: str,
        regions: str,
        embedder: Embedder,
        graph: Any,
        images: dict[str, str],
        owners: npt.NDArray[np.int64],
        boxes: Boxes,
    ) -> None:
        self.folder, self.source, self.regions = folder, source, regions
        self.embedder, self.images = embedder, images
        self._graph = graph
        # Row r of the graph is a region of image `_owners[r]`, a place in `_names`; -1 when it was removed.
        self._names = list(images)
        self._owners, self._boxes, self._next = [owners], [boxes], len(owners)

    @classmethod
    def create(cls, folder: Path, embedder: Embedder, source: str = "", regions: str = "") -> Index:
        """Begin an index; nothing is written before `save`.

        Raises
        ------
        SppnetError
            If there is an index, or the embedder does not give vectors of length 1.
        """
        if (folder / MANIFEST).exists():
            raise SppnetError(f"{folder}: found an index, expected none yet; open it instead")
        if embedder.norm != "l2":
            raise SppnetError(f"found the norm {embedder.norm!r}, expected 'l2' for an index")
        owners, boxes = np.zeros(0, np.int64), np.zeros((0, 4), np.float32)
        return cls(folder, source, regions, embedder, _graph(embedder.length), {}, owners, boxes)

    @classmethod
    def open(cls, folder: Path, *, weights: str | None = None, device: str = "cpu") -> Index:
        """Read an index.

        Parameters
        ----------
        folder : Path
        weights : str, optional
            Weights file of the backbone, if it was not the installed one.
        device : str

        Raises
        ------
        SppnetError
            If there is none, it is damaged or half written, or the backbone at hand is another one (names both).
        """
        about = _read_manifest(folder)
        damage = _damage(folder, about)
        if damage is not None and (newer := _read_manifest(folder)) != about:
            # It was saved meanwhile.
            about, damage = newer, _damage(folder, newer)
        if damage is not None:
            raise SppnetError(f"{damage}; make the index anew")
        rows, graph = (folder / about[key] for key in ("rows", "graph"))
        content = load_file(rows)
        embedder = Embedder.load(rows, weights=weights, device=device)
        restored = _graph(embedder.length)
        restored.load(str(graph))
        names = unpack_names(content["names"], np.arange(about["images"]))
        stamps = unpack_names(content["stamps"], content["stamp"])
        return cls(
            folder,
            about["source"],
            about["regions"],
            embedder,
            restored,
            dict(zip(names, stamps, strict=True)),
            content["owners"],
            content["boxes"],
        )

    def __len__(self) -> int:
        """Return the number of regions."""
        return len(self._graph)

    @property
    def memory(self) -> int:
        """Bytes that the graph, its vectors included, and the rows take in memory."""
        owners, boxes = self._rows()
        return int(self._graph.memory_usage) + owners.nbytes + boxes.nbytes

    def add(self, name: str, stamp: str, boxes: Boxes, vectors: Vectors) -> None:
        """Add the regions of an image.

        Parameters
        ----------
        name : str
        stamp : str
        boxes : (R, 4) float32
        vectors : (R, D) float32
            Of length 1.

        Raises
        ------
        SppnetError
            If the image is there already, or the vectors are of another length than the others.
        """
        if name in self.images:
            raise SppnetError(
                f"found {name!r} in the index already, expected each image once; remove it first"
            )
        if vectors.shape != (len(boxes), self._graph.ndim):
            raise SppnetError(
                f"found vectors {vectors.shape} of {name!r}, expected ({len(boxes)}, {self._graph.ndim})"
            )
        if len(boxes):
            keys = np.arange(self._next, self._next + len(boxes), dtype=np.uint64)
            self._graph.add(keys, vectors.astype(np.float16), threads=torch.get_num_threads())
        self._owners.append(np.full(len(boxes), len(self._names), np.int64))
        self._boxes.append(np.asarray(boxes, np.float32))
        self._next += len(boxes)
        self._names.append(name)
        self.images[name] = stamp

    def remove(self, names: Iterable[str]) -> None:
        """Remove images with all their regions; the others stay as they are.

        Raises
        ------
        SppnetError
            If one is not there; then none is removed.
        """
        gone = dict.fromkeys(names)
        unknown = [name for name in gone if name not in self.images]
        if unknown:
            raise SppnetError(f"found no {unknown[0]!r} in the index of {len(self.images)} images")
        if not gone:
            return
        owners, _ = self._rows()
        places = np.array([i for i, name in enumerate(self._names) if name in gone])
        rows = np.flatnonzero(np.isin(owners, places))
        self._graph.remove(rows.astype(np.uint64), compact=False)
        owners[rows] = -1
        for name in gone:
            del self.images[name]
        # A name that comes back is another image.
        for place in places:
            self._names[place] = ""

    def search(self, vector: Vectors, top: int = 20) -> list[Hit]:
        """Find the images with the regions most like a vector, best first, each with its best region.

        Parameters
        ----------
        vector : (D,) float32
            Of length 1.
        top : int
            Most images.

        Returns
        -------
        list of Hit

        Raises
        ------
        SppnetError
            If the vector has another length than the index's.
        """
        if vector.shape != (self._graph.ndim,) or top < 1:
            raise SppnetError(
                f"found a vector {vector.shape} and top {top}, expected ({self._graph.ndim},) and at least 1"
            )
        owners, boxes = self._rows()
        count = 4 * top
        while True:
            # Where all are wanted the graph may not lead to all: equal vectors know only one another.
            exact = len(self) <= max(count, _EXACT)
            keys, scores = self.nearest(vector, count, exact=exact)
            _, first = np.unique(owners[keys], return_index=True)
            best = np.sort(first)[:top]
            # Many regions of one image are alike: look further until there are enough images.
            if len(best) >= min(top, len(self.images)) or count >= len(self):
                break
            count *= 4
        return [Hit(self._names[owners[keys[i]]], boxes[keys[i]], float(scores[i])) for i in best]

    def nearest(
        self, vector: Vectors, count: int, *, exact: bool = False
    ) -> tuple[npt.NDArray[np.int64], Vectors]:
        """Return rows and scores of the `count` regions nearest to a vector, best first.

        `exact` looks at every region instead of following the graph.
        """
        if not len(self):
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        # The graph looks at no more candidates than it keeps.
        self._graph.expansion_search = max(_SEARCH, count)
        found = self._graph.search(vector.astype(np.float16), min(count, len(self)), exact=exact)
        return found.keys.astype(np.int64), 1 - found.distances.astype(np.float32)

    def save(self) -> None:
        """Write the index; what was on disk stays whole until the new one is.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = self.folder / MANIFEST
        nothing: dict[str, Any] = {"files": {}, "generation": 0}
        old = _read_manifest(self.folder) if manifest.exists() else nothing
        generation = old["generation"] + 1
        rows, graph = (self.folder / f"{generation}.{suffix}" for suffix in ("safetensors", "usearch"))
        try:
            self._write(rows, graph)
            about = self._manifest(generation, rows, graph)
            with atomic_path(manifest) as temporary:
                temporary.write_text(json.dumps(about, indent=1) + "\n")
        except BaseException:
            for path in (rows, graph):
                path.unlink(missing_ok=True)
            raise
        for name in old["files"]:
            (self.folder / name).unlink(missing_ok=True)

    def _write(self, rows: Path, graph: Path) -> None:
        try:
            with atomic_path(graph) as temporary:
                self._graph.save(str(temporary))
        except RuntimeError as error:  # what usearch makes of a full disk
            raise OSError(f"{graph}: cannot write ({error})") from None
        owners, boxes = self._compacted()
        facts, tensors = self.embedder.state()
        names, _ = pack_names(list(self.images))
        stamps, stamp = pack_names(list(self.images.values()))
        write_tensors(
            rows,
            {
                "owners": torch.from_numpy(owners),
                "boxes": torch.from_numpy(boxes),
                **{"names": names, "stamps": stamps, "stamp": stamp, **tensors},
            },
            {"format": FORMAT, "version": VERSION, **facts},
        )

    def _manifest(self, generation: int, rows: Path, graph: Path) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "generation": generation,
            "source": self.source,
            "rows": rows.name,
            "graph": graph.name,
            "regions": self.regions,
            "count": len(self),
            "images": len(self.images),
            "files": {path.name: _facts(path) for path in (rows, graph)},
        }

    def _rows(self) -> tuple[npt.NDArray[np.int64], Boxes]:
        self._owners, self._boxes = [np.concatenate(self._owners)], [np.concatenate(self._boxes)]
        return self._owners[0], self._boxes[0]

    def _compacted(self) -> tuple[npt.NDArray[np.int64], Boxes]:
        """Return owners and boxes with the images counted without those that are gone."""
        owners, boxes = self._rows()
        places = {name: i for i, name in enumerate(self.images)}
        table = np.array([*(places.get(name, -1) for name in self._names), -1])
        self._owners, self._names = [table[owners]], list(self.images)
        return self._owners[0], boxes


def changes(
    known: Mapping[str, str], found: Mapping[str, str]
) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    """Compare images of an index with those of a folder, by name and stamp.

    Returns
    -------
    (list of str, list of str, list of str)
        New, changed, and gone, in order.
    """
    new = [name for name in found if name not in known]
    changed = [name for name in found if name in known and known[name] != found[name]]
    return new, changed, [name for name in known if name not in found]


def _graph(length: int) -> Any:
    """Return an empty graph for vectors of a length; its settings are not in its file."""
    from usearch.index import Index as Graph

    return Graph(
        ndim=length,
        metric="ip",
        dtype="f16",
        connectivity=_CONNECTIVITY,
        expansion_add=_ADD,
        expansion_search=_SEARCH,
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise SppnetError(f"{folder}: found no {MANIFEST}, expected an index that sppnet index made")
    about = read_json(path)
    if not isinstance(about, dict) or (about.get("format"), about.get("version")) != (FORMAT, VERSION):
        found = about.get("format") if isinstance(about, dict) else type(about).__name__
        raise SppnetError(f"{path}: found {found}, expected {FORMAT} {VERSION}")
    missing = _KEYS - about.keys()
    if missing:
        raise SppnetError(f"{path}: found no {', '.join(sorted(missing))}, expected all that an index has")
    return about


def _damage(folder: Path, about: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the files of an index, if anything is."""
    for name, facts in about["files"].items():
        found = _facts(folder / name) if (folder / name).is_file() else None
        if found != facts:
            return f"{folder / name}: found a damaged or missing file ({found}), expected {facts}"
    return None


def _facts(path: Path) -> dict[str, int]:
    """Return the size of a file, and a checksum by which damage shows."""
    checksum = 0
    with path.open("rb") as file:
        while content := file.read(_CHUNK):
            checksum = zlib.crc32(content, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}
