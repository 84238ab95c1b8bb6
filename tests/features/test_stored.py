import numpy as np
import pytest

from sppnet.features.backbone import Backbone
from sppnet.features.stored import backbone_of, backbone_state

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def same(a, b):
    maps = zip(a(IMAGE, 64).stages, b(IMAGE, 64).stages, strict=True)
    return a.signature == b.signature and all(np.array_equal(p, q) for p, q in maps)


@pytest.fixture(scope="module")
def small(backbone_file):
    return Backbone(backbone_file("test_efficientnet"), ("2", "head"), 32)


def test_a_shipped_backbone_is_kept_by_name(lite0):
    facts, arrays = backbone_state(lite0)
    assert arrays == {}
    again = backbone_of("a", facts, arrays)
    # The very same, unless others have come in between.
    assert again is lite0 or same(again, lite0)


def test_a_tuned_one_is_kept_by_name_and_what_was_tuned(lite0):
    one = lite0.retuned({"bn2.bias": lite0.parameters["bn2.bias"] + 1})
    facts, arrays = backbone_state(one)
    assert set(arrays) == {"backbone.bn2.bias"}
    assert same(backbone_of("a", facts, {**arrays, "svms": np.zeros(3)}), one)


@pytest.mark.parametrize("tuned", [False, True])
def test_any_other_is_kept_whole(small, tuned):
    one = small.retuned({"bn2.bias": small.parameters["bn2.bias"] + 1}) if tuned else small
    facts, arrays = backbone_state(one)
    assert same(backbone_of("a", facts, arrays), one)


def test_a_shipped_name_with_other_weights_is_kept_whole(lite0):
    one = Backbone(lite0.graph.with_parameters({"bn2.bias": lite0.parameters["bn2.bias"] + 1}))
    facts, arrays = backbone_state(one)
    assert "graph" in arrays
    assert same(backbone_of("a", facts, arrays), one)


def test_what_does_not_fit_is_said_with_the_file(lite0, small):
    facts, arrays = backbone_state(small)
    bias = small.parameters["bn2.bias"].astype(np.float16)
    cases = [
        ({**facts, "digest": "0" * 64}, arrays, f"weights {small.digest[:16]}, expected 0000"),
        (facts, {}, "damaged, found no graph of the backbone 'test_efficientnet'"),
        (facts, {"graph": arrays["graph"][:1000]}, "its backbone: found no whole ONNX file"),
        (facts, {**arrays, "backbone.none": np.zeros(3)}, "does not have, first none"),
        (facts, {**arrays, "backbone.bn2.bias": bias}, "damaged, found other tuned weights of the backbone"),
        ({**facts, "name": "efficientnet-lite0"}, {}, f"expected {small.digest[:16]}"),
    ]
    for some, others, says in cases:
        with pytest.raises(ValueError, match=says) as caught:
            backbone_of("model.safetensors", some, others)
        assert str(caught.value).startswith("model.safetensors")
