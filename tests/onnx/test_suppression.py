import numpy as np
import pytest

from graphs import run, written
from sppnet.detection.postprocess import postprocess
from sppnet.onnx.nodes import Nodes
from sppnet.onnx.suppression import suppress

HEIGHT, WIDTH = 30, 40


def drawn(seed, count, classes):
    """Return boxes of whole pixels inside an image, some of no area, and scores of which many are equal."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(0, 12, (2, count, classes, 2)) * np.float32([WIDTH / 12, HEIGHT / 12])
    boxes = np.concatenate([ends.min(axis=0), ends.max(axis=0)], axis=-1).round().astype(np.float32)
    return boxes, rng.integers(-8, 9, (count, classes)).astype(np.float32) / 8


@pytest.mark.parametrize("threshold", [-1.5, 0.25])
@pytest.mark.parametrize("iou", [0.25, 0.3, 0.5])
@pytest.mark.parametrize("limit", [5, 100])
def test_what_is_left_is_what_postprocess_leaves(threshold, iou, limit):
    op = Nodes()
    values = op.input("boxes", np.float32, ["r", 3, 4]), op.input("scores", np.float32, ["r", 3])
    session = written(op, *suppress(op, *values, iou, threshold, limit))
    for seed, count in enumerate((0, 1, 7, 60, 200)):
        boxes, scores = drawn(seed, count, 3)
        if count > 7:
            assert (boxes[..., 2:] <= boxes[..., :2]).any()
        expected = postprocess(boxes, scores, "abc", (HEIGHT, WIDTH), iou, threshold, limit)
        found = run(session, boxes, scores)
        assert np.array_equal(found[0].reshape(-1, 4), expected.boxes)
        assert np.array_equal(found[1], expected.scores)
        assert tuple("abc"[i] for i in found[2]) == expected.labels
