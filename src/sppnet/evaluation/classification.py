"""How well images are classified: shares of right answers, and what is taken for what.

Everything here takes arrays and knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sppnet.arrays import FloatArray, IntArray
from sppnet.errors import SppnetError


@dataclass(frozen=True)
class ClassificationReport:
    """How well images were classified, from `evaluate_classification`.

    Attributes
    ----------
    classes : tuple of K str
        Names of the classes.
    top1, top5 : float
        Share of the images whose class is the most probable one, or among the five most probable.
    confusion : (K, K) int64
        Number of images of each class (rows) by the class they are taken for (columns).
    seen : int
        Number of images that are known to be among those the classifier was fitted on: if there are any, the
        figures say little about new images.
    unreadable : tuple of str
        A line for each image that could not be read and was left out.
    """

    classes: tuple[str, ...]
    top1: float
    top5: float
    confusion: IntArray
    seen: int = 0
    unreadable: tuple[str, ...] = ()

    @property
    def images(self) -> IntArray:
        """Number of images of each class, (K,)."""
        return np.asarray(self.confusion.sum(axis=1))

    @property
    def right(self) -> IntArray:
        """Number of images of each class that are taken for it, (K,)."""
        return np.asarray(self.confusion.diagonal())

    @property
    def mean_class(self) -> float:
        """Mean over the classes that have images of the share of their images that are right."""
        there = self.images > 0
        return float((self.right[there] / self.images[there]).mean())

    def facts(self) -> dict[str, Any]:
        """Return the numbers as JSON has them."""
        counts = zip(self.classes, self.images.tolist(), self.right.tolist(), strict=True)
        return {
            "top1": self.top1,
            "top5": self.top5,
            "mean_class": self.mean_class,
            "classes": {name: {"images": images, "right": right} for name, images, right in counts},
            "confusion": self.confusion.tolist(),
            "images": int(self.confusion.sum()),
            "seen": self.seen,
            "unreadable": list(self.unreadable),
        }


def evaluate_classification(
    scores: FloatArray, labels: npt.NDArray[np.integer[Any]], classes: Sequence[str]
) -> ClassificationReport:
    """Measure class scores.

    Parameters
    ----------
    scores : (N, K) float array
        The higher, the more probable; of equal scores the first class is taken.
    labels : (N,) integers
        The right classes, 0 to K - 1.
    classes : sequence of K str
        Names of the classes.

    Returns
    -------
    ClassificationReport

    Raises
    ------
    SppnetError
        If there is no image, or the shapes, labels or names do not fit.

    Examples
    --------
    >>> scores = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    >>> report = evaluate_classification(scores, np.array([0, 1, 1]), ["cat", "dog"])
    >>> round(report.top1, 3), report.mean_class, report.confusion.tolist()
    (0.667, 0.75, [[1, 0], [1, 1]])
    """
    from sklearn.metrics import confusion_matrix

    count, width = scores.shape if scores.ndim == 2 else (0, 0)
    if not count or labels.shape != (count,) or labels.min() < 0 or labels.max() >= width:
        raise SppnetError(
            f"expected scores (N, K) and labels (N,) below K, found {scores.shape} and {labels.shape}"
        )
    if len(classes) != width:
        raise SppnetError(f"found {len(classes)} names of classes, expected one for each of {width} scores")
    order = np.argsort(-scores, axis=1, kind="stable")
    found = order[:, :5] == labels[:, None]
    confusion = confusion_matrix(labels, order[:, 0], labels=range(width))
    return ClassificationReport(
        tuple(classes), float(found[:, 0].mean()), float(found.any(axis=1).mean()), confusion
    )
