"""The paper's networks as data, and SPP-net on them or on any timm network.

A network is a backbone (convolutions), a pooling and a head (fully connected layers). With a pyramid it takes
images of any size; with the paper's last pooling instead, of one size only (sections 2 and 3.1, table 1).
"""

from __future__ import annotations

import copy
import json
import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import has_torch_function

from sppnet.errors import SppnetError
from sppnet.features.geometry import Geometry, derive_geometry
from sppnet.features.timm import RANDOM, create_timm, fix_same_padding, load_weights
from sppnet.pooling.bins import LEVELS, pyramid_length, valid_levels
from sppnet.pooling.layer import SpatialPyramidPooling
from sppnet.storage import read_metadata, write_tensors

FORMAT, VERSION = "sppnet-network", "1"
DEFAULT_BACKBONE = "tf_efficientnet_lite0"


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
        if has_torch_function((x,)):
            # `TrueSizes` keeps images and padding apart operator by operator, so autograd must see each one.
            return x * _scale(x, self.size, self.alpha).pow(-self.beta)
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


class SPPNet(nn.Module):
    """A backbone, a pyramid and fully connected layers: scores of images of any size.

    Parameters
    ----------
    backbone : nn.Module
        Takes standardised images (N, 3, H, W) and returns maps (N, C, h, w).
    levels : sequence of int or None
        The pyramid (paper section 2.2). Without one the map itself, of one size, goes to the head.
    head : sequence of int
        Widths of the fully connected layers; the last is the number of classes. Hidden ones have ReLU, and
        dropout after it (section 3.1: 4096, 4096, 1000).
    mode : {"max", "average"}
        What is kept of a bin.
    dropout : float
        Share of hidden units left out in training.
    norm : float, optional
        Pooled vectors are scaled to this norm (section 3.2 normalises them, too). On a pretrained backbone their
        length is anything, and the head would learn too fast or too slowly.
    size : int
        Side of the square images that the network is made for: of crops and views, and the only one that a
        network without a pyramid takes.
    mean, std : (float, float, float)
        Of the pixels, 0 to 255, in red, green and blue; part of the network.
    depth : int
        Number of the backbone's last convolution, for the names of the layers: the first fully connected layer
        is ``fc<depth + 1>``.

    Attributes
    ----------
    backbone, pool, head : nn.Module
        ``head(pool(backbone(standardise(images))))`` is what the network computes.
    map_side : int
        Rows, and columns, of the map of an image of its own size.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        levels: Sequence[int] | None = LEVELS,
        head: Sequence[int] = (4096, 4096, 1000),
        *,
        mode: str = "max",
        dropout: float = 0.5,
        norm: float | None = None,
        size: int = 224,
        mean: Sequence[float] = (128.0, 128.0, 128.0),
        std: Sequence[float] = (64.0, 64.0, 64.0),
        depth: int = 5,
    ) -> None:
        super().__init__()
        if not head or any(width < 1 for width in head) or not 0 <= dropout < 1:
            raise SppnetError(f"expected widths from 1 up and 0 <= dropout < 1, found {head} and {dropout}")
        self.backbone, self.size, self.depth = backbone, size, depth
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        channels, cells = self.map_of(size)
        self.map_side = math.isqrt(cells)
        self.pool = nn.Flatten() if levels is None else SpatialPyramidPooling(levels, mode)
        bins = cells if levels is None else pyramid_length(1, levels)
        self.head = _fully_connected(channels * bins, head, dropout, depth + 1, norm)

    def map_of(self, size: int) -> tuple[int, int]:
        """Return channels and cells of the map of a square image; ValueError if it is too small."""
        training = self.backbone.training
        try:
            with torch.no_grad():
                maps = self.backbone.eval()(torch.zeros(1, 3, size, size, device=self.mean.device))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise SppnetError(
                f"found images of {size} x {size}, too small for the network ({reason})"
            ) from None
        finally:
            self.backbone.train(training)
        return maps.shape[1], maps.shape[2] * maps.shape[3]

    @cached_property
    def smallest(self) -> int:
        """Side in pixels of the smallest image that the backbone takes."""

        def fits(size: int) -> bool:
            try:
                return bool(self.map_of(size))
            except ValueError:
                return False

        return bisect_left(range(self.size), True, key=fits)

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The layers by name, in order: those of the backbone, the pooling, those of the head."""
        backbone = (
            OrderedDict(self.backbone.named_children()) if isinstance(self.backbone, nn.Sequential) else {}
        )
        own = backbone or {f"conv{self.depth}": self.backbone}
        pool = f"spp{self.depth}" if self.takes_any_size else f"flat{self.depth}"
        return {**own, pool: self.pool, **OrderedDict(self.head.named_children())}

    @property
    def groups(self) -> list[list[nn.Parameter]]:
        """The backbone's parameters in groups, from the image on: convolutions, or stages of a timm backbone."""
        if isinstance(self.backbone, _Timm):
            return self.backbone.groups()
        children = (list(child.parameters()) for child in self.backbone.children())
        return [parameters for parameters in children if parameters]

    @cached_property
    def geometry(self) -> Geometry:
        """Where the cells of the map lie in the image."""
        # On a copy: where the network itself lies and whether it trains makes no difference here.
        backbone = copy.deepcopy(self.backbone).to("cpu", torch.float32).eval()
        # Inference mode runs other operators than those that are followed.
        with torch.inference_mode(False):
            (geometry,), _ = derive_geometry(lambda x: (backbone(x),))
        return geometry

    @property
    def takes_any_size(self) -> bool:
        """Whether there is a pyramid."""
        return isinstance(self.pool, SpatialPyramidPooling)

    def standardise(self, images: Tensor) -> Tensor:
        """Return pixels, 0 to 255, as the backbone takes them."""
        return (images.to(self.mean.dtype) - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Compute class scores.

        Parameters
        ----------
        images : (N, 3, H, W) tensor
            uint8 or float pixels, 0 to 255, RGB.

        Returns
        -------
        (N, K) tensor
            Unbounded scores; their softmax is the probability of each class.
        """
        return self.features(images)

    def features(self, images: Tensor, upto: str | None = None) -> Tensor:
        """Compute what a layer gives, its ReLU included.

        Parameters
        ----------
        images : (N, 3, H, W) tensor
            uint8 or float pixels, 0 to 255, RGB.
        upto : str, optional
            A name in `layers`, such as ``conv4``, ``spp5``, ``fc7``; by default the last one, the scores.

        Returns
        -------
        (N, C, h, w) tensor for a layer of the backbone, (N, D) for any other
        """
        if upto is not None and upto not in self.layers:
            raise SppnetError(f"found the layer {upto!r}, expected one of {', '.join(self.layers)}")
        if not self.takes_any_size and images.shape[-2:] != (self.size, self.size):
            found = " x ".join(map(str, images.shape[-2:]))
            raise SppnetError(
                f"a network without a pyramid takes {self.size} x {self.size} images, found {found}"
            )
        x = self.standardise(images)
        for name, layer in self.layers.items():
            x = layer(x)
            if name == upto:
                break
        return x


def _fully_connected(
    inputs: int, widths: Sequence[int], dropout: float, number: int, norm: float | None
) -> nn.Sequential:
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


class NetworkSettings(NamedTuple):
    """What a network is built from; stored in its file.

    Attributes
    ----------
    name : str
        A key of `ARCHITECTURES`, or a timm model name.
    classes : tuple of str
    levels : tuple of int or None
    mode : {"max", "average"}
    hidden : tuple of int or None
        Widths of the hidden fully connected layers; by default the paper's 4096, 4096 times `width` for its
        networks, none for others.
    width : float
        Of the paper's networks: all numbers of filters and units are multiplied by it.
    dropout : float
    norm : float or None
        Of pooled vectors; None leaves them.
    size : int
    """

    name: str
    classes: tuple[str, ...]
    levels: tuple[int, ...] | None = LEVELS
    mode: str = "max"
    hidden: tuple[int, ...] | None = None
    width: float = 1.0
    dropout: float = 0.5
    norm: float | None = None
    size: int = 224


def build(settings: NetworkSettings, weights: str | None = RANDOM, seed: int = 0) -> SPPNet:
    """Build a network with new weights, or on a pretrained backbone.

    Parameters
    ----------
    settings : NetworkSettings
    weights : str or None
        For a timm network: a weights file of the whole network, None for the installed ImageNet weights (see
        `sppnet.features.backbone.Backbone`), or ``"random"``. The paper's networks start from random weights.
    seed : int
        Of the random weights: He et al.'s for convolutions, deviation 0.01 for fully connected layers.

    Raises
    ------
    SppnetError
        If a setting makes no network.
    """
    if len(set(settings.classes)) != len(settings.classes) or not settings.classes:
        raise SppnetError(f"expected distinct class names, at least one, found {settings.classes}")
    if not 0 < settings.width <= 4:
        raise SppnetError(f"found the width {settings.width}, expected a factor above 0, at most 4")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _paper(settings) if settings.name in ARCHITECTURES else _on_timm(settings, weights)
    return network.to(memory_format=torch.channels_last)


def _paper(settings: NetworkSettings) -> SPPNet:
    architecture = ARCHITECTURES[settings.name]
    backbone, channels = _Layers(settings.width), 3
    for layer in architecture.layers:
        channels = backbone.add(layer, channels)
    if settings.levels is None:
        backbone.add(architecture.last, channels)
    hidden = (4096, 4096) if settings.hidden is None else settings.hidden
    network = SPPNet(
        nn.Sequential(backbone.children),
        settings.levels,
        (*(_scaled(width, settings.width) for width in hidden), len(settings.classes)),
        mode=settings.mode,
        dropout=settings.dropout,
        norm=settings.norm,
        size=settings.size,
        depth=architecture.depth,
    )
    _initialise(network)
    return network


class _Layers:
    """Layers under the names that the paper gives them: conv1, norm1, pool1, conv2 and so on."""

    def __init__(self, width: float) -> None:
        self.width, self.number = width, 0
        self.children: OrderedDict[str, nn.Module] = OrderedDict()

    def add(self, layer: Conv | Pool | Norm, channels: int) -> int:
        """Add a layer and return the channels of its map."""
        if isinstance(layer, Conv):
            filters = _scaled(layer.filters, self.width)
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


def _scaled(count: int, width: float) -> int:
    return max(1, round(count * width))


def _initialise(network: SPPNet) -> None:
    """He et al.'s weights for convolutions, which suit any width; the released ones for full layers."""
    for module in network.backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, module.bias))
    _initialise_head(network)


def _initialise_head(network: SPPNet) -> None:
    for module in network.head.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


class _Timm(nn.Module):
    """The convolutions of a timm network, whose batch norms keep the statistics of their pretraining."""

    def __init__(self, model: nn.Module, statistics: bool) -> None:
        super().__init__()
        self.model, self.statistics = model, statistics

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.model.forward_features(x)  # type: ignore[operator]
        return maps

    def groups(self) -> list[list[nn.Parameter]]:
        from timm.models import group_parameters

        matcher = self.model.group_matcher(coarse=True)  # type: ignore[operator]
        named = dict(self.model.named_parameters())
        grouped = group_parameters(self.model, matcher)
        found = ([named[name] for name in names if name in named] for names in grouped.values())
        return [parameters for parameters in found if parameters]

    def train(self, mode: bool = True) -> _Timm:
        super().train(mode)
        if not self.statistics:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def _on_timm(settings: NetworkSettings, weights: str | None) -> SPPNet:
    model = create_timm(settings.name)
    load_weights(model, settings.name, weights)
    fix_same_padding(model)
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    model.reset_classifier(0)  # type: ignore[operator]
    network = SPPNet(
        _Timm(model, statistics=weights == RANDOM),
        settings.levels,
        (*(settings.hidden or ()), len(settings.classes)),
        mode=settings.mode,
        dropout=settings.dropout,
        norm=settings.norm,
        size=settings.size,
        mean=[255 * value for value in config["mean"]],
        std=[255 * value for value in config["std"]],
    )
    _initialise_head(network)
    return network


def imagenet_classifier() -> tuple[SPPNet, NetworkSettings]:
    """Return the default backbone with its own classifier of the 1,000 classes of ImageNet.

    The classes are WordNet ids, as ImageNet's folders are named; its pyramid is the single average that the
    network was trained with.
    """
    from timm.data.imagenet_info import ImageNetInfo

    classes = tuple(ImageNetInfo().label_names())  # type: ignore[no-untyped-call]
    settings = NetworkSettings(DEFAULT_BACKBONE, classes, levels=(1,), mode="average")
    network = build(settings, weights=None)
    with torch.random.fork_rng(devices=[]):
        model = create_timm(DEFAULT_BACKBONE)
    load_weights(model, DEFAULT_BACKBONE, None)
    network.head.load_state_dict(
        {f"fc6.linear.{name}": value for name, value in model.get_classifier().state_dict().items()}  # type: ignore[operator]
    )
    return network.eval(), settings


def save_network(
    path: str | Path, network: SPPNet, settings: NetworkSettings, about: dict[str, Any] | None = None
) -> None:
    """Write a network to a safetensors file that describes itself.

    Parameters
    ----------
    path : path
    network : SPPNet
    settings : NetworkSettings
        What it was built from.
    about : dict, optional
        Anything that JSON can hold: how it was made.
    """
    facts = {"format": FORMAT, "version": VERSION, "network": json.dumps(settings._asdict())}
    write_tensors(path, network.state_dict(), {**facts, "about": json.dumps(about or {})})


def load_network(path: str | Path) -> tuple[SPPNet, NetworkSettings]:
    """Read a network that `save_network` wrote, ready to compute scores.

    Raises
    ------
    SppnetError
        If the file holds no network, or one that does not fit its description.
    FileNotFoundError
        If there is no such file.
    """
    facts = read_metadata(path, FORMAT, VERSION)
    try:
        settings = settings_from(json.loads(facts["network"]))
        network = build(settings)
        network.load_state_dict(load_file(path))
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise SppnetError(f"{path}: found a network that does not fit its description ({reason})") from None
    return network.eval(), settings


def settings_from(values: dict[str, Any]) -> NetworkSettings:
    """Return settings that were stored as JSON."""
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    settings = NetworkSettings(**plain)
    if settings.levels is not None:
        valid_levels(settings.levels)
    return settings
