import copy
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from sppnet.boxes import iou
from sppnet.classification.network import NetworkSettings, build
from sppnet.classification.views import probabilities
from sppnet.detection.detector import Detector
from sppnet.detection.file import shipped
from sppnet.detection.postprocess import postprocess
from sppnet.features.backbone import _FromPixels
from sppnet.images import resize
from sppnet.onnx.export import (
    _of_backbone,
    _Preparation,
    export_classifier,
    export_detector,
    export_features,
    export_network,
)
from sppnet.pooling import SpatialPyramidPooling, pool_regions

onnx = pytest.importorskip("onnx", reason="needs the extra sppnet[onnx]")
pytest.importorskip("onnxscript", reason="needs the extra sppnet[onnx]")
runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime to run what was exported")

LEVELS = (1, 6, 4, 3, 2)
EDGES = (*range(1, 14), 20, 41, 79, 80)


def opened(path):
    """Return a session of one thread, and check what the file says of its operators."""
    model = onnx.load(path, load_external_data=False)
    assert {o.domain for o in model.opset_import} == {""}
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(session, *values):
    names = [i.name for i in session.get_inputs()]
    found = session.run(None, dict(zip(names, map(np.asarray, values), strict=True)))
    return found[0] if len(found) == 1 else found


def agree(found, expected, mode):
    """Maxima are the same numbers; means are summed in another order."""
    expected = expected.detach().numpy()
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=0 if mode == "max" else 1e-6)


class Regions(nn.Module):
    """Pool windows of maps that come as one batch or as a list."""

    def __init__(self, mode, levels=LEVELS, dtype=None):
        super().__init__()
        self.mode, self.levels, self.dtype = mode, levels, dtype

    def forward(self, maps, windows, index=None):
        return pool_regions(maps, windows, self.levels, mode=self.mode, index=index, dtype=self.dtype)


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = SpatialPyramidPooling(LEVELS)

    def forward(self, maps, sizes):
        return self.pool(maps, sizes)


@pytest.fixture(scope="module", params=["max", "average"])
def layer(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("layer") / "layer.onnx"
    pool = SpatialPyramidPooling(LEVELS, request.param)
    export_network(pool, (torch.zeros(2, 3, 5, 7),), path)
    return pool, opened(path)


def test_layer_is_exact_at_every_size(layer):
    pool, session = layer
    rng = np.random.default_rng(0)
    sizes = range(1, 81) if pool.mode == "max" else EDGES
    for height in sizes:
        for width in sizes:
            maps = rng.standard_normal((1, 3, height, width), dtype=np.float32)
            agree(run(session, maps), pool(torch.from_numpy(maps)), pool.mode)


def test_layer_takes_any_batch_and_numbers_below_zero(layer):
    pool, session = layer
    for count in (1, 2, 5):
        maps = -torch.rand(count, 3, 9, 4) - 1
        agree(run(session, maps), pool(maps), pool.mode)


def test_layer_in_half_precision(tmp_path):
    pool = SpatialPyramidPooling((3, 2))
    export_network(pool, (torch.zeros(2, 3, 5, 7, dtype=torch.float16),), tmp_path / "half.onnx")
    maps = torch.randn(2, 3, 11, 6).half()
    agree(run(opened(tmp_path / "half.onnx"), maps), pool(maps), "max")


def test_layer_of_a_list_and_of_a_padded_batch(tmp_path):
    maps = [torch.randn(3, h, w) for h, w in ((4, 9), (7, 7), (1, 2))]
    pool = SpatialPyramidPooling(LEVELS)
    example = ([torch.zeros(3, 4 + i, 5 + i) for i in range(3)],)
    export_network(pool, example, tmp_path / "list.onnx", input_names=["a", "b", "c"])
    agree(run(opened(tmp_path / "list.onnx"), *maps), pool(maps), "max")

    export_network(Padded(), (torch.zeros(2, 3, 5, 7), torch.ones(2, 2).long()), tmp_path / "padded.onnx")
    padded = torch.full((3, 3, 8, 10), 1e9)
    for page, m in zip(padded, maps, strict=True):
        page[:, : m.shape[1], : m.shape[2]] = m
    sizes = torch.tensor([m.shape[1:] for m in maps])
    agree(run(opened(tmp_path / "padded.onnx"), padded, sizes), pool(maps), "max")


def drawn_windows(rng, sizes, count):
    """Return windows anywhere in maps of these (height, width), down to one cell, and the map of each."""
    index = rng.integers(0, len(sizes), count)
    limits = np.array(sizes)[index][:, ::-1]
    low = np.floor(rng.random((count, 2)) * limits)
    high = low + 1 + np.floor(rng.random((count, 2)) * (limits - low))
    return np.concatenate([low, high], axis=1).astype(np.int64), index.astype(np.int64)


@pytest.mark.parametrize("mode", ["max", "average"])
@pytest.mark.parametrize("form", ["map", "batch", "list"])
def test_regions(mode, form, tmp_path):
    network = Regions(mode)
    example = {
        "map": torch.zeros(4, 6, 7),
        "batch": torch.zeros(3, 4, 6, 7),
        "list": [torch.zeros(4, 6 + i, 7 + i) for i in range(3)],
    }[form]
    windows, index = torch.tensor([[0, 0, 1, 1]] * 3), torch.tensor([0, 1, 2])
    given = (windows,) if form == "map" else (windows, index)
    export_network(network, (example, *given), tmp_path / "regions.onnx")
    session = opened(tmp_path / "regions.onnx")
    rng = np.random.default_rng(1)
    for count in (0, 1, 2, 40) * 6:
        sizes = rng.integers(1, 81, (3, 2))
        if form != "list":
            sizes[:] = sizes[0]
        maps = [torch.from_numpy(rng.standard_normal((4, *size), dtype=np.float32)) for size in sizes]
        places, which = map(torch.from_numpy, drawn_windows(rng, sizes, count))
        if form == "map":
            agree(run(session, maps[0], places), network(maps[0], places), mode)
        elif form == "batch":
            batch = torch.stack(maps)
            agree(run(session, batch, places, which), network(batch, places, which), mode)
        else:
            agree(run(session, *maps, places, which), network(maps, places, which), mode)


def test_regions_in_half_precision_and_the_dtype_asked_for(tmp_path):
    network = Regions("max", (3, 2), torch.float32)
    maps, windows = torch.randn(2, 9, 8).half(), torch.tensor([[0, 0, 8, 9], [2, 1, 7, 3]])
    export_network(network, (torch.zeros(2, 5, 6).half(), windows), tmp_path / "half.onnx")
    agree(run(opened(tmp_path / "half.onnx"), maps, windows), network(maps, windows), "max")


def test_a_network_of_ones_own(tmp_path):
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        SpatialPyramidPooling((3, 1)),
        nn.Linear(80, 5),
    )
    network.train()
    path = tmp_path / "network.onnx"
    facts = {"classes": "a, b, c, d, e"}
    export_network(
        network,
        (torch.zeros(2, 3, 32, 32),),
        path,
        input_names=["image"],
        output_names=["scores"],
        metadata=facts,
    )
    assert network.training, "it was left as it was"
    session = opened(path)
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert [o.name for o in session.get_outputs()] == ["scores"]
    assert session.get_modelmeta().custom_metadata_map.items() >= facts.items()
    for shape in ((1, 3, 1, 1), (3, 3, 57, 20)):
        images = torch.randn(shape)
        expected = network.eval()(images).detach().numpy()
        np.testing.assert_allclose(run(session, images), expected, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["network.onnx"], "one file, weights inside"


@pytest.fixture(scope="module")
def backbone(lite0):
    return lite0


@pytest.fixture(scope="module")
def photo():
    """A cat, 300 x 451."""
    return pytest.importorskip("skimage.data").chelsea()


def standardised(backbone, image):
    """Return what the backbone makes of the pixels of a resized image."""
    return _FromPixels(backbone.network).standardise(backbone._padded(image))


@pytest.mark.parametrize(
    ("height", "width"), [(300, 451), (451, 61), (240, 240), (97, 451), (13, 11), (9, 451), (451, 5), (1, 1)]
)
def test_preparation_is_the_backbones_to_the_bit(backbone, photo, height, width):
    image = np.ascontiguousarray(np.tile(photo, (2, 1, 1))[:height, :width])
    prepared, sizes, size = _Preparation(_of_backbone(backbone), (64, 240, 270))(torch.from_numpy(image))
    assert size.tolist() == [height, width]
    for found, (h, w), side in zip(prepared, sizes.tolist(), (64, 240, 270), strict=True):
        if height <= 2 * h or width <= 2 * w:
            assert torch.equal(found, standardised(backbone, resize(image, h, w)))
        maps = backbone(image, side)
        assert maps.factors == (w / width, h / height)


def test_preparation_shrinks_as_the_backbone_within_one_grey_level(backbone, photo):
    for side in (37, 75, 100, 128, 149):
        prepared, sizes, _ = _Preparation(_of_backbone(backbone), (side,))(torch.from_numpy(photo))
        apart = (prepared[0] - standardised(backbone, resize(photo, *sizes[0].tolist()))).abs() * 127.5
        assert apart.max() < 1.001
        assert (apart > 0).float().mean() < 2e-3


def test_features_of_a_backbone(backbone, photo, tmp_path):
    path = tmp_path / "features.onnx"
    export_features(backbone, path, side=160, levels=(3, 1))
    session = opened(path)
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
        ("image", ["height", "width", 3], "tensor(uint8)")
    ]
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["sides"]) == [160]
    assert json.loads(facts["levels"]) == [3, 1]
    assert json.loads(facts["backbone"]) == backbone.signature
    pool = SpatialPyramidPooling((3, 1))
    images = [photo, photo[:90, 50:], photo[:, :70], photo[:7, :120], np.tile(photo, (2, 2, 1))]
    for image in map(np.ascontiguousarray, images):
        expected = pool(backbone(image, 160).stages[0]).numpy()
        np.testing.assert_allclose(run(session, image), expected, atol=2e-2 if len(image) > 320 else 1e-4)


@pytest.fixture(scope="module")
def detector():
    """The detector that is shipped, at two of its sides."""
    detector = Detector.load(shipped())
    detector.sides = (320, 160)
    return detector


@pytest.fixture(scope="module")
def session(detector, tmp_path_factory):
    path = tmp_path_factory.mktemp("detector") / "detector.onnx"
    export_detector(detector, path)
    return opened(path)


def raw(detector, image, windows):
    """Return the scores and boxes of the detector before suppression."""
    maps = [detector.backbone(image, side) for side in detector.sides]
    boxes, scores = detector.score_maps(maps, image.shape[:2], windows)
    limits = np.array([image.shape[1], image.shape[0]] * 2, dtype=np.float32)
    return scores.numpy(), np.clip(boxes.numpy(), 0, limits)


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
def of_the_paper(detector):
    ruled = copy.copy(detector)
    ruled.projection, ruled.scale_rule = "paper", "paper"
    return ruled


def test_detector_by_the_rules_of_the_paper(detector, of_the_paper, photo, tmp_path):
    export_detector(of_the_paper, tmp_path / "detector.onnx")
    session, windows = opened(tmp_path / "detector.onnx"), windows_of(photo, 400)
    scores, boxes = run(session, photo, windows)
    expected = raw(of_the_paper, photo, windows)
    np.testing.assert_allclose(scores, expected[0], atol=1e-4)
    np.testing.assert_allclose(boxes, expected[1], atol=1e-2)
    assert np.abs(scores - raw(detector, photo, windows)[0]).max() > 0.1
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["projection"]) == json.loads(facts["scale_rule"]) == "paper"


def test_detector_finds_what_predict_finds(detector, session, photo):
    windows = windows_of(photo, 400, seed=1)
    scores, boxes = run(session, photo, windows)
    tensors = torch.from_numpy(boxes), torch.from_numpy(scores)
    found = postprocess(*tensors, detector.classes_, photo.shape[:2], detector.nms_iou, -1.5, 100)
    expected = detector.predict(photo, windows, threshold=-1.5)
    assert len(found.labels) > 1
    assert found.labels[0] == "cat"
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
    assert facts["sides"] == [320, 160]
    assert facts["levels"] == list(detector.levels)
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
        ("image", ["height", "width", 3], "tensor(uint8)"),
        ("windows", ["windows", 4], "tensor(float)"),
    ]


class Refused(nn.Module):
    def forward(self, maps):
        return maps if maps.sum().item() > 0 else -maps


def test_what_cannot_be_exported_is_one_line_and_leaves_the_file(backbone, tmp_path, monkeypatch):
    path = tmp_path / "network.onnx"
    path.write_bytes(b"before")
    maps, pool = torch.zeros(2, 3, 5, 7), SpatialPyramidPooling()
    with pytest.raises(ValueError, match=r"cannot be exported: .*data-dependent") as failure:
        export_network(Refused(), (maps,), path)
    assert "\n" not in str(failure.value)
    with pytest.raises(ValueError, match="found float64 maps, expected float32"):
        export_network(Regions("max"), (maps[0].double(), torch.tensor([[0, 0, 1, 1]] * 2)), path)
    with pytest.raises(ValueError, match="not fitted"):
        export_detector(Detector(backbone), path)
    with pytest.raises(ValueError, match="levels must be"):
        export_features(backbone, path, side=160, levels=(0,))
    with pytest.raises(OSError, match="cannot write"):
        export_network(pool, (maps,), tmp_path / "missing" / "network.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for refused in (
        lambda: export_network(pool, (maps,), path),
        lambda: export_features(backbone, path, side=160),
    ):
        with pytest.raises(ValueError, match=r'found no onnxscript.*pip install "sppnet\[onnx\]"'):
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
        export_classifier(network, tmp_path / "c.onnx", classes=classes)
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
        with pytest.raises(ValueError, match="no pyramid"):
            export_classifier(network, tmp_path / "c.onnx", classes=("a", "b"))
        assert not any(tmp_path.iterdir())
