import numpy as np
import pytest

from graphs import run, written
from sppnet.boxes import iou
from sppnet.onnx.nodes import Nodes
from sppnet.onnx.proposing import from_grid, from_maps
from sppnet.onnx.windows import encode
from sppnet.proposals import DenseWindows

GRIDS = (
    DenseWindows(),
    DenseWindows(sizes=(0.2, 0.9), aspects=(0.3, 1.0), step=0.3, min_side=35),
    DenseWindows(sizes=(1.0,), aspects=(1.0,), min_side=1),
)


@pytest.mark.parametrize("method", GRIDS, ids=range(len(GRIDS)))
def test_windows_of_a_grid(method):
    op = Nodes()
    session = written(op, from_grid(op, method, op.input("size", np.int64, [2])))
    for height, width in ((300, 451), (451, 300), (64, 64), (20, 500), (500, 20), (19, 40), (1, 1), (7, 900)):
        expected = method(np.zeros((height, width, 3), np.uint8)).boxes
        found = run(session, np.int64([height, width]))
        assert found.dtype == np.float32
        _, first = np.unique(found, axis=0, return_index=True)
        np.testing.assert_allclose(found[np.sort(first)], expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def proposing(drawn_detector):
    """A detector that proposes windows from its maps, and a session of what writes them."""
    detector = drawn_detector(proposes=True, scales=(450, 160))
    op = Nodes()
    encoded = encode(
        op, op.input("image", np.uint8, ["h", "w", 3]), detector.fitted_.backbone, detector.scales
    )
    return detector, written(op, from_maps(op, detector.fitted_.objectness, encoded))


@pytest.mark.parametrize("name", ["photo", "tall", "strip"])
def test_windows_from_maps(proposing, scenes, name):
    detector, session = proposing
    image = scenes[name]
    expected = detector.propose(None, detector.encode(image), "maps")
    found = run(session, image)
    assert len(expected) > 5
    # Of two windows that overlap by the limit, either may be dropped.
    assert abs(len(found) - len(expected)) <= 1
    overlap = iou(found, expected)
    assert (overlap.max(axis=1) > 0.99).mean() > 0.95
    assert (overlap.max(axis=0) > 0.99).mean() > 0.95
    # Best first.
    order = overlap.argmax(axis=1)
    assert np.corrcoef(order, np.arange(len(found)))[0, 1] > 0.95


def test_windows_from_maps_of_an_image_without_any(proposing):
    detector, session = proposing
    image = np.zeros((3, 3, 3), np.uint8)
    assert len(detector.propose(None, detector.encode(image), "maps")) == 0
    assert run(session, image).shape == (0, 4)
