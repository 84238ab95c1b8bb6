"""SPP-net as it learns, in PyTorch: a backbone of the paper's or of timm's, a pyramid, full layers.

With a pyramid a network takes images of any size; with the paper's last pooling instead, of one size only
(sections 2 and 3.1, table 1). What it has learned becomes a `sppnet.classification.scorer.Scorer`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sppnet.arrays import to_numpy
from sppnet.classification.scorer import NetworkSettings, Scorer
from sppnet.errors import SppnetError
from sppnet.features.architectures import ARCHITECTURES, Convolutions, staged
from sppnet.features.backbone import Backbone
from sppnet.features.graph import RANDOM
from sppnet.features.making import Origin, make
from sppnet.features.network import network_of
from sppnet.features.timm import PREFIX, Stages
from sppnet.linear import Linear
from sppnet.pooling.bins import LEVELS, pyramid_length
from sppnet.pooling.layer import SpatialPyramidPooling

# Mean and deviation of pixels, 0 to 1, for the paper's networks.
_MEAN, _STD = (128 / 255,) * 3, (64 / 255,) * 3


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
        super().__init__(model, ("head",))
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
        mean: Sequence[float] = (128.0,) * 3,
        std: Sequence[float] = (64.0,) * 3,
        depth: int = 5,
    ) -> None:
        super().__init__()
        if not head or any(width < 1 for width in head) or not 0 <= dropout < 1:
            raise SppnetError(f"expected widths from 1 up and 0 <= dropout < 1, found {head} and {dropout}")
        self.backbone, self.size, self.depth = backbone, size, depth
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        channels, cells = self.map_of(size)
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


def build(settings: NetworkSettings, seed: int = 0) -> SPPNet:
    """Build a network on a backbone, or one of the paper's with random weights.

    Parameters
    ----------
    settings : NetworkSettings
        What the network is.
    seed : int
        Seed of the random weights: He et al.'s for convolutions, deviation 0.01 for fully connected layers.
        A backbone starts from the weights of its file.

    Raises
    ------
    SppnetError
        If a setting makes no network, or there is no such backbone.
    FileNotFoundError
        If there is no such file.
    """
    if len(set(settings.classes)) != len(settings.classes) or not settings.classes:
        raise SppnetError(f"expected distinct class names, at least one, found {settings.classes}")
    if not 0 < settings.width <= 4:
        raise SppnetError(f"found the width {settings.width}, expected a factor above 0, at most 4")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _paper(settings) if settings.name in ARCHITECTURES else _on_backbone(settings)
    return network.to(memory_format=torch.channels_last)


def start_of(name: str) -> Backbone:
    """Return the backbone that a network is built on, by its name or file.

    Raises
    ------
    SppnetError, FileNotFoundError
        See `Backbone`.
    """
    try:
        return Backbone.shared(name, ("head",), 32)
    except FileNotFoundError:
        raise
    except SppnetError as error:
        raise SppnetError(f"{error}; the paper's networks are {', '.join(ARCHITECTURES)}") from None


def _paper(settings: NetworkSettings) -> SPPNet:
    architecture = ARCHITECTURES[settings.name]
    filters = [_scaled(count, settings.width) for count in architecture.filters]
    hidden = (4096, 4096) if settings.hidden is None else settings.hidden
    network = SPPNet(
        Convolutions(settings.name, filters, pooled=settings.levels is None),
        settings.levels,
        (*(_scaled(width, settings.width) for width in hidden), len(settings.classes)),
        mode=settings.mode,
        dropout=settings.dropout,
        norm=settings.norm,
        size=settings.size,
        depth=len(filters),
    )
    # He et al.'s weights for convolutions, which suit any width; the released ones for full layers.
    for module in network.backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, module.bias))
    _initialise_head(network)
    return network


def _scaled(count: int, width: float) -> int:
    """Return a number of filters or units times a factor, at least 1."""
    return max(1, round(count * width))


def _initialise_head(network: SPPNet) -> None:
    for module in network.head.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


def _on_backbone(settings: NetworkSettings) -> SPPNet:
    backbone = start_of(settings.name)
    model = network_of(backbone).model
    model.reset_classifier(0)
    network = SPPNet(
        TimmBackbone(model.requires_grad_(), statistics=backbone.graph.facts.source == RANDOM),
        settings.levels,
        (*(settings.hidden or ()), len(settings.classes)),
        mode=settings.mode,
        dropout=settings.dropout,
        norm=settings.norm,
        size=settings.size,
        mean=backbone.mean,
        std=backbone.std,
    )
    _initialise_head(network)
    return network.train()


def scorer_of(network: SPPNet, settings: NetworkSettings, device: str = "cpu") -> Scorer:
    """Return what a network has learned, with the weights of its layers in half precision.

    Parameters
    ----------
    network : SPPNet
        Left as it is.
    settings : NetworkSettings
        What it was built from.
    device : str
        Where the backbone is to run.
    """
    state = {name: value.detach().cpu().float() for name, value in network.backbone.state_dict().items()}
    if settings.name in ARCHITECTURES:
        pooled = settings.levels is None
        origin = Origin(settings.name, settings.name, _MEAN, _STD, source="training")
        convolutions = staged(settings.name, state, pooled)
        graph = make({ARCHITECTURES[settings.name].stride(pooled): convolutions}, origin)
    else:
        start = start_of(settings.name).graph
        graph = start.with_parameters({n: to_numpy(state[f"{PREFIX}{n}"]) for n in start.parameters})
    layers = [m for m in network.head.modules() if isinstance(m, nn.Linear)]
    head = tuple(Linear(_halved(layer.weight), to_numpy(layer.bias).astype(np.float32)) for layer in layers)
    return Scorer(settings, Backbone(graph, ("head",), next(iter(graph.facts.strides)), device), head)


def _halved(weights: Any) -> Any:
    return to_numpy(weights).astype(np.float16).astype(np.float32)
