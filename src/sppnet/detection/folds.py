"""Which photos a fit keeps aside to measure on: folds of them, or one held-out part of many.

A score of a photo that was learned from says little of new photos. So a fit learns some detectors more, each
without a fold of the photos, and scores every photo by the one that did not see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sppnet.arrays import IntArray
from sppnet.boxes import Target

LARGE = 500
"""Of more photos than this one fold is held out; of fewer, each fold in turn."""

HELD_OUT = 300
"""Most photos that are held out of many."""

# A smaller part than a quarter would say too little where there is only one.
_QUARTERS = 4


@dataclass(frozen=True)
class Folds:
    """The fold of each photo, and which classes can be learned without it.

    Attributes
    ----------
    numbers : (n,) int64
        Fold of each photo; -1 of one that belongs to none, and teaches in all.
    learned : (F, K) bool
        Whether there are examples of a class outside of a fold: without, it cannot be measured there.
    """

    numbers: IntArray
    learned: npt.NDArray[np.bool_]

    @property
    def count(self) -> int:
        """F, the number of folds."""
        return len(self.learned)


def shown_classes(targets: Sequence[Target], classes: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Return the (n, K) bool of which classes each photo shows, difficult objects and crowds aside."""
    named = [
        {label for label, ignored in zip(t.labels, t.ignored, strict=True) if not ignored} for t in targets
    ]
    return np.array([[name in there for name in classes] for there in named], bool).reshape(-1, len(classes))


def assign_folds(
    shown: npt.NDArray[np.bool_], photos: npt.NDArray[np.uint64], count: int, seed: int
) -> IntArray:
    """Deal photos into folds, such that each class is shown in all of them as evenly as it can be.

    Photos of rare classes are dealt first, each to the fold with the fewest photos of its rarest class, and
    of these to the one with the fewest photos (after Sechidis et al., "On the stratification of multi-label
    data", 2011).

    Parameters
    ----------
    shown : (n, K) bool
        Which classes each photo shows.
    photos : (n,) uint64
        The same number for the same photo, whose copies come into one fold.
    count : int
        Number of folds; with fewer different photos, as many as these. With less than two, there is none.
    seed : int
        Seed of the order among equals.

    Returns
    -------
    (n,) int64
        The fold of each photo, from 0; -1 of all where there is none.
    """
    _, group = np.unique(photos, return_inverse=True)
    total = int(group.max(initial=-1)) + 1
    count = min(count, total)
    if count < 2:
        return np.full(len(shown), -1, np.int64)
    there = np.zeros((total, shown.shape[1]), bool)
    np.logical_or.at(there, group, shown)
    # Every photo is in the last column, the commonest class.
    there = np.concatenate([there, np.ones((total, 1), bool)], axis=1)
    rarest = np.where(there, there.sum(axis=0), np.inf).argmin(axis=1)
    order = np.random.default_rng(seed).permutation(total)
    order = order[np.argsort(there.sum(axis=0)[rarest[order]], kind="stable")]
    held, fold = np.zeros((count, there.shape[1]), np.int64), np.zeros(total, np.int64)
    for g in order:
        fold[g] = np.lexsort((held[:, -1], held[:, rarest[g]]))[0]
        held[fold[g]] += there[g]
    return fold[group]


def choose_folds(
    shown: npt.NDArray[np.bool_], photos: npt.NDArray[np.uint64], count: int, seed: int, *, one: bool = False
) -> IntArray:
    """Return the fold of each photo as a fit takes it: see `assign_folds`.

    Of more than `LARGE` photos, or if `one` is asked for, only the first fold is held out, of four at most,
    and at most `HELD_OUT` photos of it; the others are in none, -1.
    """
    if len(shown) <= LARGE and not one:
        return assign_folds(shown, photos, count, seed)
    fold = assign_folds(shown, photos, min(count, _QUARTERS), seed)
    # Copies stay together: whole photos are left out, by their numbers, which are as good as random.
    distinct = np.unique(photos[fold == 0])
    fold[(fold != 0) | ~np.isin(photos, distinct[:HELD_OUT])] = -1
    return fold
