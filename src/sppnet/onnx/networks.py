"""What comes behind the preparation of an image, as networks: vectors, probabilities, or scores and boxes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sppnet.arrays import FloatArray
from sppnet.classification.network import SPPNet
from sppnet.features.backbone import Backbone
from sppnet.features.geometry import Geometry
from sppnet.features.projection import choose_scale, project_onto
from sppnet.regression import decode_deltas

if TYPE_CHECKING:
    from sppnet.detection.detector import Detector


def _cells(geometry: Geometry, sizes: Tensor) -> Tensor:
    """Return how many cells are centred inside lengths in pixels; see `Geometry.cells`."""
    return (torch.floor((sizes.double() - 0.5 - geometry.offset) / geometry.stride) + 1).clamp(min=1)


class Features(nn.Module):
    """A backbone's network and the pyramid over its maps.

    What `forward` takes is what `sppnet.onnx.preparation.Preparation` returns; so do the others here.
    """

    def __init__(self, backbone: Backbone, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.geometry, self.levels = backbone.network, backbone.geometry, levels

    def forward(self, prepared: list[Tensor], sizes: Tensor, size: Tensor) -> Tensor:
        """Return the (D,) vector of an image."""
        maps, vectors = self.network(prepared[0]), []
        for stage, geometry in zip(maps, self.geometry, strict=True):
            end = _cells(geometry, sizes).flip(1).long()
            window = torch.cat([torch.zeros_like(end), end], dim=1)
            vectors.append(torch.ops.sppnet.pool([stage], window, None, self.levels, "max"))
        return torch.cat(vectors, dim=1)[0]


class Probabilities(nn.Module):
    """A classifier's network."""

    def __init__(self, network: SPPNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, prepared: list[Tensor], sizes: Tensor, size: Tensor) -> Tensor:
        """Return the (K,) class probabilities of an image."""
        network = self.network
        return network.head(network.pool(network.backbone(prepared[0]))).softmax(dim=1)[0]  # type: ignore[no-any-return]


class Scoring(nn.Module):
    """A detector up to suppression; see `Detector.score`."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        fitted = detector.fitted_
        self.network, self.geometry = fitted.backbone.network, fitted.backbone.geometry
        self.pooling, self.classes = detector.pooling, len(fitted.classes)
        self.head, self.layer, self.scale = fitted.head, detector.layer, fitted.feature_scale
        weights, offsets = fitted.regression.weights, fitted.regression.offsets
        self.svms = _linear(fitted.svms.weights, fitted.svms.biases)
        self.regression = _linear(weights.reshape(-1, weights.shape[-1]), offsets.ravel())

    def forward(
        self, prepared: list[Tensor], sizes: Tensor, size: Tensor, windows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the (R, K) scores of (R, 4) windows, and the (R, K, 4) boxes that they become."""
        pooling, maps = self.pooling, [self.network(image) for image in prepared]
        assert pooling.reference is not None
        sides = sizes.amin(dim=1).double()
        scale = choose_scale(windows, size.min().double(), sides, pooling.reference, pooling.scale_rule)
        factors, vectors = (sizes.double() / size.double()).flip(1)[scale], []
        for t, geometry in enumerate(self.geometry):
            limits = _cells(geometry, sizes).flip(1)[scale] - 1
            cells = project_onto(windows, factors, limits, geometry, pooling.projection)
            stages = [m[t] for m in maps]
            vectors.append(torch.ops.sppnet.pool(stages, cells, scale, pooling.levels, pooling.mode))
        pooled = torch.cat(vectors, dim=1) * self.scale
        scores = self.svms(pooled if self.head is None else self.head.activations(pooled, self.layer))
        deltas = self.regression(pooled).view(-1, self.classes, 4)
        limits = size.flip(0).repeat(2).float()
        return scores, decode_deltas(windows[:, None], deltas).clamp(min=0).minimum(limits)


def _linear(weights: FloatArray, offsets: FloatArray) -> nn.Linear:
    layer = nn.Linear(weights.shape[1], weights.shape[0])
    layer.load_state_dict({"weight": torch.from_numpy(weights), "bias": torch.from_numpy(offsets)})
    return layer
