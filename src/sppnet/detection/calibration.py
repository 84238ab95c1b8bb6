"""Scores of SVMs as probabilities: of how many detections of such a score one is right.

Platt, "Probabilistic outputs for support vector machines" (1999), with a bend, fitted to detections after
suppression, class by class. What is right overlaps an object of its class by half or more, which no better
one has taken. Of the most certain detections, some are wrong: they show another class, or an object for the
second time. A single slope, which the mass of background at low scores sets, would not know of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from sppnet.arrays import FloatArray, IntArray
from sppnet.boxes import Detections
from sppnet.errors import check_choice

Scores = Literal["probability", "svm"]
SCORES: tuple[Scores, ...] = ("probability", "svm")

Vector = npt.NDArray[np.float32]

# What is known before any detection was judged, of the log-odds at the knot and the logarithms of the slopes
# below and above: means, standard deviations, and those of a class about what all have in common.
KNOT = -0.5
_MEANS = np.array([0.0, 1.7, 1.0])
_SPREADS = np.array([2.0, 0.7, 0.7])
_CLASS_SPREADS = np.array([1.0, 0.35, 0.35])
# So many hits weigh as much as what the classes have in common, for where a class has its knot.
_HITS = 5
# Of each class the best detections speak: so many for each right one, and some more. The mass of windows of
# background would set the slope otherwise, where the probability is next to 0 anyway.
_FOR_EACH, _AT_LEAST = 3, 20


@dataclass(frozen=True)
class Calibration:
    """How the score of an SVM becomes the probability that a detection is right, for each of K classes.

    ``1 / (1 + exp(-odds))`` with log-odds that rise with the score along two straight lines, which meet at a
    knot. Rising, so the order within a class stays.

    Attributes
    ----------
    knots : (K,) float32
        The scores where the lines meet.
    levels : (K,) float32
        Log-odds there.
    slopes : (K, 2) float32
        Slopes below and above, greater than 0.
    """

    knots: Vector
    levels: Vector
    slopes: Vector

    def __call__(self, scores: FloatArray, kinds: IntArray) -> Vector:
        """Return the (R,) float32 probabilities of (R,) scores of the classes of these numbers."""
        away = scores - self.knots[kinds]
        low, high = self.slopes[kinds].T
        odds = self.levels[kinds] + low * np.minimum(away, 0) + high * np.maximum(away, 0)
        return sigmoid(odds)

    def odds(self, scores: FloatArray) -> FloatArray:
        """Return the (R, K) log-odds of (R, K) scores."""
        away = scores - self.knots
        low, high = self.slopes.T
        result: FloatArray = self.levels + low * np.minimum(away, 0) + high * np.maximum(away, 0)
        return result

    def joined(self, other: Calibration) -> Calibration:
        """Return the calibration of these classes and, after them, of others."""
        return Calibration(*(np.concatenate(pair) for pair in zip(*map(_parts, (self, other)), strict=True)))

    def applied(
        self, found: Detections, classes: Sequence[str], thresholds: FloatArray | float, scores: Scores
    ) -> Detections:
        """Return the detections of at least a probability, by falling probability.

        Parameters
        ----------
        found : Detections
            With the scores of SVMs.
        classes : sequence of K str
        thresholds : (K,) float array or float
            Least probability, of each class or of all.
        scores : {"probability", "svm"}
            What the result holds; scores of SVMs fall within a class only.
        """
        check_choice("scores", scores, SCORES)
        numbers = {name: k for k, name in enumerate(classes)}
        kinds = np.array([numbers[label] for label in found.labels], np.int64)
        chances = self(found.scores, kinds)
        return shown(found, kinds, chances, thresholds, found.scores if scores == "svm" else chances)


def shown(
    found: Detections, kinds: IntArray, chances: Vector, thresholds: FloatArray | float, scores: Vector
) -> Detections:
    """Return the detections of at least a probability, by falling probability.

    Parameters
    ----------
    found : Detections
    kinds : (D,) int64
        Their classes.
    chances : (D,) float32
        Their probabilities.
    thresholds : (K,) float array or float
        Least probability, of each class or of all.
    scores : (D,) float32
        The scores to give them.
    """
    order = np.argsort(-chances, kind="stable")
    least = np.asarray(thresholds, np.float32)
    order = order[chances[order] >= (least[kinds[order]] if least.ndim else least)]
    return Detections(found.boxes[order], scores[order], tuple(found.labels[i] for i in order))


def sigmoid(odds: FloatArray) -> Vector:
    """Return the probabilities of log-odds, as float32."""
    # Log-odds beyond 80 differ by nothing in single precision, and would overflow.
    probabilities: Vector = (1 / (1 + np.exp(-np.clip(odds, -80, 80)))).astype(np.float32)
    return probabilities


def _parts(calibration: Calibration) -> tuple[Vector, Vector, Vector]:
    return calibration.knots, calibration.levels, calibration.slopes


def fit_calibration(scores: Sequence[FloatArray], hits: Sequence[npt.NDArray[np.bool_]]) -> Calibration:
    """Fit the calibration of K classes to detections that were judged.

    A class has its knot at the median score of its hits, and there log-odds and slopes of greatest posterior
    probability. Its own detections speak with Platt's smoothed targets, ``(hits + 1) / (hits + 2)`` and
    ``1 / (misses + 2)``; where they are few, it is held near what all classes have in common, and that near
    what detectors of other data sets had.

    Parameters
    ----------
    scores : sequence of K (N,) float arrays
        Scores of SVMs of the detections of each class; there may be none.
    hits : sequence of K (N,) bool
        Which of them are right.
    """
    from scipy.optimize import minimize

    count = len(scores)
    scores, hits = zip(*map(_best, scores, hits), strict=True) if count else ((), ())
    right = [np.asarray(s, np.float64)[h] for s, h in zip(scores, hits, strict=True)]
    common = float(np.median(np.append(np.concatenate(right), [KNOT] * _HITS)))
    sums = [len(r) * np.median(r) if len(r) else 0.0 for r in right]
    knots = np.array([(s + _HITS * common) / (len(r) + _HITS) for s, r in zip(sums, right, strict=True)])
    away = [np.asarray(s, np.float64) - knot for s, knot in zip(scores, knots, strict=True)]
    goals = [np.where(h, (h.sum() + 1) / (h.sum() + 2), 1 / ((~h).sum() + 2)) for h in hits]
    start = np.tile(_MEANS, count + 1)
    # Slopes beyond these limits would overflow on the way.
    limits = [(None, None), (-3.0, 4.0), (-3.0, 4.0)] * (count + 1)
    loss = partial(_loss, away, goals)
    best = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=limits, options={"maxiter": 1000}).x
    own = best.reshape(-1, 3)[1:].astype(np.float32)
    return Calibration(knots.astype(np.float32), own[:, 0], np.exp(own[:, 1:]))


def _best(scores: FloatArray, hits: npt.NDArray[np.bool_]) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Return the best detections of a class: so many for each right one, and some more."""
    order = np.argsort(-scores, kind="stable")[: _FOR_EACH * int(hits.sum()) + _AT_LEAST]
    return scores[order], hits[order]


def _loss(
    away: Sequence[FloatArray], goals: Sequence[FloatArray], parameters: FloatArray
) -> tuple[float, FloatArray]:
    """Return the negative logarithm of the posterior, and its gradient.

    `parameters` are log-odds at the knot and logarithms of the slopes, first those in common, then of each
    class; `away` how far the scores of each class are from its knot; `goals` what their probabilities should
    be.
    """
    common, own = parameters[:3], parameters[3:].reshape(-1, 3)
    distance, apart = (common - _MEANS) / _SPREADS, (own - common) / _CLASS_SPREADS
    value = (distance @ distance + (apart**2).sum()) / 2
    pulls = apart / _CLASS_SPREADS
    first = distance / _SPREADS - pulls.sum(axis=0)
    for k, (x, goal) in enumerate(zip(away, goals, strict=True)):
        parts = np.stack([np.ones(len(x)), np.minimum(x, 0), np.maximum(x, 0)])
        weights = np.append(own[k, 0], np.exp(own[k, 1:]))
        odds = weights @ parts
        value += np.logaddexp(0, odds).sum() - goal @ odds
        pulls[k] += parts @ (1 / (1 + np.exp(-odds)) - goal) * np.append(1, weights[1:])
    return float(value), np.append(first, pulls)
