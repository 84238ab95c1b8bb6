"""What a worker does with a shard of the photos, pass by pass, so that no process holds the windows of all.

A pass is a value that another process can open. What it does with a shard depends on the shard alone, not on
who does it, when, or what was done before: a shard whose worker was lost is done once more by another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from sppnet.arrays import Boxes, FloatArray, IntArray, Pixels, to_numpy
from sppnet.boxes import Detections, Target
from sppnet.detection.gathering import Halves, drop_duplicates, find, pool_first
from sppnet.detection.sampling import Plan, plan_image
from sppnet.detection.svm import Flags, LinearSVMs, Signs, is_hard
from sppnet.errors import SppnetError
from sppnet.features.backbone import Backbone
from sppnet.features.cache import MapCache
from sppnet.features.encoded import EncodedImage
from sppnet.images import photo_keys
from sppnet.parallel import Staged, thread_count
from sppnet.progress import StageTimer
from sppnet.proposals.cache import cache_folder, propose_each
from sppnet.proposals.choosing import parse
from sppnet.regression import Moments
from sppnet.storage import write_tensors

if TYPE_CHECKING:
    from sppnet.detection.fit import FitSettings, Fitted

# Of the files of first examples.
_VERSION = 1
# About so many windows of all photos teach the first SVMs, one of a photo that gives any at least.
_START, _FEWEST, _MOST = 2000, 1, 200
# A window's place among those of all photos: the photo's number, times this, and its number in the photo.
_ROWS = 1 << 24


@dataclass(frozen=True)
class Shard:
    """Some of the photos.

    Attributes
    ----------
    number : int
        Its place among the shards.
    numbers : (n,) int64
        Which of all photos these are, rising; what is drawn at random depends on it.
    images : tuple of Path or (H, W, 3) uint8
    targets : tuple of Target
    windows : tuple of (R, 4) float32, or None
        The candidate windows; None where they are to be proposed.
    keys : (n,) uint64
        Their `sppnet.images.photo_keys`; none until they were looked at.
    """

    number: int
    numbers: IntArray
    images: tuple[Path | Pixels, ...]
    targets: tuple[Target, ...]
    windows: tuple[Boxes, ...] | None
    keys: npt.NDArray[np.uint64]

    @property
    def files(self) -> tuple[Path, ...]:
        """The photos that are files, which whoever works on the shard must see."""
        return tuple(image for image in self.images if isinstance(image, Path))

    def __str__(self) -> str:
        photos = f" ({self.files[0]} to {self.files[-1]})" if self.files else ""
        return f"shard {self.number} of the photos{photos}"

    def part(self, rows: Sequence[int], keys: npt.NDArray[np.uint64] | None = None) -> Shard:
        """Return the shard with some of its photos; their keys can be given."""
        return Shard(
            self.number,
            self.numbers[list(rows)],
            tuple(self.images[i] for i in rows),
            tuple(self.targets[i] for i in rows),
            None if self.windows is None else tuple(self.windows[i] for i in rows),
            self.keys[list(rows)] if keys is None else keys,
        )


@dataclass(frozen=True)
class Recipe:
    """What all passes of a fit have in common.

    Attributes
    ----------
    classes : tuple of K str
    settings : FitSettings
    backbone : Backbone
    folder : Path
        For maps and first examples.
    proposals : str or None
        The method that proposes windows; None where they are given, or the network's own.
    photos : int
        Number of all photos, of which a few windows each teach the first SVMs.
    block : int
        Windows of a photo that are pooled at once.
    """

    classes: tuple[str, ...]
    settings: FitSettings
    backbone: Backbone
    folder: Path
    proposals: str | None
    photos: int
    block: int


class Pass(Protocol):
    """What is done with each shard: a value that pickles."""

    def __call__(self, reader: Reader, item: Any) -> Any:
        """Do it with what belongs to one shard."""
        ...


@dataclass(frozen=True)
class ShardWork:
    """One pass over the shards, as a runner takes it."""

    recipe: Recipe
    step: Pass

    def open(self) -> Callable[[Any], Any]:
        """Return what does the pass with an item; a worker asks once."""
        # One after the other, and none ahead: what comes back of a shard is large.
        return Staged(_same, partial(self.step, Reader(self.recipe)))


def _same(item: Any) -> Any:
    return item


class Planned(NamedTuple):
    """A photo, and what it contributes.

    Attributes
    ----------
    number : int
        Which of all photos it is.
    image : Path or (H, W, 3) uint8
    plan : Plan
    lots : (R,) float64
        A random number of each of its boxes: of those that teach box regression, the smallest are drawn.
    """

    number: int
    image: Path | Pixels
    plan: Plan
    lots: npt.NDArray[np.float64]


class Reader:
    """The photos of shards as a fit needs them, in one worker."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.store = MapCache(recipe.folder, recipe.backbone, recipe.settings.pooling.scales)
        self.timer = StageTimer()

    def windows(self, shard: Shard) -> Iterator[Boxes | Exception]:
        """Yield the candidate windows of each photo, or what is wrong with it."""
        if shard.windows is not None:
            yield from shard.windows
        elif self.recipe.proposals is not None:
            method = parse(self.recipe.proposals)
            for found in propose_each(shard.images, method, cache_folder(), thread_count()):
                yield found if isinstance(found, Exception) else found.boxes
        else:
            yield from map(self._own, shard.images)

    def _own(self, image: Path | Pixels) -> Boxes | Exception:
        try:
            own = self.store(image, self.timer).windows
        except (SppnetError, OSError) as error:
            return error
        assert own is not None
        return own.boxes

    def planned(self, shard: Shard) -> Iterator[Planned | Exception]:
        """Yield what each photo contributes, or what is wrong with it."""
        settings, photos = self.recipe.settings, self.recipe.photos
        sample, every = int(np.clip(_START // photos, _FEWEST, _MOST)), max(1, photos // _START)
        for row, windows in enumerate(self.windows(shard)):
            if isinstance(windows, Exception):
                yield windows
                continue
            number = int(shard.numbers[row])
            rng = np.random.default_rng([settings.seed, number])
            count = 0 if number % every else sample
            target, classes = shard.targets[row], self.recipe.classes
            plan = plan_image(windows, target, classes, settings.sampling, count, rng)
            yield Planned(number, shard.images[row], plan, rng.random(len(plan.boxes)))

    def encoded(self, shard: Shard) -> Iterator[tuple[Planned, EncodedImage]]:
        """Yield what each photo contributes, and its maps."""
        for planned in self.planned(shard):
            if isinstance(planned, Exception):
                raise planned
            encoded, settings = self.store(planned.image, self.timer), self.recipe.settings
            if settings.sampling.negatives == "released":
                drop_duplicates(planned.plan, encoded, settings.pooling)
            yield planned, encoded


class Looked(NamedTuple):
    """What is known of a shard before any maps are computed.

    Attributes
    ----------
    shard : Shard
        The photos that can be read, with their keys.
    bad : list of Exception
        What is wrong with the others.
    lots : list of K (m,) float64
        Of each class, the smallest lots of windows that may teach its regression: one more than are drawn.
    started : (K,) bool
        Of which classes a window to start with is a negative.
    """

    shard: Shard
    bad: list[Exception]
    lots: list[npt.NDArray[np.float64]]
    started: Flags


@dataclass(frozen=True)
class Look:
    """Find the photos that can be read, and their windows, which are kept on disk."""

    def __call__(self, reader: Reader, item: Shard) -> Looked:
        """Look at the photos of a shard."""
        count, most = len(reader.recipe.classes), reader.recipe.settings.sampling.regression_windows + 1
        rows, bad, started = [], [], np.zeros(count, bool)
        lots: list[npt.NDArray[np.float64]] = [np.zeros(0)] * count
        for row, planned in enumerate(reader.planned(item)):
            if isinstance(planned, Exception):
                bad.append(planned)
                continue
            rows.append(row)
            plan = planned.plan
            started |= plan.negative[plan.start].any(axis=0)
            for k in np.unique(plan.fitted[plan.fitted >= 0]):
                lots[k] = smallest([lots[k], planned.lots[plan.fitted == k]], most)
        return Looked(item.part(rows, photo_keys(item.images[i] for i in rows)), bad, lots, started)


def photo_of(places: IntArray) -> IntArray:
    """Return the numbers of the photos that show windows, by their places among the windows of all."""
    return places // _ROWS


def smallest(parts: Sequence[npt.NDArray[np.float64]], most: int) -> npt.NDArray[np.float64]:
    """Return the smallest numbers of several arrays, rising, so many at most."""
    return np.sort(np.concatenate(parts))[:most]


class Examples(NamedTuple):
    """What the photos of a shard teach the first SVMs, photo by photo: objects, then windows.

    Attributes
    ----------
    features : (n, D) float16
        Vectors.
    signs : (n, K) int8
        1 for a positive of the class, -1 for a negative, 0 for neither.
    photos : (n,) int64
        The numbers of the photos that show them.
    places : (n,) int64
        The places of the windows among those of all photos; -1 of an object.
    """

    features: Halves
    signs: Signs
    photos: IntArray
    places: IntArray


class Moves(NamedTuple):
    """What the photos of a shard teach of box regression.

    Attributes
    ----------
    features : (M, D) float16
        Vectors.
    deltas : (M, 4) float32
        What they are to be moved by.
    photos : (M,) int64
        The numbers of the photos that show them.
    """

    features: Halves
    deltas: Boxes
    photos: IntArray


class Gathered(NamedTuple):
    """What the head learns of the first examples of a shard, which stay on disk.

    Attributes
    ----------
    norms : (S,) float32
        Norms of the vectors of the windows to start with.
    counts : (K,) int64
        How many windows teach the regression of each class.
    length : int
        D, the length of the vectors.
    """

    norms: FloatArray
    counts: IntArray
    length: int


@dataclass(frozen=True)
class First:
    """Computes maps and first examples of a shard, or finds them on disk.

    Attributes
    ----------
    limits : (K,) float64
        Largest lots of windows that teach the regression of each class.
    """

    limits: npt.NDArray[np.float64]

    def is_there(self, recipe: Recipe, shard: Shard) -> bool:
        """Tell whether this process sees the first examples of a shard on disk."""
        return _digest_of(_path_of(recipe, shard)) == self._digest(recipe, shard)

    def path(self, reader: Reader, shard: Shard) -> Path:
        """Return the file of the first examples of a shard, which is written if it is not there."""
        recipe, count = reader.recipe, len(reader.recipe.classes)
        path, digest = _path_of(recipe, shard), self._digest(recipe, shard)
        if _digest_of(path) != digest:
            parts = [self._of_photo(reader, *each) for each in reader.encoded(shard)]
            length = recipe.settings.pooling.length(recipe.backbone.channels)
            write_tensors(path, _joined(parts, length, count), {"digest": digest})
        return path

    def _digest(self, recipe: Recipe, shard: Shard) -> str:
        """Return what stands for all that the first examples depend on."""
        asked = recipe.classes, recipe.settings, recipe.proposals, recipe.photos
        facts = (_VERSION, recipe.backbone.signature, *asked)
        digest = hashlib.sha256(repr(facts).encode())
        for array in (self.limits, shard.numbers, shard.keys, *(shard.windows or ())):
            digest.update(np.ascontiguousarray(array).tobytes())
        for target in shard.targets:
            digest.update(
                repr((target.labels, *(v.tolist() for v in (target.boxes, target.ignored)))).encode()
            )
        return digest.hexdigest()

    def _of_photo(self, reader: Reader, photo: Planned, encoded: EncodedImage) -> dict[str, npt.NDArray[Any]]:
        """Return the first examples of a photo."""
        plan, fitted, count = photo.plan, photo.plan.fitted, len(reader.recipe.classes)
        # The limit of a window that teaches no class is one of some class, which does no harm.
        fitted[photo.lots > self.limits[fitted]] = -1
        vectors = pool_first(plan, encoded, reader.recipe.settings.pooling)
        positive = np.eye(count, dtype=np.int8)[plan.labels]
        objects = np.full(len(positive), -1)
        return {
            "examples.features": np.concatenate([vectors.positives, vectors.start]),
            "examples.signs": np.concatenate([positive, -plan.negative[plan.start].astype(np.int8)]),
            "examples.photos": np.full(len(objects) + len(plan.start), photo.number),
            "examples.places": np.concatenate([objects, photo.number * _ROWS + plan.start]),
            "moves.features": vectors.moves,
            "moves.deltas": vectors.deltas,
            "moves.photos": np.full(len(vectors.kinds), photo.number),
            "kinds": vectors.kinds,
        }


def _path_of(recipe: Recipe, shard: Shard) -> Path:
    return recipe.folder / f"first-{shard.number}.safetensors"


def _digest_of(path: Path) -> str | None:
    """Return the digest that a file of first examples names; None if it is missing or damaged."""
    try:
        with safe_open(path, "np") as file:
            return (file.metadata() or {}).get("digest")
    except (SafetensorError, OSError):
        return None


def _joined(
    parts: Sequence[dict[str, npt.NDArray[Any]]], length: int, count: int
) -> dict[str, npt.NDArray[Any]]:
    """Return the first examples of photos together; those of box regression class by class."""
    numbers: npt.NDArray[Any] = np.zeros(0, np.int64)
    joined: dict[str, npt.NDArray[Any]] = dict.fromkeys(
        ("examples.photos", "examples.places", "moves.photos", "kinds"), numbers
    )
    for name in ("examples.features", "moves.features"):
        joined[name] = np.zeros((0, length), np.float16)
    joined["examples.signs"], joined["moves.deltas"] = (
        np.zeros((0, count), np.int8),
        np.zeros((0, 4), np.float32),
    )
    for name, none in joined.items():
        joined[name] = np.concatenate([none, *(part.pop(name) for part in parts)])
    order = np.argsort(joined["kinds"], kind="stable")
    for name in ("kinds", *(f"moves.{name}" for name in Moves._fields)):
        joined[name] = joined[name][order]
    joined["starts"] = np.searchsorted(joined.pop("kinds"), np.arange(count + 1))
    return joined


@dataclass(frozen=True)
class Gather:
    """Compute maps and first examples; both stay on disk."""

    first: First

    def __call__(self, reader: Reader, item: Shard) -> Gathered:
        """Gather the first examples of a shard."""
        with safe_open(self.first.path(reader, item), "np") as file:
            windows = file.get_tensor("examples.places") >= 0
            features = file.get_tensor("examples.features")[windows].astype(np.float32)
            counts = np.diff(file.get_tensor("starts"))
        return Gathered(np.linalg.norm(features, axis=1), counts, features.shape[1])


@dataclass(frozen=True)
class Recall:
    """Fetch the first examples of the SVMs."""

    first: First

    def __call__(self, reader: Reader, item: Shard) -> Examples:
        """Fetch those of a shard."""
        with safe_open(self.first.path(reader, item), "np") as file:
            return Examples(*(file.get_tensor(f"examples.{name}") for name in Examples._fields))


@dataclass(frozen=True)
class FetchMoves:
    """Fetch what teaches the box regression of a class: vectors or, where they are many, their sums.

    Attributes
    ----------
    first : First
    scale : float
        Factor of the vectors.
    summed : (K,) bool
        Of which classes the sums are wanted.
    folds : (N,) int64
        The fold of each photo: each has its sums.
    """

    first: First
    scale: float
    summed: Flags
    folds: IntArray

    def __call__(self, reader: Reader, item: tuple[Shard, int]) -> Moves | dict[int, Moments]:
        """Fetch what a shard teaches of one class."""
        shard, k = item
        with safe_open(self.first.path(reader, shard), "np") as file:
            start, end = file.get_tensor("starts")[k : k + 2].tolist()
            parts = (file.get_slice(f"moves.{name}") for name in Moves._fields)
            # No rows cannot be cut out of a file.
            moves = Moves(*(p[start:end] if start < end else _none_of(*p.get_shape()[1:]) for p in parts))
        if not self.summed[k]:
            return moves
        folds, found = self.folds[moves.photos], {}
        for fold in np.unique(folds).tolist():
            rows = folds == fold
            wide = np.ones((np.count_nonzero(rows), moves.features.shape[1] + 1), np.float32)
            np.multiply(moves.features[rows], np.float32(self.scale), out=wide[:, :-1])
            found[fold] = Moments.of(wide, moves.deltas[rows])
        return found


def _none_of(*length: int) -> npt.NDArray[Any]:
    return np.zeros((0, *length), np.int64 if not length else np.float32)


class Held(NamedTuple):
    """A shard, and which of its windows the training set holds.

    Attributes
    ----------
    shard : Shard
    places : (m,) int64
        The windows' places, rising.
    negative : (m, K) bool
        For which classes they are negatives there.
    """

    shard: Shard
    places: IntArray
    negative: Flags


class HardWindows(NamedTuple):
    """The hard windows of a shard, photo by photo.

    Attributes
    ----------
    places : (n,) int64
        Their places, rising.
    negative : (n, K) bool
        For which classes they are hard negatives, and were not yet.
    fresh : (n,) bool
        Which of them the training set does not hold.
    features : (f, D) float16
        The scaled vectors of these.
    left : int
        How many more there were than the shard may return.
    """

    places: IntArray
    negative: Flags
    fresh: Flags
    features: Halves
    left: int


@dataclass(frozen=True)
class Mine:
    """Find the hard windows of the SVMs as they are.

    Attributes
    ----------
    svms : LinearSVMs
    scale : float
        Factor of the vectors.
    limit : int or None
        Most windows that a shard returns: the hardest of each class in turn.
    """

    svms: LinearSVMs
    scale: float
    limit: int | None

    def __call__(self, reader: Reader, item: Held) -> HardWindows:
        """Find those of a shard."""
        hardest = _Hardest(self.limit, item.negative.shape[1])
        block = reader.recipe.block
        for photo, encoded in reader.encoded(item.shard):
            negative, fresh = self._offered(photo, item)
            rows = np.flatnonzero(negative.any(axis=1))
            for part in np.split(rows, range(block, len(rows), block)):
                features = to_numpy(reader.recipe.settings.pooling(encoded, photo.plan.boxes[part]))
                features *= np.float32(self.scale)
                scores = to_numpy(self.svms(features))
                hard = is_hard(negative[part], scores, reader.recipe.settings.mining)
                kept = np.flatnonzero(hard.any(axis=1))
                hardest.add(
                    photo.number * _ROWS + part[kept],
                    np.where(hard[kept], scores[kept], np.float32(-np.inf)),
                    fresh[part[kept]],
                    features[kept].astype(np.float16),
                )
        return hardest.windows()

    def _offered(self, photo: Planned, item: Held) -> tuple[Flags, Flags]:
        """Return for which classes windows are negatives and not held as such, and which are not held."""
        negative, fresh = photo.plan.negative.copy(), np.ones(len(photo.plan.boxes), bool)
        first, last = np.searchsorted(item.places, [photo.number * _ROWS, (photo.number + 1) * _ROWS])
        rows = item.places[first:last] - photo.number * _ROWS
        negative[rows] &= ~item.negative[first:last]
        fresh[rows] = False
        return negative, fresh


class _Hardest:
    """The hardest windows so far of a shard: memory is bounded by their limit."""

    def __init__(self, limit: int | None, classes: int) -> None:
        self.limit, self.count, self.left = limit, 0, 0
        self.parts: list[tuple[npt.NDArray[Any], ...]] = []
        self.classes = classes

    def add(self, places: IntArray, scores: FloatArray, fresh: Flags, features: Halves) -> None:
        """Take in windows, with scores of -inf for classes of which they are no hard negatives."""
        self.parts.append((places, scores, fresh, features))
        self.count += len(places)
        if self.limit is not None and self.count > self.limit + max(self.limit // 4, 64):
            self._thin(self.limit)

    def _thin(self, limit: int) -> None:
        """Leave the hardest of each class in turn."""
        joined = self._joined()
        ranks = np.argsort(np.argsort(-joined[1], axis=0, kind="stable"), axis=0, kind="stable")
        turn = np.where(np.isfinite(joined[1]), ranks, len(ranks)).min(axis=1)
        kept = np.sort(np.argsort(turn, kind="stable")[:limit])
        self.left += len(turn) - len(kept)
        self.parts, self.count = [tuple(each[kept] for each in joined)], len(kept)

    def _joined(self) -> tuple[npt.NDArray[Any], ...]:
        return tuple(np.concatenate(each) for each in zip(*self.parts, strict=True))

    def windows(self) -> HardWindows:
        """Return what is left."""
        if self.limit is not None and self.count > self.limit:
            self._thin(self.limit)
        if not self.count:
            none = np.zeros(0, np.int64), np.zeros((0, self.classes), bool), np.zeros(0, bool)
            return HardWindows(*none, np.zeros((0, 0), np.float16), self.left)
        places, scores, fresh, features = self._joined()
        return HardWindows(places, np.isfinite(scores), fresh, features[fresh], self.left)


@dataclass(frozen=True)
class Score:
    """Detect in photos by what was learned without them.

    Attributes
    ----------
    models : sequence of Fitted
        What was learned without each fold.
    folds : (N,) int64
        The fold of each photo.
    """

    models: Sequence[Fitted]
    folds: IntArray

    def __call__(self, reader: Reader, item: Shard) -> list[Detections]:
        """Detect in the photos of a shard."""
        found = []
        for windows, image, number in zip(reader.windows(item), item.images, item.numbers, strict=True):
            if isinstance(windows, Exception):
                raise windows
            model = self.models[self.folds[number]]
            found.append(find(model, reader.store(image, reader.timer), windows, reader.recipe.settings))
        return found
