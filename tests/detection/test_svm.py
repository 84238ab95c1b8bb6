import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.svm import LinearSVC

from sppnet.detection import svm as linear
from sppnet.detection.svm import Labelled, LinearSVMs, MiningSettings, TrainingSet, mine_hard_negatives

EXACT = MiningSettings(tolerance=1e-3, epochs=2000)


def clouds(rng, count, classes=3, length=30, positives=0.1):
    """Return features of overlapping clouds, one per class and one for the rest, and their signs.

    They are positive and of mean norm 20, like those that the detector makes.
    """
    centres = rng.normal(0, 1, (classes + 1, length))
    label = rng.choice(classes + 1, count, p=[positives] * classes + [1 - classes * positives])
    label[:classes] = np.arange(classes)
    features = np.maximum(centres[label] + rng.normal(0, 1.5, (count, length)), 0)
    features *= 20 / np.linalg.norm(features, axis=1).mean()
    return features.astype(np.float32), np.where(label[:, None] == np.arange(classes), 1, -1).astype(np.int8)


def objective(svms, k, features, signs, settings):
    """Return |w|^2 / 2 + (b / 10)^2 / 2 + C (2 sum hinge(positives) + sum hinge(negatives)) of class k."""
    w, b = svms.weights[k].astype(float), float(svms.biases[k])
    margins = 1 - signs[:, k] * (features.astype(float) @ w + b)
    costs = np.where(signs[:, k] > 0, settings.positive_weight, 1) * (signs[:, k] != 0)
    return (w @ w + (b / 10) ** 2) / 2 + settings.C * (costs * np.maximum(margins, 0)).sum()


def reference(features, signs, settings):
    """Fit liblinear's own solver to the examples of one class; return it as `LinearSVMs` of one class."""
    used = signs != 0
    svc = LinearSVC(
        loss="hinge",
        C=settings.C,
        intercept_scaling=10,
        class_weight={1: settings.positive_weight},
        tol=1e-5,
        max_iter=1_000_000,
        random_state=0,
    )
    svc.fit(features[used].astype(float), signs[used])
    return LinearSVMs(svc.coef_.astype(np.float32), svc.intercept_.astype(np.float32))


def check_against_liblinear(svms, features, signs, settings, slack=1.01):
    for k in range(signs.shape[1]):
        expected = reference(features, signs[:, k], settings)
        goal = objective(expected, 0, features, signs[:, k : k + 1], settings)
        assert objective(svms, k, features, signs, settings) < slack * goal
        theirs = expected(features)[:, 0]
        assert np.corrcoef(svms(features)[:, k], theirs)[0, 1] > 0.999


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_scores_are_products_plus_biases(rng):
    svms = LinearSVMs(rng.normal(size=(3, 5)).astype(np.float32), np.array([1, -2, 0], np.float32))
    features = rng.normal(size=(7, 5)).astype(np.float32)
    scores = svms(features)
    assert scores.dtype == np.float32
    torch.testing.assert_close(svms(torch.from_numpy(features)), torch.from_numpy(scores))
    for r in range(7):
        for k in range(3):
            expected = sum(features[r, d] * svms.weights[k, d] for d in range(5)) + svms.biases[k]
            assert float(scores[r, k]) == pytest.approx(expected, abs=1e-5)
    assert svms(np.zeros((0, 5), np.float32)).shape == (0, 3)


@pytest.mark.parametrize("count_length", [(500, 30), (300, 700)])
@pytest.mark.parametrize(
    ("settings", "slack"),
    [(EXACT, 1.01), (MiningSettings(), 1.02), (MiningSettings(1e-4, 5, tolerance=1e-3, epochs=2000), 1.01)],
)
def test_the_solution_is_that_of_liblinear(rng, settings, slack, count_length):
    features, signs = clouds(rng, count_length[0], length=count_length[1])
    svms = TrainingSet(features, signs, settings).fit()
    check_against_liblinear(svms, features, signs, settings, slack)


def test_many_more_examples_than_features_and_little_regularisation(rng):
    features, signs = clouds(rng, 400, length=10, positives=0.25)
    settings = MiningSettings(C=0.01, tolerance=1e-3, epochs=20000)
    check_against_liblinear(TrainingSet(features, signs, settings).fit(), features, signs, settings)


def test_examples_of_neither_kind_do_not_count(rng):
    features, signs = clouds(rng, 400)
    signs[rng.random(signs.shape) < 0.3] = 0
    signs[:3] = np.where(np.eye(3, dtype=bool), 1, -1)
    check_against_liblinear(TrainingSet(features, signs, EXACT).fit(), features, signs, EXACT)


def test_separable_examples_and_a_bias_far_from_0(rng):
    # The classes differ along one feature, far from the origin: the bias has to be large.
    features = rng.normal(0, 0.1, (200, 4)).astype(np.float32)
    signs = np.where(np.arange(200) % 2, 1, -1).astype(np.int8)[:, None]
    features[:, 0] += 8 + signs[:, 0]
    settings = MiningSettings(C=1, tolerance=1e-3, epochs=5000)
    svms = TrainingSet(features, signs, settings).fit()
    assert svms.biases[0] < -4
    assert (svms(features) * signs > 0.8).all()
    check_against_liblinear(svms, features, signs, settings)


def test_two_points_by_hand():
    # The points +-1 in one dimension; C so small that both dual variables stay at their bounds.
    features, signs = np.array([[1], [-1]], np.float32), np.array([[1], [-1]], np.int8)
    svms = TrainingSet(features, signs, MiningSettings(C=1e-3, positive_weight=2)).fit()
    # w = 2C * 1 - C * -1 = 3C, and the bias is 10 times the weight of the constant 10: 10 * 10 * (2C - C).
    np.testing.assert_allclose(svms.weights, [[3e-3]], rtol=1e-5)
    np.testing.assert_allclose(svms.biases, [0.1], rtol=1e-5)


def test_fitting_again_changes_little_and_the_same_data_give_the_same_svms(rng):
    features, signs = clouds(rng, 300)
    training = TrainingSet(features, signs, EXACT)
    first, again = training.fit(), training.fit()
    np.testing.assert_allclose(again.weights, first.weights, atol=2e-3)
    twin = TrainingSet(features, signs, EXACT).fit()
    np.testing.assert_array_equal(twin.weights, first.weights)
    np.testing.assert_array_equal(twin.biases, first.biases)


def test_results_do_not_depend_on_threads_or_on_the_other_classes(rng):
    features, signs = clouds(rng, 300)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = TrainingSet(features, signs, EXACT).fit()
        torch.set_num_threads(3)
        several = TrainingSet(features, signs, EXACT).fit()
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(single.weights, several.weights)
    alone = TrainingSet(features, signs[:, 1:2], EXACT).fit()
    np.testing.assert_array_equal(alone.weights[0], several.weights[1])


def test_the_arguments_stay_as_they_were(rng):
    features, signs = clouds(rng, 200)
    before = features.copy(), signs.copy()
    training = TrainingSet(features, signs, MiningSettings())
    svms = training.fit()
    kept = svms.weights.copy()
    training.add(*clouds(rng, 200))
    training.fit()
    np.testing.assert_array_equal(features, before[0])
    np.testing.assert_array_equal(signs, before[1])
    np.testing.assert_array_equal(svms.weights, kept)


def test_a_warm_start_ends_where_a_cold_one_does(rng):
    features, signs = clouds(rng, 900)
    # Nothing is easy here, so that the training set stays whole.
    settings = MiningSettings(tolerance=1e-3, epochs=2000, easy=-1e9)
    warm = TrainingSet(features[:300], signs[:300], settings)
    warm.fit()
    for start in (300, 500, 700):
        warm.add(features[start : start + 200], signs[start : start + 200])
        svms = warm.fit()
    assert len(warm) == 900
    check_against_liblinear(svms, features, signs, settings)
    cold = TrainingSet(features, signs, settings).fit()
    for k in range(3):
        warm_goal, cold_goal = (objective(s, k, features, signs, settings) for s in (svms, cold))
        assert warm_goal == pytest.approx(cold_goal, rel=1e-3)


def test_easy_negatives_are_dropped_and_the_solution_stays(rng):
    features, signs = clouds(rng, 300)
    far = (features[signs[:, 0] < 0][:50] - 20 * features[signs[:, 0] > 0].mean(axis=0)).astype(np.float32)
    training = TrainingSet(features, signs, EXACT)
    first = training.fit()
    near = len(training)
    easy = (signs < 0) & (first(features) < -1.2)
    # A row stays while any class needs it. Those of dual variables above 0 stay even if rounding says easy.
    assert near == pytest.approx((~easy.all(axis=1)).sum(), abs=2)
    assert near < 300
    only_first = np.zeros((50, 3), np.int8)
    only_first[:, 0] = -1
    training.add(far, only_first)
    assert len(training) == near + 50
    svms = training.fit()
    assert len(training) <= near
    check_against_liblinear(svms, features, signs, EXACT)


def test_positives_are_never_dropped(rng):
    features = rng.normal(0, 0.1, (40, 3)).astype(np.float32)
    signs = np.repeat([1, -1], 20).astype(np.int8)[:, None]
    features[:, 0] += 3 * signs[:, 0]
    # All negatives are to the left of -1.2, and all positives right of 1.2, but for those that define w.
    training = TrainingSet(features, signs, MiningSettings(C=10, easy=-0.5))
    for _ in range(3):
        training.fit()
        assert 20 <= len(training) < 40


def test_growing_and_dropping_leave_the_solution_of_a_plain_list(rng):
    # The same rounds with a list of rows, liblinear's solver from scratch, and nothing shared.
    features, signs = clouds(rng, 1200, classes=2, positives=0.05)
    training = TrainingSet(features[:200], signs[:200], EXACT)
    kept = [list(range(200)), list(range(200))]
    sizes = []
    for start in range(200, 1400, 200):
        svms = training.fit()
        sizes.append(len(training))
        for k in range(2):
            expected = reference(features[kept[k]], signs[kept[k], k], EXACT)
            scores = expected(features)[:, 0]
            assert np.corrcoef(svms(features)[:, k], scores)[0, 1] > 0.999
            kept[k] = [i for i in kept[k] if signs[i, k] > 0 or scores[i] >= -1.2]
        assert sizes[-1] == pytest.approx(len(set(kept[0]) | set(kept[1])), abs=4)
        if start < 1200:
            new = slice(start, start + 200)
            training.add(features[new], signs[new])
            for rows in kept:
                rows.extend(range(new.start, new.stop))
    assert sizes[-1] < 900


def stream(features, signs, size=50):
    for start in range(0, len(signs), size):
        part = slice(start, start + size)
        yield features[part].copy(), signs[part] < 0


def mine(positives, shown, start, negative, candidates, settings=None):
    """Return the SVMs of positives, negatives to start with, and pairs of candidates, none in a fold."""
    stream = (Labelled(*pair) for pair in candidates)
    first = Labelled(positives, shown), Labelled(start, negative)
    return mine_hard_negatives(*first, stream, settings or MiningSettings()).svms


def split(features, signs):
    """Return the positives of all classes, of which each is, and the rows that are positive for no class."""
    row = np.flatnonzero((signs > 0).any(axis=1))
    return features[row], signs[row] > 0, np.flatnonzero((signs < 0).all(axis=1))


def test_tensors_are_mined_as_arrays_are(rng):
    features, signs = clouds(rng, 1000)
    positives, shown, rest = split(features, signs)
    first, negative = (positives, shown, features[rest[:300]]), np.ones((300, 3), bool)
    later = rest[300:]
    tensors = ((torch.from_numpy(f), n) for f, n in stream(features[later], signs[later]))
    ours, theirs = (
        mine(*first, negative, candidates, MiningSettings(retrain=50))
        for candidates in (stream(features[later], signs[later]), tensors)
    )
    np.testing.assert_allclose(ours.weights, theirs.weights, atol=1e-4)


@pytest.mark.parametrize("retrain", [20, 200, 10**9])
def test_mining_a_stream_ends_near_the_svm_of_all_negatives(rng, retrain):
    features, signs = clouds(rng, 4000, positives=0.02)
    positives, shown, rest = split(features, signs)
    start, later = rest[:300], rest[300:]
    settings = MiningSettings(retrain=retrain, tolerance=1e-3, epochs=1000)
    svms = mine(
        positives,
        shown,
        features[start],
        np.ones((300, 3), bool),
        stream(features[later], signs[later]),
        settings,
    )
    # The positives of one class are in the example neither positive nor negative of the others.
    signs[signs.max(axis=1) > 0] *= signs[signs.max(axis=1) > 0] > 0
    for k in range(3):
        goal = objective(
            reference(features, signs[:, k], settings), 0, features, signs[:, k : k + 1], settings
        )
        assert objective(svms, k, features, signs, settings) < 1.02 * goal


def test_mining_without_candidates_is_fitting_the_start(rng):
    features, signs = clouds(rng, 400)
    positives, shown, rest = split(features, signs)
    svms = mine(positives, shown, features[rest], np.ones((len(rest), 3), bool), iter(()), EXACT)
    signs[signs.max(axis=1) > 0] *= signs[signs.max(axis=1) > 0] > 0
    check_against_liblinear(svms, features, signs, EXACT)


def test_only_negatives_of_a_class_are_mined_for_it(rng):
    features, signs = clouds(rng, 400, classes=2)
    positives, shown, rest = split(features, signs)
    start = features[rest]
    candidates = clouds(rng, 300, classes=2)[0]
    negative = np.zeros((300, 2), bool)
    negative[:, 1] = True

    def mined(stream):
        return mine(positives, shown, start, np.ones((len(start), 2), bool), stream, EXACT)

    without, some = mined([]), mined([(candidates, negative)])
    np.testing.assert_allclose(some.weights[0], without.weights[0], atol=2e-3)
    assert np.abs(some.weights[1] - without.weights[1]).max() > 0.02


def test_memory_is_bounded_by_the_hard_negatives(rng, monkeypatch):
    features, signs = clouds(rng, 500, classes=2)
    positives, shown, rest = split(features, signs)
    far = -30 * positives.mean(axis=0)
    alive, most, sizes = [], [], []

    def windows():
        for _ in range(100):
            part = rng.normal(0, 1.5, (200, 30)).astype(np.float32) + far
            part[:2] -= far  # two of two hundred are near
            alive.append(weakref.ref(part))
            most.append(sum(made() is not None for made in alive))
            yield part, np.ones((200, 2), bool)
            del part

    class Spied(TrainingSet):
        def add(self, features, signs, fold=-1, places=-1):
            super().add(features, signs, fold, places)
            sizes.append((len(self), len(self._features)))

    monkeypatch.setattr(linear, "TrainingSet", Spied)
    mine(
        positives,
        shown,
        features[rest],
        np.ones((len(rest), 2), bool),
        windows(),
        MiningSettings(retrain=40),
    )
    assert max(most) <= 2, "images are taken one by one"
    assert len(sizes) == 100
    assert max(size for size, _ in sizes) <= len(positives) + len(rest) + 200
    assert max(room for _, room in sizes) <= 1.3 * (len(positives) + len(rest) + 200)


def test_retraining_happens_when_enough_negatives_have_joined(rng, monkeypatch):
    features, signs = clouds(rng, 400, classes=1, positives=0.3)
    positives, shown, rest = split(features, signs)
    fits = []

    class Spied(TrainingSet):
        def fit(self):
            fits.append(len(self))
            return super().fit()

    monkeypatch.setattr(linear, "TrainingSet", Spied)
    hard = features[signs[:, 0] > 0][:10].copy()  # look like positives
    mine(
        positives,
        shown,
        features[rest],
        np.ones((len(rest), 1), bool),
        [(hard, np.ones((10, 1), bool))] * 8,
        MiningSettings(C=1e-4, hard=-1e9, easy=-1e9, retrain=25),
    )
    first = len(positives) + len(rest)
    assert fits == [first, first + 30, first + 60, first + 80]  # more than 25 each, and at the end


@pytest.mark.parametrize("kind", ["positive", "negative"])
def test_a_class_of_one_kind_only_is_an_error(rng, kind):
    features, signs = clouds(rng, 100, classes=2)
    positives, shown, rest = split(features, signs)
    negative = np.ones((len(rest), 2), bool)
    if kind == "positive":
        positives, shown = positives[shown[:, 0]], shown[shown[:, 0]]
    else:
        negative[:, 1] = False
    with pytest.raises(ValueError, match="class number 1 needs positive and negative examples"):
        mine(positives, shown, features[rest], negative, [], EXACT)


def test_folded_svms_score_raw_vectors_as_the_others_score_standardised_ones(rng):
    svms = LinearSVMs(rng.normal(size=(3, 8)).astype(np.float32), rng.normal(size=3).astype(np.float32))
    raw, centre = rng.normal(2, 3, (20, 8)).astype(np.float32), rng.normal(2, 1, 8).astype(np.float32)
    expected = svms((raw - centre) * np.float32(0.7))
    np.testing.assert_allclose(svms.folded(centre, 0.7)(raw), expected, rtol=1e-5, atol=1e-4)


def test_fitting_leaves_no_threads_behind(rng):
    features, signs = clouds(rng, 100)
    TrainingSet(features, signs, EXACT).fit()
    before = threading.active_count()
    TrainingSet(features, signs, EXACT).fit()
    assert threading.active_count() == before


def test_without_a_fold_it_is_as_if_its_examples_were_not_there(rng):
    features, signs = clouds(rng, 600)
    folds = np.arange(600) % 3 - 1  # -1 is in no fold
    settings = replace(EXACT, easy=-np.inf)
    training = TrainingSet(features, signs, settings, folds)
    training.fit()
    for fold in (0, 1):
        left = folds != fold
        check_against_liblinear(training.without(fold), features[left], signs[left], settings)
    twin = TrainingSet(features, signs, settings)
    twin.fit()
    np.testing.assert_array_equal(training.fit().weights, twin.fit().weights)


def test_without_a_fold_that_holds_all_examples_of_a_class_its_weights_are_0(rng):
    features, signs = clouds(rng, 300)
    folds = np.where(signs[:, 1] > 0, 0, 1)
    training = TrainingSet(features, signs, EXACT, folds)
    training.fit()
    svms = training.without(0)
    assert not svms.weights[1].any()
    assert svms.biases[1] == 0
    assert svms.weights[[0, 2]].any(axis=1).all()


def test_mined_negatives_keep_their_folds(rng):
    """As of a training set that has them all from the start, where none becomes easy."""
    features, signs = clouds(rng, 400)
    positives, shown, rest = split(features, signs)
    first, later, folds = rest[:100], rest[100:], np.arange(len(rest)) % 4
    settings = replace(EXACT, hard=-np.inf, easy=-np.inf)
    stream = (
        Labelled(features[[row]], np.ones((1, 3), bool), int(fold))
        for row, fold in zip(later, folds[100:], strict=True)
    )
    start = Labelled(features[first], np.ones((100, 3), bool), folds[:100])
    mined = mine_hard_negatives(Labelled(positives, shown, 2), start, stream, settings)
    rows = np.concatenate([np.flatnonzero((signs > 0).any(axis=1)), rest])
    kinds = np.where(signs[rows] > 0, 1, -1) * ((signs[rows] > 0) | (signs[rows] < 0).all(axis=1)[:, None])
    of_all = np.concatenate([np.full(len(positives), 2), folds])
    for fold in (0, 1, 3):
        left = of_all != fold
        check_against_liblinear(mined.without(fold), features[rows][left], kinds[left], EXACT)
    assert not mined.without(2).weights.any()
