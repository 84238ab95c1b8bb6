"""The paper's networks as data, and the layers that they are made of (paper table 1, section 3.1)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv(NamedTuple):
    """A convolution of `filters` of `size` x `size`, with ReLU."""

    filters: int
    size: int
    stride: int = 1
    padding: int = 1


class Pool(NamedTuple):
    """Max pooling; `ceil` rounds the size of the map up, as Caffe does."""

    size: int
    stride: int
    ceil: bool = True


class Norm(NamedTuple):
    """Local response normalisation, with the constants of the released ZF-5."""

    size: int = 3
    alpha: float = 5e-5
    beta: float = 0.75


class Architecture(NamedTuple):
    """The layers of a backbone, and the pooling after them in the network without a pyramid."""

    layers: tuple[Conv | Pool | Norm, ...]
    last: Pool

    @property
    def depth(self) -> int:
        """Number of convolutions, after which the paper counts fully connected layers on."""
        return sum(isinstance(layer, Conv) for layer in self.layers)


_ZF5_FROM_CONV3 = (Conv(384, 3), Conv(384, 3), Conv(256, 3))
_OVERFEAT5 = (
    *(Conv(96, 7, 2), Pool(3, 3, ceil=False), Norm()),
    *(Conv(256, 5, padding=2), Pool(2, 2, ceil=False)),
    *(Conv(512, 3), Conv(512, 3), Conv(512, 3)),
)
# Table 1 gives no paddings; these give its map sizes. The released ZF-5 does not pad conv2, whose map of a
# 224 image is then 26 x 26, not 27 x 27.
ARCHITECTURES = {
    "zf5": Architecture(
        (
            *(Conv(96, 7, 2), Norm(), Pool(3, 2)),
            *(Conv(256, 5, 2), Norm(), Pool(3, 2)),
            *_ZF5_FROM_CONV3,
        ),
        Pool(3, 2),
    ),
    "zf5-released": Architecture(
        (
            *(Conv(96, 7, 2), Norm(), Pool(3, 2)),
            *(Conv(256, 5, 2, padding=0), Norm(), Pool(3, 2)),
            *_ZF5_FROM_CONV3,
        ),
        Pool(3, 2),
    ),
    "convnet5": Architecture(
        (
            *(Conv(96, 11, 4, padding=2), Norm()),
            *(Conv(256, 5, padding=2), Norm(), Pool(3, 2)),
            *(Conv(384, 3), Pool(3, 2)),
            *(Conv(384, 3), Conv(256, 3)),
        ),
        Pool(3, 2),
    ),
    "overfeat5": Architecture(_OVERFEAT5, Pool(3, 3)),
    "overfeat7": Architecture((*_OVERFEAT5, Conv(512, 3), Conv(512, 3)), Pool(3, 3)),
}


def _scale(x: Tensor, size: int, alpha: float) -> Tensor:
    return F.avg_pool2d(x * x, size, 1, size // 2) * alpha + 1


class _Normalise(torch.autograd.Function):
    """``x * s ** -0.75`` with ``s = 1 + alpha * average(x * x)``, in fewer passes than autograd takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, alpha: float, beta: float) -> Tensor:
        scale = _scale(x, size, alpha)
        power = scale.pow(-beta)
        ctx.save_for_backward(x, scale, power)
        ctx.settings = size, alpha, beta
        return x * power

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, scale, power = ctx.saved_tensors
        size, alpha, beta = ctx.settings
        direct = gradient * power
        # Averaging over a centred square of cells is its own adjoint.
        spread = F.avg_pool2d(direct * x / scale, size, 1, size // 2)
        return direct.addcmul(x, spread, value=-2 * alpha * beta), None, None, None


class WithinChannelNorm(nn.Module):
    """Local response normalisation over neighbouring cells of a channel, as in the released ZF-5.

    ``y = x * (1 + alpha * a) ** -beta``, where ``a`` is the mean of ``x ** 2`` over `size` x `size` cells,
    those outside the map counted as 0.
    """

    def __init__(self, size: int = 3, alpha: float = 5e-5, beta: float = 0.75) -> None:
        super().__init__()
        self.size, self.alpha, self.beta = size, alpha, beta

    def forward(self, x: Tensor) -> Tensor:
        """Normalise maps (N, C, H, W)."""
        normalised: Tensor = _Normalise.apply(x, self.size, self.alpha, self.beta)
        return normalised

    def extra_repr(self) -> str:
        """Return what `repr` shows between the parentheses."""
        return f"size={self.size}, alpha={self.alpha}, beta={self.beta}"


class VectorNorm(nn.Module):
    """Scale vectors (N, D) to one Euclidean norm, so that learning does not depend on their length."""

    def __init__(self, norm: float) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, vectors: Tensor) -> Tensor:
        """Scale vectors."""
        return F.normalize(vectors) * self.norm

    def extra_repr(self) -> str:
        """Return what `repr` shows between the parentheses."""
        return f"norm={self.norm}"


class Layers:
    """Layers under the names that the paper gives them: conv1, norm1, pool1, conv2 and so on."""

    def __init__(self, width: float) -> None:
        self.width, self.number = width, 0
        self.children: OrderedDict[str, nn.Module] = OrderedDict()

    def add(self, layer: Conv | Pool | Norm, channels: int) -> int:
        """Add a layer and return the channels of its map."""
        if isinstance(layer, Conv):
            filters = scaled(layer.filters, self.width)
            conv = nn.Conv2d(channels, filters, layer.size, layer.stride, layer.padding)
            self.number += 1
            self.children[f"conv{self.number}"] = nn.Sequential(OrderedDict(conv=conv, relu=nn.ReLU()))
            return filters
        if isinstance(layer, Pool):
            pool = nn.MaxPool2d(layer.size, layer.stride, ceil_mode=layer.ceil)
            self.children[f"pool{self.number}"] = pool
        else:
            self.children[f"norm{self.number}"] = WithinChannelNorm(*layer)
        return channels


def scaled(count: int, width: float) -> int:
    """Return a number of filters or units times a factor, at least 1."""
    return max(1, round(count * width))


def fully_connected(
    inputs: int, widths: Sequence[int], dropout: float, number: int, norm: float | None
) -> nn.Sequential:
    """Return fully connected layers, the first under the name ``fc<number>``.

    Parameters
    ----------
    inputs : int
        Length of the vectors that they take.
    widths : sequence of int
        Units of each layer; hidden ones have ReLU, and dropout after it.
    dropout : float
        Share of hidden units left out in training.
    number : int
        Place of the first layer among all that the paper counts.
    norm : float, optional
        Euclidean norm to which the vectors are scaled first.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, width in enumerate(widths):
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        if i:
            parts["dropout"] = nn.Dropout(dropout)
        elif norm is not None:
            parts["norm"] = VectorNorm(norm)
        parts["linear"] = nn.Linear(inputs, width)
        if i < len(widths) - 1:
            parts["relu"] = nn.ReLU()
        layers[f"fc{number + i}"] = nn.Sequential(parts)
        inputs = width
    return nn.Sequential(layers)
