from functools import partial

import numpy as np
import pytest
from scipy.optimize import check_grad
from sklearn.linear_model import LogisticRegression

from sppnet.boxes import Detections
from sppnet.detection.calibration import Calibration, _loss, fit_calibration
from sppnet.errors import SppnetError
from sppnet.evaluation.calibration import expected_calibration_error


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def judged(rng, count, low, high):
    """Return scores, and hits that come with log-odds 0 at 0 and these slopes below and above."""
    scores = rng.uniform(-1, 1.5, count).astype(np.float32)
    odds = np.where(scores < 0, low, high) * scores
    return scores, rng.random(count) < 1 / (1 + np.exp(-odds))


def test_many_detections_speak_for_themselves(rng):
    """The probabilities are those that the hits were drawn with, whatever the other classes are."""
    kinds = [judged(rng, 20000, *rule) for rule in ((4, 4), (8, 8), (3, 3))]
    found = fit_calibration(*zip(*kinds, strict=True))
    assert found.slopes.dtype == found.levels.dtype == found.knots.dtype == np.float32
    for k, (low, high) in enumerate(((4, 4), (8, 8), (3, 3))):
        scores = np.linspace(-1, 1.5, 50)
        expected = 1 / (1 + np.exp(-np.where(scores < 0, low, high) * scores))
        np.testing.assert_allclose(found(scores, np.full(50, k)), expected, atol=0.06)


def test_it_is_the_logistic_regression_of_two_slopes(rng):
    scores, hits = judged(rng, 3000, 5, 2)
    found = fit_calibration([scores], [hits])
    away = scores - found.knots[0]
    parts = np.stack([np.minimum(away, 0), np.maximum(away, 0)], axis=1)
    expected = LogisticRegression(C=1e6).fit(parts, hits)
    np.testing.assert_allclose(found.slopes[0], expected.coef_[0], rtol=0.1)
    assert found.levels[0] == pytest.approx(expected.intercept_[0], abs=0.1)


def test_probabilities_come_true(rng):
    (scores, hits), (later, came) = judged(rng, 500, 6, 6), judged(rng, 20000, 6, 6)
    calibration = fit_calibration([scores], [hits])
    chances = calibration(later, np.zeros(len(later), int))
    assert expected_calibration_error(chances, came) < 0.03


def test_windows_of_background_set_no_slope(rng):
    scores, hits = judged(rng, 500, 6, 6)
    mass = np.full(100_000, -1.4, np.float32)
    found = fit_calibration([np.append(scores, mass)], [np.append(hits, np.zeros(len(mass), bool))])
    places = np.linspace(-0.6, 1, 20)
    expected = 1 / (1 + np.exp(-np.where(places < 0, 6, 6) * places))
    np.testing.assert_allclose(found(places, np.zeros(20, int)), expected, atol=0.12)


def test_few_detections_are_held_near_the_others(rng):
    many = [judged(rng, 5000, 6, 2) for _ in range(3)]
    few = np.float32([1.0, 0.9, -0.5]), np.array([False, True, True])  # as luck has it
    for last in (few, (np.zeros(0, np.float32), np.zeros(0, bool))):
        found = fit_calibration(*zip(*many, last, strict=True))
        places = np.linspace(-1, 1, 20)
        theirs = np.mean([found(places, np.full(20, k)) for k in range(3)], axis=0)
        np.testing.assert_allclose(found(places, np.full(20, 3)), theirs, atol=0.3 if last is few else 0.08)


@pytest.mark.parametrize("hits", [True, False])
def test_detections_of_one_kind_only_have_finite_odds(hits):
    scores = np.linspace(-1.5, 1, 30).astype(np.float32)
    found = fit_calibration([scores], [np.full(30, hits)])
    chances = found(scores, np.zeros(30, int))
    assert (np.diff(chances) > 0).all(), "the order stays"
    assert ((chances > 0) & (chances < 1)).all()
    assert (chances[15] > 0.5) == hits


def test_without_any_detection_scores_mean_what_they_did_elsewhere():
    for count in (1, 2):
        found = fit_calibration([np.zeros(0, np.float32)] * count, [np.zeros(0, bool)] * count)
        np.testing.assert_allclose(found(np.full(count, -0.5), np.arange(count)), 0.5, atol=1e-3)
        assert (found.slopes > 1).all()


def test_the_gradient_is_that_of_the_loss(rng):
    away = [rng.normal(size=20), rng.normal(size=7), np.zeros(0)]
    goals = [rng.random(len(x)) for x in away]
    functions = [partial(lambda i, p: _loss(away, goals, p)[i], i) for i in (0, 1)]
    assert check_grad(*functions, rng.normal(size=12) / 2) < 1e-4


def test_probabilities_by_hand():
    calibration = Calibration(*np.float32([[0.5, 0], [1, -1]]), np.float32([[2, 1], [3, 4]]))
    scores, kinds = np.array([0.5, 0.0, 1.5, -1, 2, -300, 300]), np.array([0, 0, 0, 1, 1, 0, 0])
    odds = np.array([1, 0, 2, -4, 7, -600, 300])
    np.testing.assert_allclose(calibration(scores, kinds), 1 / (1 + np.exp(-odds.clip(-80))), atol=1e-6)
    np.testing.assert_allclose(calibration.odds(np.array([[1.5, 2]])), [[2, 7]])
    both = calibration.joined(calibration)
    assert both.knots.tolist() == [0.5, 0, 0.5, 0]
    assert both.slopes.tolist() == [[2, 1], [3, 4], [2, 1], [3, 4]]


def test_what_is_unlikely_is_dropped_and_the_rest_sorted():
    calibration = Calibration(*np.zeros((2, 2), np.float32), np.float32([[1, 1], [4, 4]]))
    boxes = np.arange(16, dtype=np.float32).reshape(4, 4)
    found = Detections(boxes, np.float32([1.0, 0.8, 0.2, -1]), ("a", "b", "a", "b"))
    chances = 1 / (1 + np.exp(-np.array([1.0, 3.2, 0.2, -4])))
    shown = calibration.applied(found, ("a", "b"), 0.0, "probability")
    assert shown.labels == ("b", "a", "a", "b")
    np.testing.assert_allclose(shown.scores, chances[[1, 0, 2, 3]], rtol=1e-6)
    np.testing.assert_array_equal(shown.boxes, boxes[[1, 0, 2, 3]])
    raw = calibration.applied(found, ("a", "b"), 0.0, "svm")
    assert raw.labels == shown.labels
    np.testing.assert_array_equal(raw.scores, found.scores[[1, 0, 2, 3]])
    least = np.float32([0.6, 0.01])
    assert calibration.applied(found, ("a", "b"), least, "probability").labels == ("b", "a", "b")
    assert len(calibration.applied(found, ("a", "b"), 1.0, "probability")) == 0
    with pytest.raises(SppnetError, match="scores"):
        calibration.applied(found, ("a", "b"), 0.0, "odds")
