"""The convolutions of the paper's networks as data, and the layers that they are made of (paper table 1)."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
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
    def filters(self) -> tuple[int, ...]:
        """Filters of each convolution."""
        return tuple(layer.filters for layer in self.layers if isinstance(layer, Conv))

    def stride(self, pooled: bool) -> int:
        """Return the stride of the last map, `pooled` that of the pooling after it."""
        layers = (*self.layers, *([self.last] if pooled else []))
        return math.prod(layer.stride for layer in layers if not isinstance(layer, Norm))


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
        if not x.requires_grad:
            # The same without a function of our own, which would be in no exported graph.
            return x * _scale(x, self.size, self.alpha).pow(-self.beta)
        normalised: Tensor = _Normalise.apply(x, self.size, self.alpha, self.beta)
        return normalised

    def extra_repr(self) -> str:
        """Return what `repr` shows between the parentheses."""
        return f"size={self.size}, alpha={self.alpha}, beta={self.beta}"


class Convolutions(nn.Sequential):
    """Layers under the names that the paper gives them: conv1, norm1, pool1, conv2 and so on.

    Parameters
    ----------
    name : str
        A key of `ARCHITECTURES`.
    filters : sequence of int
        Of each convolution, see `Architecture.filters`.
    pooled : bool
        Whether the pooling after them belongs to it, as in the network without a pyramid.
    """

    def __init__(self, name: str, filters: Sequence[int], pooled: bool) -> None:
        super().__init__()
        architecture, channels, number = ARCHITECTURES[name], 3, 0
        for layer in (*architecture.layers, *([architecture.last] if pooled else [])):
            if isinstance(layer, Conv):
                conv = nn.Conv2d(channels, filters[number], layer.size, layer.stride, layer.padding)
                channels, number = filters[number], number + 1
                self.add_module(f"conv{number}", nn.Sequential(OrderedDict(conv=conv, relu=nn.ReLU())))
            elif isinstance(layer, Pool):
                pool = nn.MaxPool2d(layer.size, layer.stride, ceil_mode=layer.ceil)
                self.add_module(f"pool{number}", pool)
            else:
                self.add_module(f"norm{number}", WithinChannelNorm(*layer))


class Staged(Convolutions):
    """The convolutions as a backbone: their map is that of its one stage."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Return the (N, C, h, w) map of standardised (N, 3, H, W) images, alone in a tuple."""
        return (super().forward(x),)  # type: ignore[no-untyped-call]


def staged(name: str, state: Mapping[str, Tensor], pooled: bool) -> Staged:
    """Return a network of the paper with these weights, whose shapes tell its filters, for evaluation."""
    filters = [value.shape[0] for value in state.values() if value.ndim == 4]
    network = Staged(name, filters, pooled)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)
