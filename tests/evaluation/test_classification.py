import json

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from sppnet.evaluation.classification import evaluate_classification


def one_hot(choices, classes):
    return np.eye(classes)[choices]


def test_by_hand():
    # Three cats, of which one is taken for a dog; one dog, found; no bird.
    report = evaluate_classification(one_hot([0, 0, 1, 1], 3), np.array([0, 0, 0, 1]), ["cat", "dog", "bird"])
    assert report.classes == ("cat", "dog", "bird")
    assert report.top1 == 3 / 4
    assert report.top5 == 1  # of three classes, every one is among the five
    assert report.mean_class == pytest.approx((2 / 3 + 1) / 2)
    assert report.confusion.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert report.images.tolist() == [3, 1, 0]
    assert report.right.tolist() == [2, 1, 0]


def test_the_fifth_counts_and_the_sixth_does_not():
    scores = np.array([[6.0, 5, 4, 3, 2, 1]] * 2)
    report = evaluate_classification(scores, np.array([4, 5]), list("abcdef"))
    assert report.top1 == 0
    assert report.top5 == 1 / 2


def test_of_equal_scores_the_first_class_is_taken():
    report = evaluate_classification(np.zeros((2, 7)), np.array([0, 5]), list("abcdefg"))
    assert report.confusion[:, 0].tolist() == [1, 0, 0, 0, 0, 1, 0]
    assert report.top5 == 1 / 2


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.normal(size=(200, 9)), rng.integers(0, 9, 200)
    report = evaluate_classification(scores, labels, [str(i) for i in range(9)])
    assert report.top1 == pytest.approx(top_k_accuracy_score(labels, scores, k=1))
    assert report.top5 == pytest.approx(top_k_accuracy_score(labels, scores, k=5))
    assert report.mean_class == pytest.approx(balanced_accuracy_score(labels, scores.argmax(axis=1)))
    assert report.confusion.sum() == 200
    assert report.right.sum() == (scores.argmax(axis=1) == labels).sum()


def test_facts_are_json():
    report = evaluate_classification(one_hot([0, 0, 1], 2), np.array([0, 1, 1]), ["cat", "dog"])
    assert json.loads(json.dumps(report.facts(), allow_nan=False)) == {
        "top1": 2 / 3,
        "top5": 1,
        "mean_class": 0.75,
        "classes": {"cat": {"images": 1, "right": 1}, "dog": {"images": 2, "right": 1}},
        "confusion": [[1, 0], [1, 1]],
        "images": 3,
        "seen": 0,
        "unreadable": [],
    }


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        (np.zeros((0, 2)), np.zeros(0, int)),
        (np.zeros(2), np.zeros(2, int)),
        (np.zeros((2, 2)), np.zeros(3, int)),
        (np.zeros((2, 2)), np.array([0, 2])),
        (np.zeros((2, 2)), np.array([-1, 0])),
    ],
)
def test_what_does_not_fit(scores, labels):
    with pytest.raises(ValueError, match=r"expected scores \(N, K\) and labels \(N,\) below K"):
        evaluate_classification(scores, labels, ["cat", "dog"])


def test_names_that_do_not_fit():
    with pytest.raises(ValueError, match="found 1 names of classes, expected one for each of 2 scores"):
        evaluate_classification(np.zeros((1, 2)), np.array([0]), ["cat"])
