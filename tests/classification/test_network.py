import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

from onnx import numpy_helper
from sppnet.classification.file import StoredNetwork, load_network, save_network, titles_of
from sppnet.classification.network import build, scorer_of
from sppnet.classification.scorer import NetworkSettings
from sppnet.classification.views import probabilities
from sppnet.features.architectures import ARCHITECTURES, Conv, Pool, WithinChannelNorm
from sppnet.features.backbone import Backbone
from sppnet.features.encoded import FeatureMaps
from sppnet.features.geometry import Geometry
from sppnet.features.graph import graph_of, make_graph, read_graph
from sppnet.features.network import network_of
from sppnet.features.projection import project
from sppnet.onnx.network import export_network

CLASSES = ("cat", "dog", "owl")
TIMM = "test_resnet"


@pytest.fixture(autouse=True)
def seed(threads):
    torch.manual_seed(0)


@pytest.fixture
def named(backbone_file):
    """Return a function from the name of a network, of the paper's or of timm's, to what stands for it."""
    return lambda name: name if name in ARCHITECTURES else str(backbone_file(name))


def tiny(name="zf5", **options):
    return NetworkSettings(name, CLASSES, **({"width": 1 / 32, "size": 64} | options))


def full(name, levels=(6, 3, 2, 1)):
    """Return a network of full width for 1,000 classes, without memory for its numbers."""
    with torch.device("meta"):
        return build(NetworkSettings(name, tuple(map(str, range(1000))), levels))


def pixels(*shape, dtype=torch.float32):
    return torch.randint(0, 256, shape).to(dtype)


def lively(network):
    """Return a network in evaluation mode whose norms, biases and scores matter, in float64."""
    for module in network.modules():
        if isinstance(module, WithinChannelNorm):
            module.alpha = 0.5
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.uniform_(module.bias, 0.1, 1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return network.eval().double()


# Side of the map after each layer for images of 224 x 224: table 1 of the paper, and what lies between.
SIDES = {
    "zf5": "conv1 110 norm1 110 pool1 55 conv2 27 norm2 27 pool2 13 conv3 13 conv4 13 conv5 13 pool5 6",
    "convnet5": "conv1 55 norm1 55 conv2 55 norm2 55 pool2 27 conv3 27 pool3 13 conv4 13 conv5 13 pool5 6",
    "overfeat5": "conv1 110 pool1 36 norm1 36 conv2 36 pool2 18 conv3 18 conv4 18 conv5 18 pool5 6",
}
SIDES["zf5-released"] = SIDES["zf5"].replace("conv2 27 norm2 27", "conv2 26 norm2 26")
SIDES["overfeat7"] = SIDES["overfeat5"].replace("pool5", "conv6 18 conv7 18 pool7")
ZF5 = [(3, 96, 7), (96, 256, 5), (256, 384, 3), (384, 384, 3), (384, 256, 3)]
CONVNET5 = [(3, 96, 11), *ZF5[1:]]
OVERFEAT5 = [(3, 96, 7), (96, 256, 5), (256, 512, 3), (512, 512, 3), (512, 512, 3)]
CONVOLUTIONS = {
    "zf5": ZF5,
    "zf5-released": ZF5,
    "convnet5": CONVNET5,
    "overfeat5": OVERFEAT5,
    "overfeat7": [*OVERFEAT5, (512, 512, 3), (512, 512, 3)],
}


def sides_of(network, side):
    x, sides = torch.zeros(1, 3, side, side, device="meta"), {}
    for name, layer in network.backbone.named_children():
        x = layer(x)
        assert x.shape[2] == x.shape[3]
        sides[name] = x.shape[2]
    return sides


@pytest.mark.parametrize("name", SIDES)
def test_maps_have_the_sides_of_table_1(name):
    words = SIDES[name].split()
    expected = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    assert sides_of(full(name, None), 224) == expected
    expected.pop(words[-2])  # A pyramid takes the place of the last pooling.
    assert sides_of(full(name), 224) == expected


def test_maps_of_images_of_180():
    assert sides_of(full("zf5"), 180)["conv5"] == 10
    released = sides_of(full("zf5-released"), 180)
    assert [released[layer] for layer in ("conv1", "pool1", "conv2", "pool2", "conv5")] == [
        88,
        44,
        20,
        10,
        10,
    ]


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize(("levels", "bins"), [((6, 3, 2, 1), 50), ((4, 3, 2, 1), 30), (None, 6 * 6)])
def test_number_of_parameters(name, levels, bins):
    layers = CONVOLUTIONS[name]
    convolutions = sum(outputs * (inputs * size * size + 1) for inputs, outputs, size in layers)
    length = layers[-1][1] * bins
    connected = 4096 * (length + 1) + 4096 * (4096 + 1) + 1000 * (4096 + 1)
    network = full(name, levels)
    assert sum(p.numel() for p in network.parameters()) == convolutions + connected
    assert network.layers[f"fc{len(layers) + 1}"].linear.in_features == length


def normalised(x, size, alpha, beta):
    """Normalise cell by cell; cells outside the map count as 0."""
    result, reach = torch.empty_like(x), size // 2
    for n, c, i, j in np.ndindex(*x.shape):
        near = x[n, c, max(0, i - reach) : i + reach + 1, max(0, j - reach) : j + reach + 1]
        result[n, c, i, j] = x[n, c, i, j] * (1 + alpha * (near**2).sum() / size**2) ** -beta
    return result


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 2, 1, 1), (1, 1, 2, 7)])
@pytest.mark.parametrize("size", [3, 5])
def test_within_channel_norm_equals_a_loop_over_cells(shape, size, layout):
    x = (3 * torch.randn(shape, dtype=torch.float64)).contiguous(memory_format=layout).requires_grad_()
    norm = WithinChannelNorm(size, 0.7, 0.6)
    torch.testing.assert_close(norm(x), normalised(x.detach(), size, 0.7, 0.6))
    assert torch.autograd.gradcheck(norm, x)


def test_the_norm_has_the_constants_of_the_released_network():
    x = 100 * torch.rand(1, 2, 4, 4, dtype=torch.float64)
    norm = build(tiny()).backbone.norm1
    torch.testing.assert_close(norm(x), normalised(x, 3, 5e-5, 0.75))


def test_the_norm_works_in_bfloat16():
    x = torch.randn(2, 3, 9, 8, dtype=torch.bfloat16, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    norm = WithinChannelNorm(alpha=0.5)
    found, expected = norm(x), norm(exact)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0.03, atol=0.03)
    gradient = torch.autograd.grad(found.sum(), x)[0]
    torch.testing.assert_close(
        gradient.double(), torch.autograd.grad(expected.sum(), exact)[0], rtol=0.05, atol=0.05
    )


def test_a_network_runs_under_autocast():
    network, images = lively(build(tiny())).float(), pixels(2, 3, 64, 80)
    names, parameters = zip(*network.named_parameters(), strict=True)
    expected = network(images)
    exact = torch.autograd.grad(expected.square().sum(), parameters)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(images)
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    rough = torch.autograd.grad(found.float().square().sum(), parameters)
    for name, one, other in zip(names, rough, exact, strict=True):
        assert one.dtype == torch.float32
        assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.9, name


@pytest.mark.parametrize(
    ("name", "geometry", "cells"),
    [
        # Sums of ((size - 1) / 2 - padding) * earlier strides: 2 + 2 + 4 + 8, and 4 more without padding.
        ("zf5", Geometry(16, 16), 13),
        ("zf5-released", Geometry(16, 20), 13),
        ("convnet5", Geometry(16, 3 + 4 + 8), 13),
        ("overfeat5", Geometry(12, 2 + 2 + 3), 18),
        ("overfeat7", Geometry(12, 2 + 2 + 3), 18),
    ],
)
def test_geometry(name, geometry, cells):
    settings = tiny(name, width=1 / 64, hidden=())
    backbone = scorer_of(build(settings), settings).backbone
    assert (backbone.geometry, backbone.output_stride) == ((geometry,), geometry.stride)
    (maps,) = backbone.maps(np.zeros((1, 224, 224, 3), np.uint8))
    assert maps.shape[1:3] == (cells, cells)
    found = FeatureMaps((maps[0].transpose(2, 0, 1),), (geometry,), (1.0, 1.0), 224)
    whole = project(np.array([[0.0, 0.0, 224.0, 224.0]]), found)
    assert whole.tolist() == [[0, 0, cells, cells]]


def layer_by_layer(network, name, levels, images):
    """Compute every layer with the functions of PyTorch."""
    x, found, number = (images - 128) / 64, {}, 0
    layers = ARCHITECTURES[name].layers + (() if levels else (ARCHITECTURES[name].last,))
    state = network.state_dict()
    for layer in layers:
        if isinstance(layer, Conv):
            number += 1
            weight, bias = (state[f"backbone.conv{number}.conv.{part}"] for part in ("weight", "bias"))
            x = F.conv2d(x, weight, bias, layer.stride, layer.padding).clamp(min=0)
            found[f"conv{number}"] = x
        elif isinstance(layer, Pool):
            x = F.max_pool2d(x, layer.size, layer.stride, ceil_mode=layer.ceil)
            found[f"pool{number}"] = x
        else:
            x = x * (1 + 0.5 * F.avg_pool2d(x**2, 3, 1, 1)) ** -0.75
            found[f"norm{number}"] = x
    x = torch.cat([F.adaptive_max_pool2d(x, n).flatten(1) for n in levels], 1) if levels else x.flatten(1)
    found[f"spp{number}" if levels else f"flat{number}"] = x
    for i in range(1, 4):
        weight, bias = (state[f"head.fc{number + i}.linear.{part}"] for part in ("weight", "bias"))
        x = x @ weight.T + bias
        x = found[f"fc{number + i}"] = x if i == 3 else x.clamp(min=0)
    return found


@pytest.mark.parametrize("levels", [(3, 2, 1), None])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_features_of_every_layer_are_those_of_the_layers_in_turn(name, levels):
    network, images = lively(build(tiny(name, levels=levels))), pixels(2, 3, 64, 64, dtype=torch.float64)
    expected = layer_by_layer(network, name, levels, images)
    assert list(network.layers) == list(expected)
    for layer, value in expected.items():
        torch.testing.assert_close(network.features(images, layer), value)
        assert (value < 0).any() == (layer == list(expected)[-1])
    scores = network(images)
    assert scores.shape == (2, 3)
    assert torch.equal(scores, network.features(images))
    assert torch.equal(scores, network.features(images, list(expected)[-1]))
    assert torch.equal(network(images.to(torch.uint8)), scores)


def test_an_unknown_layer():
    with pytest.raises(
        ValueError, match=r"found the layer 'conv6', expected one of conv1, norm1, pool1, .* fc8"
    ):
        build(tiny()).features(pixels(1, 3, 64, 64), "conv6")


def test_a_pyramid_takes_images_of_any_size():
    network = build(tiny()).eval()
    assert network.takes_any_size
    for height, width in ((64, 64), (31, 200), (100, 47)):
        assert network(pixels(2, 3, height, width)).shape == (2, 3)


def test_no_pyramid_takes_images_of_one_size():
    network = build(tiny(levels=None)).eval()
    assert not network.takes_any_size
    assert network(pixels(2, 3, 64, 64)).shape == (2, 3)
    for height, width in ((64, 65), (80, 64)):
        with pytest.raises(ValueError, match=f"takes 64 x 64 images, found {height} x {width}"):
            network(pixels(1, 3, height, width))


@pytest.mark.parametrize("name", ["zf5", TIMM])
def test_dropout_and_hidden_layers(name, named):
    network = build(tiny(named(name), width=1 / 16, hidden=(32, 48), dropout=0.25)).train()
    scaled = (2, 3) if name == "zf5" else (32, 48)
    first, second, last = network.head.children()
    assert [part for part, _ in first.named_children()] == ["linear", "relu"]
    assert [part for part, _ in second.named_children()] == ["dropout", "linear", "relu"]
    assert [part for part, _ in last.named_children()] == ["dropout", "linear"]
    assert [layer.linear.out_features for layer in (first, second, last)] == [*scaled, 3]
    assert second.dropout.p == last.dropout.p == 0.25


@pytest.mark.parametrize("name", ["zf5", TIMM])
def test_pooled_vectors_are_scaled_to_one_norm(name, named):
    network, plain = (build(tiny(named(name), norm=norm)).eval() for norm in (7.5, None))
    plain.load_state_dict(network.state_dict())
    images = pixels(3, 3, 64, 80)
    vectors = network.features(images, "spp5")
    assert torch.equal(vectors, plain.features(images, "spp5"))
    scaled = 7.5 * vectors / (vectors**2).sum(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(network(images), plain.head(scaled))
    assert not torch.allclose(network(images), plain(images))


@pytest.mark.parametrize("width", [0.01, 0.1, 1 / 3, 2])
def test_width_multiplies_filters_and_units(width):
    with torch.device("meta"):
        network = build(tiny(width=width))
    filters = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)]
    units = [m.out_features for m in network.modules() if isinstance(m, nn.Linear)]
    counts = [(96, 256, 384, 384, 256), (4096, 4096)]
    expected = [[max(1, round(width * n)) for n in numbers] for numbers in counts]
    assert [filters, units] == [expected[0], [*expected[1], 3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 15}, "found images of 15 x 15, too small for the network"),
        ({"size": 20, "levels": None}, "found images of 20 x 20, too small for the network"),
        ({"name": TIMM, "size": 0}, "found images of 0 x 0, too small for the network"),
        ({"classes": ()}, r"expected distinct class names, at least one, found \(\)"),
        ({"classes": ("cat", "cat")}, "expected distinct class names"),
        ({"width": 0}, "found the width 0, expected a factor above 0, at most 4"),
        ({"width": 4.5}, "found the width 4.5"),
        ({"dropout": 1}, "0 <= dropout < 1, found .* and 1"),
        ({"name": TIMM, "hidden": (0,)}, r"expected widths from 1 up .* found \(0, 3\)"),
        ({"levels": (3, 0)}, "levels"),
        ({"mode": "median"}, "median"),
        (
            {"name": "zf6"},
            "found no backbone 'zf6', expected .*; the paper's networks are zf5, ",
        ),
    ],
)
def test_settings_that_make_no_network(options, message, named):
    options = options | ({"name": named(TIMM)} if options.get("name") == TIMM else {})
    with pytest.raises(ValueError, match=message):
        build(tiny()._replace(**options))


@pytest.mark.parametrize("name", ["zf5", TIMM])
def test_a_seed_determines_a_network_and_nothing_else(name, named):
    name = named(name)
    before = torch.random.get_rng_state()
    one, same, other = (build(tiny(name), seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(7)
    later = build(tiny(name), 3).state_dict()
    assert all(torch.equal(one[key], same[key]) and torch.equal(one[key], later[key]) for key in one)
    # A backbone has the weights of its file, whatever the seed.
    drawn = "" if name in ARCHITECTURES else "head."
    weights = [key for key, value in one.items() if value.ndim > 1 and key.startswith(drawn)]
    assert weights
    assert not any(torch.equal(one[key], other[key]) for key in weights)


def test_random_weights_have_the_deviations_that_they_should():
    network = build(tiny(width=1, hidden=(64,)))
    for layer in (network.backbone.conv2.conv, network.backbone.conv4.conv):
        inputs = layer.in_channels * layer.kernel_size[0] ** 2
        assert layer.weight.std().item() == pytest.approx((2 / inputs) ** 0.5, rel=0.02)
        assert not layer.bias.any()
    assert network.head.fc6.linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not network.head.fc6.linear.bias.any()


def stored_of(settings, seed=5):
    """Return a network with random numbers everywhere, as it learns and as it is stored."""
    network = build(settings, seed)
    torch.manual_seed(seed)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(torch.rand(value.shape) + 0.5)
        elif value.is_floating_point():
            value.copy_((torch.rand(value.shape) - 0.3) / value[0].numel() ** 0.5)
    titles = tuple(f"a {name}" for name in settings.classes)
    photos = np.array([3, 2**64 - 1], np.uint64)
    return network.eval(), StoredNetwork(scorer_of(network, settings), titles, {"epochs": 3}, photos)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"name": "overfeat7", "levels": None, "norm": 3.0},
        {"name": "convnet5", "levels": (4, 1), "mode": "average"},
        {"name": TIMM},
        {"name": TIMM, "hidden": (5,), "levels": (2,), "norm": 2.0},
    ],
)
class TestWhatWasLearned:
    @pytest.fixture
    def settings(self, options, named):
        return tiny(**options | {"name": named(options.get("name", "zf5"))})

    def test_it_gives_the_scores_of_the_network(self, settings):
        network, stored = stored_of(settings)
        for parameter in network.parameters():
            parameter.data = parameter.data.half().float() if parameter.ndim > 1 else parameter.data
        sizes = [(64, 64)] if settings.levels is None else [(64, 64), (70, 91)]
        for height, width in sizes:
            images = pixels(2, 3, height, width, dtype=torch.uint8)
            with torch.no_grad():
                expected = network(images).numpy()
            found = stored.scorer.scores(images.permute(0, 2, 3, 1).contiguous().numpy())
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())

    def test_half_precision_changes_the_scores_little(self, settings):
        network, stored = stored_of(settings)
        images = pixels(2, 3, 64, 64, dtype=torch.uint8)
        with torch.no_grad():
            expected = network(images).numpy()
        found = stored.scorer.scores(images.permute(0, 2, 3, 1).contiguous().numpy())
        np.testing.assert_allclose(found, expected, rtol=0.01, atol=0.01 * np.abs(expected).max())

    def test_a_file_holds_all_of_it(self, settings, tmp_path):
        _, stored = stored_of(settings)
        save_network(tmp_path / "a.safetensors", stored)
        loaded = load_network(tmp_path / "a.safetensors")
        assert loaded.scorer.settings == settings
        assert loaded.scorer.backbone.signature == stored.scorer.backbone.signature
        assert (loaded.titles, loaded.about) == (stored.titles, stored.about)
        assert loaded.photos.tolist() == [3, 2**64 - 1]
        image = pixels(1, 64, 64, 3, dtype=torch.uint8).numpy()
        assert np.array_equal(loaded.scorer.scores(image), stored.scorer.scores(image))
        save_network(tmp_path / "b.safetensors", loaded)
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()

    def test_it_is_the_same_on_another_device(self, settings, tmp_path):
        _, stored = stored_of(settings)
        save_network(tmp_path / "a.safetensors", stored)
        # Any device but "cpu" goes through PyTorch, also this other name of it.
        other = load_network(tmp_path / "a.safetensors", "cpu:0").scorer
        image = pixels(90, 70, 3, dtype=torch.uint8).numpy()
        for views in ("one", *([] if settings.levels is None else ["full", "maps10"])):
            expected = probabilities(stored.scorer, image, views)
            np.testing.assert_allclose(probabilities(other, image, views), expected, rtol=1e-3, atol=1e-5)

    def test_pytorch_builds_its_backbone_again(self, settings):
        _, stored = stored_of(settings)
        backbone = stored.scorer.backbone
        image = pixels(1, 64, 64, 3, dtype=torch.uint8)
        standard = (image.float() - torch.tensor(backbone.mean)) / torch.tensor(backbone.std)
        (found,) = network_of(backbone)(standard.permute(0, 3, 1, 2))
        (expected,) = backbone.maps(image.numpy())
        np.testing.assert_allclose(
            found.permute(0, 2, 3, 1).numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
        )


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    save_network(path, stored_of(tiny())[1])
    return path.read_bytes()


class TestFiles:
    @pytest.fixture
    def path(self, content, tmp_path):
        path = tmp_path / "a.safetensors"
        path.write_bytes(content)
        return path

    def test_weights_are_in_half_precision(self, path):
        tensors = load_file(path)
        kinds = {name: str(value.dtype) for name, value in tensors.items()}
        expected = {"graph": "uint8", "photos": "uint64"}
        for i in range(3):
            expected |= {f"head.{i}.weights": "float16", f"head.{i}.offsets": "float32"}
        assert kinds == expected
        graph = graph_of(tensors["graph"].tobytes(), "a")
        assert {p.dtype.name for p in map(numpy_helper.to_array, graph.model.graph.initializer)} == {
            "float16",
            "float32",
        }

    def test_no_such_file(self, tmp_path):
        for path, found in ((tmp_path / "gone.safetensors", "no such file"), (tmp_path, "a folder")):
            with pytest.raises(
                FileNotFoundError, match=f"{path}: found {found}, expected an sppnet-network file"
            ):
                load_network(path)

    @pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
    def test_a_file_that_ends_early(self, path, share):
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(
            ValueError, match=r"a.safetensors: found no safetensors file .*, expected an sppnet-network file"
        ):
            load_network(path)

    @pytest.mark.parametrize(
        ("facts", "found"),
        [
            (None, "a safetensors file without a format mark"),
            ({"format": "pt"}, "pt"),
            ({"format": "sppnet-network", "version": "2"}, "sppnet-network 2"),
            ({"format": "sppnet-detector", "version": "1"}, "sppnet-detector 1"),
        ],
    )
    def test_another_format(self, tmp_path, facts, found):
        save_file({"a": np.zeros(2)}, tmp_path / "b.safetensors", facts)
        other = r"( \(made by another version of sppnet\))?"
        says = rf"b.safetensors: found {found}, expected sppnet-network 3{other}$"
        with pytest.raises(ValueError, match=says):
            load_network(tmp_path / "b.safetensors")

    @pytest.mark.parametrize(
        "change",
        [
            {"classes": ["cat", "dog"]},
            {"classes": ["cat", "cat", "owl"]},
            {"classes": []},
            {"levels": [2, 1]},
            {"levels": [0]},
            {"levels": [10**9]},
            {"levels": None},
            {"mode": "median"},
            {"size": 0},
            {"size": 10**9},
            {"size": "large"},
            {"norm": 0},
            {"colour": "red"},
        ],
    )
    def test_a_description_that_does_not_fit(self, path, change):
        self.changed(path, network=json.dumps({**tiny()._asdict(), **change}))
        self.refused(path)

    @pytest.mark.parametrize("name", ["network", "titles", "about", "backbone"])
    @pytest.mark.parametrize("text", ["{", "[1]", "{}", "3", None])
    def test_no_description(self, path, name, text):
        if (name, text) == ("about", "{}"):
            return
        self.changed(path, **{name: text})
        self.refused(path)

    @pytest.mark.parametrize("name", ["head.0.weights", "head.2.weights", "head.1.offsets", "photos"])
    def test_a_tensor_is_missing(self, path, name):
        self.rewritten(path, lambda tensors: tensors.pop(name))
        self.refused(path)

    @pytest.mark.parametrize(
        ("name", "shape"),
        [("head.0.weights", (128, 3)), ("head.1.weights", (128,)), ("head.2.offsets", (2,))],
    )
    def test_a_tensor_of_another_shape(self, path, name, shape):
        self.rewritten(path, lambda tensors: tensors.update({name: np.zeros(shape, np.float16)}))
        self.refused(path)

    def test_a_damaged_backbone(self, path):
        self.rewritten(path, lambda tensors: tensors.update(graph=tensors["graph"][:-9]))
        with pytest.raises(ValueError, match=r"a.safetensors, its backbone: found no whole ONNX file"):
            load_network(path)

    def refused(self, path):
        with pytest.raises(
            ValueError, match=r"a.safetensors: found a network that does not fit its description"
        ) as caught:
            load_network(path)
        assert "\n" not in str(caught.value)

    def changed(self, path, **texts):
        with safe_open(path, "np") as file:
            facts = {name: text for name, text in (file.metadata() | texts).items() if text is not None}
        save_file(load_file(path), path, facts)

    def rewritten(self, path, change):
        with safe_open(path, "np") as file:
            facts = file.metadata()
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, facts)


class TestShippedBackbone:
    @pytest.fixture
    def path(self, tmp_path):
        """A network whose backbone came with sppnet and has not learned."""
        path, settings = tmp_path / "a.safetensors", tiny("efficientnet-lite0", width=1, levels=(1,))
        save_network(path, stored_as(settings))
        return path

    def test_the_file_names_it_with_its_digest(self, path):
        assert "graph" not in load_file(path)
        assert path.stat().st_size < 20_000
        assert load_network(path).scorer.backbone is shipped_backbone()

    def test_another_digest_is_told(self, path):
        with safe_open(path, "np") as file:
            facts = json.loads(file.metadata()["backbone"])
        TestFiles().changed(path, backbone=json.dumps(facts | {"digest": "0" * 64}))
        digests = f"with weights {shipped_backbone().digest[:16]}, expected {'0' * 16}$"
        with pytest.raises(ValueError, match=rf"a.safetensors: found the backbone efficient.* {digests}"):
            load_network(path)

    def test_one_that_learned_is_in_the_file(self, tmp_path):
        path, settings = tmp_path / "a.safetensors", tiny("efficientnet-lite0", width=1, levels=(1,))
        network = build(settings)
        with torch.no_grad():
            network.backbone.model.conv_stem.weight += 1
        save_network(path, StoredNetwork(scorer_of(network, settings), CLASSES, {}, np.zeros(0, np.uint64)))
        assert "graph" in load_file(path)
        found = load_network(path).scorer.backbone.parameters["conv_stem.weight"]
        expected = shipped_backbone().parameters["conv_stem.weight"] + 1
        np.testing.assert_allclose(found, expected, atol=1e-3)


def stored_as(settings):
    return StoredNetwork(scorer_of(build(settings), settings), CLASSES, {}, np.zeros(0, np.uint64))


def shipped_backbone():
    return Backbone.shared("efficientnet-lite0", ("head",), 32)


class TestBackbones:
    def test_a_network_on_a_backbone_computes_what_the_backbone_computes(self, backbone_file):
        path = backbone_file(TIMM)
        network = build(tiny(str(path), levels=(2, 1))).eval()
        images = pixels(2, 3, 70, 90, dtype=torch.uint8)
        maps = network.features(images, "conv5").detach()
        (expected,) = Backbone(path, ("head",), 32).maps(images.permute(0, 2, 3, 1).contiguous().numpy())
        np.testing.assert_allclose(
            maps.permute(0, 2, 3, 1).numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
        )
        vector = torch.cat([F.adaptive_max_pool2d(maps, n).flatten(1) for n in (2, 1)], dim=1)
        torch.testing.assert_close(network.features(images, "spp5"), vector)
        assert list(network.layers) == ["conv5", "spp5", "fc6"]

    @pytest.mark.parametrize("pretrained", [True, False])
    def test_batch_norm_statistics_stay_those_of_the_pretraining(self, backbone_file, pretrained, tmp_path):
        path = backbone_file(TIMM)
        if pretrained:
            graph = read_graph(path)
            path = tmp_path / "pretrained.onnx"
            make_graph(graph.model, replace(graph.facts, source="a file")).save(path)
        network = build(tiny(str(path)))
        before = {name: value.clone() for name, value in network.named_buffers()}
        network.eval()
        network.train()
        assert network.backbone.training
        network(pixels(4, 3, 64, 64)).sum().backward()
        statistics = [name for name in before if "running" in name]
        assert statistics
        after = dict(network.named_buffers())
        assert {torch.equal(before[name], after[name]) for name in statistics} == {pretrained}


def test_titles_are_those_of_imagenet_where_a_name_is_a_wordnet_id():
    assert titles_of(("n02124075", "cat", "n99999999")) == ("Egyptian cat", "cat", "n99999999")
    assert titles_of(("cat", "dog")) == ("cat", "dog")


def test_an_exported_network_gives_the_same_scores_at_any_size(tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime to run what was exported")
    network = lively(build(tiny())).float()
    export_network(network, (torch.zeros(2, 3, 64, 72),), tmp_path / "network.onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(tmp_path / "network.onnx", options, providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 64, 64), (3, 3, 101, 75)):
        images = pixels(*shape)
        found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
        expected = network(images).detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_groups_hold_every_parameter_of_the_backbone_once_from_the_image_on():
    for name, count, first in (
        ("zf5", 5, "conv1.conv.weight"),
        ("efficientnet-lite0", 8, "model.conv_stem.weight"),
    ):
        network = build(NetworkSettings(name, ("a", "b"), levels=(1,), width=0.05 if count == 5 else 1))
        groups = network.groups
        assert len(groups) == count
        assert groups[0][0] is network.backbone.get_parameter(first)
        found = [id(parameter) for group in groups for parameter in group]
        assert sorted(found) == sorted(map(id, network.backbone.parameters()))
