"""The convex pieces fitted on frozen features: linear SVMs with hard-negative mining, box regression.

Memory does not grow with the windows that were looked at, only with those that are hard. Nothing here knows
images.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sppnet.arrays import IntArray, like, to_numpy
from sppnet.errors import SppnetError
from sppnet.linear import Linear
from sppnet.parallel import thread_count

FloatVector = npt.NDArray[np.float32]
Signs = npt.NDArray[np.int8]
Flags = npt.NDArray[np.bool_]

BIAS_FEATURE = 10.0


@dataclass(frozen=True)
class MiningSettings:
    """Settings of the linear SVMs and their hard-negative mining (paper section 4.1, released code).

    Attributes
    ----------
    C : float
        Weight of the hinge loss against ``|w|^2 / 2``.
    positive_weight : float
        Weight of a positive's loss relative to a negative's.
    hard : float
        A negative that scores above this joins the training set.
    easy : float
        A negative that scores below this after a training leaves it.
    retrain : int
        All classes are trained anew when more windows than this have joined (released code: 2,000 for each
        class); bounds the memory.
    tolerance : float
        A training ends when no dual gradient is further than this from its optimum.
    epochs : int
        A training ends after so many rounds over its examples in any case.
    """

    C: float = 1e-3
    positive_weight: float = 2.0
    hard: float = -1.0001
    easy: float = -1.2
    retrain: int = 4000
    tolerance: float = 0.02
    epochs: int = 200


class Labelled(NamedTuple):
    """Windows, and what they are.

    Attributes
    ----------
    features : (R, D) float32
        An array, or a tensor on any device.
    classes : (R, K) bool
        For which classes each of them is a positive, or a negative.
    folds : int or (R,) int64
        The fold of the photo that shows it; -1 of one in no fold.
    """

    features: Any
    classes: npt.NDArray[np.bool_]
    folds: IntArray | int = -1


@dataclass(frozen=True)
class LinearSVMs:
    """One-vs-rest linear scorers: ``scores = features @ weights.T + biases``.

    Attributes
    ----------
    weights : (K, D) float32
    biases : (K,) float32
    """

    weights: FloatVector
    biases: FloatVector

    def __call__(self, features: Any) -> Any:
        """Return the (R, K) scores of (R, D) float32 features, an array or a tensor on any device."""
        return Linear(self.weights, self.biases)(features)

    def joined(self, other: LinearSVMs) -> LinearSVMs:
        """Return the SVMs of these classes and, after them, of others."""
        return LinearSVMs(
            np.concatenate([self.weights, other.weights]), np.concatenate([self.biases, other.biases])
        )

    def folded(self, centre: FloatVector, factor: float) -> LinearSVMs:
        """Return SVMs that give features the scores of these for ``(features - centre) * factor``."""
        weights = self.weights * np.float32(factor)
        shift = (weights * centre).sum(axis=1)
        return LinearSVMs(weights, (self.biases - shift).astype(np.float32))


def mine_hard_negatives(
    positives: Labelled,
    start: Labelled,
    candidates: Iterable[Labelled],
    settings: MiningSettings = MiningSettings(),
) -> TrainingSet:
    """Fit one SVM per class, going once through all negatives and keeping the hard ones (section 4.1).

    Parameters
    ----------
    positives : Labelled
        The ground-truth windows of all classes, and for which classes each of them is a positive.
    start : Labelled
        Windows that the first SVMs are trained with, and for which classes each of them is a negative.
    candidates : iterable of Labelled
        Windows image by image, arrays or tensors on any device, and for which classes each is a negative.
        Consumed once.
    settings : MiningSettings

    Returns
    -------
    TrainingSet
        With all that is hard, and fitted: its `svms` are the result. Those of classes without any example
        are 0.

    Raises
    ------
    SppnetError
        If a class has positives and no negatives, or the other way round.
    """
    for k in np.flatnonzero(positives.classes.any(axis=0) != start.classes.any(axis=0)):
        raise SppnetError(f"class number {k} needs positive and negative examples, found one kind only")
    training = TrainingSet(
        np.concatenate([positives.features, start.features]),
        np.concatenate([positives.classes.astype(np.int8), -start.classes.astype(np.int8)]),
        settings,
        np.concatenate([_per_row(positives), _per_row(start)]),
    )
    del positives, start  # copied; mining takes long, and memory is short
    training.fit()
    joined = 0
    for features, negative, fold in candidates:
        hard = is_hard(negative, to_numpy(training.svms(features)), settings)
        chosen = np.flatnonzero(hard.any(axis=1))
        training.add(to_numpy(features[like(chosen, features)]), -hard[chosen].astype(np.int8), fold)
        joined += len(chosen)
        if joined > settings.retrain:
            training.fit()
            joined = 0
    training.fit()
    return training


def is_hard(negative: Flags, scores: FloatVector, settings: MiningSettings) -> Flags:
    """Tell which (R, K) negatives score so much that they join the training set."""
    hard: Flags = negative & (scores > settings.hard)
    return hard


def _per_row(examples: Labelled) -> IntArray:
    return np.broadcast_to(np.asarray(examples.folds, np.int64), len(examples.classes))


class TrainingSet:
    """The examples of K linear SVMs, which share memory and are trained anew from where they stood.

    Minimises, for each class, ``|w|^2 / 2 + (b / 10)^2 / 2 + C (positive_weight * sum hinge(positives) + sum
    hinge(negatives))``, the objective of the released code, by dual coordinate descent with shrinking (Hsieh
    et al., "A dual coordinate descent method for large-scale linear SVM", ICML 2008): liblinear's method, on
    features that the classes share and with a warm start, neither of which liblinear offers.

    Parameters
    ----------
    features : (n, D) float32
        Kept in half precision: the examples are what fills the memory.
    signs : (n, K) int8
        1 for a positive of the class, -1 for a negative, 0 for neither.
    settings : MiningSettings
    folds : (n,) int64, optional
        The fold of each example, for `without`; by default none is in any.

    Attributes
    ----------
    svms : LinearSVMs
        What the last `fit` gave.
    """

    svms: LinearSVMs

    def __init__(
        self, features: FloatVector, signs: Signs, settings: MiningSettings, folds: IntArray | None = None
    ) -> None:
        self.settings = settings
        self._folds = np.full(len(signs), -1) if folds is None else folds
        self._places = np.full(len(signs), -1)
        self._features = features.astype(np.float16, order="C")
        self._signs, self._alphas = signs.copy(), np.zeros(signs.shape, dtype=np.float32)
        self._size = len(signs)
        # The bias is the weight of a constant feature, regularised like the others.
        self._weights = np.zeros((signs.shape[1], features.shape[1]), dtype=np.float32)
        self._bias = np.zeros(signs.shape[1], dtype=np.float32)

    def __len__(self) -> int:
        return self._size

    def add(
        self,
        features: FloatVector | npt.NDArray[np.float16],
        signs: Signs,
        fold: IntArray | int = -1,
        places: IntArray | int = -1,
    ) -> None:
        """Take in examples.

        Parameters
        ----------
        features : (n, D) float32 or float16
        signs : (n, K) int8
        fold : int or (n,) int64
            The fold that they are in.
        places : int or (n,) int64
            Numbers by which they are known to `held` and `mark`, if these are 0 or more.
        """
        end = self._size + len(signs)
        if end > len(self._features):
            room = max(end, len(self._features) * 5 // 4)
            self._features.resize((room, self._features.shape[1]), refcheck=False)
        self._features[self._size : end] = features
        self._signs = np.concatenate([self._signs, signs])
        self._alphas = np.concatenate([self._alphas, np.zeros(signs.shape, np.float32)])
        self._folds = np.concatenate([self._folds, np.broadcast_to(fold, len(signs))])
        self._places = np.concatenate([self._places, np.broadcast_to(places, len(signs))])
        self._size = end

    @property
    def held(self) -> tuple[IntArray, Flags]:
        """The (n,) places of the examples that have one, rising, and for which classes they are negatives."""
        rows = np.argsort(self._places, kind="stable")
        rows = rows[np.searchsorted(self._places[rows], 0) :]
        return self._places[rows], self._signs[rows] < 0

    def mark(self, places: IntArray, negative: Flags) -> None:
        """Make examples that are held, by their places, negatives of further classes: (n, K) bool."""
        order = np.argsort(self._places, kind="stable")
        rows = order[np.searchsorted(self._places[order], places)]
        self._signs[rows] = np.where(negative, np.int8(-1), self._signs[rows])

    def fit(self) -> LinearSVMs:
        """Train all classes, then drop the negatives that have become easy."""
        live = self._features[: self._size]
        with ThreadPoolExecutor(thread_count()) as threads:
            list(threads.map(self._fit_class, range(self._signs.shape[1])))
        self.svms = LinearSVMs(self._weights.copy(), self._bias * BIAS_FEATURE)
        parts = (live[start : start + 1024].astype(np.float32) for start in range(0, len(live), 1024))
        scores = np.concatenate([self.svms(part) for part in parts])
        # What still carries weight stays, or the solution would move.
        easy = (self._signs < 0) & (scores < self.settings.easy) & (self._alphas == 0)
        self._signs[easy] = 0
        self._compact()
        return self.svms

    def without(self, fold: int) -> LinearSVMs:
        """Return what is learned without the examples of a fold, from where all stand; nothing changes.

        The hard negatives are those that all examples together found hard. A class that has no positive or
        no negative left has weights of 0.
        """
        weights, bias = self._weights.copy(), self._bias.copy()
        with ThreadPoolExecutor(thread_count()) as threads:
            classes = range(len(bias))
            list(threads.map(lambda k: self._fit_without(fold, k, weights[k], bias[k : k + 1]), classes))
        return LinearSVMs(weights, bias * BIAS_FEATURE)

    def _fit_class(self, k: int) -> None:
        rows = np.flatnonzero(self._signs[:, k])
        alphas = self._alphas[rows, k]
        self._descend(rows, k, alphas, self._weights[k], self._bias[k : k + 1])
        self._alphas[rows, k] = alphas

    def _fit_without(self, fold: int, k: int, weights: FloatVector, bias: FloatVector) -> None:
        left = self._signs[:, k] * (self._folds != fold)
        if not ((left > 0).any() and (left < 0).any()):
            weights[:], bias[:] = 0, 0
            return
        held = np.flatnonzero((self._folds == fold) & (self._alphas[:, k] > 0))
        shares = self._alphas[held, k] * self._signs[held, k]
        weights -= shares @ self._features[held].astype(np.float32)
        bias -= shares.sum() * np.float32(BIAS_FEATURE)
        rows = np.flatnonzero(left)
        self._descend(rows, k, self._alphas[rows, k], weights, bias)

    def _descend(
        self, rows: IntArray, k: int, alphas: FloatVector, weights: FloatVector, bias: FloatVector
    ) -> None:
        """Improve the solution of a class on some of its examples, in place."""
        # Imported late: numba takes long to start.
        from sppnet.detection.coordinate_descent import ClassExamples, Solution, descend

        signs = self._signs[rows, k].astype(np.float32)
        limits = np.where(signs > 0, self.settings.positive_weight, 1.0).astype(np.float32) * self.settings.C
        bits = self._features[: self._size].view(np.uint16)
        descend(
            ClassExamples(bits, rows, signs, limits, np.float32(BIAS_FEATURE)),
            Solution(alphas, weights, bias),
            np.float32(self.settings.tolerance),
            self.settings.epochs,
        )

    def _compact(self) -> None:
        """Close the gaps of the examples that no class needs, in place."""
        kept = np.flatnonzero(self._signs.any(axis=1))
        for start in range(0, len(kept), 512):
            part = kept[start : start + 512]
            self._features[start : start + len(part)] = self._features[part]
        self._signs, self._alphas = self._signs[kept], self._alphas[kept]
        self._folds, self._places = self._folds[kept], self._places[kept]
        self._size = len(kept)
