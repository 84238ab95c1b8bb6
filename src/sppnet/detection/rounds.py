"""A fit in rounds over shards of the photos: what one machine, or a cluster, does of any number of them.

`sppnet.detection.fit.fit` has the examples of all photos in one place and mines hard negatives photo by
photo, with SVMs that learn on the way. Here each pass goes over shards, by whatever runs it, and what comes
back is bounded: first examples, then in each round the hardest windows of the SVMs as they were when it
began. What was learned does not depend on who did which shard, or when.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from sppnet.arrays import IntArray
from sppnet.detection.fit import FitSettings, Fitted, Work, folds_with, moves_of
from sppnet.detection.folds import Folds
from sppnet.detection.quality import learn_scores, unmeasured
from sppnet.detection.sampling import Examples, check_background, check_examples
from sppnet.detection.shards import (
    FetchMoves,
    First,
    Gather,
    Held,
    Look,
    Looked,
    Mine,
    Pass,
    Recall,
    Recipe,
    Score,
    Shard,
    ShardWork,
    photo_of,
    smallest,
)
from sppnet.detection.stream import check_bad, tell_bad
from sppnet.detection.svm import LinearSVMs, TrainingSet
from sppnet.errors import SppnetError
from sppnet.features.backbone import Backbone
from sppnet.parallel import Runner, Threads
from sppnet.regression import BoxRegression, Moments

ROUNDS = 4
"""Most rounds of mining unless another number is asked for."""

# Bytes that a process holds beside what grows: interpreter, libraries, network and the maps of a photo.
_BASE = 0.55e9
# Of the rest, shares for the windows of a photo that are pooled at once, for the first examples of a shard,
# for its hard windows, and for the training set of the SVMs: where one process does all, they are beside each
# other; else hard windows wait at the head, which takes in no more of all shards than it has room for.
_BLOCK, _FIRST, _HARD, _TRAINING = 0.12, 0.1, 0.08, 0.6
# Where no memory is stated: photos of a shard, and windows that are pooled at once.
_PHOTOS, _WINDOWS = 64, 2000
_FEWEST = 16


@dataclass(frozen=True)
class Sharding:
    """How a fit is cut into shards.

    Attributes
    ----------
    shards : int or None
        Number of shards, at least; by default as many as the memory asks for, or one for each 64 photos.
    memory : float or None
        Bytes that each process may hold, about; None: no more than needed, without a limit.
    rounds : int
        Most rounds of mining; it ends before where no window is hard any more.

    Raises
    ------
    SppnetError
        If a number is none of its kind.
    """

    shards: int | None = None
    memory: float | None = None
    rounds: int = ROUNDS

    def __post_init__(self) -> None:
        for name in ("shards", "memory", "rounds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SppnetError(f"found {value:g} as {name}, expected more than 0")


@dataclass(frozen=True)
class Bounds:
    """What follows from the memory of a process.

    Attributes
    ----------
    photos : int
        Most photos of a shard.
    block : int
        Windows of a photo that are pooled at once.
    hard : int or None
        Most hard windows that a shard returns.
    held : int or None
        Most examples of the training set of the SVMs.
    """

    photos: int
    block: int = _WINDOWS
    hard: int | None = None
    held: int | None = None


def bounds_of(memory: float | None, length: int, classes: int, windows: int) -> Bounds:
    """Return what a process may hold at once.

    Parameters
    ----------
    memory : float or None
        Bytes of a process; None: no limit.
    length : int
        D, the length of a vector.
    classes : int
        K.
    windows : int
        Most windows that teach the regression of a class.

    Raises
    ------
    SppnetError
        If the memory is too little for any fit.
    """
    if memory is None:
        return Bounds(_PHOTOS)
    # Single precision of the vectors, and three matrices of their products; or sums in double precision.
    few = min(windows, length)
    ridge = 4 * few * length + 3 * 4 * few**2 if windows <= length else 4 * 8 * length**2
    least = max(_BASE + 4 * length * _FEWEST / _BLOCK, _BASE / 2 + ridge)
    if memory < least:
        raise SppnetError(f"found a memory of {memory / 1e9:g} GB, expected at least {least / 1e9:.2g} GB")
    rest = memory - _BASE
    example = 2 * length + 5 * classes
    # Of a photo, some objects and windows to start with, and some that teach regression.
    photos = int(_FIRST * rest / (32 * 2 * length))
    return Bounds(
        max(1, photos),
        int(np.clip(_BLOCK * rest / (4 * length), _FEWEST, _WINDOWS)),
        max(_FEWEST, int(_HARD * rest / example)),
        int(_TRAINING * rest / example),
    )


def cut(examples: Examples, count: int, given: bool) -> list[Shard]:
    """Cut photos into shards of consecutive ones, as even as can be; some are empty if there are too many.

    Parameters
    ----------
    examples : Examples
    count : int
        Number of shards.
    given : bool
        Whether their windows are taken; else they are to be proposed.
    """
    edges = np.linspace(0, len(examples), count + 1).round().astype(int).tolist()
    return [
        Shard(
            number,
            np.arange(start, end),
            tuple(examples.images[start:end]),
            tuple(examples.targets[start:end]),
            tuple(examples.windows[start:end]) if given else None,
            np.zeros(0, np.uint64),
        )
        for number, (start, end) in enumerate(pairwise(edges))
    ]


@dataclass(frozen=True)
class Source:
    """Where the windows come from, and who does the work.

    Attributes
    ----------
    proposals : str or None
        The method that proposes windows; None where they are given, or the network's own.
    given : bool
        Whether the examples have their windows.
    max_bad : float
        Share of the photos that may be unreadable.
    runner : Runner or None
        Who does the shards; None: this process, one after the other.
    """

    proposals: str | None = None
    given: bool = False
    max_bad: float = 0.0
    runner: Runner | None = None


def fit_in_rounds(
    examples: Examples,
    settings: FitSettings,
    backbone: Backbone,
    work: Work,
    source: Source,
    sharding: Sharding,
) -> Fitted:
    """Fit SVMs and box regressions in rounds over shards of annotated images.

    Raises
    ------
    SppnetError
        If a class has no example or no background, more photos cannot be read than may be, or the memory is
        too little.
    """
    check_examples(examples.targets, examples.classes)
    length, count = settings.pooling.length(backbone.channels), len(examples.classes)
    windows = settings.sampling.regression_windows if settings.moves else 0
    bounds = bounds_of(sharding.memory, length, count, windows)
    shards = -(-len(examples) // bounds.photos)
    if sharding.shards is not None:
        shards = sharding.shards if sharding.memory is None else max(sharding.shards, shards)
    work.folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(
        examples.classes, settings, backbone, work.folder, source.proposals, len(examples), bounds.block
    )
    passes = _Passes(recipe, source.runner or Threads(1), work)
    return _Rounds(examples, passes, bounds, sharding.rounds).fit(
        cut(examples, shards, source.given), source.max_bad
    )


@dataclass(frozen=True)
class _Passes:
    """Goes over shards, and tells how far it is."""

    recipe: Recipe
    runner: Runner
    work: Work

    def over(self, step: Pass, items: Sequence[Any], doing: str, *, here: bool = False) -> Iterator[Any]:
        """Yield what a pass makes of each item, in their order; it may be little enough to do it here."""
        runner = Threads(1) if here else self.runner
        results = iter(runner.stream(ShardWork(self.recipe, step), items, together=1))
        for _ in self.work.track(range(len(items)), doing):
            yield next(results)


class _Rounds:
    """One fit, at the head: what it takes in of the shards, and what it learns."""

    def __init__(self, examples: Examples, passes: _Passes, bounds: Bounds, rounds: int) -> None:
        self.examples, self.passes, self.bounds, self.rounds = examples, passes, bounds, rounds
        self.settings, self.timer = passes.recipe.settings, passes.work.timer
        self.shards: list[Shard] = []
        self.seen = False

    def fit(self, shards: list[Shard], max_bad: float) -> Fitted:
        """Fit to the photos of the shards, and measure on those that are held out."""
        with self.timer("proposals"):
            limits = self._look(shards, max_bad)
        first, folds = First(limits), self._folds()
        with self.timer("backbone"):
            scale, counts, length = self._gather(first)
        # From here on the maps come from the disk.
        self.passes.recipe.backbone.release()
        with self.timer("box regression"):
            regressions = self._regress(first, scale, counts, length, folds)
        with self.timer("SVMs"):
            svms, objects = self._mine(first, scale, length, folds)
        fitted = Fitted(
            self.examples.classes,
            self.passes.recipe.backbone,
            None,
            None,
            svms[0],
            regressions[0],
            scale,
            np.sort(np.concatenate([shard.keys for shard in self.shards])),
            objects,
            *unmeasured(len(self.examples.classes)),
        )
        models = [
            fitted.without_fold(folds, f, *learned)
            for f, learned in enumerate(zip(svms[1:], regressions[1:], strict=True))
        ]
        with self.timer("measuring"):
            return self._measured(fitted, models, folds)

    def _look(self, shards: list[Shard], max_bad: float) -> npt.NDArray[np.float64]:
        """Find the photos that can be read; return of each class the largest lot that teaches regression."""
        names, rules = self.examples.classes, self.settings.sampling
        total, bad, most = len(self.examples), [], rules.regression_windows
        lots, started = [np.zeros(0)] * len(names), np.zeros(len(names), bool)
        for looked in self.passes.over(Look(), shards, "Proposing windows"):
            assert isinstance(looked, Looked)
            bad += looked.bad
            check_bad(bad, total, max_bad)
            self.shards.append(looked.shard)
            started |= looked.started
            # One more than are drawn, which tells whether there are more.
            lots = [smallest([*pair], most + 1) for pair in zip(lots, looked.lots, strict=True)]
        tell_bad(bad, total)
        check_examples(self._targets, names)
        check_background(started, names, total, rules)
        return np.array([part[most - 1] if len(part) > most else np.inf for part in lots])

    @property
    def _targets(self) -> list[Any]:
        return [target for shard in self.shards for target in shard.targets]

    def _folds(self) -> Folds:
        """Choose the folds; their numbers are those of all photos, -1 of those that were left out."""
        keys = np.concatenate([shard.keys for shard in self.shards])
        folds = folds_with(keys, self._targets, self.examples.classes, self.settings)
        numbers = np.full(len(self.examples), -1)
        numbers[np.concatenate([shard.numbers for shard in self.shards])] = folds.numbers
        return replace(folds, numbers=numbers)

    def _gather(self, first: First) -> tuple[float, IntArray, int]:
        """Have maps and first examples computed; return scale, numbers of moves by class, and D."""
        found = list(self.passes.over(Gather(first), self.shards, "Computing feature maps"))
        # Where the head sees the files of the workers, none is needed to read them.
        self.seen = all(first.is_there(self.passes.recipe, shard) for shard in self.shards)
        norm = float(np.concatenate([gathered.norms for gathered in found]).mean())
        return 20.0 / norm, np.sum([gathered.counts for gathered in found], axis=0), found[0].length

    def _regress(
        self, first: First, scale: float, counts: IntArray, length: int, folds: Folds
    ) -> list[BoxRegression]:
        """Fit the box regressions to all images, and to those outside of each fold."""
        count = len(counts)
        if not self.settings.moves:
            still = BoxRegression(np.zeros((count, 4, length), np.float32), np.zeros((count, 4), np.float32))
            return [still] * (1 + folds.count)
        summed = sums_are_less(counts, length)
        items = [(shard, k) for k in range(count) for shard in self.shards]
        step = FetchMoves(first, scale, summed, folds.numbers)
        results = self.passes.over(step, items, "Fitting box regression", here=self.seen and not summed.any())
        found = []
        for k in range(count):
            parts = (next(results) for _ in self.shards)
            if summed[k]:
                found.append(_ridges_of_sums(parts, folds.learned[:, k], self.settings.ridge))
                continue
            wide, deltas = np.ones((counts[k], length + 1), np.float32), np.zeros((counts[k], 4), np.float32)
            numbers, filled = np.zeros(counts[k], np.int64), 0
            for moves in parts:
                rows = slice(filled, filled + len(moves.deltas))
                np.multiply(moves.features, np.float32(scale), out=wide[rows, :-1])
                deltas[rows], numbers[rows] = moves.deltas, folds.numbers[moves.photos]
                filled = rows.stop
            found.append(moves_of(wide, deltas, numbers, folds.learned[:, k], self.settings.ridge))
        # All are taken: what draws how far it is ends here.
        next(results, None)
        return [
            BoxRegression(*(np.stack(values) for values in zip(*ridges, strict=True)))
            for ridges in zip(*found, strict=True)
        ]

    def _mine(
        self, first: First, scale: float, length: int, folds: Folds
    ) -> tuple[list[LinearSVMs], IntArray]:
        """Fit the SVMs to first examples, then in rounds with hard negatives.

        Returns those of all images and those outside of each fold, and the number of objects of each class.
        """
        training, objects = self._start(first, scale, length, folds)
        training.fit()
        left = 0
        for number in range(self.rounds):
            doing = f"Mining hard negatives, round {number + 1}"
            found, left = self._round(training, scale, folds, doing)
            if not found:
                break
            training.fit()
        if left:
            warnings.warn(
                f"{left} hard windows of the last round found no room in the memory beside {len(training)} "
                "examples: the hardest of each class were taken; more memory takes in more",
                stacklevel=2,
            )
        return [training.svms, *map(training.without, range(folds.count))], objects

    def _start(self, first: First, scale: float, length: int, folds: Folds) -> tuple[TrainingSet, IntArray]:
        """Return a training set of the first examples, and the number of objects of each class."""
        count = len(self.examples.classes)
        none = np.zeros((0, length), np.float32), np.zeros((0, count), np.int8)
        training = TrainingSet(*none, self.settings.mining, np.zeros(0, np.int64))
        objects = np.zeros(count, np.int64)
        for found in self.passes.over(
            Recall(first), self.shards, "Mining hard negatives, first examples", here=self.seen
        ):
            objects += (found.signs > 0).sum(axis=0)
            features = found.features.astype(np.float32) * np.float32(scale)
            training.add(features, found.signs, folds.numbers[found.photos], found.places)
            if self.bounds.held is not None and len(training) >= self.bounds.held:
                raise SppnetError(
                    f"found more than {len(training)} objects and windows to start with, expected "
                    f"{self.bounds.held} at most in so little memory"
                )
        return training, objects

    def _round(self, training: TrainingSet, scale: float, folds: Folds, doing: str) -> tuple[int, int]:
        """Take in the hard windows of all shards; return how many, and for how many there was no room."""
        limit = self.bounds.hard
        if limit is not None and self.bounds.held is not None:
            limit = min(limit, max(0, self.bounds.held - len(training)) // len(self.shards))
        step, found, left = Mine(training.svms, scale, limit), 0, 0
        for hard in self.passes.over(step, list(self._held(training)), doing):
            found, left = found + len(hard.places), left + hard.left
            training.mark(hard.places[~hard.fresh], hard.negative[~hard.fresh])
            places = hard.places[hard.fresh]
            if len(places):
                negative = -hard.negative[hard.fresh].astype(np.int8)
                training.add(hard.features, negative, folds.numbers[photo_of(places)], places)
        return found, left

    def _held(self, training: TrainingSet) -> Iterator[Held]:
        """Yield each shard with those of its windows that are held."""
        places, negative = training.held
        photos = photo_of(places)
        for shard in self.shards:
            rows = np.isin(photos, shard.numbers)
            yield Held(shard, places[rows], negative[rows])

    def _measured(self, fitted: Fitted, models: list[Fitted], folds: Folds) -> Fitted:
        """Return what was fitted with what its scores mean, by photos that were not learned from."""
        if not folds.count:
            return fitted
        parts = [s.part(np.flatnonzero(folds.numbers[s.numbers] >= 0).tolist()) for s in self.shards]
        doing = "Scoring photos not learned from"
        found = [
            each for part in self.passes.over(Score(models, folds.numbers), parts, doing) for each in part
        ]
        targets = [target for part in parts for target in part.targets]
        numbers = folds.numbers[np.concatenate([part.numbers for part in parts])]
        learned = learn_scores(found, targets, fitted.classes, folds.learned[numbers], folds.count)
        return replace(fitted, **learned._asdict())


def sums_are_less(counts: IntArray, length: int) -> npt.NDArray[np.bool_]:
    """Tell of which classes the sums of a ridge are less than its examples: of more than features."""
    return counts > length


def _ridges_of_sums(
    parts: Iterable[dict[int, Moments]], learned: npt.NDArray[np.bool_], penalty: float
) -> list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """Fit the box regression of a class to sums of all photos, and without those of each fold."""
    sums: dict[int, Moments] = {}
    for part in parts:
        for fold, moments in part.items():
            sums[fold] = sums[fold] + moments if fold in sums else moments
    folds = sorted(sums)
    total = sums[folds[0]]
    for fold in folds[1:]:
        total = total + sums[fold]
    # A class that cannot be learned without a fold is not looked for there.
    rest = [total - sums[f] if f in sums and there else total for f, there in enumerate(learned)]
    return [part.ridge(penalty) for part in (total, *rest)]
