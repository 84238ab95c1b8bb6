"""Class probabilities of images: one view, many crops, the whole image, or many windows of its maps.

However many views, the backbone runs once per scale and flip if they are windows of the maps (paper section
3.1.5); the softmax scores of all views are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from sppnet.arrays import FloatArray, IntArray, Pixels
from sppnet.boxes import flip
from sppnet.classification.augment import central_crop, resize_shorter
from sppnet.classification.scorer import Scorer
from sppnet.errors import SppnetError
from sppnet.images import resize, view_windows, whole_image_size

# Shorter sides for views of 224 x 224 (section 3.1.5).
SCALES = (224, 256, 300, 360, 448, 560)
# Of whole images and of the ten views (section 3.1.4).
WHOLE = 256
_REFERENCE = 224


def probabilities(scorer: Scorer, image: Pixels, views: str = "full") -> FloatArray:
    """Compute how probable each class is for an image.

    Parameters
    ----------
    scorer : Scorer
        Sizes below are for networks of ``size`` 224 and in proportion for others.
    image : (H, W, 3) uint8 RGB
    views : str
        ``"one"``: the central crop, shorter side 256. ``"ten"``: crops of centre and corners and their flips.
        ``"full"``: the whole image, shorter side 256. ``"maps10"``: the ten views as windows of the maps of
        the image and its flip. ``"maps96"``: windows of maps at six scales, 18 each, fewer where they
        coincide (6 at the smallest). ``"maps98"``: those and the whole image and its flip. All but the crops
        need a pyramid.

    Returns
    -------
    (K,) float32
        Sums to 1.

    Raises
    ------
    SppnetError
        Unknown views, or views that a network without a pyramid cannot take.
    """
    check_views(scorer, views)
    scores = VIEWS[views](scorer, image)
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    means: FloatArray = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
    return means


def check_views(scorer: Scorer, views: str) -> None:
    """Raise the error that `probabilities` would raise for these views."""
    if views not in VIEWS:
        raise SppnetError(f"found the views {views!r}, expected one of {', '.join(VIEWS)}")
    if views not in _CROPS and not scorer.takes_any_size:
        raise SppnetError(
            f"the views {views!r} need a network with a pyramid, expected {' or '.join(_CROPS)}"
        )


def side_of(scorer: Scorer, scale: int) -> int:
    """Return the side that is `scale` for a network of size 224."""
    return round(scorer.settings.size * scale / _REFERENCE)


def _one(scorer: Scorer, image: Pixels) -> FloatArray:
    return scorer.scores(central_crop(image, scorer.settings.size)[None])


def _ten(scorer: Scorer, image: Pixels) -> FloatArray:
    resized = resize_shorter(image, side_of(scorer, WHOLE))
    places = _windows(resized, scorer.settings.size, middles=False)
    crops = [resized[y1:y2, x1:x2] for x1, y1, x2, y2 in places]
    return scorer.scores(np.stack([*crops, *(crop[:, ::-1] for crop in crops)]))


def _full(scorer: Scorer, image: Pixels) -> FloatArray:
    height, width = image.shape[:2]
    resized = resize(image, *whole_image_size(height, width, side_of(scorer, WHOLE)))
    return scorer.scores(resized[None])


def _windows(image: Pixels, size: int, middles: bool) -> IntArray:
    height, width = image.shape[:2]
    return view_windows(height, width, size, middles)


def _on_maps(
    scorer: Scorer, image: Pixels, *, scales: Sequence[int], middles: bool = False, whole: bool = False
) -> FloatArray:
    """Score windows of the maps of an image and its flip at each scale; `whole` adds the maps at `WHOLE`."""
    pooled = []
    for scale in scales:
        resized = resize_shorter(image, side_of(scorer, scale))
        maps = scorer.maps(np.stack([resized, resized[:, ::-1]]))
        windows = _windows(resized, scorer.settings.size, middles)
        flipped = flip(windows, resized.shape[1])
        cells = [_cells(scorer, maps[0], windows), _cells(scorer, maps[1], flipped)]
        if whole and scale == WHOLE:
            cells = [np.concatenate([c, [[0, 0, maps.shape[3], maps.shape[2]]]]) for c in cells]
        index = np.repeat([0, 1], [len(c) for c in cells])
        pooled.append(scorer.windows(maps, np.concatenate(cells), index))
    return scorer.head(np.concatenate(pooled))


def _cells(scorer: Scorer, maps: Any, windows: IntArray) -> IntArray:
    """Return the cells of views on a map (C, h, w): as many as the map of a crop has, at the nearest place.

    Cell ``u`` of a crop that begins at pixel x lies where cell ``u + x / stride`` of the image does. The rule
    for candidate windows (`sppnet.features.projection.project`) has a tolerance at their borders, and would
    often give a view a row or column more than the network was trained with.
    """
    side, (geometry,) = scorer.map_side, scorer.backbone.geometry
    ends = np.array([maps.shape[2], maps.shape[1]]) - side
    starts = np.floor(windows[:, :2] / geometry.stride + 0.5).astype(np.int64).clip(0, ends)
    return np.concatenate([starts, starts + side], axis=1)


VIEWS: dict[str, Callable[[Scorer, Pixels], FloatArray]] = {
    "one": _one,
    "ten": _ten,
    "full": _full,
    "maps10": partial(_on_maps, scales=(WHOLE,)),
    "maps96": partial(_on_maps, scales=SCALES, middles=True),
    "maps98": partial(_on_maps, scales=SCALES, middles=True, whole=True),
}
_CROPS = ("one", "ten")
