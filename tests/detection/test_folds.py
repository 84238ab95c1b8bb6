from collections import Counter

import numpy as np
import pytest

from sppnet.boxes import Target
from sppnet.detection import folds
from sppnet.detection.folds import assign_folds, choose_folds, shown_classes


def drawn(count, shares=(0.5, 0.3, 0.05), seed=0):
    """Return which of three classes each photo shows, and a number for each photo."""
    rng = np.random.default_rng(seed)
    return rng.random((count, len(shares))) < shares, rng.permutation(count).astype(np.uint64)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_folds_are_of_one_size_and_show_each_class_alike(count):
    shown, photos = drawn(200)
    fold = assign_folds(shown, photos, count, seed=1)
    sizes = np.bincount(fold, minlength=count)
    assert sizes.min() > 0.8 * 200 / count
    assert sizes.max() < 1.2 * 200 / count
    for k in range(3):
        held = np.bincount(fold[shown[:, k]], minlength=count)
        assert held.max() - held.min() <= 3, "as even as they come"


def test_copies_of_a_photo_come_into_one_fold():
    shown, photos = drawn(60)
    photos = photos // 3
    fold = assign_folds(shown, photos, 4, seed=0)
    for photo in set(photos.tolist()):
        assert len(set(fold[photos == photo].tolist())) == 1
    assert set(fold.tolist()) == {0, 1, 2, 3}


def test_deals_are_equal_by_seed():
    shown, photos = drawn(50)
    one, two, other = (assign_folds(shown, photos, 3, seed) for seed in (0, 0, 1))
    assert (one == two).all()
    assert (one != other).any()


@pytest.mark.parametrize(("count", "asked"), [(1, 4), (5, 1), (5, 0), (0, 4)])
def test_where_there_is_no_fold(count, asked):
    shown, photos = drawn(count)
    assert (assign_folds(shown, photos, asked, 0) == -1).all()


def test_fewer_photos_than_folds():
    shown, photos = drawn(3)
    assert sorted(assign_folds(shown, photos, 4, 0).tolist()) == [0, 1, 2]


def test_of_many_photos_some_are_held_out_once(monkeypatch):
    monkeypatch.setattr(folds, "LARGE", 100)
    monkeypatch.setattr(folds, "HELD_OUT", 20)
    shown, photos = drawn(101)
    assert Counter(choose_folds(shown, photos, 4, 0).tolist()) == {-1: 81, 0: 20}
    assert set(choose_folds(shown[:100], photos[:100], 4, 0).tolist()) == {0, 1, 2, 3}
    one = choose_folds(shown[:40], photos[:40], 4, 0, one=True)
    assert Counter(one.tolist()) == {-1: 30, 0: 10}


def test_difficult_objects_and_crowds_are_not_shown():
    boxes = [[0, 0, 5, 5]] * 3
    targets = [
        Target.of(boxes, ["a", "b", "c"], difficult=[True, False, False], crowd=[False, False, True]),
        Target.of([], []),
    ]
    assert shown_classes(targets, ["a", "b", "c"]).tolist() == [[False, True, False], [False] * 3]
    assert shown_classes([], ["a"]).shape == (0, 1)
