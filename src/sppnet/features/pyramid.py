"""Backbones with a feature pyramid: maps of several strides of one pass, and windows that it proposes.

Above some backbones a small network joins the maps of the last stages (Lin et al., "Feature Pyramid
Networks for Object Detection", arXiv 1612.03144) and says of each cell how likely it lies in an object, and
how far the object's sides are (Tian et al., "FCOS", arXiv 1904.01355). All of it is one graph, which
`sppnet.rpn` trains.

Windows are pooled from the maps of all levels, side by side. That takes the place of the paper's several
scales of the image, each with a pass of its own (section 4.1). To choose the level that suits a window
measured worse.
"""

from __future__ import annotations

import numpy as np

from sppnet.arrays import FloatArray, IntArray
from sppnet.boxes import clip, nms
from sppnet.features.encoded import EncodedImage, FeatureMaps, OwnWindows
from sppnet.features.graph import MAPS, STRIDES

WINDOWS, WINDOW_IOU = 1000, 0.75
"""Most windows of an image, and the overlap from which one of two is enough."""

SURE, UNLIKELY = 300, -6.0
"""So many windows are taken in any case; the others if their log-odds are more."""

LOOKED_AT, LEAST_SIDE = 3000, 1.0
"""Most cells that are looked at for windows, and the least side of these in pixels."""


def with_windows(maps: FeatureMaps, size: tuple[int, int]) -> EncodedImage:
    """Return the maps of the levels as those of an image, with the windows that they propose.

    Parameters
    ----------
    maps : FeatureMaps
        The maps of `STAGES`.
    size : (int, int)
        Height and width of the original image.
    """
    levels = len(MAPS)
    pooled = FeatureMaps(maps.stages[:levels], maps.geometry[:levels], maps.factors, maps.side)
    return EncodedImage(size, (pooled,), windows=_windows(maps, size))


def _windows(maps: FeatureMaps, size: tuple[int, int]) -> OwnWindows:
    """Return what the cells of all levels propose, best first, scored by the log-odds of an object."""
    height, width = size
    odds, boxes, kinds = [], [], []
    for answers, stride in zip(maps.stages[len(STRIDES) :], STRIDES, strict=True):
        rows = np.asarray(answers).reshape(len(answers), -1)
        best = _top(rows[0], LOOKED_AT)
        y, x = np.divmod(best, answers.shape[-1])
        centres = np.stack([x, y]) * stride + stride / 2
        corners = np.concatenate([centres - rows[1:3, best], centres + rows[3:5, best]])
        boxes.append(corners.T / np.tile(maps.factors, 2))
        odds.append(rows[0, best])
        kinds.append(rows[5:, best].T)
    found = clip(np.concatenate(boxes).astype(np.float32), width, height)
    scores = np.concatenate(odds).astype(np.float32)
    large = np.flatnonzero((found[:, 2:] - found[:, :2] >= LEAST_SIDE).all(axis=1))
    large = large[_top(scores[large], LOOKED_AT)]
    kept = large[nms(found[large], scores[large], WINDOW_IOU, WINDOWS)]
    kept = kept[(np.arange(len(kept)) < SURE) | (scores[kept] > UNLIKELY)]
    return OwnWindows(found[kept], scores[kept], np.concatenate(kinds)[kept].astype(np.float32))


def _top(scores: FloatArray, count: int) -> IntArray:
    """Return the places of the best scores, rising."""
    if len(scores) <= count:
        return np.arange(len(scores))
    return np.sort(np.argpartition(-scores, count)[:count])
