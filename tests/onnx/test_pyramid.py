import numpy as np
import pytest

import sppnet.detection.joint as joint
from graphs import opened, run
from sppnet.boxes import Target, iou
from sppnet.datasets.records import Sample
from sppnet.detection.detector import Detector
from sppnet.onnx.export import export_detector
from sppnet.rpn.settings import Joint
from trees import scene


@pytest.fixture(scope="module")
def fitted(backbone_file):
    """A detector whose network learned for a few seconds to propose windows."""
    data = []
    for seed in range(9):
        drawn = scene(seed)
        data.append(Sample(f"scene{seed}", drawn.image, Target.of(drawn.boxes, drawn.labels)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint, "_LEAST", 2.0)
        patch.setattr(joint, "_PASSES", 1.0)
        settings = Joint(side=96, width=16, batch=4, frozen=0)
        return Detector(str(backbone_file("test_efficientnet")), joint=settings, folds=3).fit(
            data, minutes=0.1
        )


def test_detections_are_those_of_the_library(fitted, tmp_path):
    path = tmp_path / "d.onnx"
    export_detector(fitted, path, threshold=0.02)
    session = opened(path)
    assert "windows from the network itself" in session.get_modelmeta().custom_metadata_map["windows"]
    for image in (scene(30).image, scene(31, 150, 97).image, scene(32, 64, 200).image):
        boxes, scores, labels = run(session, image)
        expected = fitted.predict(image, threshold=0.02)
        assert abs(len(boxes) - len(expected)) <= 0.03 * len(expected) + 1
        # Near ties may be suppressed the other way round: each one is looked for by itself.
        names = np.array(expected.labels)
        for box, score, label in zip(boxes[:10], scores[:10], labels[:10], strict=True):
            same = np.flatnonzero(names == fitted.classes_[label])
            overlap = iou(box[None], expected.boxes[same])[0]
            assert overlap.max() > 0.85
            assert abs(expected.scores[same[overlap.argmax()]] - score) < 0.05
