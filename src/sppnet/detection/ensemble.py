"""Several detectors as one: each scores all candidate windows, and their boxes are suppressed together.

The paper's section 4.4. What makes detectors complement each other are their backbones: two that differ only
in what was fitted on one backbone gained nothing there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from sppnet.arrays import Boxes, Image, Pixels
from sppnet.boxes import Detections
from sppnet.datasets.records import Sample
from sppnet.detection.postprocess import postprocess
from sppnet.detection.stream import LEAST_SCORE, Asked, detect_each, measure
from sppnet.errors import NotFittedError, SppnetError
from sppnet.evaluation.detection import DetectionReport
from sppnet.images import photo_keys, pixels_of
from sppnet.progress import StageTimer, Track, no_track
from sppnet.proposals.method import Proposer

if TYPE_CHECKING:
    from sppnet.detection.detector import Detector


class Ensemble:
    """Detectors of the same classes, each on its own backbone, that detect together (paper section 4.4).

    Each one scores every window and moves its boxes on its own. Suppression then goes over the union of these
    boxes, class by class, by their scores as they are: margins of SVMs, trained alike, compare without being
    calibrated. So a box survives that is the best of its surroundings for any of the detectors.

    Parameters
    ----------
    detectors : sequence of Detector
        Fitted, on the same classes in any order, and all different. They may differ in everything else but
        `nms_iou`, which is one for all.

    Attributes
    ----------
    detectors : tuple of Detector
        The detectors; the first one's candidate windows are those of all.
    classes_ : tuple of str
        Names of the classes, in the order of the first detector.

    Raises
    ------
    SppnetError
        If there is no detector, one is not fitted, two are the same, or classes or `nms_iou` differ.
    """

    def __init__(self, detectors: Sequence[Detector]) -> None:
        _check(detectors)
        self.detectors = tuple(detectors)

    def proposer(self, proposals: str | None = None) -> Proposer | None:
        """Return what proposes windows for all; all is as in `Detector.proposer`."""
        return self.detectors[0].proposer(proposals)

    @property
    def classes_(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the first detector."""
        return self.detectors[0].classes_

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
        threshold: float = LEAST_SCORE,
        limit: int = 100,
        timer: StageTimer | None = None,
    ) -> Detections:
        """Detect objects in one image; all is as in `Detector.predict`, and seconds add up over detectors.

        Without `windows`, all score those that the first detector takes.
        """
        timer = timer or StageTimer()
        pixels = pixels_of(image)
        boxes, scores = [], []
        for detector in self.detectors:
            with timer("backbone"):
                encoded = detector.encode(pixels)
            if windows is None:
                with timer("proposals"):
                    windows = detector.propose(pixels, encoded, proposals)
            moved, margins = detector.score(encoded, windows, regress=regress, timer=timer)
            columns = [detector.classes_.index(name) for name in self.classes_]
            boxes.append(moved[:, columns])
            scores.append(margins[:, columns])
        with timer("scoring"):
            union, nms_iou = (np.concatenate(boxes), np.concatenate(scores)), self.detectors[0].nms_iou
            return postprocess(*union, self.classes_, encoded.size, nms_iou, threshold, limit)

    def stream(
        self,
        images: Iterable[Image],
        *,
        proposals: str | None = None,
        regress: bool = True,
        threshold: float = LEAST_SCORE,
        timer: StageTimer | None = None,
    ) -> Iterator[tuple[Pixels, Detections] | Exception]:
        """Detect in many images; all is as in `Detector.stream`."""
        asked = Asked(self.proposer(proposals), regress, threshold, timer or StageTimer())
        return detect_each(self, images, asked)

    def evaluate(
        self,
        data: Sequence[Sample],
        *,
        proposals: str | None = None,
        regress: bool = True,
        track: Track = no_track,
        timer: StageTimer | None = None,
    ) -> DetectionReport:
        """Measure the ensemble on annotated images; all is as in `Detector.evaluate`."""
        asked = Asked(self.proposer(proposals), regress, timer=timer or StageTimer())
        return measure(self, data, asked, track)

    def seen(self, data: Sequence[Sample]) -> int:
        """Return how many of some images are among those that any of the detectors was fitted on."""
        photos = np.concatenate([detector.fitted_.photos for detector in self.detectors])
        return int(np.isin(photo_keys(sample.image for sample in data), photos).sum())


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
        if detector.nms_iou != first.nms_iou:
            raise SppnetError(
                f"detector {number} has nms_iou {detector.nms_iou}, expected {first.nms_iou} as the first"
            )
    for (i, one), (j, other) in combinations(enumerate(detectors, 1), 2):
        if _same(one, other):
            raise SppnetError(f"detectors {i} and {j} are the same, expected different ones")


def _same(one: Detector, other: Detector) -> bool:
    """Return whether two detectors give every window the same scores."""
    settings = [(d.fitted_.backbone.signature, d.pooling, d.layer) for d in (one, other)]
    heads = [{} if d.fitted_.head is None else d.fitted_.head.state() for d in (one, other)]
    return (
        settings[0] == settings[1]
        and np.array_equal(one.fitted_.svms.weights, other.fitted_.svms.weights)
        and heads[0].keys() == heads[1].keys()
        and all(np.array_equal(value, heads[1][name]) for name, value in heads[0].items())
    )
