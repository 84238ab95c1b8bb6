import json
from types import SimpleNamespace

import numpy as np
import pytest

import onnx
from graphs import opened, run
from processes import without_pytorch
from sppnet.classification.scorer import NetworkSettings, Scorer
from sppnet.classification.views import probabilities
from sppnet.detection.detector import Detector
from sppnet.errors import NotFittedError, SppnetError
from sppnet.features.backbone import Backbone
from sppnet.linear import Linear
from sppnet.onnx.export import export_classifier, export_detector, export_features, export_model
from sppnet.pooling.pyramid import spatial_pyramid
from sppnet.proposals import DenseWindows
from sppnet.proposals.maps import Objectness


def facts_of(session):
    """Return the metadata of a file, read from JSON."""
    texts = session.get_modelmeta().custom_metadata_map
    return {name: json.loads(text) for name, text in texts.items() if name != "sppnet"}


def takes_an_image(session):
    found = [(i.name, i.shape, i.type) for i in session.get_inputs()]
    return found == [("image", ["height", "width", 3], "tensor(uint8)")]


def weight_bytes(path):
    return sum(len(t.raw_data) for t in onnx.load(path).graph.initializer)


class TestFeatures:
    def test_of_images_of_any_size(self, small_backbone, photo, scenes, tmp_path):
        path, backbone = tmp_path / "features.onnx", small_backbone
        said = export_model(backbone, path, scale=160, levels=(3, 1))
        assert said == "image -> features of test_efficientnet"
        session = opened(path)
        assert takes_an_image(session)
        assert [(o.name, o.type) for o in session.get_outputs()] == [("features", "tensor(float)")]
        facts = facts_of(session)
        assert facts["scales"] == [160]
        assert facts["levels"] == [3, 1]
        assert facts["backbone"] == backbone.signature
        assert facts["source"] == "random"
        for image in (*scenes.values(), np.tile(photo, (2, 2, 1))):
            maps = backbone(image, 160)
            expected = np.concatenate([spatial_pyramid(m, (3, 1)) for m in maps.stages])
            atol = (2e-2 if len(image) > 320 else 5e-4) * expected.std()
            np.testing.assert_allclose(run(session, image), expected, rtol=0, atol=atol)

    def test_of_tuned_weights_and_another_stride(self, small_backbone, photo, tmp_path):
        name = next(n for n, v in small_backbone.parameters.items() if v.ndim == 4)
        tuned = small_backbone.retuned({name: small_backbone.parameters[name] * 2})
        tuned = Backbone(small_backbone.graph, ("head",), 32).retuned(tuned.tuned)
        export_features(tuned, tmp_path / "tuned.onnx", scale=100, levels=(1,))
        expected = spatial_pyramid(tuned(photo, 100).stages[0], (1,))
        found = run(opened(tmp_path / "tuned.onnx"), photo)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-2 * expected.std())
        plain = spatial_pyramid(Backbone(tuned.graph, ("head",), 32)(photo, 100).stages[0], (1,))
        assert np.abs(plain - expected).max() > 0.1 * expected.std()

    def test_equal_exports_are_equal_files(self, small_backbone, tmp_path):
        for name in ("one.onnx", "two.onnx"):
            export_features(small_backbone, tmp_path / name)
        assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def finds_what_predict_finds(session, detector, image, *, threshold=None, scores_atol=1e-3, box_atol=0.5):
    """Compare a file with the library; of detections with nearly equal scores either may come first."""
    fitted = detector.fitted_
    learned = fitted.objectness is not None or fitted.side is not None
    windows = None if learned else DenseWindows()(image).boxes
    proposals = None if windows is not None else "maps"
    expected = detector.predict(image, windows, proposals=proposals, threshold=threshold)
    boxes, scores, labels = run(session, image)
    assert (boxes.dtype, scores.dtype, labels.dtype) == (np.float32, np.float32, np.int64)
    assert boxes.shape == (len(scores), 4)
    assert (np.diff(scores) <= 0).all()
    assert len(labels) == len(expected.labels)
    names, left = [detector.classes_[i] for i in labels], set(range(len(labels)))
    for box, score, label in zip(expected.boxes, expected.scores, expected.labels, strict=True):
        same = [
            i
            for i in left
            if names[i] == label
            and abs(scores[i] - score) <= scores_atol
            and np.abs(boxes[i] - box).max() <= box_atol
        ]
        assert same, f"not found: {label} {score} at {box}"
        left.remove(min(same, key=lambda i: np.abs(boxes[i] - box).max()))
    return len(labels)


PAPER = {"projection": "paper", "scale_rule": "paper"}
DETECTORS = {
    "released rules": {"projection": "released", "scale_rule": "released"},
    "rules of the paper": PAPER,
    "layers": {**PAPER, "head": True},
    "scales in any order": {"scales": (160, 320, 240), "scale_rule": "released", "projection": "paper"},
    "one scale, average": {"scales": (240,), "reference": 100.0},
    "windows from maps": {"proposes": True},
    "windows from maps under layers": {"proposes": True, "head": True, "scales": (240, 320, 160), **PAPER},
}


class TestDetector:
    @pytest.mark.parametrize("kind", DETECTORS)
    def test_finds_what_predict_finds(self, drawn_detector, scenes, tmp_path, kind):
        detector = drawn_detector(**DETECTORS[kind])
        export_model(detector, tmp_path / "d.onnx", threshold=0)
        session = opened(tmp_path / "d.onnx")
        counts = [
            finds_what_predict_finds(session, detector, image, threshold=0) for image in scenes.values()
        ]
        assert max(counts) > 10
        assert min(counts) < 10

    def test_on_an_image_that_shrinks(self, drawn_detector, photo, tmp_path):
        detector = drawn_detector()
        export_detector(detector, tmp_path / "d.onnx")
        image = np.tile(photo, (2, 2, 1))  # To less than half, where a pixel may be a grey level off.
        finds_what_predict_finds(opened(tmp_path / "d.onnx"), detector, image, scores_atol=1e-2)

    @pytest.mark.parametrize(("height", "width"), [(12, 451), (300, 14), (21, 440)])
    def test_on_a_strip_chooses_scales_by_its_true_sides(
        self, drawn_detector, photo, tmp_path, height, width
    ):
        detector = drawn_detector(**PAPER)
        image = np.ascontiguousarray(photo[:height, :width])
        assert max(detector.encode(image).sides) < max(detector.scales)
        export_detector(detector, tmp_path / "d.onnx")
        assert finds_what_predict_finds(opened(tmp_path / "d.onnx"), detector, image)

    def test_threshold_and_limit(self, drawn_detector, photo, tmp_path):
        detector = drawn_detector()
        export_detector(detector, tmp_path / "d.onnx", threshold=0.25)
        session = opened(tmp_path / "d.onnx")
        count = finds_what_predict_finds(session, detector, photo, threshold=0.25)
        assert 0 < count < len(detector.predict(photo, threshold=0).labels)
        assert facts_of(session)["thresholds"] == [0.25, 0.25]
        detector.limit = 3
        export_detector(detector, tmp_path / "d.onnx", threshold=0)
        windows = DenseWindows()(photo).boxes
        expected = detector.predict(photo, windows, threshold=0)
        assert len(expected.labels) == 6
        assert run(opened(tmp_path / "d.onnx"), photo)[2].tolist() == [
            detector.classes_.index(label) for label in expected.labels
        ]
        export_detector(detector, tmp_path / "d.onnx", threshold=1.01)
        assert [len(part) for part in run(opened(tmp_path / "d.onnx"), photo)] == [0, 0, 0]

    def test_file_says_what_it_is(self, drawn_detector, tmp_path):
        detector = drawn_detector(nms_iou=0.4)
        path = tmp_path / "d.onnx"
        said = export_model(detector, path, threshold=0)
        assert said == "image -> boxes, scores and labels of this, that; windows from a grid"
        session = opened(path)
        assert takes_an_image(session)
        assert [(o.name, o.shape, o.type) for o in session.get_outputs()] == [
            ("boxes", ["detections", 4], "tensor(float)"),
            ("scores", ["detections"], "tensor(float)"),
            ("labels", ["detections"], "tensor(int64)"),
        ]
        expected = {
            "classes": ["this", "that"],
            "nms_iou": 0.4,
            "thresholds": [0, 0],
            "limit": 100,
            "scales": [320, 160],
        }
        expected |= {"levels": [3, 1], "projection": "released", "windows": "windows from a grid"}
        expected |= {"backbone": detector.fitted_.backbone.signature, "source": "random", "licence": ""}
        assert facts_of(session).items() >= expected.items()
        detector.set_params(proposals="selective-search+edge-boxes")
        said = export_model(detector, path)
        assert said.endswith("a grid, not by selective-search+edge-boxes, which no graph holds")
        assert export_model(drawn_detector(proposes=True), path).endswith("windows from its maps")

    def test_weights_are_there_once_however_many_the_scales(self, drawn_detector, tmp_path):
        detector = drawn_detector(head=True)
        sizes = []
        for scales in ((240,), (160, 240, 320, 400)):
            export_detector(detector.set_params(scales=scales), tmp_path / "d.onnx")
            sizes.append(weight_bytes(tmp_path / "d.onnx"))
        assert sizes[1] < sizes[0] + 2000

    def test_needs_no_pytorch(self, tmp_path):
        without_pytorch(
            "from sppnet.detection.detector import Detector\n"
            "from sppnet.onnx.export import export_model\n"
            "export_model(Detector.load('animals'), sys.argv[1])",
            tmp_path / "animals.onnx",
        )
        assert onnx.load(tmp_path / "animals.onnx").graph.node


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """The detector that is shipped, with its file."""
    path, detector = tmp_path_factory.mktemp("animals") / "animals.onnx", Detector.load("animals")
    export_detector(detector, path, threshold=0)
    return detector, path


def test_animals_in_a_photo(animals, photo):
    detector, path = animals
    session = opened(path)
    assert finds_what_predict_finds(session, detector, photo, threshold=0)
    _, scores, labels = run(session, photo)
    assert detector.classes_[labels[0]] == "cow"
    assert scores[0] > 0.5
    assert path.stat().st_size < 40e6


def test_what_cannot_be_exported_is_one_line_and_leaves_the_file(small_backbone, tmp_path):
    path = tmp_path / "network.onnx"
    path.write_bytes(b"before")
    with pytest.raises(NotFittedError, match="not fitted"):
        export_detector(Detector(), path)
    for model in (Detector(), Objectness(), object()):
        with pytest.raises(SppnetError, match=f"found {type(model).__name__}, expected a fitted Detector"):
            export_model(model, path)
    with pytest.raises(SppnetError, match=r"network\.txt: found the suffix '\.txt', expected \.onnx"):
        export_model(small_backbone, path.with_suffix(".txt"))
    with pytest.raises(SppnetError, match="levels must be"):
        export_features(small_backbone, path, levels=(0,))
    with pytest.raises(OSError, match="cannot write"):
        export_features(small_backbone, tmp_path / "missing" / "network.onnx")
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["network.onnx"]


def drawn_classifier(backbone, levels, mode="max", hidden=(), norm=None):
    """Return a classifier of three classes, drawn instead of fitted."""
    rng, classes = np.random.default_rng(0), ("a", "b", "c")
    inputs, layers = backbone.channels[0] * sum(n * n for n in levels or (3,)), []
    for width in (*hidden, 3):
        weights = rng.standard_normal((width, inputs)).astype(np.float32) / np.float32(inputs**0.5)
        layers.append(Linear(weights, rng.standard_normal(width).astype(np.float32)))
        inputs = width
    settings = NetworkSettings(backbone.name, classes, levels, mode, hidden or None, norm=norm, size=96)
    scorer = Scorer(settings, backbone, tuple(layers))
    if levels is not None:
        # The maps of drawn weights are much alike: what differs is made larger, about a first image.
        last = layers[-1]
        first = scorer.scores(rng.integers(0, 256, (1, 96, 96, 3), dtype=np.uint8))[0]
        layers[-1] = Linear(last.weights * 100, (last.offsets - first) * 100)
        scorer = Scorer(settings, backbone, tuple(layers))
    return SimpleNamespace(scorer_=scorer, classes_=classes)


class TestClassifier:
    @pytest.mark.parametrize(
        "settings",
        [
            {"levels": (3, 2, 1)},
            {"levels": (1,), "mode": "average"},
            {"levels": (2, 1), "hidden": (20, 10), "norm": 30.0},
        ],
        ids=str,
    )
    def test_probabilities_of_images_of_any_size(self, backbone_file, settings, tmp_path):
        backbone = Backbone.shared(backbone_file("test_efficientnet"), ("head",), 32)
        classifier = drawn_classifier(backbone, **settings)
        said = export_model(classifier, tmp_path / "c.onnx")
        assert said == "image -> probabilities of 3 classes"
        session = opened(tmp_path / "c.onnx")
        assert takes_an_image(session)
        rng, seen = np.random.default_rng(0), []
        for size in ((96, 96), (130, 200), (200, 97), (70, 60), (19, 250)):
            image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            expected = probabilities(classifier.scorer_, image, "full")
            assert expected.max() - expected.min() > 0.01
            np.testing.assert_allclose(run(session, image), expected, atol=2e-4)
            seen.append(expected)
        assert np.ptp(seen, axis=0).max() > 1e-2
        facts = facts_of(session)
        assert facts["classes"] == ["a", "b", "c"]
        assert facts["side"] == 110
        assert facts["backbone"] == backbone.signature

    def test_without_a_pyramid(self, backbone_file, tmp_path):
        backbone = Backbone.shared(backbone_file("test_efficientnet"), ("head",), 32)
        with pytest.raises(SppnetError, match="no pyramid"):
            export_classifier(drawn_classifier(backbone, None), tmp_path / "c.onnx")
        assert not any(tmp_path.iterdir())
