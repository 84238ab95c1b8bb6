"""Whether scores are probabilities: of what is said to be right in 70 of 100 cases, how much is.

Everything here takes arrays and knows no model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sppnet.arrays import FloatArray, IntArray
from sppnet.errors import SppnetError

Float64Array = npt.NDArray[np.float64]

# Detections of less are background that no one takes for objects: so many that in a mean over all of them the
# errors of the others drown.
LIKELY = 0.05


@dataclass(frozen=True)
class Reliability:
    """What probabilities promise and what they keep, bin by bin: the points of a reliability plot.

    Attributes
    ----------
    edges : (B + 1,) float64
        Borders of the bins, rising; a bin holds its lower one, the last one both. Empty without a case.
    mean : (B,) float64
        Mean of the probabilities in each bin: the share of hits that they promise.
    observed : (B,) float64
        Share of hits in each bin.
    counts : (B,) int64
        Number of cases in each bin, never 0.
    """

    edges: Float64Array
    mean: Float64Array
    observed: Float64Array
    counts: IntArray

    @property
    def error(self) -> float:
        """Mean of the distance between promised and observed, weighted by cases, in [0, 1]; nan of none."""
        if not len(self.counts):
            return math.nan
        return float(np.abs(self.mean - self.observed) @ self.counts / self.counts.sum())


def reliability(probabilities: FloatArray, hits: npt.ArrayLike, bins: int = 10) -> Reliability:
    """Sort cases into bins of equal mass by their probability, and hold promises against what happened.

    Bins are of equal mass, not of equal width, since scores of detections crowd near 0 (Nixon et al.,
    "Measuring Calibration in Deep Learning", 2019). Cases of one probability are never parted: where there
    are many, as after an isotonic calibration, bins differ in mass and there are fewer.

    Parameters
    ----------
    probabilities : (N,) float array
        In [0, 1].
    hits : (N,) array-like of bool
        What came true.
    bins : int
        Most bins to make.

    Returns
    -------
    Reliability

    Raises
    ------
    SppnetError
        If the lengths differ, a probability is none, or there is to be no bin.

    Examples
    --------
    >>> found = reliability(np.array([0.1, 0.2, 0.8, 0.9]), [False, False, True, True], bins=2)
    >>> found.mean.round(2).tolist(), found.observed.tolist(), found.counts.tolist()
    ([0.15, 0.85], [0.0, 1.0], [2, 2])
    """
    p, came = np.asarray(probabilities, np.float64), np.asarray(hits, bool)
    if p.ndim != 1 or p.shape != came.shape:
        raise SppnetError(f"probabilities and hits must be of one length, got {p.shape} and {came.shape}")
    if not ((p >= 0) & (p <= 1)).all():
        worst = p[~((p >= 0) & (p <= 1))][0]
        raise SppnetError(f"found the probability {worst:g}, expected one in [0, 1]")
    if bins < 1:
        raise SppnetError(f"found {bins} bins, expected at least 1")
    ordered = np.sort(p)
    starts = np.unique(ordered[len(p) * np.arange(bins) // bins]) if len(p) else ordered
    place = np.searchsorted(starts, p, side="right") - 1
    counts = np.bincount(place, minlength=len(starts))
    mean, observed = (np.bincount(place, values, len(starts)) / counts for values in (p, came))
    return Reliability(np.append(starts, ordered[-1:]), mean, observed, counts)


def expected_calibration_error(probabilities: FloatArray, hits: npt.ArrayLike, bins: int = 10) -> float:
    """Return by how much probabilities are off on the mean, over the bins of `reliability`.

    Returns
    -------
    float
        In [0, 1]; nan if there is no case.
    """
    return reliability(probabilities, hits, bins).error
