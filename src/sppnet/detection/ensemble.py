"""Several detectors as one: each scores all candidate windows, and their boxes are suppressed together.

The paper's section 4.4. What makes detectors complement each other are their backbones: two that differ only in
what was fitted on one backbone gained nothing there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch

from sppnet.arrays import Boxes, Image
from sppnet.boxes import Detections
from sppnet.detection.detector import Detector
from sppnet.detection.postprocess import postprocess
from sppnet.errors import SppnetError
from sppnet.features.windows import encode
from sppnet.images import pixels_of
from sppnet.progress import StageTimer


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
    classes_ : tuple of str
        In the order of the first detector.

    Raises
    ------
    SppnetError
        If there is no detector, one is not fitted, two are the same, or classes or `nms_iou` differ.
    """

    def __init__(self, detectors: Sequence[Detector]) -> None:
        _check(detectors)
        self.detectors = tuple(detectors)
        self.classes_ = self.detectors[0].classes_

    def predict(
        self,
        image: Image,
        windows: Boxes | None = None,
        *,
        regress: bool = True,
        threshold: float = -1.5,
        limit: int = 100,
        timer: StageTimer | None = None,
    ) -> Detections:
        """Detect objects in one image; all is as in `Detector.predict`, and seconds add up over detectors.

        Without `windows`, all score those that the first detector's maps propose.
        """
        timer = timer or StageTimer()
        pixels = pixels_of(image)
        shape = pixels.shape[:2]
        boxes, scores = [], []
        for detector in self.detectors:
            with timer("backbone"):
                maps = encode(detector.backbone, pixels, detector.sides)
            if windows is None:
                with timer("proposals"):
                    windows = detector.propose(maps, shape)
            moved, margins = detector.score_maps(maps, shape, windows, regress=regress, timer=timer)
            columns = [detector.classes_.index(name) for name in self.classes_]
            boxes.append(moved[:, columns])
            scores.append(margins[:, columns])
        with timer("scoring"):
            union, nms_iou = (torch.cat(boxes), torch.cat(scores)), self.detectors[0].nms_iou
            return postprocess(*union, self.classes_, shape, nms_iou, threshold, limit)


def _check(detectors: Sequence[Detector]) -> None:
    """Raise ValueError for detectors that cannot detect together."""
    if not detectors:
        raise SppnetError("found no detector to combine, expected at least one")
    first = detectors[0]
    for number, detector in enumerate(detectors, 1):
        if not detector.classes_:
            raise SppnetError(f"detector {number} is not fitted yet; call fit, or load one")
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
    names = ("sides", "levels", "reference", "projection", "scale_rule", "layer")
    settings = [(d.backbone.signature, *(getattr(d, name) for name in names)) for d in (one, other)]
    heads = [{} if d.head_ is None else d.head_.state_dict() for d in (one, other)]
    return (
        settings[0] == settings[1]
        and np.array_equal(one.svms_.weights, other.svms_.weights)
        and heads[0].keys() == heads[1].keys()
        and all(torch.equal(value, heads[1][name]) for name, value in heads[0].items())
    )
