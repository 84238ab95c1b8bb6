"""``sppnet export``."""

import json
from pathlib import Path

import numpy as np
import pytest

import onnx
from commands import detections_of, fails, succeeds
from processes import without_pytorch
from sppnet.datasets import read_dataset
from sppnet.detection.detector import Detector
from sppnet.images import read_image


def facts_of(path):
    return {p.key: json.loads(p.value) for p in onnx.load(path).metadata_props if p.key != "sppnet"}


class TestExport:
    def test_detector(self, model, data):
        graphs = pytest.importorskip("graphs", reason="needs onnxruntime to run what was exported")
        outcome = succeeds("export", model, "--out", "d.onnx")
        assert (
            "d.onnx: image -> boxes, scores and labels of disc, square, triangle; windows from a grid"
            in outcome.out
        )
        assert facts_of("d.onnx")["thresholds"] == Detector.load(model).thresholds_.tolist()
        session = graphs.opened("d.onnx")
        photos = read_dataset(data, "val")
        for name, expected in detections_of(model, photos, None).items():
            image = read_image(next(sample.path for sample in photos if sample.name == name))
            boxes, scores, labels = graphs.run(session, image)
            assert [facts_of("d.onnx")["classes"][i] for i in labels] == list(expected.labels)
            np.testing.assert_allclose(scores, expected.scores, atol=1e-3)
            np.testing.assert_allclose(boxes, expected.boxes, atol=0.5)

    def test_threshold_of_a_detector(self, model):
        succeeds("export", model, "--out", "d.onnx", "--threshold", "50")
        assert set(facts_of("d.onnx")["thresholds"]) == {0.5}

    def test_backbone(self):
        options = ("--levels", "2,1", "--scales", "64", "--stages", "3,head")
        outcome = succeeds("export", "efficientnet-lite0", "--out", "a.onnx", *options)
        assert "a.onnx: image -> features of efficientnet-lite0" in outcome.out
        assert "Exporting" in outcome.err
        facts = facts_of("a.onnx")
        assert (facts["levels"], facts["scales"], facts["licence"]) == ([2, 1], [64], "apache-2.0")
        assert "stages=3,head" in facts["backbone"]

    def test_backbone_of_ones_own(self, backbone_file):
        path = backbone_file("test_efficientnet")
        before = path.read_bytes()
        outcome = succeeds("export", path, "--out", "a.onnx")
        assert "a.onnx: image -> features of test_efficientnet" in outcome.out
        fails("export", path, "--out", path, says=["found a file that is to be read"])
        assert path.read_bytes() == before

    def test_shipped_models_without_pytorch(self):
        code = "from sppnet.cli import main\nsys.argv = ['sppnet', 'export', *sys.argv[1:]]\nmain()"
        said = without_pytorch(code, "animals", "--out", "animals.onnx")
        assert "image -> boxes, scores and labels of cat, cow, dog, horse, person, sheep" in said
        said = without_pytorch(code, "imagenet", "--out", "imagenet.onnx")
        assert "image -> probabilities of 1000 classes" in said
        without_pytorch(code, "efficientnet-lite0", "--out", "lite0.onnx")

    def test_bad_places(self, model):
        fails("export", model, "--out", "a.bin", says=["a.bin", "'.bin'", ".onnx"])
        fails("export", model, "--out", "nowhere/a.onnx", says=["nowhere/a.onnx: cannot write"])
        Path("folder.onnx").mkdir()
        fails("export", model, "--out", "folder.onnx", says=["folder.onnx: found a folder"])

    def test_bad_models(self):
        for name in ("missing.safetensors", "missing.onnx"):
            fails("export", name, "--out", "a.onnx", says=[f"{name}: found no such file"])
        fails("export", "animal", "--out", "a.onnx", says=["'animal'", "did you mean animals?"])
        fails("export", "resnet18", "--out", "a.onnx", says=["'resnet18'", "a backbone: efficientnet-lite0"])
        Path("text.onnx").write_text("no graph")
        fails("export", "text.onnx", "--out", "a.onnx", says=["text.onnx: found no"])
        Path("text.safetensors").write_text("no model")
        fails("export", "text.safetensors", "--out", "a.onnx", says=["text.safetensors"])

    def test_bad_options(self):
        fails("export", "efficientnet-lite0", "--out", "a.onnx", "--stages", "9", says=["stages 9"])
        fails("export", "efficientnet-lite0", "--out", "a.onnx", "--levels", "0", says=["--levels 0"])
