import math

import numpy as np
import pytest
import torch

from sppnet.regression import BoxRegression, Moments, decode_deltas, encode_deltas, fit_ridge, fit_ridges


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def some_boxes(rng, count, extent=12, empty=True):
    """Return boxes with small integer corners, so that many touch, agree or (if `empty`) have no area."""
    corners = rng.integers(0, extent, (count, 2, 2))
    low, high = corners.min(axis=1), corners.max(axis=1) + (0 if empty else 1)
    return np.concatenate([low, high], axis=1).astype(np.float32)


def decoded(windows, deltas):
    """Decode, and check that tensors become what arrays become."""
    found = decode_deltas(windows, deltas)
    tensors = decode_deltas(torch.from_numpy(windows), torch.from_numpy(deltas))
    np.testing.assert_allclose(found, tensors.numpy(), rtol=1e-5, atol=1e-4)
    return found


def test_deltas_by_hand():
    window = np.array([[10, 20, 30, 60]], np.float32)  # 20 x 40, centre 20, 40
    truth = np.array([[20, 30, 60, 50]], np.float32)  # 40 x 20, centre 40, 40
    expected = [[(40 - 20) / 20, (40 - 40) / 40, math.log(40 / 20), math.log(20 / 40)]]
    np.testing.assert_allclose(encode_deltas(window, truth), expected, rtol=1e-6)
    np.testing.assert_allclose(decoded(window, np.array(expected)), truth, atol=1e-4)


def test_deltas_of_a_window_that_is_the_truth_are_0(rng):
    boxes = some_boxes(rng, 20, empty=False)
    np.testing.assert_array_equal(encode_deltas(boxes, boxes), np.zeros((20, 4)))
    np.testing.assert_array_equal(decoded(boxes, np.zeros((20, 4), np.float32)), boxes)


def test_decoding_undoes_encoding(rng):
    windows, truth = (some_boxes(rng, 500, extent=700, empty=False) for _ in range(2))
    ratio = (truth[:, 2:] - truth[:, :2]) / (windows[:, 2:] - windows[:, :2])
    within = (np.abs(np.log(ratio)) < math.log(16)).all(axis=1)  # larger factors are cut, see below
    moved = decoded(windows, encode_deltas(windows, truth))
    assert within.sum() > 300
    np.testing.assert_allclose(moved[within], truth[within], atol=0.02)


def test_decoded_boxes_grow_at_most_16_fold():
    window = np.array([[0, 0, 10, 10]], np.float32)
    wild = np.array([[0, 0, 1e6, -1e6]], np.float32)
    np.testing.assert_allclose(decoded(window, wild), [[-75, 5 - 10 / 32, 85, 5 + 10 / 32]], rtol=1e-5)


def test_deltas_of_classes_move_one_window_each_in_its_own_way(rng):
    windows, deltas = some_boxes(rng, 6, empty=False), rng.normal(0, 0.3, (6, 3, 4)).astype(np.float32)
    moved = decoded(windows[:, None], deltas)
    assert moved.shape == (6, 3, 4)
    assert moved.dtype == np.float32
    for k in range(3):
        np.testing.assert_array_equal(moved[:, k], decoded(windows, deltas[:, k]))


def closed_form(features, targets, penalty):
    """Return weights and offsets by (A A^T + lambda I)^-1 A y on whitened targets, in float64."""
    x, y = features.astype(np.float64), targets.astype(np.float64)
    mean = y.mean(axis=0)
    values, vectors = np.linalg.eigh((y - mean).T @ (y - mean) / len(y))
    whiten = vectors @ np.diag((values + 0.001) ** -0.5) @ vectors.T
    solution = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ ((y - mean) @ whiten))
    unwhitened = solution @ np.linalg.inv(whiten)
    return unwhitened[:-1].T, unwhitened[-1] + mean


@pytest.mark.parametrize(("count", "length"), [(200, 20), (20, 60), (1, 5), (40, 40)])
@pytest.mark.parametrize("penalty", [1, 1000])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_ridge_equals_the_closed_form(rng, count, length, penalty, dtype):
    features = rng.normal(0, 3, (count, length + 1)).astype(dtype)
    features[:, -1] = 1  # regularised like the others
    mixing = rng.normal(0, 0.1, (length + 1, 4))
    targets = (features @ mixing + rng.normal(0, 0.05, (count, 4)) + [0.3, -0.2, 0.1, 0]).astype(np.float32)
    weights, offsets = closed_form(features, targets, penalty)
    found_weights, found_offsets = fit_ridge(features.copy(), targets, penalty)
    assert found_weights.shape == (4, length)
    assert found_weights.dtype == found_offsets.dtype == np.float32
    tolerance = 1e-3 if dtype == np.float32 else 1e-5
    np.testing.assert_allclose(found_weights, weights, atol=tolerance * np.abs(weights).max() + 1e-9)
    np.testing.assert_allclose(found_offsets, offsets, atol=tolerance)


def test_a_great_penalty_predicts_the_mean(rng):
    features = np.c_[rng.normal(size=(50, 3)), np.ones(50)]
    targets = rng.normal(size=(50, 4))
    weights, offsets = fit_ridge(features, targets, 1e12)
    np.testing.assert_allclose(weights, 0, atol=1e-8)
    np.testing.assert_allclose(offsets, targets.mean(axis=0), rtol=1e-5)


def test_targets_that_never_change_are_predicted(rng):
    # Their covariance is 0: only the 0.001 in the whitening keeps it finite.
    features = np.c_[rng.normal(size=(30, 3)), np.ones(30)]
    weights, offsets = fit_ridge(features, np.tile([0.1, 0, -0.2, 0.3], (30, 1)), 10)
    np.testing.assert_allclose(weights, 0, atol=1e-6)
    np.testing.assert_allclose(offsets, [0.1, 0, -0.2, 0.3], atol=1e-6)


def test_regressions_predict_the_deltas_of_every_class(rng):
    vectors = rng.normal(size=(7, 6)).astype(np.float32)
    weights, offsets = (
        rng.normal(size=(3, 4, 6)).astype(np.float32),
        rng.normal(size=(3, 4)).astype(np.float32),
    )
    both = BoxRegression(weights[:1], offsets[:1]).joined(BoxRegression(weights[1:], offsets[1:]))
    for found in (both(vectors), both(torch.from_numpy(vectors)).numpy()):
        assert found.shape == (7, 3, 4)
        assert found.dtype == np.float32
        for k in range(3):
            expected = vectors @ weights[k].T + offsets[k]
            np.testing.assert_allclose(found[:, k], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [60, 300])
def test_ridges_of_parts_are_those_of_their_examples_alone(rng, count):
    """By the primal problem and, with fewer examples than features, by one inverse for all parts."""
    features = np.ones((count, 121), np.float32)
    features[:, :-1] = rng.normal(size=(count, 120))
    targets = rng.normal(size=(count, 4)).astype(np.float32)
    parts = [np.ones(count, bool), np.arange(count) % 3 != 0, np.arange(count) < 20]
    for part, (weights, offsets) in zip(parts, fit_ridges(features, targets, 30.0, parts), strict=True):
        alone = fit_ridge(features[part], targets[part], 30.0)
        np.testing.assert_allclose(weights, alone[0], atol=1e-5)
        np.testing.assert_allclose(offsets, alone[1], atol=1e-5)


def test_classes_that_do_not_move_windows_leave_them_exactly():
    rng = np.random.default_rng(3)
    corner = rng.uniform(0, 50, (9, 2))
    windows = np.concatenate([corner, corner + rng.uniform(5, 60, (9, 2))], axis=1).astype(np.float32)
    vectors = rng.normal(size=(9, 6)).astype(np.float32)
    weights, offsets = np.zeros((3, 4, 6), np.float32), np.zeros((3, 4), np.float32)
    weights[1] = rng.normal(size=(4, 6)) * 0.1
    regression = BoxRegression(weights, offsets)
    assert regression.moves.tolist() == [False, True, False]
    moved = regression.moved(windows, vectors)
    np.testing.assert_array_equal(moved[:, [0, 2]], np.repeat(windows[:, None], 2, axis=1))
    expected = decode_deltas(windows, vectors @ weights[1].T)
    np.testing.assert_allclose(moved[:, 1], expected, rtol=1e-5)
    assert regression.moved(windows[:0], vectors[:0]).shape == (0, 3, 4)


def test_sums_of_parts_add_up_to_the_ridge_of_all():
    rng = np.random.default_rng(0)
    # Fewer examples than features, which `fit_ridges` solves by the products of examples instead.
    features = np.concatenate([rng.normal(1, 2, (40, 60)), np.ones((40, 1))], axis=1)
    targets = rng.normal(0.1, 0.3, (40, 4))
    expected = fit_ridge(features, targets, 30.0)
    parts = [Moments.of(features[rows], targets[rows]) for rows in np.split(np.arange(40), [7, 7, 30])]
    whole = sum(parts[1:], parts[0])
    for found in (whole.ridge(30.0), Moments.of(features, targets).ridge(30.0)):
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5)
    rest = fit_ridge(features[7:], targets[7:], 30.0)
    for mine, theirs in zip((whole - parts[0]).ridge(30.0), rest, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
