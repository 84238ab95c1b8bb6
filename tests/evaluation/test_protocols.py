import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from sklearn.svm import SVC

from sppnet.evaluation import protocols
from sppnet.evaluation.protocols import (
    caltech101_results,
    cross_validated,
    gram_matrix,
    svm_scores,
    voc_results,
)


def clusters(classes=4, each=12, noise=1.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    vectors = rng.normal(size=(classes, 20))[labels] + noise * rng.normal(size=(len(labels), 20))
    return vectors.astype(np.float32), labels


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_gram_matrix(dtype, monkeypatch):
    monkeypatch.setattr(protocols, "_BLOCK", 7)
    vectors = np.random.default_rng(0).normal(size=(23, 5)).astype(dtype)
    expected = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    np.testing.assert_allclose(gram_matrix(vectors), expected, atol=1e-4)
    assert gram_matrix(vectors[:0]).shape == (0, 0)


def test_svm_scores_are_those_of_the_vectors():
    vectors, labels = clusters()
    seen, unseen = np.arange(0, 48, 2), np.arange(1, 48, 2)
    signs = np.where(labels[:, None] == np.arange(4), 1, -1)
    signs[2, 0] = 0
    found = svm_scores(gram_matrix(vectors), seen, unseen, signs[seen], [1.0, 2.0, 3.0, 4.0])
    for k, cost in enumerate((1.0, 2.0, 3.0, 4.0)):
        known = seen[signs[seen, k] != 0]
        svm = SVC(kernel="linear", C=cost).fit(vectors[known], signs[known, k])
        np.testing.assert_allclose(found[:, k], svm.decision_function(vectors[unseen]), atol=1e-3)


class TestCaltech101:
    def test_separable_classes_are_all_right(self):
        vectors, labels = clusters(noise=0.05)
        results = list(caltech101_results(gram_matrix(vectors), labels, splits=3, train=6))
        assert [result.accuracy for result in results] == [1.0] * 3
        assert [result.cross_validation for result in results] == [1.0] * 3

    def test_noise_is_near_chance(self):
        vectors, labels = clusters(classes=5, each=40, noise=50)
        results = list(caltech101_results(gram_matrix(vectors), labels, splits=4, train=6))
        assert 0.1 < np.mean([result.accuracy for result in results]) < 0.3
        assert 0.05 < np.mean([result.cross_validation for result in results]) < 0.4

    def test_splits_follow_the_seed(self):
        vectors, labels = clusters(noise=3)
        gram = gram_matrix(vectors)
        once, again, other = (
            list(caltech101_results(gram, labels, splits=3, train=6, seed=s)) for s in (0, 0, 1)
        )
        assert once == again != other
        assert len({result.accuracy for result in once}) > 1

    def test_never_tests_on_what_it_learnt_from(self, monkeypatch):
        uses = []
        plain = protocols.svm_scores

        def spied(gram, train, test, signs, costs):
            uses.append((set(train), set(test)))
            return plain(gram, train, test, signs, costs)

        monkeypatch.setattr(protocols, "svm_scores", spied)
        vectors, labels = clusters(each=12)
        list(caltech101_results(gram_matrix(vectors), labels, splits=1, train=6, test=4))
        assert all(not (train & test) for train, test in uses)
        (seen, unseen), chosen = uses[-1], uses[:-1]
        assert (len(seen), len(unseen)) == (24, 16)
        # The choice of C sees training images alone.
        assert all(train | test <= seen for train, test in chosen)

    @pytest.mark.parametrize("settings", [{"train": 12}, {"train": 2}, {"splits": 0}, {"test": 0}])
    def test_bad_settings(self, settings):
        vectors, labels = clusters()
        with pytest.raises(ValueError, match="expected at least 1 split"):
            list(caltech101_results(gram_matrix(vectors), labels, **{"train": 6, **settings}))

    def test_bad_matrix(self):
        vectors, labels = clusters()
        with pytest.raises(ValueError, match="expected it square"):
            list(caltech101_results(gram_matrix(vectors)[:5], labels, train=6))


class TestVoc:
    def signs(self, labels):
        return np.where(labels[:, None] == np.arange(4), 1, -1)

    def test_precision_is_that_of_scikit_learn(self):
        vectors, labels = clusters(noise=2.5, each=20)
        signs, gram = self.signs(labels), gram_matrix(vectors)
        seen, unseen = np.arange(0, 80, 2), np.arange(1, 80, 2)
        results = voc_results(gram, signs, seen, unseen)
        scores = svm_scores(gram, seen, unseen, signs[seen], [r.C for r in results])
        for k, result in enumerate(results):
            # Theirs is not interpolated: ours has the envelope of the curve.
            plain = average_precision_score(signs[unseen, k] == 1, scores[:, k])
            assert plain <= result.area + 1e-9 <= plain + 0.08
            assert result.positives == 10

    def test_difficult_images_neither_train_nor_test(self):
        vectors, labels = clusters(noise=1.5, each=20)
        signs, gram = self.signs(labels), gram_matrix(vectors)
        seen, unseen = np.arange(0, 80, 2), np.arange(1, 80, 2)
        signs[[0, 1], 0] = 0
        with_them = voc_results(gram, signs, seen, unseen)[0]
        without = voc_results(gram, signs, seen[1:], unseen[1:])[0]
        assert with_them.positives == without.positives == 9
        scores = [svm_scores(gram, part, unseen, signs[part], [1.0] * 4)[:, 0] for part in (seen, seen[1:])]
        np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)

    def test_choice_between_features_sees_training_images_alone(self):
        vectors, labels = clusters(noise=2, each=20)
        signs, seen = self.signs(labels), np.arange(0, 80, 2)
        good, bad = gram_matrix(vectors), gram_matrix(np.random.default_rng(1).normal(size=vectors.shape))
        assert cross_validated(good, signs, seen) > cross_validated(bad, signs, seen)
        spoilt = good.copy()
        rest = np.setdiff1d(np.arange(80), seen)
        spoilt[rest] = spoilt[:, rest] = 0
        assert cross_validated(spoilt, signs, seen) == cross_validated(good, signs, seen)

    def test_a_class_without_examples(self):
        vectors, labels = clusters()
        with pytest.raises(ValueError, match="found 0 positive training images of class 3"):
            voc_results(gram_matrix(vectors), self.signs(labels), np.arange(30), np.arange(30, 48))

    def test_training_images_are_not_tested(self):
        vectors, labels = clusters()
        with pytest.raises(ValueError, match="found 18 images both"):
            voc_results(gram_matrix(vectors), self.signs(labels), np.arange(48), np.arange(30, 48))

    @pytest.mark.parametrize("seed", range(20))
    def test_every_class_is_in_every_fold(self, seed):
        rng = np.random.default_rng(seed)
        signs = np.full((40, 3), -1)
        for k, count in enumerate((3, 3, 30)):
            signs[rng.permutation(40)[:count], k] = 1
        folds = protocols._balanced_folds(signs, seed)
        shared = (signs == 1).sum(axis=1) > 1
        for k in range(3):
            # Only where images have several classes can a fold go without one.
            found = set(folds[signs[:, k] == 1])
            assert found == {0, 1, 2} or shared[signs[:, k] == 1].any()
