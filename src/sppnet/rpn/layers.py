"""The layers of a timm network in their order, so that the first of them can be run apart from the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn


class Layers(NamedTuple):
    """The layers of a network that returns the maps of some stages.

    Attributes
    ----------
    whole : Module
        The network.
    names : tuple of str
        What the names of their parameters begin with.
    modules : tuple of Module
        They follow one another. None where it is not known that the network does nothing but call them.
    leave : tuple of int
        After which of them the map of a stage leaves the network.
    """

    whole: nn.Module
    names: tuple[str, ...] = ()
    modules: tuple[nn.Module, ...] = ()
    leave: tuple[int, ...] = ()

    @classmethod
    def of(cls, body: Any) -> Layers:
        """Return the layers of a timm network made with ``features_only``."""
        from timm.models import FeatureListNet
        from timm.models.efficientnet import EfficientNetFeatures
        from timm.models.mobilenetv3 import MobileNetV3Features

        if not isinstance(body, FeatureListNet | EfficientNetFeatures | MobileNetV3Features):
            return cls(body)
        named: list[tuple[str, nn.Module]] = []
        for name, child in body.named_children():
            # The blocks of the efficient networks are stages of their own.
            parts = child.named_children() if name == "blocks" else ()
            named += [(f"{name}.{number}", block) for number, block in parts] or [(name, child)]
        places = {name.replace(".", "_"): place for place, (name, _) in enumerate(named)}
        leave = [places[name.replace(".", "_")] for name in body.feature_info.module_name()]
        names, modules = zip(*named, strict=True)
        return cls(body, names, modules, tuple(leave))

    def before(self, kept: tuple[str, ...]) -> int:
        """Return how many layers come first whose parameters all begin with one of some names."""
        for place, (name, module) in enumerate(zip(self.names, self.modules, strict=True)):
            if any(not f"{name}.{inner}".startswith(kept) for inner, _ in module.named_parameters()):
                return place
        return len(self.modules)

    def first(self, count: int) -> FirstLayers:
        """Return the first layers as a network of its own."""
        return FirstLayers(self, count)

    def rest(self, first: Sequence[Tensor], count: int) -> list[Tensor]:
        """Return the maps of all stages, from what the first layers returned."""
        if not self.modules:
            return list(self.whole(*first))
        maps, x = list(first[:-1]), first[-1]
        if count - 1 in self.leave:
            maps.append(x)
        for place in range(count, len(self.modules)):
            x = self.modules[place](x)
            if place in self.leave:
                maps.append(x)
        return maps


class FirstLayers(nn.Module):
    """The first layers of a network.

    Parameters
    ----------
    layers : Layers
    count : int
        How many.
    """

    def __init__(self, layers: Layers, count: int) -> None:
        super().__init__()
        self.count = count
        # After which of them the maps come that are returned.
        self.places = (*(place for place in layers.leave if place < count - 1), count - 1)
        self.layers = nn.ModuleList(layers.modules[:count])

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of stages that leave on the way, then what the next layer takes."""
        maps: list[Tensor] = []
        x = pictures
        for place, layer in enumerate(self.layers):
            x = layer(x)
            if place in self.places:
                maps.append(x)
        return tuple(maps)
