"""A backbone with a feature pyramid and region proposals, as a network that learns."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sppnet.errors import SppnetError
from sppnet.features.graph import STRIDES, Graph
from sppnet.features.timm import create_timm, fix_same_padding
from sppnet.rpn.layers import FirstLayers, Layers

_RARE = 0.01  # share of cells that lie in an object, which a new network starts from


class Answers(NamedTuple):
    """What a network says of the A cells of all levels, of each of N pictures.

    Attributes
    ----------
    objects : (N, A)
        Log-odds that a cell lies in an object.
    boxes : (N, A, 4)
        Where the object's box is, in pixels of the picture.
    kinds : (N, A, K)
        Logits of the object's classes.
    centres : (A, 2)
        Centres of the cells, in pixels of the picture.
    strides : (A,)
        Of their levels.
    """

    objects: Tensor
    boxes: Tensor
    kinds: Tensor
    centres: Tensor
    strides: Tensor


class PyramidNetwork(nn.Module):
    """The network; `Answers` while it learns, maps and windows of `sppnet.features.pyramid` afterwards.

    Parameters
    ----------
    name : str
        Of the timm network that is its backbone.
    count : int
        K, the number of classes.
    width : int
        Channels of the pyramid.
    """

    def __init__(self, name: str, count: int, width: int = 96) -> None:
        super().__init__()
        self.name, self.width = name, width
        self.body = _body(name)
        channels = self.body.feature_info.channels()
        self.lateral = nn.ModuleList(_layer(c, width, 1, active=False) for c in channels)
        self.join = nn.ModuleList(_layer(width, width) for _ in channels[:-1])
        self.seek = nn.ModuleList(_layer(width, width) for _ in channels)
        self.tell = nn.ModuleList(_layer(width, width) for _ in channels)
        self.objects = nn.ModuleList(_linear(width, 1, math.log(_RARE / (1 - _RARE))) for _ in channels)
        self.sides = nn.ModuleList(_linear(width, 4, 1.0) for _ in channels)
        self.kinds = nn.ModuleList(_linear(width, count, 0.0) for _ in channels)

    def train(self, mode: bool = True) -> PyramidNetwork:
        """Set what is new to learn or to stay; the backbone's batch norms keep their statistics."""
        super().train(mode)
        self.body.eval()
        return self

    def pyramid(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Return the maps (N, width, h, w) of the levels, of those of the backbone's stages."""
        maps = [layer(m) for layer, m in zip(self.lateral, stages, strict=True)]
        for level in reversed(range(len(maps) - 1)):
            above = F.interpolate(maps[level + 1], size=maps[level].shape[-2:], mode="nearest")
            maps[level] = self.join[level](maps[level] + above)
        return maps

    def propose(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the (N, 5, h, w) answers of the levels that know no class: log-odds, distances in pixels."""
        answers = []
        for level, (m, stride) in enumerate(zip(maps, STRIDES, strict=True)):
            hidden = self.seek[level](m)
            distances = F.softplus(self.sides[level](hidden)) * stride
            answers.append(torch.cat([self.objects[level](hidden), distances], 1))
        return answers

    def classify(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the (N, K, h, w) logits of the classes, level by level."""
        return [head(tell(m)) for head, tell, m in zip(self.kinds, self.tell, maps, strict=True)]

    def forward(self, first: Sequence[Tensor], count: int = 0) -> Answers:
        """Answer, from what the backbone's first layers make of pictures.

        Parameters
        ----------
        first : sequence of tensor
            What `first_layers` of that count returns; of none, one tensor: standardised (N, 3, H, W)
            pictures, height and width multiples of 32.
        count : int
        """
        maps = self.pyramid(Layers.of(self.body).rest(first, count))
        kinds = self.classify(maps)
        found = torch.cat([a.flatten(2) for a in self.propose(maps)], 2).transpose(1, 2).float()
        centres, strides = _cells([m.shape[-2:] for m in maps], maps[0].device)
        boxes = torch.cat([centres - found[..., 1:3], centres + found[..., 3:]], -1)
        return Answers(
            found[..., 0],
            boxes,
            torch.cat([k.flatten(2) for k in kinds], 2).transpose(1, 2),
            centres,
            strides,
        )

    def frozen(self) -> nn.Module:
        """Return what `sppnet.features.pyramid.STAGES` names, as a network of its own: maps, then answers."""
        return _Frozen(copy.deepcopy(self)).eval().requires_grad_(False)

    def first_layers(self, stages: int) -> FirstLayers:
        """Return the backbone's layers that `learn` leaves as they are; their `count` is how many."""
        layers = Layers.of(self.body)
        return layers.first(layers.before(_first_layers(self.body, stages)))

    def learn(self, stages: int) -> list[list[nn.Parameter]]:
        """Let all learn but the first stages of the backbone; return its parameters, and the others."""
        kept = _first_layers(self.body, stages)
        mine = []
        for name, parameter in self.body.named_parameters():
            parameter.requires_grad_(not name.startswith(kept))
            if parameter.requires_grad:
                mine.append(parameter)
        body = {id(p) for p in self.body.parameters()}
        return [mine, [p for p in self.parameters() if id(p) not in body]]

    @classmethod
    def start(cls, graph: Graph, kinds: Sequence[str], width: int = 96) -> PyramidNetwork:
        """Return a network to train, with the weights of a backbone; with its pyramid, too, if it has one.

        Raises
        ------
        SppnetError
            If the backbone was made of no timm network, or of one without stages of strides 8, 16 and 32.
        """
        facts = graph.facts
        if facts.proposes:
            width = facts.channels["p3"]
        if not facts.network:
            raise SppnetError(
                f"found the backbone {facts.name!r}, expected one of a timm network, to train it"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = cls(facts.network, len(kinds), width)
        prefix = "" if facts.proposes else "body."
        there = network.state_dict()
        state = {f"{prefix}{n}": torch.from_numpy(v.copy()) for n, v in graph.parameters.items()}
        if tuple(kinds) != facts.kinds:
            # Other classes, whose scores start anew; what tells them apart goes on from what there is.
            state = {n: v for n, v in state.items() if not n.startswith("kinds.")}
        network.load_state_dict({n: v for n, v in state.items() if n in there}, strict=False)
        needed = [n for n in there if n.startswith("body.") and "num_batches" not in n]
        missing = [n for n in needed if n not in state]
        if missing:
            raise SppnetError(f"found no weights {missing[0]} in the backbone {facts.name!r}, expected all")
        return network


class _Frozen(nn.Module):
    def __init__(self, network: PyramidNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        maps = self.network.pyramid(self.network.body(pictures))
        pairs = zip(self.network.propose(maps), self.network.classify(maps), strict=True)
        return (*maps, *(torch.cat([a, F.log_softmax(kinds, 1)], 1) for a, kinds in pairs))


def _body(name: str) -> Any:
    """Return the stages of strides 8, 16 and 32 of a timm network, with random weights."""
    full: Any = create_timm(name)
    reductions = [info["reduction"] for info in full.feature_info]
    if not set(STRIDES) <= set(reductions):
        raise SppnetError(
            f"found a backbone {name!r} of strides {reductions}, expected 8, 16 and 32 among them"
        )
    last = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in STRIDES]
    import timm

    body = timm.create_model(name, pretrained=False, features_only=True, out_indices=tuple(last))
    fix_same_padding(body)
    return body


def _first_layers(body: Any, stages: int) -> tuple[str, ...]:
    """Return what the names of the parameters of the first stages begin with."""
    names = list(dict.fromkeys(name.partition(".")[0] for name, _ in body.named_parameters()))
    if "blocks" in names:
        inner = dict.fromkeys(
            ".".join(n.split(".")[:2]) for n, _ in body.named_parameters() if n[:7] == "blocks."
        )
        stem = [f"{name}." for name in names if name != "blocks"]
        return (*stem, *(f"{name}." for name in list(inner)[:stages])) if stages else ()
    return tuple(f"{name}." for name in names[:stages])


def _cells(shapes: list[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    centres, strides = [], []
    for (height, width), stride in zip(shapes, STRIDES, strict=True):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        centres.append((torch.stack([x, y], -1).reshape(-1, 2) + 0.5) * stride)
        strides.append(torch.full((height * width,), float(stride)))
    return torch.cat(centres).to(device), torch.cat(strides).to(device)


def _layer(inputs: int, outputs: int, kernel: int = 3, *, active: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03),
    ]
    return nn.Sequential(*layers, *([nn.ReLU6()] if active else []))


def _linear(inputs: int, outputs: int, bias: float) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, 1)
    nn.init.normal_(layer.weight, 0, 0.01)
    assert layer.bias is not None
    nn.init.constant_(layer.bias, bias)
    return layer
