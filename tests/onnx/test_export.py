import copy
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from graphs import opened, run
from sppnet.boxes import iou
from sppnet.classification.network import NetworkSettings, build
from sppnet.classification.views import probabilities
from sppnet.detection.detector import Detector
from sppnet.detection.fit import Fitted
from sppnet.detection.head import Head
from sppnet.detection.postprocess import postprocess
from sppnet.detection.svm import LinearSVMs
from sppnet.errors import NotFittedError, SppnetError
from sppnet.features.backbone import Backbone
from sppnet.features.projection import choose_scale
from sppnet.linear import Linear
from sppnet.onnx.export import (
    export_classifier,
    export_detector,
    export_features,
    export_model,
    export_network,
)
from sppnet.onnx.networks import Scoring
from sppnet.onnx.preparation import PixelRules, Preparation
from sppnet.pooling import SpatialPyramidPooling
from sppnet.proposals.maps import Objectness
from sppnet.regression import BoxRegression


@pytest.fixture(scope="module")
def small_backbone():
    """A tiny backbone of two stages with drawn weights."""
    return Backbone.shared("test_efficientnet", ("3", "head"), 16, "random", "cpu")


def test_features_of_a_backbone(small_backbone, photo, tmp_path):
    path, backbone = tmp_path / "features.onnx", small_backbone
    said = export_model(backbone, path, scale=160, levels=(3, 1))
    assert said == "image -> features of test_efficientnet"
    session = opened(path)
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
        ("image", ["height", "width", 3], "tensor(uint8)")
    ]
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["scales"]) == [160]
    assert json.loads(facts["levels"]) == [3, 1]
    assert json.loads(facts["backbone"]) == backbone.signature
    pool = SpatialPyramidPooling((3, 1))
    images = [photo, photo[:90, 50:], photo[:, :70], photo[:7, :120], np.tile(photo, (2, 2, 1))]
    for image in map(np.ascontiguousarray, images):
        expected = np.concatenate([pool(stage).numpy() for stage in backbone(image, 160).stages])
        spread = expected.std()
        atol = (2e-2 if len(image) > 320 else 1e-4) * spread
        np.testing.assert_allclose(run(session, image), expected, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def detector():
    """The detector that is shipped, at one scale of its own."""
    return Detector.load("animals").set_params(scales=(320,))


@pytest.fixture(scope="module")
def session(detector, tmp_path_factory):
    path = tmp_path_factory.mktemp("detector") / "detector.onnx"
    said = export_model(detector, path)
    assert said == "image, windows -> scores, boxes of cat, cow, dog, horse, person, sheep"
    return opened(path)


def raw(detector, image, windows):
    """Return the scores and boxes of the detector before suppression."""
    boxes, scores = detector.score(detector.encode(image), windows)
    limits = np.array([image.shape[1], image.shape[0]] * 2, dtype=np.float32)
    return scores, np.clip(boxes, 0, limits)


def windows_of(image, count, seed=0):
    height, width = image.shape[:2]
    ends = np.random.default_rng(seed).random((2, count, 2)) * [width, height]
    low, high = ends.min(axis=0), np.minimum(ends.max(axis=0) + 1, [width, height])
    return np.concatenate([low, high], axis=1).astype(np.float32)


def test_detector_scores_and_boxes(detector, session, photo):
    images = {"photo": photo, "tall": photo[:, 100:220], "strip": photo[100:118, :300], "tiny": photo[:9, :8]}
    for name, image in images.items():
        image = np.ascontiguousarray(image)
        windows = windows_of(image, 200)
        scores, boxes = run(session, image, windows)
        expected = raw(detector, image, windows)
        assert scores.dtype == boxes.dtype == np.float32
        np.testing.assert_allclose(scores, expected[0], atol=1e-4, err_msg=name)
        np.testing.assert_allclose(boxes, expected[1], atol=1e-2, err_msg=name)


def test_detector_on_an_image_that_shrinks(detector, session, photo):
    image = np.tile(photo, (2, 2, 1))  # To less than half, where a pixel may be a grey level off.
    windows = windows_of(image, 200)
    scores, boxes = run(session, image, windows)
    expected = raw(detector, image, windows)
    np.testing.assert_allclose(scores, expected[0], atol=5e-3)
    np.testing.assert_allclose(boxes, expected[1], atol=0.5)


@pytest.fixture(scope="module")
def of_the_paper(small_backbone, photo):
    """A detector by the rules of the paper, without fully connected layers; drawn instead of fitted."""
    detector = Detector(
        small_backbone.name,
        stages=small_backbone.stages,
        weights="random",
        scales=(320, 160),
        levels=(3, 1),
        projection="paper",
        scale_rule="paper",
    )
    pooled = detector.pooling(small_backbone.encode(photo, detector.scales), windows_of(photo, 200))
    rng, length = np.random.default_rng(0), pooled.shape[1]
    weights = (rng.standard_normal((2, 5, length)) / np.sqrt(length)).astype(np.float32)
    detector.fitted_ = Fitted(
        classes=("this", "that"),
        backbone=small_backbone,
        head=None,
        objectness=None,
        svms=LinearSVMs(weights[:, 0].copy(), np.float32([0.5, -0.5])),
        regression=BoxRegression(weights[:, 1:] / 10, np.float32([[0, 0.1, 0.2, 0.3], [-0.1, 0, 0, 0.1]])),
        feature_scale=1 / float(pooled.std()),
        photos=np.zeros(0, np.uint64),
    )
    return detector


@pytest.fixture(scope="module")
def session_of_the_paper(of_the_paper, tmp_path_factory):
    path = tmp_path_factory.mktemp("paper") / "detector.onnx"
    export_detector(of_the_paper, path)
    return opened(path)


def test_detector_by_the_rules_of_the_paper(of_the_paper, session_of_the_paper, photo):
    session, windows = session_of_the_paper, windows_of(photo, 400)
    scores, boxes = run(session, photo, windows)
    expected = raw(of_the_paper, photo, windows)
    assert expected[0].std() > 0.1
    np.testing.assert_allclose(scores, expected[0], atol=1e-4)
    np.testing.assert_allclose(boxes, expected[1], atol=1e-2)
    released = {"scale_rule": "released", "projection": "released"}
    for rule in released:
        other = copy.copy(of_the_paper).set_params(**{rule: released[rule]})
        assert np.abs(scores - raw(other, photo, windows)[0]).max() > 0.1, rule
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["projection"]) == json.loads(facts["scale_rule"]) == "paper"


@pytest.mark.parametrize("ranks", [(0, 0), (5, 0)])
def test_detector_with_fully_connected_layers(of_the_paper, photo, tmp_path, ranks):
    rng, fitted = np.random.default_rng(0), of_the_paper.fitted_
    length = fitted.regression.weights.shape[-1]

    def linear(inputs, outputs):
        weights = rng.standard_normal((outputs, inputs)) / np.sqrt(inputs)
        return Linear(weights.astype(np.float32), rng.standard_normal(outputs).astype(np.float32))

    head = Head((linear(length, 16),), (linear(16, 16),), linear(16, 3), linear(16, 8)).compressed(ranks)
    detector = copy.copy(of_the_paper).set_params(layer="fc7")
    detector.fitted_ = replace(fitted, head=head, svms=LinearSVMs(*linear(16, 2)))
    export_detector(detector, tmp_path / "headed.onnx")
    windows = windows_of(photo, 50)
    scores, boxes = run(opened(tmp_path / "headed.onnx"), photo, windows)
    expected = raw(detector, photo, windows)
    assert expected[0].std() > 0.1
    np.testing.assert_allclose(scores, expected[0], atol=1e-4)
    np.testing.assert_allclose(boxes, expected[1], atol=1e-2)


@pytest.mark.parametrize("scale_rule", ["released", "paper"])
@pytest.mark.parametrize("projection", ["released", "paper"])
def test_networks_of_a_detector_follow_its_rules(of_the_paper, photo, scale_rule, projection):
    scales = (160, 320, 240)
    detector = copy.copy(of_the_paper).set_params(
        scales=scales, scale_rule=scale_rule, projection=projection, reference=None
    )
    prepare, score = Preparation(PixelRules.of(detector.fitted_.backbone), scales), Scoring(detector).eval()
    for image in map(np.ascontiguousarray, (photo, photo[:, :130], photo[:11, :300], photo[:9, :8])):
        windows = windows_of(image, 300)
        with torch.no_grad():
            scores, boxes = score(*prepare(torch.from_numpy(image)), torch.from_numpy(windows))
        expected = raw(detector, image, windows)
        np.testing.assert_allclose(scores.numpy(), expected[0], atol=1e-4)
        np.testing.assert_allclose(boxes.numpy(), expected[1], atol=1e-2)


@pytest.mark.parametrize(("height", "width"), [(12, 451), (300, 14), (21, 440)])
def test_detector_on_a_strip_chooses_scales_by_its_true_sides(
    of_the_paper, session_of_the_paper, photo, height, width
):
    image = np.ascontiguousarray(photo[:height, :width])
    windows = windows_of(image, 400)
    encoded, pooling = of_the_paper.encode(image), of_the_paper.pooling
    assert max(encoded.sides) < max(of_the_paper.scales)
    chosen = pooling.choose(encoded, windows)
    asked = choose_scale(windows, min(image.shape[:2]), pooling.scales, pooling.reference, "paper")
    assert (chosen != asked).any(), "otherwise this says nothing"
    scores, boxes = run(session_of_the_paper, image, windows)
    expected = raw(of_the_paper, image, windows)
    np.testing.assert_allclose(scores, expected[0], atol=1e-4)
    np.testing.assert_allclose(boxes, expected[1], atol=1e-2)


@pytest.mark.parametrize("rule", ["released", "paper"])
def test_scales_are_chosen_alike_from_arrays_and_from_tensors(rule):
    boxes = windows_of(np.zeros((480, 640, 3), np.uint8), 2000)
    for sides in ((240, 336, 480), (480, 240, 336), (240, 240, 480), (300,)):
        chosen = choose_scale(boxes, 480, sides, 208, rule)
        tensors = torch.from_numpy(boxes), torch.tensor(480.0), torch.tensor(sides, dtype=torch.float64)
        found = choose_scale(*tensors, 208, rule)
        assert found.dtype == torch.int64
        assert found.tolist() == chosen.tolist()
        # A loop over the scales, the smaller one first.
        order = sorted(range(len(sides)), key=lambda s: sides[s])
        for box, place in zip(boxes.astype(float), chosen, strict=True):
            area = max((box[2] - box[0]) * (box[3] - box[1]), 1)
            wanted = (208 * 480) ** 2 / area
            if rule == "paper":
                gaps = [abs(sides[s] ** 2 - wanted) for s in order]
            else:
                gaps = [abs(sides[s] - np.floor(208 * 480 / np.sqrt(area) + 0.5)) for s in order]
            assert place == order[int(np.argmin(gaps))]


def test_detector_finds_what_predict_finds(detector, session, photo):
    windows = windows_of(photo, 400, seed=1)
    scores, boxes = run(session, photo, windows)
    found = postprocess(boxes, scores, detector.classes_, photo.shape[:2], detector.nms_iou, -1.5, 100)
    expected = detector.predict(photo, windows, threshold=-1.5)
    assert len(found.labels) > 1
    assert found.labels[0] == "cow"
    assert found.labels == expected.labels
    assert (iou(found.boxes, expected.boxes).diagonal() > 0.999).all()


def test_detector_takes_any_number_of_windows(detector, session, photo):
    for count in (0, 1):
        windows = windows_of(photo, count)
        scores, boxes = run(session, photo, windows)
        assert scores.shape == (count, len(detector.classes_))
        assert boxes.shape == (count, len(detector.classes_), 4)
        if count:
            np.testing.assert_allclose(scores, raw(detector, photo, windows)[0], atol=1e-4)


def test_detector_file_says_what_it_is(detector, session):
    facts = {
        name: json.loads(text)
        for name, text in session.get_modelmeta().custom_metadata_map.items()
        if name != "sppnet"
    }
    assert tuple(facts["classes"]) == detector.classes_
    assert facts["nms_iou"] == detector.nms_iou
    assert facts["scales"] == [320]
    assert facts["levels"] == list(detector.levels)
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
        ("image", ["height", "width", 3], "tensor(uint8)"),
        ("windows", ["windows", 4], "tensor(float)"),
    ]


class Refused(nn.Module):
    def forward(self, maps):
        return maps if maps.sum().item() > 0 else -maps


def test_what_cannot_be_exported_is_one_line_and_leaves_the_file(small_backbone, tmp_path, monkeypatch):
    backbone = small_backbone
    path = tmp_path / "network.onnx"
    path.write_bytes(b"before")
    maps, pool = torch.zeros(2, 3, 5, 7), SpatialPyramidPooling()
    with pytest.raises(SppnetError, match=r"cannot be exported: .*data-dependent") as failure:
        export_network(Refused(), (maps,), path)
    assert "\n" not in str(failure.value)
    with pytest.raises(NotFittedError, match="not fitted"):
        export_detector(Detector(), path)
    for model in (Detector(), pool, Objectness()):
        with pytest.raises(SppnetError, match=f"found {type(model).__name__}, expected a fitted Detector"):
            export_model(model, path)
    with pytest.raises(SppnetError, match=r"network\.txt: found the suffix '\.txt', expected \.onnx"):
        export_model(backbone, path.with_suffix(".txt"))
    with pytest.raises(SppnetError, match="levels must be"):
        export_features(backbone, path, scale=160, levels=(0,))
    with pytest.raises(OSError, match="cannot write"):
        export_network(pool, (maps,), tmp_path / "missing" / "network.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for refused in (
        lambda: export_network(pool, (maps,), path),
        lambda: export_features(backbone, path, scale=160),
    ):
        with pytest.raises(SppnetError, match=r'found no onnxscript.*pip install "sppnet\[onnx\]"'):
            refused()
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["network.onnx"]


class TestClassifier:
    @pytest.mark.parametrize("name", ["zf5", "overfeat7", "resnet10t"])
    def test_probabilities_of_images_of_any_size(self, name, tmp_path):
        classes = ("a", "b", "c")
        network = build(NetworkSettings(name, classes, (3, 2, 1), width=0.1, size=96)).eval()
        with torch.no_grad():
            network.head[-1].linear.weight.mul_(100)  # so that the classes differ
        classifier = SimpleNamespace(network_=network, classes_=classes)
        said = export_model(classifier, tmp_path / "c.onnx")
        assert said == "image -> probabilities of 3 classes"
        session = opened(tmp_path / "c.onnx")
        rng = np.random.default_rng(0)
        for size in ((96, 96), (130, 300), (300, 97), (50, 40), (9, 250)):
            image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            expected = probabilities(network, image, "full").numpy()
            assert expected.max() - expected.min() > 0.01
            np.testing.assert_allclose(run(session, image), expected, atol=2e-4)
        metadata = session.get_modelmeta().custom_metadata_map
        assert json.loads(metadata["classes"]) == [*classes]
        assert json.loads(metadata["side"]) == 110

    def test_without_a_pyramid(self, tmp_path):
        network = build(NetworkSettings("zf5", ("a", "b"), None, width=0.05, size=96))
        with pytest.raises(SppnetError, match="no pyramid"):
            export_classifier(SimpleNamespace(network_=network, classes_=("a", "b")), tmp_path / "c.onnx")
        assert not any(tmp_path.iterdir())
