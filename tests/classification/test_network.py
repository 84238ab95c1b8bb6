import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from sppnet.classification.architectures import ARCHITECTURES, Conv, Pool, WithinChannelNorm
from sppnet.classification.file import load_network, save_network
from sppnet.classification.network import NetworkSettings, build, imagenet_classifier
from sppnet.features.encoded import FeatureMaps
from sppnet.features.geometry import Geometry
from sppnet.features.projection import project
from sppnet.features.timm import create_timm
from sppnet.images import read_image, resize, shorter_side_size
from sppnet.onnx.export import export_network

CLASSES = ("cat", "dog", "owl")
TIMM = "test_resnet"
GERMAN_SHEPHERD = "n02106662"


@pytest.fixture(autouse=True)
def seed(threads):
    torch.manual_seed(0)


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
    network = build(tiny(name, width=1 / 64, hidden=())).train()
    assert network.geometry == geometry
    assert network.training
    assert network.backbone.training
    maps = network.backbone(torch.zeros(1, 3, 224, 224))[0]
    assert maps.shape[1:] == (cells, cells)
    whole = project(np.array([[0.0, 0.0, 224.0, 224.0]]), FeatureMaps((maps,), (geometry,), (1.0, 1.0), 224))
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
def test_dropout_and_hidden_layers(name):
    network = build(tiny(name, width=1 / 16, hidden=(32, 48), dropout=0.25)).train()
    scaled = (2, 3) if name == "zf5" else (32, 48)
    first, second, last = network.head.children()
    assert [part for part, _ in first.named_children()] == ["linear", "relu"]
    assert [part for part, _ in second.named_children()] == ["dropout", "linear", "relu"]
    assert [part for part, _ in last.named_children()] == ["dropout", "linear"]
    assert [layer.linear.out_features for layer in (first, second, last)] == [*scaled, 3]
    assert second.dropout.p == last.dropout.p == 0.25


@pytest.mark.parametrize("name", ["zf5", TIMM])
def test_pooled_vectors_are_scaled_to_one_norm(name):
    network, plain = (build(tiny(name, norm=norm)).eval() for norm in (7.5, None))
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
        ({"name": "zf6"}, "unknown backbone 'zf6'"),
    ],
)
def test_settings_that_make_no_network(options, message):
    with pytest.raises(ValueError, match=message):
        build(tiny()._replace(**options))


@pytest.mark.parametrize("name", ["zf5", TIMM])
def test_a_seed_determines_a_network_and_nothing_else(name):
    before = torch.random.get_rng_state()
    one, same, other = (build(tiny(name), "random", seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(7)
    later = build(tiny(name), "random", 3).state_dict()
    assert all(torch.equal(one[key], same[key]) and torch.equal(one[key], later[key]) for key in one)
    weights = [key for key, value in one.items() if value.ndim > 1]
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


class TestFiles:
    @pytest.mark.parametrize(
        "settings",
        [
            tiny(),
            tiny("overfeat7", levels=None, norm=3.0),
            tiny("convnet5", levels=(4, 1), mode="average"),
            tiny(TIMM),
        ],
    )
    def test_round_trip(self, tmp_path, settings):
        network, photos = build(settings, "random", 5), np.array([3, 2**64 - 1], np.uint64)
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape))
        save_network(tmp_path / "a.safetensors", network, settings, {"epochs": 3}, photos)
        loaded, described, about, photos = load_network(tmp_path / "a.safetensors")
        assert described == settings
        assert not loaded.training
        expected, found = network.state_dict(), loaded.state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        images = pixels(1, 3, 64, 64)
        assert torch.equal(loaded(images), network.eval()(images))
        assert about == {"epochs": 3}
        assert photos.tolist() == [3, 2**64 - 1]

    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "a.safetensors"
        save_network(path, build(tiny()), tiny())
        return path

    def test_no_such_file(self, tmp_path):
        for path in (tmp_path / "gone.safetensors", tmp_path):
            with pytest.raises(
                FileNotFoundError, match=f"{path}: found no such file, expected an sppnet-network file"
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
            ({"format": "sppnet-network", "version": "1"}, "sppnet-network 1"),
            ({"format": "sppnet-detector", "version": "1"}, "sppnet-detector 1"),
        ],
    )
    def test_another_format(self, tmp_path, facts, found):
        save_file({"a": torch.zeros(2)}, tmp_path / "b.safetensors", facts)
        with pytest.raises(ValueError, match=rf"b.safetensors: found {found}, expected sppnet-network 2$"):
            load_network(tmp_path / "b.safetensors")

    @pytest.mark.parametrize(
        "change",
        [
            {"classes": ["cat", "dog"]},
            {"classes": ["cat", "cat", "owl"]},
            {"levels": [2, 1]},
            {"levels": [0]},
            {"width": 0.5},
            {"size": 3},
            {"name": "convnet5"},
            {"name": "no-such-network"},
            {"colour": "red"},
        ],
    )
    def test_a_description_that_does_not_fit(self, path, change):
        self.describe(path, json.dumps({**tiny()._asdict(), **change}))
        with pytest.raises(
            ValueError, match=r"a.safetensors: found a network that does not fit its description"
        ):
            load_network(path)

    @pytest.mark.parametrize("text", ["{", "[1]", "{}", "3", None])
    def test_no_description(self, path, text):
        self.describe(path, text)
        with pytest.raises(
            ValueError, match=r"a.safetensors: found a network that does not fit its description"
        ):
            load_network(path)

    def describe(self, path, text):
        facts = {"format": "sppnet-network", "version": "2"} | ({} if text is None else {"network": text})
        save_file(load_file(path), path, facts)

    def test_a_tensor_is_missing(self, path):
        state = load_file(path)
        del state["backbone.conv3.conv.bias"]
        facts = {"format": "sppnet-network", "version": "2", "network": json.dumps(tiny()._asdict())}
        save_file(state, path, facts)
        with pytest.raises(
            ValueError, match=r"a.safetensors: found a network that does not fit its description"
        ):
            load_network(path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights file of the whole network, with statistics that are not those of new layers."""
    torch.manual_seed(1)
    state = create_timm(TIMM).state_dict()
    state = {key: v + 0.1 * torch.rand(v.shape) if v.is_floating_point() else v for key, v in state.items()}
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(state, path)
    return path


class TestTimm:
    def test_a_network_on_a_pretrained_backbone_computes_what_the_backbone_computes(self, weights):
        network = build(tiny(TIMM, levels=(2, 1)), str(weights)).eval()
        model = create_timm(TIMM).eval()
        model.load_state_dict(load_file(weights))
        images = pixels(2, 3, 70, 90)
        mean, std = (255 * torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        maps = model.forward_features((images - mean) / std)
        torch.testing.assert_close(network.features(images, "conv5"), maps)
        vector = torch.cat([F.adaptive_max_pool2d(maps, n).flatten(1) for n in (2, 1)], dim=1)
        torch.testing.assert_close(network.features(images, "spp5"), vector)
        assert list(network.layers) == ["conv5", "spp5", "fc6"]

    @pytest.mark.parametrize("pretrained", [True, False])
    def test_batch_norm_statistics_stay_those_of_the_pretraining(self, weights, pretrained):
        network = build(tiny(TIMM), str(weights) if pretrained else "random")
        before = {name: value.clone() for name, value in network.named_buffers()}
        network.eval()
        network.train()
        assert network.backbone.training
        network(pixels(4, 3, 64, 64)).sum().backward()
        statistics = [name for name in before if "running" in name]
        assert statistics
        after = dict(network.named_buffers())
        assert {torch.equal(before[name], after[name]) for name in statistics} == {pretrained}

    def test_no_weights_are_installed_for_most_backbones(self):
        with pytest.raises(ValueError, match="no weights are installed"):
            build(tiny(TIMM), None)


def test_the_classifier_of_imagenet_knows_a_dog(shepherd):
    state = torch.random.get_rng_state()
    network, settings = imagenet_classifier()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(settings.classes) == 1000
    image = read_image(shepherd)
    image = resize(image, *shorter_side_size(*image.shape[:2], 256))
    with torch.inference_mode():
        scores = network(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
    assert settings.classes[int(scores.argmax())] == GERMAN_SHEPHERD
    assert scores.softmax(0).max() > 0.5


def test_an_exported_network_gives_the_same_scores_at_any_size(tmp_path):
    pytest.importorskip("onnx", reason="needs the extra sppnet[onnx]")
    pytest.importorskip("onnxscript", reason="needs the extra sppnet[onnx]")
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


@pytest.mark.parametrize("name", ["zf5", "overfeat5", "resnet10t"])
def test_the_smallest_image(name):
    network = build(NetworkSettings(name, ("a", "b"), width=0.05, size=96))
    side = network.smallest
    assert network.map_of(side)[1] >= 1
    if side > 1:
        with pytest.raises(ValueError, match="too small"):
            network.map_of(side - 1)
    assert network.training


def test_groups_hold_every_parameter_of_the_backbone_once_from_the_image_on():
    for name, count, first in (
        ("zf5", 5, "conv1.conv.weight"),
        ("tf_efficientnet_lite0", 8, "model.conv_stem.1.weight"),
    ):
        network = build(NetworkSettings(name, ("a", "b"), levels=(1,), width=0.05 if count == 5 else 1))
        groups = network.groups
        assert len(groups) == count
        assert groups[0][0] is network.backbone.get_parameter(first)
        found = [id(parameter) for group in groups for parameter in group]
        assert sorted(found) == sorted(map(id, network.backbone.parameters()))
