"""The small network that looks at every cell of a map, on arrays; `sppnet.proposals.training` trains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from sppnet.errors import SppnetError
from sppnet.features.encoded import FeatureMaps
from sppnet.linear import Linear

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class AnchorNetwork:
    """For each cell, the logit of objectness and four deltas of each of A anchors.

    The C channels of a map are reduced to a few, W, whose neighbours are looked at channel by channel.

    Attributes
    ----------
    reduce : Linear
        From C channels to W; a ReLU follows.
    kernels : (W, k, k) float32
        What a cell and those about it are multiplied with, for each channel; cells outside are 0.
    offsets : (W,) float32
        What is added then; a ReLU follows.
    answer : Linear
        From W channels to 5 A numbers.
    """

    reduce: Linear
    kernels: Floats
    offsets: Floats
    answer: Linear

    def __call__(self, stage: Floats) -> tuple[Floats, Floats]:
        """Take a (C, h, w) map; return the (h * w * A, 5) answers, and the (h, w, W) reduced map."""
        channels, height, width = stage.shape
        reduced = self.reduce(stage.transpose(1, 2, 0).reshape(-1, channels)).clip(min=0)
        planes = np.ascontiguousarray(reduced.T).reshape(-1, height, width)
        spread = np.empty_like(planes)
        for plane, kernel, offset, out in zip(planes, self.kernels, self.offsets, spread, strict=True):
            cv2.filter2D(plane, -1, kernel, out, delta=float(offset), borderType=cv2.BORDER_CONSTANT)
        np.maximum(spread, 0, out=spread)
        answers = self.answer(spread.reshape(len(spread), -1).T)
        return answers.reshape(-1, 5), reduced.reshape(height, width, -1)

    def state(self) -> dict[str, Floats]:
        """Return all numbers by name."""
        spread = Linear(self.kernels[:, None], self.offsets)
        found: dict[str, Floats] = {}
        for name, layer in (("reduce", self.reduce), ("spread", spread), ("answer", self.answer)):
            assert layer.offsets is not None
            found |= {f"{name}.weight": layer.weights, f"{name}.bias": layer.offsets}
        return found

    @classmethod
    def from_state(cls, state: Mapping[str, npt.NDArray[Any]]) -> AnchorNetwork:
        """Return the network whose `state` this is, in any precision."""
        single = {name: value.astype(np.float32) for name, value in state.items()}
        reduce, answer = (Linear(single[f"{n}.weight"], single[f"{n}.bias"]) for n in ("reduce", "answer"))
        return cls(reduce, single["spread.weight"][:, 0], single["spread.bias"], answer)


def last_stage(maps: FeatureMaps, channels: int) -> Any:
    """Return the map that the network looks at; a `SppnetError` if it has another number of channels."""
    stage = maps.stages[-1]
    if stage.shape[0] != channels:
        raise SppnetError(
            f"found maps of {stage.shape[0]} channels, expected {channels}: "
            "those of the backbone that the objectness was fitted with"
        )
    return stage
