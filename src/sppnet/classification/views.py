"""Class probabilities of images: one view, many crops, the whole image, or many windows of its maps.

However many views, the backbone runs once per scale and flip if they are windows of the maps (paper section
3.1.5); the softmax scores of all views are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from sppnet.arrays import IntArray, Pixels
from sppnet.boxes import flip
from sppnet.classification.augment import central_crop, resize_shorter
from sppnet.classification.network import SPPNet
from sppnet.errors import SppnetError
from sppnet.images import resize, view_windows, whole_image_size
from sppnet.pooling.layer import SpatialPyramidPooling
from sppnet.pooling.regions import pool_regions

# Shorter sides for views of 224 x 224 (section 3.1.5).
SCALES = (224, 256, 300, 360, 448, 560)
# Of whole images and of the ten views (section 3.1.4).
WHOLE = 256
_REFERENCE = 224


def probabilities(network: SPPNet, image: Pixels, views: str = "full") -> Tensor:
    """Compute how probable each class is for an image.

    Parameters
    ----------
    network : SPPNet
        In evaluation mode. Sizes below are for networks of ``size`` 224 and in proportion for others.
    image : (H, W, 3) uint8 RGB
    views : str
        ``"one"``: the central crop, shorter side 256. ``"ten"``: crops of centre and corners and their flips.
        ``"full"``: the whole image, shorter side 256. ``"maps10"``: the ten views as windows of the maps of
        the image and its flip. ``"maps96"``: windows of maps at six scales, 18 each, fewer where they
        coincide (6 at the smallest). ``"maps98"``: those and the whole image and its flip. All but the crops
        need a pyramid.

    Returns
    -------
    (K,) float32 tensor
        On the CPU, sums to 1.

    Raises
    ------
    SppnetError
        Unknown views, or views that a network without a pyramid cannot take.
    """
    check_views(network, views)
    with torch.inference_mode():
        return VIEWS[views](network, image).float().softmax(dim=1).mean(dim=0).cpu()


def check_views(network: SPPNet, views: str) -> None:
    """Raise the error that `probabilities` would raise for these views."""
    if views not in VIEWS:
        raise SppnetError(f"found the views {views!r}, expected one of {', '.join(VIEWS)}")
    if views not in _CROPS and not network.takes_any_size:
        raise SppnetError(
            f"the views {views!r} need a network with a pyramid, expected {' or '.join(_CROPS)}"
        )


def side_of(network: SPPNet, scale: int) -> int:
    """Return the side that is `scale` for a network of size 224."""
    return round(network.size * scale / _REFERENCE)


def _batch(network: SPPNet, images: Sequence[Pixels]) -> Tensor:
    """Return images of one size as (N, 3, H, W), channels last in memory, on the network's device."""
    height, width = images[0].shape[:2]
    # Only strips come out smaller than the network's own size.
    if min(height, width) < network.size and min(height, width) < network.smallest:
        raise SppnetError(
            f"found an image that becomes {height} x {width} pixels, expected at least {network.smallest} "
            "each way for the network; cut it into parts"
        )
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(network.mean.device)


def _one(network: SPPNet, image: Pixels) -> Tensor:
    scores: Tensor = network(_batch(network, [central_crop(image, network.size)]))
    return scores


def _ten(network: SPPNet, image: Pixels) -> Tensor:
    resized = resize_shorter(image, side_of(network, WHOLE))
    crops = [resized[y1:y2, x1:x2] for x1, y1, x2, y2 in _windows(resized, network.size, middles=False)]
    scores: Tensor = network(_batch(network, [*crops, *(crop[:, ::-1] for crop in crops)]))
    return scores


def _full(network: SPPNet, image: Pixels) -> Tensor:
    height, width = image.shape[:2]
    resized = resize(image, *whole_image_size(height, width, side_of(network, WHOLE)))
    scores: Tensor = network(_batch(network, [resized]))
    return scores


def _windows(image: Pixels, size: int, middles: bool) -> IntArray:
    height, width = image.shape[:2]
    return view_windows(height, width, size, middles)


def _on_maps(
    network: SPPNet, image: Pixels, *, scales: Sequence[int], middles: bool = False, whole: bool = False
) -> Tensor:
    """Score windows of the maps of an image and its flip at each scale; `whole` adds the maps at `WHOLE`."""
    pooled = []
    for scale in scales:
        resized = resize_shorter(image, side_of(network, scale))
        maps = network.backbone(network.standardise(_batch(network, [resized, resized[:, ::-1]])))
        windows = _windows(resized, network.size, middles)
        flipped = flip(windows, resized.shape[1])
        cells = [_cells(network, maps[0], windows), _cells(network, maps[1], flipped)]
        if whole and scale == WHOLE:
            cells = [np.concatenate([c, [[0, 0, maps.shape[3], maps.shape[2]]]]) for c in cells]
        index = np.repeat([0, 1], [len(c) for c in cells])
        pooled.append(_pooled(network, maps, np.concatenate(cells), index))
    scores: Tensor = network.head(torch.cat(pooled))
    return scores


def _cells(network: SPPNet, maps: Tensor, windows: IntArray) -> IntArray:
    """Return the cells of views on a map (C, h, w): as many as the map of a crop has, at the nearest place.

    Cell ``u`` of a crop that begins at pixel x lies where cell ``u + x / stride`` of the image does. The rule
    for candidate windows (`sppnet.features.projection.project`) has a tolerance at their borders, and would
    often give a view a row or column more than the network was trained with.
    """
    side = network.map_side
    ends = np.array([maps.shape[2], maps.shape[1]]) - side
    starts = np.floor(windows[:, :2] / network.geometry.stride + 0.5).astype(np.int64).clip(0, ends)
    return np.concatenate([starts, starts + side], axis=1)


def _pooled(network: SPPNet, maps: Tensor, windows: IntArray, index: IntArray) -> Tensor:
    pyramid = cast(SpatialPyramidPooling, network.pool)
    return pool_regions(maps, windows, pyramid.levels, mode=pyramid.mode, index=index)


VIEWS: dict[str, Callable[[SPPNet, Pixels], Tensor]] = {
    "one": _one,
    "ten": _ten,
    "full": _full,
    "maps10": partial(_on_maps, scales=(WHOLE,)),
    "maps96": partial(_on_maps, scales=SCALES, middles=True),
    "maps98": partial(_on_maps, scales=SCALES, middles=True, whole=True),
}
_CROPS = ("one", "ten")
