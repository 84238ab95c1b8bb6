"""Spatial pyramid pooling of whole maps (section 3.1), arrays or tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sppnet.pooling.bins import LEVELS, pyramid_length, valid_levels, valid_mode
from sppnet.pooling.checks import Maps, checked_batches
from sppnet.pooling.cpu import scheduling
from sppnet.pooling.memory import empty


def spatial_pyramid(
    maps: Maps | Sequence[Maps], levels: Sequence[int] = LEVELS, *, mode: str = "max"
) -> Maps:
    """Pool whole maps of any size into vectors of one length.

    Tensors are pooled as by the layer `SpatialPyramidPooling`, differentiable in the maps; for arrays PyTorch
    is not needed.

    Parameters
    ----------
    maps : (N, C, H, W) or (C, H, W) array or tensor, or sequence of (C, H_i, W_i) ones
        float32, float16 or float64; tensors also bfloat16. In any memory layout.
    levels : sequence of int
        Sides of the levels, finest first in the paper.
    mode : {"max", "average"}
        What is kept of a bin; the paper keeps the maximum. A NaN in it wins.

    Returns
    -------
    (N, C * M) array or tensor, or (C * M,) for a single map (C, H, W)
        Of the kind and dtype of the maps.

    Raises
    ------
    SppnetError
        If an argument is not as described.

    Examples
    --------
    >>> spatial_pyramid(np.arange(24.0).reshape(2, 3, 4), levels=(1,))
    array([11., 23.])
    """
    sides, batches = valid_levels(levels), checked_batches(maps)
    valid_mode(mode)
    pooled: Any
    if isinstance(batches[0], np.ndarray):
        length = pyramid_length(batches[0].shape[1], sides)
        pooled = empty((sum(len(m) for m in batches), length), batches[0].dtype)
        scheduling.pool(batches, None, None, sides, mode, pooled)
    else:
        from sppnet.pooling import operator

        pooled = operator.pooled(batches, None, None, sides, mode)
    # A sequence of maps has no dimensions.
    vectors: Maps = pooled[0] if getattr(maps, "ndim", 4) == 3 else pooled
    return vectors
