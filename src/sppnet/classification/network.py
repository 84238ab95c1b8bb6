"""SPP-net: a backbone of the paper's or of any timm network, a pyramid, and fully connected layers.

With a pyramid a network takes images of any size; with the paper's last pooling instead, of one size only
(sections 2 and 3.1, table 1).
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from sppnet.classification.architectures import ARCHITECTURES, Layers, fully_connected, scaled
from sppnet.errors import SppnetError
from sppnet.features.geometry import Geometry
from sppnet.features.timm import HEAD, RANDOM, Stages, create_timm, fix_same_padding, load_weights
from sppnet.features.tracing import derive_geometry
from sppnet.pooling.bins import LEVELS, pyramid_length
from sppnet.pooling.layer import SpatialPyramidPooling

DEFAULT_BACKBONE = "tf_efficientnet_lite0"


class TimmBackbone(Stages):
    """The convolutions of a timm network, whose batch norms keep the statistics of their pretraining.

    Parameters
    ----------
    model : nn.Module
        The network of timm's.
    statistics : bool
        Whether batch norms learn statistics of their own in training, as from random weights they must.
    """

    def __init__(self, model: nn.Module, statistics: bool) -> None:
        super().__init__(model, (HEAD,))
        self.statistics = statistics

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the last maps, (N, C, h, w), of standardised images (N, 3, H, W)."""
        return super().forward(x)[0]

    def groups(self) -> list[list[nn.Parameter]]:
        """Return the parameters by stage, from the image on."""
        from timm.models import group_parameters

        matcher = self.model.group_matcher(coarse=True)  # type: ignore[operator]
        named = dict(self.model.named_parameters())
        grouped = group_parameters(self.model, matcher)
        found = ([named[name] for name in names if name in named] for names in grouped.values())
        return [parameters for parameters in found if parameters]

    def train(self, mode: bool = True) -> TimmBackbone:
        """Set the mode of all layers but for batch norms that keep their statistics."""
        super().train(mode)
        if not self.statistics:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


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
        Pooled vectors are scaled to this norm (section 3.2 normalises them, too). On a pretrained backbone
        their length is anything, and the head would learn too fast or too slowly.
    size : int
        Side of the square images that the network is made for: of crops and views, and the only one that a
        network without a pyramid takes.
    mean, std : (float, float, float)
        Mean and deviation of the pixels, 0 to 255, in red, green and blue; part of the network.
    depth : int
        Number of the backbone's last convolution, for the names of the layers: the first fully connected
        layer is ``fc<depth + 1>``.

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
        self.head = fully_connected(channels * bins, head, dropout, depth + 1, norm)

    def map_of(self, size: int) -> tuple[int, int]:
        """Return channels and cells of the map of a square image.

        Raises
        ------
        SppnetError
            If the image is too small for the network.
        """
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
            except SppnetError:
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
        """The backbone's parameters in groups from the image on: convolutions, or stages of timm's."""
        if isinstance(self.backbone, TimmBackbone):
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


class NetworkSettings(NamedTuple):
    """What a network is built from; stored in its file.

    Attributes
    ----------
    name : str
        A key of `ARCHITECTURES`, or a timm model name.
    classes : tuple of str
        Names of the classes.
    levels : tuple of int or None
        The pyramid; None is the paper's last pooling instead.
    mode : {"max", "average"}
        What is kept of a bin.
    hidden : tuple of int or None
        Widths of the hidden fully connected layers; by default the paper's 4096, 4096 times `width` for its
        networks, none for others.
    width : float
        Factor on all numbers of filters and units of the paper's networks.
    dropout : float
        Share of hidden units left out in training.
    norm : float or None
        Euclidean norm to which pooled vectors are scaled; None leaves them.
    size : int
        Side of the square images that the network is made for.
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
        What the network is.
    weights : str or None
        For a timm network: a weights file of the whole network, None for the installed ImageNet weights (see
        `sppnet.features.backbone.Backbone`), or ``"random"``. The paper's networks start from random weights.
    seed : int
        Seed of the random weights: He et al.'s for convolutions, deviation 0.01 for fully connected layers.

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
    backbone, channels = Layers(settings.width), 3
    for layer in architecture.layers:
        channels = backbone.add(layer, channels)
    if settings.levels is None:
        backbone.add(architecture.last, channels)
    hidden = (4096, 4096) if settings.hidden is None else settings.hidden
    network = SPPNet(
        nn.Sequential(backbone.children),
        settings.levels,
        (*(scaled(width, settings.width) for width in hidden), len(settings.classes)),
        mode=settings.mode,
        dropout=settings.dropout,
        norm=settings.norm,
        size=settings.size,
        depth=architecture.depth,
    )
    _initialise(network)
    return network


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


def _on_timm(settings: NetworkSettings, weights: str | None) -> SPPNet:
    model = create_timm(settings.name)
    load_weights(model, settings.name, weights)
    fix_same_padding(model)
    model.reset_classifier(0)  # type: ignore[operator]
    backbone = TimmBackbone(model, statistics=weights == RANDOM)
    network = SPPNet(
        backbone,
        settings.levels,
        (*(settings.hidden or ()), len(settings.classes)),
        mode=settings.mode,
        dropout=settings.dropout,
        norm=settings.norm,
        size=settings.size,
        mean=[255 * value for value in backbone.mean],
        std=[255 * value for value in backbone.std],
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
