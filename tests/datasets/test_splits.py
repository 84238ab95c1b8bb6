from pathlib import Path

import pytest

from sppnet.datasets.splits import default_training_split, pick_split
from sppnet.errors import DatasetError


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ([], None),
        (["all"], None),
        (["val", "test"], None),
        (["train"], "train"),
        (["Train", "Val"], "Train"),
        (["training", "test"], "training"),
        (["val2017", "train2017"], "train2017"),
        (["trainval", "train", "cat_train"], "train"),
        (["trainval", "test"], "trainval"),
        (["trainval2007", "train2007"], "train2007"),
        (["train2014", "train2017"], None),
        (["trainval2007", "trainval2012"], None),
        (["train", "training"], "train"),
        (["cat_train"], None),
    ],
)
def test_split_to_learn_from(splits, expected):
    assert default_training_split(splits) == expected
    assert default_training_split(iter(splits)) == expected


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", ("train", 1)), ("trainv", ("trainval", 2)), ("v", ("val", 3)), ("trainval", ("trainval", 2))],
)
def test_pick_by_name_or_beginning(split, expected):
    assert pick_split(Path("data"), {"train": 1, "trainval": 2, "val": 3}, split) == expected


def test_pick_the_only_one():
    assert pick_split(Path("data"), {"val": 3}, None) == ("val", 3)


@pytest.mark.parametrize(
    ("splits", "split", "message"),
    [
        ({"val": 1, "train": 2}, None, "found 2 splits and none chosen, expected one of: train, val"),
        (
            {"train1": 1, "train2": 2},
            "train",
            "found no single split 'train', expected one of: train1, train2",
        ),
        ({}, "train", r"found no single split 'train', expected one of: \(none\)"),
        ({}, None, r"found 0 splits and none chosen, expected one of: \(none\)"),
    ],
)
def test_pick_in_vain(splits, split, message):
    with pytest.raises(DatasetError, match=f"^data: {message}$"):
        pick_split(Path("data"), splits, split)
