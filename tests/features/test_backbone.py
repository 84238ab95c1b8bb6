import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest

from processes import without_pytorch
from sppnet.features.backbone import Backbone
from sppnet.features.inference import compile_graph


@pytest.fixture(scope="module")
def lite0():
    return Backbone(stages=("3", "4", "head"))


@pytest.fixture(scope="module")
def small(backbone_file):
    return Backbone(backbone_file("test_efficientnet"), ("2", "head"), 32)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def picture(rng, height, width):
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def plain(backbone, image):
    """Compute the maps of an image at its own size in plain steps: standardise, pad by zeros, cut."""
    height, width = image.shape[:2]
    facts = backbone.graph.facts
    padded = np.zeros((math.ceil(height / 32) * 32, math.ceil(width / 32) * 32, 3))
    padded[:height, :width] = (image / 255 - np.array(facts.mean)) / np.array(facts.std)
    run = compile_graph(backbone.graph.at(backbone.stages, backbone.output_stride), (0,) * 3, (1,) * 3)
    cut = []
    for m, place in zip(run(padded[None].astype(np.float32)), backbone.geometry, strict=True):
        rows = [v for v in range(m.shape[1]) if place.stride * v + place.offset <= height - 0.5]
        columns = [u for u in range(m.shape[2]) if place.stride * u + place.offset <= width - 0.5]
        cut.append(m[0, : max(1, len(rows)), : max(1, len(columns))].transpose(2, 0, 1))
    return cut


def close(found, expected, tolerance=1e-3):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("height_width", [(33, 47), (64, 96), (111, 75), (239, 161), (32, 400)])
def test_maps_end_where_the_image_does(lite0, small, rng, height_width):
    image = picture(rng, *height_width)
    for backbone in (lite0, small):
        maps = backbone(image, min(height_width))
        assert maps.factors == (1, 1)
        assert maps.geometry == backbone.geometry
        close(maps.stages, plain(backbone, image))
        for found, channels in zip(maps.stages, backbone.channels, strict=True):
            assert found.dtype == np.float32
            assert found.strides[0] == 4, "channels last in memory"
            assert found.strides[2] == 4 * channels


def test_a_backbone_for_threads_gives_the_same_maps_in_several_at_once(lite0, rng):
    images = [picture(rng, 64, 64 + 8 * i) for i in range(12)]
    several = lite0.for_threads(2)
    assert several.signature == lite0.signature
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda image: several(image, 64), images))
    for image, maps in zip(images, found, strict=True):
        close(maps.stages, lite0(image, 64).stages, 1e-4)


def test_factors_are_the_resized_over_the_original_size(lite0, rng):
    maps = lite0(picture(rng, 50, 75), 64)
    assert maps.factors == (96 / 75, 64 / 50)
    maps = lite0(picture(rng, 101, 50), 64)
    assert maps.factors == (64 / 50, 130 / 101)  # 129.28, rounded up
    assert [m.shape[1:] for m in maps.stages] == [(16, 8), (8, 4), (8, 4)]


@pytest.mark.parametrize("height_width", [(1, 1), (1, 200), (200, 1), (3, 2)])
def test_tiny_images_have_maps(lite0, small, rng, height_width):
    for backbone in (lite0, small):
        maps = backbone(picture(rng, *height_width), 32)
        for m, channels in zip(maps.stages, backbone.channels, strict=True):
            assert m.shape[0] == channels
            assert min(m.shape) >= 1
            assert np.isfinite(m).all()


def test_pixels_far_from_a_cell_leave_it_alone_and_maps_do_not_share_memory(lite0, rng):
    image = picture(rng, 64, 600)
    first = lite0(image, 64).stages[0]
    kept = first.copy()
    image[:, 500:] = 0
    second = lite0(image, 64).stages[0]
    assert np.array_equal(first, kept)
    assert np.array_equal(first[:, :, :50], second[:, :, :50])
    assert not np.array_equal(first[:, :, 65:], second[:, :, 65:])


def test_the_signature_tells_backbones_apart(lite0, small, backbone_file):
    path = backbone_file("test_efficientnet")
    stem = small.parameters["conv_stem.weight"]
    other = Backbone(small.graph.with_parameters({"conv_stem.weight": stem + 1}), ("2", "head"), 32)
    same, swapped = Backbone(path, ("2", "head"), 32), Backbone(str(path), ("head", "2"), 32)
    assert same.signature == small.signature
    assert same.digest == swapped.digest != other.digest
    assert len({t.signature for t in (lite0, small, other, swapped)}) == 4
    assert Backbone(stages=lite0.stages).signature == lite0.signature
    assert Backbone(stages=lite0.stages, output_stride=32).signature != lite0.signature


def test_the_order_of_stages_is_the_order_of_maps(small, backbone_file, rng):
    swapped = Backbone(backbone_file("test_efficientnet"), ("head", "2"), 32)
    image = picture(rng, 64, 96)
    close(swapped(image, 64).stages[::-1], small(image, 64).stages, 1e-5)
    assert swapped.geometry == small.geometry[::-1]
    assert swapped.channels == small.channels[::-1]


def tunable(backbone):
    return {n: v for n, v in backbone.parameters.items() if n.startswith(("blocks.5", "blocks.6", "bn2"))}


def test_a_retuned_backbone_leaves_the_first_as_it_is(lite0, rng):
    image = picture(rng, 64, 96)
    before, signature = lite0(image, 64).stages, lite0.signature
    other = lite0.retuned({n: v + 0.1 for n, v in tunable(lite0).items() if "running" not in n})
    assert lite0.signature == signature
    assert lite0.tuned == {}
    first, second, third = other(image, 64).stages
    close((first, second), before[:2])
    assert np.abs(third - before[2]).max() > 0.1
    assert all(np.array_equal(a, b) for a, b in zip(lite0(image, 64).stages, before, strict=True))


def test_retuned_parameters_are_kept_in_half_precision(lite0):
    state = {name: value * 1.01 for name, value in tunable(lite0).items()}
    one = lite0.retuned(state)
    assert one.tuned.keys() == state.keys()
    for name, value in state.items():
        assert one.tuned[name].dtype == np.float16
        assert np.array_equal(one.parameters[name], value.astype(np.float16).astype(np.float32))
    for name, value in lite0.parameters.items():
        assert name in state or np.array_equal(one.parameters[name], value)
    # The same in another order is the same backbone; a little more is another.
    other = lite0.retuned(dict(reversed(list(state.items()))))
    assert other.signature == one.signature != lite0.signature
    name = next(iter(state))
    other = other.retuned({name: state[name] + 1})
    assert other.signature != one.signature
    assert other.tuned.keys() == state.keys(), "what was replaced before is still replaced"


def test_retuned_parameters_that_do_not_fit(lite0):
    good = tunable(lite0)
    name = next(iter(good))
    for state, wrong in (
        (good | {"body.weight": np.zeros(3)}, "body.weight"),
        (good | {name: np.zeros(3)}, name),
        ({"conv_stem.weight": np.zeros(1)}, "conv_stem.weight"),
    ):
        with pytest.raises(ValueError, match=f"weights that efficientnet-lite0 does not have, first {wrong}"):
            lite0.retuned(state)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("resnet_18",), "found no backbone 'resnet_18', expected a backbone file, or one of efficientnet-"),
        (("efficientnet-lite1",), "did you mean efficientnet-lite0.*sppnet backbone make NAME --out FILE"),
        (("efficientnet-lite0", ()), r"stages \(none\) found, expected distinct ones of 1, 2, 3, 4, 5, head"),
        (("efficientnet-lite0", ("6",)), "stages 6 found, expected distinct ones of 1, 2, 3, 4, 5, head"),
        (("efficientnet-lite0", ("4", "4")), "stages 4,4 found, expected distinct ones"),
        (("efficientnet-lite0", ("head", "body")), "stages head,body found"),
        (("efficientnet-lite0", ("head",), 4), "at output stride 4, expected 32, 16, 8"),
        (("efficientnet-lite0", ("head",), 16, "toaster"), "found the device 'toaster'"),
    ],
)
def test_backbones_that_are_not_there(arguments, match):
    with pytest.raises(ValueError, match=match) as caught:
        Backbone(*arguments)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.onnx: found no such file, expected a backbone file"):
        Backbone(tmp_path / "none.onnx")


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
            assert all(np.array_equal(a, b) for a, b in zip(maps.stages, alone.stages, strict=True))
    flipped = lite0.encode(image, (64,), flip=True).flipped
    expected = lite0(np.ascontiguousarray(image[:, ::-1]), 64)
    assert all(np.array_equal(a, b) for a, b in zip(flipped.scales[0].stages, expected.stages, strict=True))


def test_a_strip_is_encoded_at_a_smaller_side_that_its_maps_tell(lite0, rng):
    maps = lite0(picture(rng, 2, 200), 32)
    assert maps.side == round(maps.factors[1] * 2) < 32


def test_equal_settings_share_a_backbone_until_its_file_changes(backbone_file, tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(backbone_file("test_efficientnet").read_bytes())
    first = Backbone.shared(path, ("head",), 32)
    assert Backbone.shared(str(path), ["head"], 32) is first
    assert Backbone.shared(path, ["2"], 32) is not first
    first.graph.with_parameters({"conv_stem.weight": first.parameters["conv_stem.weight"] + 1}).save(path)
    assert Backbone.shared(path, ("head",), 32).digest != first.digest


def test_maps_need_no_pytorch():
    code = """
import numpy as np
from sppnet.features.backbone import Backbone
print([m.shape for m in Backbone(stages=("4", "head"))(np.zeros((50, 70, 3), np.uint8), 64).stages])
"""
    assert without_pytorch(code) == "[(112, 4, 5), (1280, 4, 5)]\n"
