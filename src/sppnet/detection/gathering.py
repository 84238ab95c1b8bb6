"""What one photo gives to a fit, once its maps are there: vectors to learn from, and what a model finds."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from sppnet.arrays import Boxes, IntArray, to_numpy
from sppnet.boxes import Detections
from sppnet.detection.moving import Scored, moved_again
from sppnet.detection.postprocess import postprocess
from sppnet.regression import encode_deltas

if TYPE_CHECKING:
    from sppnet.detection.fit import FitSettings, Fitted
    from sppnet.detection.sampling import Plan
    from sppnet.features.encoded import EncodedImage
    from sppnet.features.windows import WindowPooling

Halves = npt.NDArray[np.float16]


class FirstVectors(NamedTuple):
    """What a photo teaches before any window of it was scored, in half precision.

    Attributes
    ----------
    positives : (G, D) float16
        The vectors of its objects.
    start : (S, D) float16
        Those of the windows that the first SVMs are trained with.
    moves : (M, D) float16
        Those of the windows that teach box regression.
    deltas : (M, 4) float32
        What these are to be moved by.
    kinds : (M,) int64
        The class whose regression each of them teaches.
    """

    positives: Halves
    start: Halves
    moves: Halves
    deltas: Boxes
    kinds: IntArray


def pool_first(plan: Plan, encoded: EncodedImage, pooling: WindowPooling) -> FirstVectors:
    """Pool what a photo teaches before any window of it was scored."""
    taught = np.flatnonzero(plan.fitted >= 0)
    first, second = len(plan.labels), len(plan.labels) + len(plan.start)
    wanted = np.concatenate([np.arange(first), plan.start, taught])
    features = to_numpy(pooling(encoded, plan.boxes[wanted])).astype(np.float16)
    deltas = encode_deltas(plan.boxes[taught], plan.truth[taught])
    return FirstVectors(
        features[:first].copy(),
        features[first:second].copy(),
        features[second:].copy(),
        deltas,
        plan.fitted[taught],
    )


def drop_duplicates(plan: Plan, encoded: EncodedImage, pooling: WindowPooling) -> None:
    """Leave one negative of the windows that cover the same cells at the same scale."""
    duplicate = np.ones(len(plan.boxes), dtype=bool)
    duplicate[pooling.distinct(encoded, plan.boxes)] = False
    plan.negative[duplicate] = False


def later_negatives(plan: Plan) -> npt.NDArray[np.bool_]:
    """Return the (R, K) bool of the negatives that are not in the training set from the start."""
    negative = plan.negative.copy()
    negative[plan.start] = False
    return negative


def find(model: Fitted, encoded: EncodedImage, windows: Boxes, settings: FitSettings) -> Detections:
    """Detect in one image, with scores of the SVMs."""
    if settings.maps and model.objectness is not None:
        windows = model.objectness.propose(encoded).boxes
    windows = np.asarray(windows, np.float32).reshape(-1, 4)
    if encoded.windows is not None:
        windows = encoded.windows.boxes

    def look(places: Boxes) -> Scored:
        return model.score(settings.pooling(encoded, places), places, settings.layer, own=encoded.windows)

    found = moved_again(look, look(windows), encoded.size, model, settings.moves - 1)
    nms_iou, limit = settings.nms_iou, settings.limit
    return postprocess(*found, model.classes, encoded.size, nms_iou, model.least_score, limit)
