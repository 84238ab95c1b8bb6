"""Several detectors as one: each scores all candidate windows, and together they say how likely each is.

The paper's section 4.4. What makes detectors complement each other are their backbones: two that differ only
in what was fitted on one backbone gained nothing there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sppnet.arrays import Boxes, FloatArray, Image
from sppnet.boxes import Detections
from sppnet.datasets.records import Sample
from sppnet.detection.calibration import Scores, shown, sigmoid
from sppnet.detection.postprocess import postprocess
from sppnet.detection.stream import Predictor
from sppnet.errors import NotFittedError, SppnetError
from sppnet.images import photo_keys, pixels_of
from sppnet.progress import StageTimer
from sppnet.proposals.method import Proposer

if TYPE_CHECKING:
    from sppnet.detection.detector import Detector

# Log-odds that no window has.
NO_ODDS = -1e30


class Ensemble(Predictor):
    """Detectors of the same classes, each on its own backbone, that detect together (paper section 4.4).

    Each one scores every window and moves its box. A window's log-odds are the mean of those that its scores
    mean to the detectors, so that one that is often wrong, whose scores say less, counts less; its box is the
    mean of the moved ones, weighted by the probabilities. Suppression then goes class by class, as ever.

    The paper compares the scores as they are, over the union of all moved boxes. Then the mistakes of a
    weaker detector come with it.

    Parameters
    ----------
    detectors : sequence of Detector
        Fitted, on the same classes in any order, and all different. They may differ in everything else but
        `nms_iou`, which is one for all; the first one's `limit` is that of all.

    Attributes
    ----------
    detectors : tuple of Detector
        The detectors; the first one's candidate windows are those of all.
    classes_ : tuple of str
        Names of the classes, in the order of the first detector.
    thresholds_ : (K,) float32
        Least probability of a detection of each class, unless another is asked for: mean of the detectors'.

    Raises
    ------
    SppnetError
        If there is no detector, one is not fitted, two are the same, or classes or `nms_iou` differ.
    """

    def __init__(self, detectors: Sequence[Detector]) -> None:
        _check(detectors)
        self.detectors, self.device = tuple(detectors), detectors[0].device

    def proposer(self, proposals: str | None = None) -> Proposer | None:
        """Return what proposes windows for all; all is as in `Detector.proposer`."""
        return self.detectors[0].proposer(proposals)

    @property
    def classes_(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the first detector."""
        return self.detectors[0].classes_

    @property
    def thresholds_(self) -> npt.NDArray[np.float32]:
        """Least probability of a detection of each class, unless another is asked for."""
        own = [detector.thresholds_[self._columns(detector)] for detector in self.detectors]
        mean: npt.NDArray[np.float32] = np.mean(own, axis=0)
        return mean

    def _columns(self, detector: Detector) -> list[int]:
        return [detector.classes_.index(name) for name in self.classes_]

    def for_threads(self, count: int) -> Ensemble:
        """Return the same for `count` threads at once; see `Detector.for_threads`."""
        return Ensemble([detector.for_threads(count) for detector in self.detectors])

    def prepare(self) -> None:
        """Do now what the first image would wait for; see `Detector.prepare`."""
        for detector in self.detectors:
            detector.prepare()

    def predict(
        self,
        image: Image,
        windows: Boxes | None = None,
        *,
        proposals: str | None = None,
        regress: bool = True,
        threshold: float | None = None,
        scores: Scores = "probability",
        timer: StageTimer | None = None,
    ) -> Detections:
        """Detect objects in one image; all is as in `Detector.predict`, and seconds add up over detectors.

        Without `windows`, all score those that the first detector takes.

        Raises
        ------
        SppnetError
            Also if scores of SVMs are asked for: those of several detectors do not compare.
        """
        if scores != "probability":
            raise SppnetError(f"found several detectors, whose {scores} scores do not compare, expected one")
        timer = timer or StageTimer()
        pixels = pixels_of(image)
        boxes, margins, odds = [], [], []
        for detector in self.detectors:
            with timer("backbone"):
                encoded = detector.encode(pixels)
            if windows is None:
                with timer("proposals"):
                    windows = detector.propose(pixels, encoded, proposals)
            moved, values = detector.score(encoded, windows, regress=regress, timer=timer)
            columns = self._columns(detector)
            boxes.append(moved[:, columns])
            margins.append(values[:, columns])
            odds.append(detector.fitted_.calibration.odds(values)[:, columns])
        with timer("scoring"):
            floors = [detector.fitted_.least_score for detector in self.detectors]
            real = np.stack([m >= floor for m, floor in zip(margins, floors, strict=True)])
            places, together = _mean(np.stack(boxes), np.stack(odds), real)
            nms_iou, limit = self.detectors[0].suppression, self.detectors[0].limit
            found = postprocess(places, together, self.classes_, encoded.size, nms_iou, NO_ODDS, limit)
            least = self.thresholds_ if threshold is None else threshold
            kinds = np.array([self.classes_.index(label) for label in found.labels], np.int64)
            chances = sigmoid(found.scores)
            return shown(found, kinds, chances, least, chances)

    def seen(self, data: Sequence[Sample]) -> int:
        """Return how many of some images are among those that any of the detectors was fitted on."""
        photos = np.concatenate([detector.fitted_.photos for detector in self.detectors])
        return int(np.isin(photo_keys(sample.image for sample in data), photos).sum())


def _mean(
    boxes: Boxes, odds: FloatArray, real: npt.NDArray[np.bool_]
) -> tuple[Boxes, npt.NDArray[np.float32]]:
    """Return boxes and log-odds of all detectors together.

    Parameters
    ----------
    boxes : (N, R, K, 4) float32
        How each of N detectors moves each window for each class.
    odds : (N, R, K) float32
        Logarithms of the odds.
    real : (N, R, K) bool
        Whether its SVM gives a window what a detection scores at least. One that none does is no detection.
    """
    chances = 1 / (1 + np.exp(-np.clip(odds, -30, 30)))[..., None]
    moved = (boxes * (chances / chances.sum(axis=0))).sum(axis=0)
    together = np.where(real.any(axis=0), odds.mean(axis=0), 2 * NO_ODDS)
    return moved.astype(np.float32), together.astype(np.float32)


def _check(detectors: Sequence[Detector]) -> None:
    """Raise an error for detectors that cannot detect together."""
    if not detectors:
        raise SppnetError("found no detector to combine, expected at least one")
    for number, detector in enumerate(detectors, 1):
        if not detector.__sklearn_is_fitted__():
            raise NotFittedError(f"detector {number} is not fitted yet; call fit, or load one")
    first = detectors[0]
    for number, detector in enumerate(detectors, 1):
        if set(detector.classes_) != set(first.classes_):
            raise SppnetError(
                f"detector {number} knows {', '.join(detector.classes_)}, expected the classes of the first: "
                f"{', '.join(first.classes_)}"
            )
        if detector.suppression != first.suppression:
            raise SppnetError(
                f"detector {number} has nms_iou {detector.suppression}, expected {first.suppression} as the "
                "first"
            )
    for (i, one), (j, other) in combinations(enumerate(detectors, 1), 2):
        if _same(one, other):
            raise SppnetError(f"detectors {i} and {j} are the same, expected different ones")


def _same(one: Detector, other: Detector) -> bool:
    """Return whether two detectors give every window the same scores."""
    settings = [(d.fitted_.backbone.signature, d.pooling, d.layer, d.moves) for d in (one, other)]
    heads = [{} if d.fitted_.head is None else d.fitted_.head.state() for d in (one, other)]
    return (
        settings[0] == settings[1]
        and np.array_equal(one.fitted_.svms.weights, other.fitted_.svms.weights)
        and heads[0].keys() == heads[1].keys()
        and all(np.array_equal(value, heads[1][name]) for name, value in heads[0].items())
    )
