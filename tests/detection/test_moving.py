"""Windows that are pooled again where they were moved to: against a slow oracle, and through a whole fit."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import trees
from sppnet.detection import moving
from sppnet.detection.detector import Detector
from sppnet.detection.gathering import find
from sppnet.detection.moving import moved_again
from sppnet.errors import SppnetError
from sppnet.onnx.export import export_detector
from sppnet.regression import BoxRegression
from trees import drawn

SETTINGS = {"levels": (2, 1), "scales": (160,), "reference": 160, "folds": 2}
SIZE = (60, 80)


def shifted(places):
    """Move each window by three pixels for the first class, make it half as wide for the second."""
    first, second = places + np.float32(3), places.copy()
    second[:, 2] = (places[:, 0] + places[:, 2]) / 2
    scores = np.stack([places[:, 0] / 40 - 1, 1 - places[:, 3] / 60], axis=1)
    return np.stack([first, second], axis=1), scores.astype(np.float32)


def model(*moves):
    """What moves, or does not, windows of as many classes."""
    weights = np.array(moves, np.float32).reshape(-1, 1, 1) * np.ones((1, 4, 3), np.float32)
    return SimpleNamespace(
        regression=BoxRegression(weights, np.zeros(weights.shape[:2], np.float32)), least_score=-0.2
    )


def slowly(found, times, moves):
    boxes, scores = found[0].copy(), found[1].copy()
    for before in range(1, times + 1):
        for row in range(len(boxes)):
            for kind in np.flatnonzero(moves):
                x1, y1, x2, y2 = boxes[row, kind].tolist()
                place = max(0, min(x1, 80)), max(0, min(y1, 60)), max(0, min(x2, 80)), max(0, min(y2, 60))
                if scores[row, kind] < -0.2 or place[2] <= place[0] + 1 or place[3] <= place[1] + 1:
                    continue
                again, value = shifted(np.array([place], np.float32))
                boxes[row, kind] = again[0, kind]
                scores[row, kind] = (before * scores[row, kind] + value[0, kind]) / (before + 1)
    return boxes, scores


@pytest.mark.parametrize("moves", [(1, 1), (0, 1), (0, 0)])
@pytest.mark.parametrize("count", [0, 1, 40])
@pytest.mark.parametrize("times", [-1, 0, 1, 2])
def test_the_best_are_moved_and_scored_again(moves, count, times):
    rng = np.random.default_rng(count)
    corner = rng.uniform(-10, 70, (count, 2))
    windows = np.concatenate([corner, corner + rng.uniform(0, 30, (count, 2))], axis=1).astype(np.float32)
    found = shifted(windows)
    given = found[0].copy(), found[1].copy()
    moved = moved_again(shifted, found, SIZE, model(*moves), times)
    for a, b, before, after in zip(moved, slowly(found, times, moves), given, found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        np.testing.assert_array_equal(before, after)
        assert a.dtype == np.float32


def test_only_the_best_of_each_class_are_looked_at_again(monkeypatch):
    monkeypatch.setattr(moving, "_MOST", 3)
    windows = np.array([[x, 0, x + 20, 20] for x in range(30, 60, 5)], np.float32)
    found = shifted(windows)
    boxes, _ = moved_again(shifted, found, SIZE, model(1, 1), 1)
    changed = (boxes != found[0]).any(axis=-1)
    assert changed.sum(axis=0).tolist() == [3, 3]
    for kind in range(2):
        scores, again = found[1][:, kind], changed[:, kind]
        assert scores[again].min() >= scores[~again].max()


def test_the_mean_is_of_as_many_scores_as_there_were_looks(monkeypatch):
    monkeypatch.setattr(moving, "_MOST", 1)
    boxes = np.array([[[0, 0, 20, 20]], [[10, 0, 30, 20]]], np.float32)
    found = boxes, np.array([[1.0], [0.9]], np.float32)

    def look(places):
        return places[:, None], np.where(places[:, :1] == 0, np.float32(0.5), np.float32(0.8))

    # The first falls to 0.75 at its look; so the second is looked at, for the first time.
    _, scores = moved_again(look, found, SIZE, model(1), 2)
    np.testing.assert_allclose(scores, [[0.75], [0.85]], atol=1e-6)


@pytest.fixture(scope="module")
def data():
    return drawn(range(1, 9))


@pytest.fixture(scope="module")
def twice(data, tmp_path_factory):
    images, windows, targets = data
    detector = Detector(**SETTINGS, moves=2)
    return detector.fit(
        trees.samples(images, targets), windows=windows, cache=tmp_path_factory.mktemp("maps")
    )


def test_a_detector_moves_windows_as_often_as_it_is_set(twice, data):
    image, windows = data[0][0], data[1][0]
    encoded = twice.encode(image)
    once = Detector(**SETTINGS)
    once.fitted_ = twice.fitted_
    found = once.score(encoded, windows)
    expected = moved_again(lambda w: once.score(encoded, w), found, encoded.size, twice.fitted_, 1)
    for a, b in zip(twice.score(encoded, windows), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(twice.score(encoded, windows)[1], found[1])
    still = twice.score(encoded, windows, regress=False)
    np.testing.assert_array_equal(still[0], np.repeat(windows[:, None], len(twice.classes_), axis=1))


def test_a_fit_measures_what_it_will_find(twice, data):
    image, windows = data[0][0], data[1][0]
    settings = replace(twice.settings, nms_iou=twice.suppression)
    found = find(twice.fitted_, twice.encode(image), windows, settings)
    expected = twice.predict(image, windows, threshold=0, scores="svm")
    # What is shown is in the order of probabilities, which may differ from that of scores.
    pairs = [
        sorted(zip(each.labels, each.scores.tolist(), each.boxes.tolist(), strict=True))
        for each in (found, expected)
    ]
    assert pairs[0] == pairs[1]


def test_the_file_keeps_how_often(twice, tmp_path):
    twice.save(tmp_path / "m.safetensors")
    assert Detector.load(tmp_path / "m.safetensors").moves == 2


def test_a_class_that_is_added_leaves_the_others_as_they_are(data):
    images, windows, targets = data
    detector = Detector(**SETTINGS | {"folds": 0}, moves=2)
    detector.fit(trees.samples(images, targets), windows=windows, classes=["disc", "square"])
    before = [detector.score(detector.encode(i), w) for i, w in zip(images[:3], windows, strict=False)]
    detector.add_class(["triangle"], trees.samples(images, targets), windows=windows)
    for image, boxes, (places, scores) in zip(images[:3], windows, before, strict=False):
        after = detector.score(detector.encode(image), boxes)
        np.testing.assert_allclose(after[0][:, :2], places, atol=1e-4)
        np.testing.assert_allclose(after[1][:, :2], scores, atol=1e-6)


def test_what_it_cannot_do_is_said(twice, data, tmp_path):
    with pytest.raises(SppnetError, match="found 0 moves of windows, expected at least 1"):
        Detector(moves=0).fit(trees.samples(data[0], data[2]))
    with pytest.raises(SppnetError, match="found 2 moves of windows for a network that is trained"):
        Detector(moves=2).fit(trees.samples(data[0], data[2]), minutes=1)
    with pytest.raises(SppnetError, match="found a detector that moves windows 2 times, expected one that"):
        export_detector(twice, tmp_path / "m.onnx")
