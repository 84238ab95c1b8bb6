import numpy as np
import pytest

from sppnet.boxes import iou
from sppnet.features.encoded import FeatureMaps
from sppnet.features.graph import STRIDES, geometry_of
from sppnet.features.projection import project
from sppnet.features.pyramid import SURE, UNLIKELY, WINDOW_IOU, WINDOWS, with_windows


def maps_of(height, width, factor=1.0, seed=0, channels=3):
    """Random maps and answers of an image, resized by a factor."""
    rng = np.random.default_rng(seed)
    places = [geometry_of(stride) for stride in STRIDES]
    resized = round(height * factor), round(width * factor)
    shapes = [tuple(g.cells(length) for length in resized) for g in places]
    maps = [rng.normal(size=(channels, *shape)).astype(np.float32) for shape in shapes]
    answers = [rng.normal(size=(7, *shape)).astype(np.float32) for shape in shapes]
    for answer, stride in zip(answers, STRIDES, strict=True):
        answer[1:5] = np.abs(answer[1:5]) * stride * 2
    stages = (*maps, *answers)
    return FeatureMaps(stages, (*places, *places), (factor, factor), min(resized))


@pytest.mark.parametrize("factor", [1.0, 0.7, 1.6])
def test_cells_of_every_level_lie_where_the_level_has_them(factor):
    height, width = 300, 420
    maps = maps_of(height, width, factor)
    encoded = with_windows(maps, (height, width))
    assert encoded.channels == (3, 3, 3)
    for level, stride in enumerate(STRIDES):
        side = stride / factor
        # A box of whole cells, from the third to the fourth, covers these.
        box = np.array([[2 * side, side, 4 * side, 3 * side]], np.float32)
        assert project(box, encoded.scales[0], level).tolist() == [[2, 1, 4, 3]]
        np.testing.assert_array_equal(encoded.scales[0].stages[level], maps.stages[level])


def test_windows_are_those_of_a_loop_over_cells():
    height, width, factor = 130, 190, 1.3
    maps = maps_of(height, width, factor, seed=3)
    boxes, odds, kinds = [], [], []
    for answers, stride in zip(maps.stages[3:], STRIDES, strict=True):
        for y in range(answers.shape[1]):
            for x in range(answers.shape[2]):
                score, left, top, right, bottom = answers[:5, y, x]
                cx, cy = (x + 0.5) * stride, (y + 0.5) * stride
                box = np.array([cx - left, cy - top, cx + right, cy + bottom]) / factor
                boxes.append(box.clip(0, [width, height, width, height]))
                odds.append(score)
                kinds.append(answers[5:, y, x])
    kept = []
    for i in np.argsort(-np.array(odds), kind="stable"):
        sides = boxes[i][2:] - boxes[i][:2]
        if (sides >= 1).all() and all(iou(boxes[i][None], boxes[j][None])[0, 0] <= WINDOW_IOU for j in kept):
            kept.append(i)
    kept = [k for rank, k in enumerate(kept[:WINDOWS]) if rank < SURE or odds[k] > UNLIKELY]
    found = with_windows(maps, (height, width)).windows
    np.testing.assert_allclose(found.boxes, np.array(boxes)[kept], rtol=0, atol=1e-3)
    np.testing.assert_allclose(found.scores, np.array(odds)[kept])
    np.testing.assert_array_equal(found.kinds, np.array(kinds)[kept])


def test_an_image_of_one_cell_has_windows():
    found = with_windows(maps_of(5, 5), (5, 5)).windows
    assert len(found.boxes) == len(found.scores) <= 3
