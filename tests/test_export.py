"""ONNX files against PyTorch: exact at every size, for windows, and for whole detectors."""

import json
import sys

import numpy as np
import pytest
import torch
from skimage.data import chelsea
from torch import nn

from sppnet import export
from sppnet.boxes import clip
from sppnet.detect import Detector, shipped
from sppnet.maps import encode
from sppnet.networks import Trunk
from sppnet.pooling import SpatialPyramidPooling, pool_regions

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


class Layer(nn.Module):
    def __init__(self, levels, mode):
        super().__init__()
        self.pool = SpatialPyramidPooling(levels, mode)

    def forward(self, maps):
        return self.pool(maps)


def session(path):
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("levels", "mode"), [((6, 3, 2, 1), "max"), ((5, 4, 2), "max"), ((6, 3, 2, 1), "average")]
)
def test_the_layer_is_exact_at_every_size(tmp_path, levels, mode):
    network = Layer(levels, mode)
    export.export_network(network, (torch.zeros(2, 3, 9, 9),), tmp_path / "a.onnx")
    run = session(tmp_path / "a.onnx")
    sides = [*range(1, 20), 23, 24, 37, 48, 57, 64, 79, 80]
    for height in sides:
        for width in sides:
            maps = torch.randn(1 + height % 3, 3, height, width)
            (found,) = run.run(None, {run.get_inputs()[0].name: maps.numpy()})
            if mode == "max":
                assert np.array_equal(found, network(maps).numpy()), (height, width)
            else:
                np.testing.assert_allclose(found, network(maps).numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["max", "average"])
def test_windows_are_exact(tmp_path, mode):
    class Network(nn.Module):
        def forward(self, maps, windows, index):
            return pool_regions(maps, windows, (6, 3, 2, 1), mode=mode, index=index)

    example = torch.zeros(2, 3, 9, 8), torch.tensor([[0, 0, 2, 2]] * 3), torch.tensor([0, 1, 1])
    export.export_network(Network(), example, tmp_path / "a.onnx")
    run = session(tmp_path / "a.onnx")
    names = [i.name for i in run.get_inputs()]
    rng = np.random.default_rng(0)
    for count, height, width, rows in [
        (2, 9, 8, 20),
        (3, 43, 58, 300),
        (2, 1, 1, 2),
        (4, 80, 7, 50),
        (2, 6, 5, 0),
        (2, 6, 5, 1),
    ]:
        maps = torch.randn(count, 3, height, width)
        corners = [
            np.sort(rng.integers(0, side, (rows, 2)), axis=1) + np.array([0, 1]) for side in (width, height)
        ]
        windows = np.stack([corners[0][:, 0], corners[1][:, 0], corners[0][:, 1], corners[1][:, 1]], axis=1)
        index = rng.integers(0, count, rows)
        (found,) = run.run(None, dict(zip(names, (maps.numpy(), windows, index), strict=True)))
        expected = pool_regions(maps, windows, (6, 3, 2, 1), mode=mode, index=index).numpy()
        assert found.shape == expected.shape
        if mode == "max":
            assert np.array_equal(found, expected)
        else:
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_trunk_with_a_pyramid(tmp_path):
    trunk = Trunk("resnet18", stages=("3", "head"), output_stride=32, weights="random")
    export.export_features(trunk, tmp_path / "a.onnx", side=96, levels=(3, 1))
    run, layer = session(tmp_path / "a.onnx"), SpatialPyramidPooling((3, 1))
    photo = chelsea()
    for image in (photo, photo[:150, :90], photo[:20, :400], np.tile(photo, (2, 2, 1))):
        (found,) = run.run(None, {"image": np.ascontiguousarray(image)})
        expected = torch.cat([layer(m) for m in trunk(np.ascontiguousarray(image), 96).stages]).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_the_shipped_detector(tmp_path):
    detector, path = Detector.load(shipped()), tmp_path / "a.onnx"
    detector.sides = (160, 240)
    export.export_detector(detector, path)
    facts = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert json.loads(facts["classes"]) == list(detector.classes_)
    run, rng = session(path), np.random.default_rng(0)
    photo = chelsea()
    for image in (photo, photo[:120, :70], np.tile(photo, (3, 3, 1))):
        image = np.ascontiguousarray(image)
        height, width = image.shape[:2]
        corners = np.sort(rng.uniform(0, 1, (50, 2, 2)), axis=1) * [width, height]
        windows = corners.reshape(50, 4).astype(np.float32)
        scores, boxes = run.run(None, {"image": image, "windows": windows})
        maps = encode(detector.trunk, image, detector.sides)
        features = detector._pool(maps, windows, (height, width)) * detector.feature_scale_
        np.testing.assert_allclose(scores, detector.svms_(features), atol=1e-3)
        moved = detector._move(windows, features)
        for k in range(len(detector.classes_)):
            np.testing.assert_allclose(boxes[:, k], clip(moved[:, k], width, height), atol=0.05)
        assert run.run(None, {"image": image, "windows": windows[:0]})[0].shape == (0, 6)


def test_what_cannot_be_exported_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_text("old")

    class Broken(nn.Module):
        def forward(self, maps):
            return maps if maps.sum() > 0 else maps * 2

    with pytest.raises(ValueError, match="the network cannot be exported"):
        export.export_network(Broken(), (torch.zeros(2, 3, 9, 9),), path)
    with pytest.raises(ValueError, match="not fitted"):
        export.export_detector(Detector(Trunk(weights="random")), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r'onnxscript is missing.*pip install "sppnet\[onnx\]"'):
        export.export_network(Layer((1,), "max"), (torch.zeros(2, 3, 9, 9),), tmp_path / "a.onnx")
