"""The layers that stay as they are while others learn, run without PyTorch, which takes longer over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from sppnet.arrays import Pixels, to_numpy
from sppnet.features.graph import Facts
from sppnet.features.inference import compile_graph
from sppnet.features.making import exported, store_weights
from sppnet.rpn.layers import FirstLayers
from sppnet.rpn.pictures import standardised

First: TypeAlias = Callable[[Sequence[Pixels]], tuple[Tensor, ...]]
"""Takes pictures of equal size; returns what the first layers of the network make of them."""


def run_first(layers: FirstLayers, facts: Facts) -> First:
    """Return how to compute what the first layers return, float32, channels last in memory.

    Parameters
    ----------
    layers : FirstLayers
        If there are none, pictures are standardised alone.
    facts : Facts
        Those of the backbone, for the mean and spread of pixels.
    """
    mean, std = (tuple(255 * v for v in values) for values in (facts.mean, facts.std))
    if not layers.count:
        return lambda pictures: (torch.from_numpy(standardised(pictures, mean, std)),)
    model = exported(layers, tuple(str(place) for place in layers.places))
    store_weights(model, {name: to_numpy(value) for name, value in layers.state_dict().items()}, "")
    run = compile_graph(model, mean, std)

    def first(pictures: Sequence[Pixels]) -> tuple[Tensor, ...]:
        maps = run(np.stack(pictures).astype(np.float32))
        return tuple(torch.from_numpy(one).permute(0, 3, 1, 2) for one in maps)

    return first
