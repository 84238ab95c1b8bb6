import numpy as np
import pytest
import torch
from torch import nn

from sppnet.features.backbone import Backbone
from sppnet.features.making import Origin, make
from sppnet.features.timm import UnevenConv2d


class Small(nn.Module):
    """Two stages, batch norms of equal weights, paddings that are not even, and a layer that is not used."""

    def __init__(self, dilation=1):
        super().__init__()
        stride = 2 // dilation
        self.one = nn.Sequential(UnevenConv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.one[0].before, self.one[0].after = 0, 1
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3, stride, padding=1), nn.BatchNorm2d(8))
        self.last = nn.Conv2d(8, 8, 3, padding=dilation, dilation=dilation)
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        one = self.one(x)
        two = self.two(one)
        return one, self.last(two)


def network(dilation=1):
    torch.manual_seed(0)
    return Small(dilation).eval().requires_grad_(False)


def test_a_network_as_a_file_gives_its_maps_at_every_stride():
    networks = {4: network(), 2: network(2)}
    graph = make(networks, Origin("small", licence="MIT", source="here"))
    facts = graph.facts
    assert facts.channels == {"1": 8, "head": 8}
    assert {s: v.geometry["head"].stride for s, v in facts.strides.items()} == {4: 4, 2: 2}
    assert (facts.name, facts.network, facts.licence, facts.source) == ("small", "", "MIT", "here")
    used = {n for n in network().state_dict() if not ("num_batches" in n or "unused" in n)}
    assert set(graph.parameters) == used
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    for stride, one in networks.items():
        maps = Backbone(graph, ("1", "head"), stride)(image, 64)
        with torch.no_grad():
            expected = one(torch.from_numpy(image / 255).float().permute(2, 0, 1)[None])
        for found, wanted in zip(maps.stages, expected, strict=True):
            np.testing.assert_allclose(found, wanted[0], rtol=1e-2, atol=1e-2)


def test_a_graph_that_is_not_the_network_is_refused():
    class Fickle(Small):
        def forward(self, x):
            return tuple(m * (1.0 if torch.onnx.is_in_onnx_export() else 2.0) for m in super().forward(x))

    with pytest.raises(ValueError, match="the graph of odd gives another map of the stage 1 than PyTorch"):
        make({4: Fickle().eval()}, Origin("odd"))


def test_maps_that_have_no_place_are_refused():
    class Flat(nn.Module):
        def forward(self, x):
            return (nn.functional.adaptive_avg_pool2d(x, 2),)

    with pytest.raises(ValueError, match="cannot be derived"):
        make({32: Flat()}, Origin("flat"))
