"""Test-time augmentation: an image is looked at several times, at other sizes and flipped.

For networks that propose windows themselves. What the looks find is fused: boxes that overlap become one, at
their mean weighted by probability, as likely as they are on average over all looks (weighted boxes fusion:
Solovyev, Wang, Gabruseva, arXiv 1910.13302). Scores of the union of all windows, or means of each window's
scores, measured worse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sppnet.arrays import Boxes, FloatArray, Image, IntArray, Pixels
from sppnet.boxes import Detections, flip, iou
from sppnet.datasets.records import Sample
from sppnet.detection.calibration import Scores
from sppnet.detection.stream import Predictor
from sppnet.errors import SppnetError
from sppnet.images import pixels_of
from sppnet.progress import StageTimer
from sppnet.proposals.maps import MAPS
from sppnet.proposals.odds import SLOPE

if TYPE_CHECKING:
    from sppnet.detection.detector import Detector

VIEWS = ((1.0, False), (1.0, True), (1.25, False), (1.25, True))
"""How an image is looked at: times its usual size, and whether flipped."""

FUSED_IOU = 0.55
"""Boxes of two looks are of one object if they overlap by more."""


class Augmented(Predictor):
    """A detector that looks at each image four times: as ever, a quarter larger, and each flipped, too.

    It can find more, and takes some four times as long. `predict`, `stream` and `evaluate` are as those of
    the detector, but that windows are always the network's own.

    Parameters
    ----------
    detector : Detector
        Fitted, with a network that proposes windows.

    Attributes
    ----------
    detector : Detector
    classes_ : tuple of str
        The detector's.
    thresholds_ : (K,) float32
        The detector's.

    Raises
    ------
    SppnetError
        If its network does not propose windows.
    """

    def __init__(self, detector: Detector) -> None:
        if detector.fitted_.side is None:
            raise SppnetError(
                "found a detector with windows of another source, expected one whose network proposes them, "
                "to look again: one that was fitted by time, or animals"
            )
        self.detector, self.side, self.device = detector, detector.fitted_.side, detector.device

    @property
    def classes_(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.detector.classes_

    @property
    def thresholds_(self) -> npt.NDArray[np.float32]:
        """Least probability of a detection of each class, unless another is asked for."""
        return self.detector.thresholds_

    def proposer(self, proposals: str | None = None) -> None:
        """Return nothing, as the network proposes the windows.

        Raises
        ------
        SppnetError
            If others are asked for.
        """
        if proposals not in (None, MAPS):
            raise SppnetError(f"found the proposals {proposals!r}, expected the network's own, to look again")

    def for_threads(self, count: int) -> Augmented:
        """Return the same for `count` threads at once; see `Detector.for_threads`."""
        return Augmented(self.detector.for_threads(count))

    def prepare(self) -> None:
        """Do now what the first image would wait for."""
        self.detector.prepare()

    def seen(self, data: Sequence[Sample]) -> int:
        """Return how many of some images are among those that the detector was fitted on."""
        return self.detector.seen(data)

    def predict(
        self,
        image: Image,
        windows: None = None,
        *,
        proposals: str | None = None,
        regress: bool = True,
        threshold: float | None = None,
        scores: Scores = "probability",
        timer: StageTimer | None = None,
    ) -> Detections:
        """Detect objects in one image; all is as in `sppnet.detection.detector.Detector.predict`.

        Raises
        ------
        SppnetError
            Also if there are windows, or others than the network's own are asked for.
        """
        self.proposer(proposals)
        if windows is not None:
            raise SppnetError("found windows, expected none: the network proposes them in every look")
        pixels, timer, looks = pixels_of(image), timer or StageTimer(), []
        for view, side, flipped in views(pixels, self.side):
            with timer("backbone"):
                encoded = self.detector.fitted_.backbone.encode(view, (side,))
            found = self.detector.predict(encoded, regress=regress, threshold=0.0, scores="svm", timer=timer)
            looks.append(turned(found, pixels.shape[1]) if flipped else found)
        with timer("scoring"):
            found = fused(looks, self.detector.limit)
            likely = self.thresholds_ if threshold is None else threshold
            return self.detector.fitted_.calibration.applied(found, self.classes_, likely, scores)


def views(image: Pixels, side: int) -> Iterator[tuple[Pixels, int, bool]]:
    """Yield what is looked at of an (H, W, 3) image, at which shorter side, and whether it is flipped."""
    for times, flipped in VIEWS:
        yield np.ascontiguousarray(image[:, ::-1]) if flipped else image, round(times * side), flipped


def turned(found: Detections, width: int) -> Detections:
    """Return detections of a flipped image of that width where they lie in the image itself."""
    return Detections(flip(found.boxes, width), found.scores, found.labels)


def fused(looks: Sequence[Detections], limit: int) -> Detections:
    """Fuse what several looks at an image found.

    Parameters
    ----------
    looks : sequence of Detections
        What each found, after suppression, with scores of SVMs.
    limit : int
        Most detections of a class.

    Returns
    -------
    Detections
        By falling score, again as SVMs score.
    """
    every = np.concatenate([found.boxes for found in looks])
    scores = np.concatenate([found.scores for found in looks]).astype(np.float64)
    labels = np.array([label for found in looks for label in found.labels], dtype=object)
    look = np.repeat(np.arange(len(looks)), [len(found) for found in looks])
    chances = 1 / (1 + np.exp(-SLOPE * scores))
    boxes, means, names = [np.zeros((0, 4))], [], []
    for name in dict.fromkeys(labels):
        rows = np.flatnonzero(labels == name)
        here = list(_objects(every[rows], chances[rows], look[rows]))
        places, likely = zip(*(_mean(every[rows[o]], chances[rows[o]]) for o in here), strict=True)
        best = np.argsort(-np.array(likely), kind="stable")[:limit]
        boxes.append(np.array(places)[best])
        means += (np.array(likely)[best] / len(looks)).tolist()
        names += [str(name)] * len(best)
    odds = np.log(means) - np.log1p(-np.array(means)) if means else np.zeros(0)
    order = np.argsort(-odds, kind="stable")
    found = np.concatenate(boxes)[order].astype(np.float32)
    return Detections(found, (odds / SLOPE)[order].astype(np.float32), tuple(names[i] for i in order))


def _objects(boxes: Boxes, chances: FloatArray, look: IntArray) -> Iterator[IntArray]:
    """Yield the rows of each object of a class: the likeliest left, and at most one of each other look."""
    overlap, free = iou(boxes, boxes), np.ones(len(boxes), bool)
    for first in np.argsort(-chances, kind="stable"):
        if not free[first]:
            continue
        rows = [first]
        suits = free & (overlap[first] > FUSED_IOU)
        for other in np.unique(look[suits]):
            mine = np.flatnonzero(suits & (look == other))
            if other != look[first]:
                rows.append(mine[np.argmax(overlap[first, mine] * chances[mine])])
        free[rows] = False
        yield np.array(rows)


def _mean(boxes: Boxes, chances: FloatArray) -> tuple[FloatArray, float]:
    """Return the mean of boxes, weighted by their probabilities, and the sum of these."""
    total = float(chances.sum())
    return chances @ boxes / total, total
