"""Scores of SVMs as probabilities: of how many detections of such a score one is right.

Platt, "Probabilistic outputs for support vector machines" (1999), fitted to detections after suppression,
class by class; what is right overlaps an object of its class by half or more, which no better one has taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sppnet.arrays import FloatArray, IntArray
from sppnet.boxes import Detections
from sppnet.errors import check_choice

Scores = Literal["probability", "svm"]
SCORES: tuple[Scores, ...] = ("probability", "svm")

Vector = npt.NDArray[np.float32]

# What is known before any detection was judged: logarithm of the slope, log-odds at the score CENTRE, each
# with its standard deviation; then those of a class about what all have in common.
CENTRE = -0.5
_SLOPE, _SLOPE_SPREAD, _ODDS, _ODDS_SPREAD = 1.0, 0.5, 0.0, 2.0
_CLASS_SLOPE_SPREAD, _CLASS_ODDS_SPREAD = 0.25, 1.0


@dataclass(frozen=True)
class Calibration:
    """How the score of an SVM becomes the probability that a detection is right, for each of K classes.

    ``1 / (1 + exp(-(slope * score + offset)))``: rising, so the order within a class stays.

    Attributes
    ----------
    slopes : (K,) float32
        Above 0.
    offsets : (K,) float32
    """

    slopes: Vector
    offsets: Vector

    def __call__(self, scores: FloatArray, kinds: IntArray) -> Vector:
        """Return the (R,) float32 probabilities of (R,) scores of the classes of these numbers."""
        odds = self.slopes[kinds] * scores + self.offsets[kinds]
        # Odds beyond 80 differ by nothing in single precision, and would overflow.
        probabilities: Vector = (1 / (1 + np.exp(-np.clip(odds, -80, 80)))).astype(np.float32)
        return probabilities

    def odds(self, scores: FloatArray) -> FloatArray:
        """Return the (R, K) logarithms of the odds of (R, K) scores."""
        result: FloatArray = self.slopes * scores + self.offsets
        return result

    def joined(self, other: Calibration) -> Calibration:
        """Return the calibration of these classes and, after them, of others."""
        return Calibration(
            np.concatenate([self.slopes, other.slopes]), np.concatenate([self.offsets, other.offsets])
        )

    def applied(
        self, found: Detections, classes: Sequence[str], thresholds: FloatArray | float, scores: Scores
    ) -> Detections:
        """Return the detections of at least a probability, by falling probability.

        Parameters
        ----------
        found : Detections
            With the scores of SVMs, by falling score.
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
        order = np.argsort(-chances, kind="stable")
        least = np.broadcast_to(np.asarray(thresholds, np.float32), len(classes))
        order = order[chances[order] >= least[kinds[order]]]
        values = chances if scores == "probability" else found.scores
        return Detections(found.boxes[order], values[order], tuple(found.labels[i] for i in order))


def fit_calibration(scores: Sequence[FloatArray], hits: Sequence[npt.NDArray[np.bool_]]) -> Calibration:
    """Fit the calibration of K classes to detections that were judged.

    Of each class slope and log-odds are those of greatest posterior probability. Its own detections speak
    with Platt's smoothed targets, ``(hits + 1) / (hits + 2)`` and ``1 / (misses + 2)``; where they are few,
    it is held near what all classes have in common, and that near what detectors of other data sets had.

    Parameters
    ----------
    scores : sequence of K (N,) float arrays
        Scores of SVMs of the detections of each class; there may be none.
    hits : sequence of K (N,) bool
        Which of them are right.
    """
    from scipy.optimize import minimize

    count = len(scores)
    shifted = [np.asarray(s, np.float64) - CENTRE for s in scores]
    goals = [np.where(h, (h.sum() + 1) / (h.sum() + 2), 1 / ((~h).sum() + 2)) for h in hits]

    def loss(parameters: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        common, own = parameters[:2], parameters[2:].reshape(2, count)
        gradient = np.zeros_like(parameters)
        means, spreads = np.array([_SLOPE, _ODDS]), np.array([_SLOPE_SPREAD, _ODDS_SPREAD])
        distance = (common - means) / spreads
        apart = (own - common[:, None]) / np.array([[_CLASS_SLOPE_SPREAD], [_CLASS_ODDS_SPREAD]])
        value = (distance @ distance + (apart**2).sum()) / 2
        pulls = apart / np.array([[_CLASS_SLOPE_SPREAD], [_CLASS_ODDS_SPREAD]])
        gradient[:2] = distance / spreads - pulls.sum(axis=1)
        for k, (s, goal) in enumerate(zip(shifted, goals, strict=True)):
            slope = np.exp(own[0, k])
            odds = slope * s + own[1, k]
            value += np.logaddexp(0, odds).sum() - goal @ odds
            rest = 1 / (1 + np.exp(-odds)) - goal
            pulls[:, k] += slope * (rest @ s), rest.sum()
        gradient[2:] = pulls.reshape(-1)
        return float(value), gradient

    start = np.concatenate([[_SLOPE, _ODDS], np.full(count, _SLOPE), np.full(count, _ODDS)])
    # Slopes beyond these limits would overflow on the way.
    limits = [(-3.0, 4.0), (None, None), *[(-3.0, 4.0)] * count, *[(None, None)] * count]
    best = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=limits, options={"maxiter": 1000}).x
    slopes, odds = np.exp(best[2 : 2 + count]), best[2 + count :]
    return Calibration(slopes.astype(np.float32), (odds - slopes * CENTRE).astype(np.float32))
