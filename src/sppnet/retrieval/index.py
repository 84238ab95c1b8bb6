"""Search by region: an index of the vectors of images and of windows in them, kept on disk.

An index is a folder: the vectors in half precision, as a graph of neighbours where they are very many, the
regions that they are of, and a manifest that names both files with their checksums. The manifest is replaced
last, so that what is on disk is always one whole index, the old or the new.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from sppnet.arrays import Boxes, Image, IntArray
from sppnet.errors import SppnetError
from sppnet.features.encoded import EncodedImage
from sppnet.parallel import Runner
from sppnet.progress import Track, no_track
from sppnet.remote import address_of
from sppnet.retrieval.embedder import Embedder, Vectors, check_same
from sppnet.retrieval.manifest import FORMAT, MANIFEST, VERSION, damage, file_facts, read_manifest
from sppnet.retrieval.neighbours import Graph, Listed, check_count, read_neighbours, with_room
from sppnet.retrieval.regions import AHEAD, Describing, Regions, changes, fitted_on_regions, image_stamps
from sppnet.retrieval.sharded import ShardedIndex, shard_folders
from sppnet.retrieval.shards import EMBEDDER, shard_tables
from sppnet.retrieval.tables import rows_by_name
from sppnet.retrieval.vectors import pack_names, unpack_names
from sppnet.storage import atomic_path, map_tensors, write_tensors

SETTINGS: Mapping[str, Any] = {"output_stride": 16, "scales": (320,), "levels": (2, 1), "pca": 256}
"""Settings of the embedder that `Index.build` makes unless it is given one (benchmarks/search.py)."""

# Seconds after which an index that grows is written.
_SAVE_EVERY = 300.0


@dataclass(frozen=True)
class Hit:
    """What a search found in one image.

    Attributes
    ----------
    image : str
        Name of the image: its path below the folder that was indexed.
    box : (4,) float32
        The region of it that matches best, in its pixels, 0-based and half-open.
    score : float
        Inner product of the vectors: 1 for equal ones.
    """

    image: str
    box: npt.NDArray[np.float32]
    score: float


@dataclass(frozen=True)
class Update:
    """What `Index.build` did.

    Attributes
    ----------
    found : int
        Number of images in the folder.
    new, changed, gone : tuple of str
        Names of the images that were to be added, done again, and removed.
    failures : tuple of str
        A line for each image that could not be read; it is not in the index.
    notes : tuple of str
        What was left out of the folder, with its count.
    """

    found: int
    new: tuple[str, ...]
    changed: tuple[str, ...]
    gone: tuple[str, ...]
    failures: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass
class _Rows:
    """What an index holds: vector r is that of region `boxes[r]` of the image at place `owners[r]`."""

    vectors: Listed | Graph
    images: dict[str, str]
    owners: IntArray
    boxes: Boxes


class Index:
    """Vectors of regions of images, found by similarity; `build`, `open` or `create` one.

    Attributes
    ----------
    folder : Path
        Where the index lies.
    source : str
        Where the images lie.
    regions : str
        How the regions of an image were chosen, in words.
    embedder : Embedder
        Makes the vectors, those of the queries, too; they have length 1.
    images : dict of str to str
        Name of each image to its stamp: any text that changes when the image does.
    update : Update or None
        What `build` did; None if the index was not built but opened or created.

    Examples
    --------
    ::

        index = Index.build("photos", "photos.index")
        hits = index.search("cat.jpg", box=(140, 30, 440, 290))
    """

    update: Update | None = None

    def __init__(self, folder: Path, embedder: Embedder, source: str, regions: str, rows: _Rows) -> None:
        self.folder, self.embedder, self.source, self.regions = folder, embedder, source, regions
        self.images, self._vectors = rows.images, rows.vectors
        # Vector r is that of a region of image `_owners[r]`, a place in `_names`; -1 when it was removed.
        self._names = list(rows.images)
        self._owners, self._boxes, self._next = [rows.owners], [rows.boxes], len(rows.owners)

    @classmethod
    def build(
        cls,
        photos: str | Path,
        folder: str | Path,
        *,
        embedder: Embedder | None = None,
        proposals: str = "edge-boxes",
        windows: int = 60,
        track: Track = no_track,
        cluster: Runner | None = None,
    ) -> Index:
        """Index the regions of all images in a folder, or bring such an index up to date.

        New and changed images are added, those that are gone are removed; the rest stays. The index is saved
        every five minutes and at the end, also when the work is stopped: called again, it goes on.

        Parameters
        ----------
        photos : path
            Folder of images, at any depth.
        folder : path
            Folder of the index; made if it is missing, and brought up to date if it holds an index.
        embedder : Embedder, optional
            Makes the vectors. A projection that is not learned yet is learned from regions of some of the
            images; the embedder itself stays as it is. By default one of `SETTINGS`.
        proposals : str
            Method that proposes windows besides the whole image, see `sppnet.proposals.parse`; or ``"none"``.
        windows : int
            Most regions of an image, the whole image counted.
        track : callable
            ``track(items, description)`` yields the items and may draw progress.
        cluster : Runner, optional
            Whose workers read and embed the images, see `sppnet.cluster.Cluster`; by default this process.

        Returns
        -------
        Index
            Saved; `update` tells what was done, and names the images that could not be read.

        Raises
        ------
        SppnetError
            If there is no image, or the index in `folder` is of another embedder, of other regions, or of
            another folder of images; says what differs. If there may be more regions than are searched
            without usearch, and it is not installed.
        OSError
            If the index cannot be written, or no image can be read.
        """
        photos, folder = Path(photos), Path(folder)
        if folder.exists() and not folder.is_dir():
            raise OSError(f"{folder}: found a file, expected a folder, or nothing yet")
        (found, notes), regions = image_stamps(photos), Regions(proposals, windows)
        check_count(len(found) * (1 if regions.method is None else windows))
        asked, runner = Embedder(**SETTINGS) if embedder is None else embedder, cluster or AHEAD
        if (folder / MANIFEST).exists():
            index = cls.open(folder, backbone=asked.backbone, device=asked.device)
            index._check(asked, str(regions), photos, found)
            index.source = _place(photos)
        else:
            ready = fitted_on_regions(asked, [photos / name for name in found], regions, track, runner)
            index = cls.create(folder, ready, _place(photos), str(regions))
        new, changed, gone = changes(index.images, found)
        index.remove([*changed, *gone])
        try:
            stamps = {name: found[name] for name in [*new, *changed]}
            stream = runner.stream(Describing(index.embedder, regions), [photos / name for name in stamps])
            failures = index._fill(stamps, stream, track)
        finally:
            # What was done stays, also when it is stopped.
            if index.images:
                index.save()
        index.update = Update(len(found), tuple(new), tuple(changed), tuple(gone), tuple(failures), notes)
        return index

    @classmethod
    def of_shards(cls, shards: str | Path, folder: str | Path) -> Index:
        """Make an index of the vectors in a folder of shards, see `sppnet.retrieval.shards`, and save it.

        Parameters
        ----------
        shards : path
            The folder that ``embed`` wrote, of images or of boxes in them.
        folder : path
            Where the index is to lie.

        Raises
        ------
        SppnetError
            As `sppnet.retrieval.shards.read_shards`; if there is an index in `folder` already, or the vectors
            are not of length 1.
        """
        shards = Path(shards)
        tables = shard_tables(shards)
        index = cls.create(folder, Embedder.load(shards / EMBEDDER), str(shards.resolve()), "shards")
        for table in tables:
            for name, rows in rows_by_name(table).items():
                index.add(name, "", table.boxes[rows], table.vectors[rows].astype(np.float32))
        index.save()
        return index

    def _check(self, embedder: Embedder, regions: str, photos: Path, found: Mapping[str, str]) -> None:
        """Raise an error if the index was made of something else than is asked for."""
        check_same(self.folder, self.embedder, embedder)
        if self.regions != regions:
            raise SppnetError(f"{self.folder}: made of regions by {self.regions}; expected {regions}")
        source = _place(photos)
        if self.source != source and not self.images.keys() & found.keys():
            raise SppnetError(
                f"{self.folder}: the index of {self.source}, expected that folder, found {source}"
            )

    def _fill(
        self,
        stamps: Mapping[str, str],
        described: Iterable[tuple[Boxes, Vectors] | SppnetError | OSError],
        track: Track,
    ) -> list[str]:
        """Add images as they are described, save now and then, and return what could not be read."""
        failures: list[str] = []
        saved = time.monotonic()
        for name, found in zip(track(list(stamps), "Indexing"), described, strict=True):
            if isinstance(found, Exception):
                failures.append(str(found))
                continue
            self.add(name, stamps[name], *found)
            if time.monotonic() - saved > _SAVE_EVERY:
                self.save()
                saved = time.monotonic()
        return failures

    @classmethod
    def create(cls, folder: str | Path, embedder: Embedder, source: str = "", regions: str = "") -> Index:
        """Begin an index of one's own regions, for `add`; nothing is written before `save`.

        Parameters
        ----------
        folder : path
            Where it is to lie.
        embedder : Embedder
            Makes the vectors; its projection, if it has one, must be learned.
        source : str
            Where the images lie.
        regions : str
            How the regions of an image are chosen, in words.

        Raises
        ------
        SppnetError
            If there is an index, or the embedder does not give vectors of length 1.
        """
        folder = Path(folder)
        if (folder / MANIFEST).exists():
            raise SppnetError(f"{folder}: found an index, expected none yet; open it instead")
        if embedder.norm != "l2":
            raise SppnetError(f"found the norm {embedder.norm!r}, expected 'l2' for an index")
        none = Listed(np.zeros(0, np.int64), np.zeros((0, embedder.length), np.float16))
        rows = _Rows(none, {}, np.zeros(0, np.int64), np.zeros((0, 4), np.float32))
        return cls(folder, embedder, source, regions, rows)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        backbone: str | Path | None = None,
        device: str = "cpu",
        mapped: bool = False,
    ) -> Index:
        """Read an index.

        Parameters
        ----------
        folder : path
            The folder that `save` wrote.
        backbone : str or path, optional
            Where the backbone file lies now, if it is not where it was.
        device : str
            ``"cpu"``, or a PyTorch device, on which the backbone of the queries is to run.
        mapped : bool
            Whether vectors and rows stay on disk, to come into memory as a search looks at them: for
            indexes that are larger than memory, and only for searching. Of the vectors' file only the size
            is checked.

        Raises
        ------
        SppnetError
            If there is none, it is damaged or half written, the backbone at hand is another one (names both),
            or it is large and usearch is not installed.
        """
        folder = Path(folder)
        about = read_manifest(folder)
        wrong = damage(folder, about, mapped=mapped)
        if wrong is not None and (newer := read_manifest(folder)) != about:
            # It was saved meanwhile.
            about, wrong = newer, damage(folder, newer, mapped=mapped)
        if wrong is not None:
            raise SppnetError(f"{wrong}; make the index anew")
        path = folder / about["rows"]
        content = map_tensors(path) if mapped else load_file(path)
        embedder = Embedder.load(path, backbone=backbone, device=device)
        vectors = read_neighbours(folder / about["vectors"], embedder.length, mapped=mapped)
        names = unpack_names(content["names"], np.arange(about["images"]))
        stamps = unpack_names(content["stamps"], content["stamp"])
        images = dict(zip(names, stamps, strict=True))
        rows = _Rows(vectors, images, content["owners"], content["boxes"])
        return cls(folder, embedder, about["source"], about["regions"], rows)

    def __len__(self) -> int:
        """Return the number of regions."""
        return len(self._vectors)

    @property
    def memory(self) -> int:
        """Bytes that the vectors, with their graph, and the rows take in memory."""
        owners, boxes = self._rows()
        return self._vectors.memory + owners.nbytes + boxes.nbytes

    def add(self, name: str, stamp: str, boxes: Boxes, vectors: Vectors) -> None:
        """Add the regions of an image.

        Parameters
        ----------
        name : str
            Name of the image, by which `search` tells it.
        stamp : str
            Any text that changes when the image does.
        boxes : (R, 4) float32
            The regions in pixels of the image, 0-based and half-open.
        vectors : (R, D) float32
            Their vectors, of length 1.

        Raises
        ------
        SppnetError
            If the image is there already, the vectors are of another length than the others, or too many to
            be searched without usearch, and it is not installed.
        """
        if name in self.images:
            raise SppnetError(
                f"found {name!r} in the index already, expected each image once; remove it first"
            )
        expected = (len(boxes), self._vectors.length)
        if vectors.shape != expected:
            raise SppnetError(f"found vectors {vectors.shape} of {name!r}, expected {expected}")
        if len(boxes):
            self._vectors = with_room(self._vectors, len(boxes))
            self._vectors.add(np.arange(self._next, self._next + len(boxes)), vectors)
        self._owners.append(np.full(len(boxes), len(self._names), np.int64))
        self._boxes.append(np.asarray(boxes, np.float32))
        self._next += len(boxes)
        self._names.append(name)
        self.images[name] = stamp

    def remove(self, names: Iterable[str]) -> None:
        """Remove images with all their regions; the others stay as they are.

        Parameters
        ----------
        names : iterable of str
            Names of the images.

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
        self._vectors.remove(rows)
        owners[rows] = -1
        for name in gone:
            del self.images[name]

    def search(
        self, image: Image | EncodedImage, *, box: npt.ArrayLike | None = None, top: int = 20
    ) -> list[Hit]:
        """Find the images with the regions most like an image, or a region of one.

        Parameters
        ----------
        image : path, str, PIL.Image.Image, (H, W, 3) uint8 RGB, or EncodedImage
            The image to search with; it need not be in the index. Of what `Index.embedder.encode` gave, any
            number of regions can be searched for.
        box : (4,) float, optional
            The region x1, y1, x2, y2 in pixels of the image, 0-based and half-open; by default the whole.
        top : int
            Most images.

        Returns
        -------
        list of Hit
            Best first, each image once, with its best region.

        Raises
        ------
        SppnetError
            If the box has no area or lies outside the image, `top` is below 1, or the image cannot be read
            (`ImageError`).
        FileNotFoundError
            If there is no such file.
        """
        if box is None:
            return self.search_vector(self.embedder(image), top)
        return self.search_vector(self.embedder(image, np.asarray(box, np.float32)[None])[0], top)

    def search_vector(self, vector: Vectors, top: int = 20) -> list[Hit]:
        """Find the images with the regions most like a vector; see `search`.

        Parameters
        ----------
        vector : (D,) float32
            A vector of length 1 that `embedder` made.
        top : int
            Most images.

        Returns
        -------
        list of Hit
            Best first, each image once, with its best region.

        Raises
        ------
        SppnetError
            If `top` is below 1, or the vector has another length than the index's.
        """
        expected = (self._vectors.length,)
        if vector.shape != expected or top < 1:
            raise SppnetError(
                f"found a vector {vector.shape} and top {top}, expected {expected} and at least 1"
            )
        owners, boxes = self._rows()
        count = 4 * top
        while True:
            # Where all are wanted a graph may not lead to all: equal vectors know only one another.
            rows, scores = self.nearest(vector, count, exact=len(self) <= count)
            _, first = np.unique(owners[rows], return_index=True)
            best = np.sort(first)[:top]
            # Many regions of one image are alike: look further until there are enough images.
            if len(best) >= min(top, len(self.images)) or count >= len(self):
                break
            count *= 4
        return [Hit(self._names[owners[rows[i]]], boxes[rows[i]], float(scores[i])) for i in best]

    def nearest(self, vector: Vectors, count: int, *, exact: bool = False) -> tuple[IntArray, Vectors]:
        """Return the regions nearest to a vector, whatever their images.

        Parameters
        ----------
        vector : (D,) float32
            A vector of length 1.
        count : int
            Most regions.
        exact : bool
            Whether every region is looked at, also where there is a graph to follow.

        Returns
        -------
        (n,) int64 and (n,) float32
            Rows, in the order in which regions were added, and inner products; best first.
        """
        if not len(self):
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        return self._vectors.nearest(vector, count, exact=exact)

    def regions_from(self, start: int, count: int) -> tuple[tuple[str, ...], Boxes, Vectors]:
        """Return some regions in the order in which they were added, without those that were removed.

        Parameters
        ----------
        start, count : int
            How many are passed over, and how many are returned at most.

        Returns
        -------
        tuple of n str, (n, 4) float32, (n, D) float32
            The images, the boxes in them, and their vectors, as exact as they are kept.
        """
        owners, boxes = self._rows()
        rows = np.flatnonzero(owners >= 0)[start : start + count]
        vectors = self._vectors.of(rows).astype(np.float32)
        return tuple(self._names[owner] for owner in owners[rows].tolist()), boxes[rows], vectors

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
        old = read_manifest(self.folder) if manifest.exists() else nothing
        generation = old["generation"] + 1
        suffixes = (".safetensors", self._vectors.suffix)
        rows, vectors = (self.folder / f"{generation}{suffix}" for suffix in suffixes)
        try:
            self._vectors.save(vectors)
            self._write(rows)
            about = self._manifest(generation, rows, vectors)
            with atomic_path(manifest) as temporary:
                temporary.write_text(json.dumps(about, indent=1) + "\n")
        except BaseException:
            for path in (rows, vectors):
                path.unlink(missing_ok=True)
            raise
        for name in old["files"]:
            (self.folder / name).unlink(missing_ok=True)

    def _write(self, rows: Path) -> None:
        owners, boxes = self._compacted()
        facts, arrays = self.embedder.state()
        names, _ = pack_names(list(self.images))
        stamps, stamp = pack_names(list(self.images.values()))
        own = {"owners": owners, "boxes": boxes, "names": names, "stamps": stamps, "stamp": stamp}
        write_tensors(rows, own | arrays, {"format": FORMAT, "version": VERSION, **facts})

    def _manifest(self, generation: int, rows: Path, vectors: Path) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "generation": generation,
            "source": self.source,
            "rows": rows.name,
            "vectors": vectors.name,
            "regions": self.regions,
            "count": len(self),
            "images": len(self.images),
            "files": {path.name: file_facts(path) for path in (rows, vectors)},
        }

    def _rows(self) -> tuple[npt.NDArray[np.int64], Boxes]:
        if len(self._owners) > 1:
            self._owners, self._boxes = [np.concatenate(self._owners)], [np.concatenate(self._boxes)]
        return self._owners[0], self._boxes[0]

    def _compacted(self) -> tuple[npt.NDArray[np.int64], Boxes]:
        """Return owners and boxes with the images counted without those that are gone."""
        owners, boxes = self._rows()
        places = {name: i for i, name in enumerate(self.images)}
        table = np.array([*(places.get(name, -1) for name in self._names), -1])
        self._owners, self._names = [table[owners]], list(self.images)
        return self._owners[0], boxes


def open_index(
    folder: str | Path, *, backbone: str | Path | None = None, device: str = "cpu"
) -> Index | ShardedIndex:
    """Open an index, or a folder of indexes that are searched side by side as one.

    Parameters
    ----------
    folder : path
        An index; or a folder with a file that `sppnet.retrieval.sharded.write_shards` wrote, or else with
        indexes in it. The vectors of these stay on disk.
    backbone, device
        See `Index.open`.

    Raises
    ------
    SppnetError
        If there is none, one is damaged (names it), or they do not belong together.
    """
    folder = Path(folder)
    places = [] if (folder / MANIFEST).exists() else shard_folders(folder)
    if not places:
        return Index.open(folder, backbone=backbone, device=device)
    return ShardedIndex(
        [Index.open(place, backbone=backbone, device=device, mapped=True) for place in places]
    )


def embedder_of(folder: str | Path, *, device: str = "cpu") -> Embedder:
    """Return the embedder of an index, or of a folder of them: another shard is made with it."""
    folder = Path(folder)
    places = [] if (folder / MANIFEST).exists() else shard_folders(folder)
    return Index.open(places[0] if places else folder, device=device, mapped=True).embedder


def _place(folder: Path) -> str:
    """Return where a folder is, whatever the folder that somebody works in."""
    return address_of(folder) or str(folder.resolve())
