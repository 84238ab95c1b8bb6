"""Regions of all photos as short vectors, for what is alike: the windows that the network itself proposes."""

from __future__ import annotations

import sqlite3
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sppnet.arrays import Boxes, to_numpy
from sppnet.boxes import iou
from sppnet.features.encoded import EncodedImage
from sppnet.features.windows import WindowPooling
from sppnet.serve.settings import SIDE

Vectors = npt.NDArray[np.float32]
Corners = tuple[float, float, float, float]

LENGTH = 256
"""Numbers of a vector."""

WINDOWS = 200
"""Most regions of a photo, the likeliest objects."""

_A_PHOTO = 3
_OVERLAP = 0.3
_PART = 65536
_MORE = 1.1
_POOLING = WindowPooling((SIDE,), (3, 2, 1))
_VERSION = 3


class RegionIndex:
    """Regions of photos and their vectors, in memory and in a file.

    Parameters
    ----------
    path : Path
        The SQLite file; made if it is missing, or anew if it is of another version.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._prepare()
        self._projection: Vectors | None = None
        self._photos: list[str] = []
        self._number: dict[str, int] = {}
        self._stamps: dict[str, str] = {}
        self._maps: dict[str, str] = {}
        self._owner = np.zeros(0, np.int32)
        self._boxes = np.zeros((0, 4), np.float32)
        self._vectors = np.zeros((0, LENGTH), np.float16)
        self._used = 0
        # The mean of so many vectors, and the lengths of vectors about it.
        self._averaged, self._centre = 0, np.zeros(LENGTH, np.float32)
        self._lengths = np.zeros(0, np.float32)
        self._load()

    def _prepare(self) -> None:
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL"):
            self._connection.execute(f"PRAGMA {pragma}")
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version != _VERSION:
            self._connection.executescript(
                "DROP TABLE IF EXISTS regions; CREATE TABLE regions (photo TEXT PRIMARY KEY, stamp TEXT"
                " NOT NULL, maps TEXT NOT NULL, boxes BLOB NOT NULL, vectors BLOB NOT NULL) STRICT;"
                f" PRAGMA user_version = {_VERSION};"
            )

    def _load(self) -> None:
        for photo, stamp, maps, boxes, vectors in self._connection.execute("SELECT * FROM regions"):
            self._append(
                photo,
                stamp,
                maps,
                np.frombuffer(boxes, np.float32).reshape(-1, 4),
                np.frombuffer(vectors, np.float16).reshape(-1, LENGTH),
            )

    def has(self, photo: str, stamp: str) -> bool:
        """Tell whether the regions of a photo are known, of that state of its file."""
        return self._stamps.get(photo) == stamp

    def photos(self) -> list[str]:
        """Return whose regions are known."""
        with self._lock:
            return list(self._stamps)

    def add(self, photo: str, stamp: str, maps: str, encoded: EncodedImage) -> set[str]:
        """Take in the regions of a photo whose maps have that name; return those that nobody needs now."""
        assert encoded.windows is not None
        boxes = encoded.windows.boxes[:WINDOWS]
        vectors = self._project(encoded, boxes).astype(np.float16)
        with self._lock:
            left = self.remove([photo])
            self._connection.execute(
                "INSERT OR REPLACE INTO regions VALUES (?, ?, ?, ?, ?)",
                (photo, stamp, maps, boxes.tobytes(), vectors.tobytes()),
            )
            self._append(photo, stamp, maps, boxes, vectors)
            return left - {maps}

    def remove(self, photos: list[str]) -> set[str]:
        """Drop the regions of photos; return the names of the maps that no other photo has."""
        left = set()
        with self._lock:
            for photo in photos:
                number = self._number.pop(photo, None)
                if number is not None:
                    del self._stamps[photo]
                    left.add(self._maps.pop(photo))
                    self._owner[: self._used][self._owner[: self._used] == number] = -1
                    self._connection.execute("DELETE FROM regions WHERE photo = ?", (photo,))
            return left.difference(self._maps.values()) if left else left

    def _append(
        self, photo: str, stamp: str, maps: str, boxes: Boxes, vectors: npt.NDArray[np.float16]
    ) -> None:
        end = self._used + len(boxes)
        if end > len(self._owner):
            room = max(4096, 2 * end)
            self._owner, self._boxes, self._vectors = (
                np.concatenate([a[: self._used], np.zeros((room - self._used, *a.shape[1:]), a.dtype)])
                for a in (self._owner, self._boxes, self._vectors)
            )
        self._owner[self._used : end] = self._number[photo] = len(self._photos)
        self._photos.append(photo)
        self._stamps[photo], self._maps[photo] = stamp, maps
        self._boxes[self._used : end], self._vectors[self._used : end] = boxes, vectors
        self._used = end

    def vector(self, encoded: EncodedImage, boxes: Boxes) -> Vectors:
        """Return the vectors of boxes of a photo, as those of regions are, each of length 1."""
        return _unit(self._project(encoded, boxes) - self._mean())

    def _project(self, encoded: EncodedImage, boxes: Boxes) -> Vectors:
        pooled = to_numpy(_POOLING(encoded, np.asarray(boxes, np.float32)))
        return np.asarray(pooled @ self._directions(pooled.shape[1]), np.float32)

    def _directions(self, length: int) -> Vectors:
        """Return random directions, the same ones each time: angles come through nearly as they were."""
        with self._lock:
            if self._projection is None:
                drawn = np.random.default_rng(0).standard_normal((length, LENGTH))
                self._projection = (drawn / np.sqrt(LENGTH)).astype(np.float32)
            return self._projection

    def _mean(self) -> Vectors:
        """Return the mean of all vectors; it is computed anew where there are more by a tenth."""
        with self._lock:
            if self._used > _MORE * self._averaged:
                known = self._vectors[: self._used]
                sample = known[:: max(1, len(known) // 4096)].astype(np.float32)
                self._averaged, self._centre = self._used, sample.mean(axis=0)
                self._lengths = np.zeros(0, np.float32)
            new = [np.linalg.norm(part - self._centre, axis=1) for _, part in self._parts(len(self._lengths))]
            self._lengths = np.concatenate([self._lengths, *new])
            return self._centre

    def _parts(self, first: int = 0) -> Iterator[tuple[slice, Vectors]]:
        """Yield places of vectors, and these in single precision, a bounded number at once."""
        for start in range(first, self._used, _PART):
            place = slice(start, min(start + _PART, self._used))
            yield place, self._vectors[place].astype(np.float32)

    def nearest(
        self, query: Vectors, photo: str, box: tuple[float, ...], limit: int
    ) -> list[tuple[str, Corners, float]]:
        """Return the regions whose vectors are nearest to one, best first: photo, box and likeness.

        At most three of a photo, none over another, and none over the box itself in its photo.
        """
        with self._lock:
            owner, boxes = self._owner[: self._used], self._boxes[: self._used]
            scores = self._scores(query[0])
            own = self._number.get(photo, -2)
        scores[owner < 0] = -2
        mine = np.flatnonzero(owner == own)
        scores[mine[iou(boxes[mine], np.array([box], np.float32))[:, 0] > _OVERLAP]] = -2
        return self._best(scores, owner, boxes, limit)

    def _scores(self, query: Vectors) -> Vectors:
        """Return the cosine of the angle between a vector and each region's."""
        shift, found = self._mean() @ query, np.empty(self._used, np.float32)
        for place, part in self._parts():
            found[place] = (part @ query - shift) / np.maximum(self._lengths[place], 1e-6)
        return found

    def _best(
        self, scores: Vectors, owner: npt.NDArray[np.int32], boxes: Boxes, limit: int
    ) -> list[tuple[str, Corners, float]]:
        kept: list[tuple[str, Corners, float]] = []
        of: defaultdict[int, list[Corners]] = defaultdict(list)
        for i in _falling(scores, 40 * limit):
            photo = int(owner[i])
            if scores[i] < -1 or len(kept) == limit:
                break
            x1, y1, x2, y2 = boxes[i].tolist()
            box = (x1, y1, x2, y2)
            if len(of[photo]) < _A_PHOTO and all(_overlap(box, other) <= _OVERLAP for other in of[photo]):
                of[photo].append(box)
                kept.append((self._photos[photo], box, float(scores[i])))
        return kept


def _overlap(one: Corners, other: Corners) -> float:
    """Return the intersection over union of two boxes, one pair at a time much sooner than arrays."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return shared / max(sum(areas) - shared, 1e-6)


def _falling(scores: Vectors, count: int) -> list[int]:
    """Return the places of the best scores, best first."""
    count = min(count, len(scores))
    if not count:
        return []
    best = np.argpartition(-scores, count - 1)[:count]
    order: list[int] = best[np.argsort(-scores[best], kind="stable")].tolist()
    return order


def _unit(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-6), np.float32)
