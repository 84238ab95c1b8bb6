import numpy as np
import pytest
import torch

from sppnet.features.graph import read_graph
from sppnet.rpn.frozen import run_first
from sppnet.rpn.layers import Layers
from sppnet.rpn.network import PyramidNetwork


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def body(name):
    import timm

    network = timm.create_model(name, pretrained=False, features_only=True).eval()
    reductions = network.feature_info.reduction()
    last = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in (8, 16, 32)]
    return timm.create_model(name, pretrained=False, features_only=True, out_indices=last).eval()


@pytest.mark.parametrize("name", ["test_efficientnet", "resnet10t", "mobilenetv3_small_050"])
def test_first_layers_and_the_rest_are_the_network(name, rng):
    network = body(name)
    layers, pictures = Layers.of(network), torch.from_numpy(rng.random((2, 3, 64, 96), np.float32))
    assert len(layers.modules) > 4
    with torch.no_grad():
        expected = network(pictures)
        assert all(torch.equal(a, b) for a, b in zip(layers.rest((pictures,), 0), expected, strict=True))
        for count in (1, 3, *layers.leave, *(place + 1 for place in layers.leave)):
            found = layers.rest(layers.first(count)(pictures), count)
            assert len(found) == 3
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_network_of_other_kind_is_run_whole(rng):
    network = body("hrnet_w18_small")
    layers, pictures = Layers.of(network), torch.from_numpy(rng.random((1, 3, 64, 64), np.float32))
    assert layers.before(("conv1",)) == 0
    with torch.no_grad():
        found, expected = layers.rest((pictures,), 0), network(pictures)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("stages", [0, 1, 3, 5])
def test_first_layers_without_pytorch_give_what_they_give_with_it(backbone_file, rng, stages):
    graph = read_graph(backbone_file("test_efficientnet"))
    network = PyramidNetwork.start(graph, "ab", 16).train()
    layers, pictures = network.first_layers(stages), rng.integers(0, 256, (2, 64, 96, 3), np.uint8)
    mean, std = (np.array(v, np.float32) for v in (graph.facts.mean, graph.facts.std))
    standardised = torch.from_numpy((pictures / np.float32(255) - mean) / std).permute(0, 3, 1, 2)
    found = run_first(layers, graph.facts)(list(pictures))
    with torch.no_grad():
        expected = layers(standardised) if layers.count else (standardised,)
        whole, parts = network(expected, layers.count), network(found, layers.count)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.boxes, whole.boxes, rtol=1e-3, atol=1e-2)


def test_what_does_not_learn_is_what_runs_without_pytorch(backbone_file):
    network = PyramidNetwork.start(read_graph(backbone_file("test_efficientnet")), "ab", 16)
    for stages in range(6):
        network.learn(stages)
        layers = network.first_layers(stages)
        assert not any(p.requires_grad for p in layers.parameters())
        rest = Layers.of(network.body).modules[layers.count :]
        assert not rest or any(p.requires_grad for p in rest[0].parameters())
