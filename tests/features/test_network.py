import copy

import numpy as np
import pytest
import torch
from torch import nn

from sppnet.features.backbone import Backbone
from sppnet.features.network import TrainableBackbone, network_of
from sppnet.features.timm import Stages

LITE0 = "efficientnet-lite0"


@pytest.fixture(scope="module")
def lite0():
    return Backbone(stages=("3", "4", "head"))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def picture(rng, height, width):
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def behind(model, stage):
    """Return the parameters that a stage's map does not depend on, but for the classifier's."""
    model = copy.deepcopy(model).requires_grad_(True)
    _, maps = model.forward_intermediates(torch.randn(1, 3, 64, 64), indices=[int(stage) - 1])
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(maps[0].sum(), parameters, allow_unused=True)
    classifier = {id(p) for p in model.get_classifier().parameters()}
    return [
        name
        for name, parameter, gradient in zip(names, parameters, gradients, strict=True)
        if gradient is None and id(parameter) not in classifier
    ]


@pytest.mark.parametrize(
    ("name", "stride"), [(LITE0, 16), ("resnet18", 32), ("tf_mobilenetv3_small_100", 32)]
)
def test_layers_after_a_stage_are_those_that_its_map_does_not_need(backbone_file, name, stride):
    backbone = Backbone(name if name == LITE0 else backbone_file(name), ("head",), stride)
    model, counts = network_of(backbone).model, []
    for stage in "1234":
        learning = TrainableBackbone(backbone, stage).learning
        # A last layer that serves the classifier alone is no part of the backbone.
        assert list(learning) == [n for n in behind(model, stage) if n in backbone.parameters]
        assert all(np.array_equal(p.detach(), backbone.parameters[n]) for n, p in learning.items())
        counts.append(len(learning))
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("height_width", [(33, 47), (111, 75)])
def test_maps_with_gradients_are_those_that_were_compiled(lite0, rng, height_width):
    image, backbone = picture(rng, *height_width), lite0.retuned({})
    found = TrainableBackbone(backbone, "4")(image, min(height_width))
    expected = backbone(image, min(height_width))
    assert found.factors == expected.factors
    for ours, theirs in zip(found.stages, expected.stages, strict=True):
        np.testing.assert_allclose(ours.detach(), theirs, rtol=1e-3, atol=1e-3)


def test_gradients_tell_how_the_maps_change_and_what_was_learned_is_the_backbone_s(lite0, rng):
    image = picture(rng, 64, 64)
    trainable = TrainableBackbone(lite0, "4")

    def loss():
        return trainable(image, 64).stages[2].square().mean()

    assert not loss().requires_grad
    for parameter in trainable.learning.values():
        parameter.requires_grad_(True)
    loss().backward()
    gradients = [p.grad for p in trainable.learning.values()]
    assert all(g.abs().max() > 0 for g in gradients)
    # Along the gradient the loss rises as fast as it says.
    slope = sum(float(g.square().sum()) for g in gradients)
    step, values = 1e-2 / slope, []
    with torch.no_grad():
        for move in (step, -2 * step):
            for parameter in trainable.learning.values():
                parameter += move * parameter.grad
            values.append(float(loss()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=0.05)
    learned = trainable.retuned()
    assert learned.tuned.keys() == trainable.learning.keys()
    with torch.no_grad():
        for ours, theirs in zip(learned(image, 64).stages, trainable(image, 64).stages, strict=True):
            assert np.linalg.norm(ours - theirs.numpy()) < 0.03 * np.linalg.norm(theirs)


def test_a_backbone_that_is_no_timm_network(lite0):
    graph = copy.copy(lite0.graph)
    object.__setattr__(graph, "facts", copy.copy(graph.facts))
    object.__setattr__(graph.facts, "network", "")
    with pytest.raises(ValueError, match="'efficientnet-lite0', expected one of a timm network"):
        network_of(Backbone(graph))


@pytest.mark.parametrize("height_width", [(650, 711), (720, 736)])
def test_a_patch_in_an_image_is_answered_where_the_geometry_says(lite0, height_width):
    # End to end, resizing and padding included: a bright patch changes the maps evenly about its own centre.
    trainable = TrainableBackbone(lite0, "4")
    trainable._run.network = averaging(trainable._run.network)
    side = 2 * min(height_width)
    black = np.zeros((*height_width, 3), np.uint8)
    before = trainable(black, side)
    misses = []
    for x, y in [(330, 310), (333, 323), (341, 335), (352, 345)]:
        image = black.copy()
        image[y : y + 6, x : x + 8] = 255
        after = trainable(image, side)
        assert after.factors == (2, 2)
        centre = np.array([(x + 4) * 2 - 0.5, (y + 3) * 2 - 0.5])
        for place, a, b in zip(after.geometry, after.stages, before.stages, strict=True):
            answer = (a - b)[0].double().numpy()
            rows, columns = np.indices(answer.shape)
            middle = np.array([(answer * columns).sum(), (answer * rows).sum()]) / answer.sum()
            misses.append(place.stride * middle + place.offset - centre)
    np.testing.assert_allclose(misses, 0, atol=0.2)


def averaging(network):
    """Return a copy of a network in which every convolution is a mean over its square, and nothing bends."""
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                colours = 3 if name == "conv_stem" else 1
                mean = 1 / child.weight[0, 0].numel()
                child.weight = nn.Parameter(torch.full((1, colours, *child.kernel_size), mean))
                child.bias, child.groups = None, 1
            elif any(word in type(child).__name__ for word in ("Norm", "ReLU")):
                setattr(parent, name, nn.Identity())
    assert isinstance(network, Stages)
    return network.requires_grad_(False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="device 'cuda' was asked for, but PyTorch finds no CUDA device"):
        Backbone(device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_gives_the_same_maps(lite0, rng):
    image = picture(rng, 111, 75)
    backbone = Backbone(stages=("3", "4", "head"), device="cuda")
    for a, b in zip(backbone(image, 111).stages, lite0(image, 111).stages, strict=True):
        assert a.stride(0) == 1
        np.testing.assert_allclose(a.cpu(), b, rtol=1e-2, atol=1e-2)
