from pathlib import Path

import pytest

from sppnet.datasets.splits import (
    by_folder,
    default_training_split,
    pick_split,
    same_split,
    split_of_folders,
    split_of_stem,
)
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
    assert pick_split(Path("data"), {"train": 1, "trainval": 2, "val": 3}, 6, split) == expected


def test_pick_the_only_one():
    assert pick_split(Path("data"), {"val": 3}, 6, None) == ("val", 3)


def test_pick_everything():
    assert pick_split(Path("data"), {"train": 1, "val": 2}, 3, "all") == (None, 3)
    assert pick_split(Path("data"), {}, 3, "all") == pick_split(Path("data"), {}, 3, None) == (None, 3)
    assert pick_split(Path("data"), {"all": 1, "val": 2}, 3, "all") == ("all", 1)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("val", "valid", True),
        ("Train", "train2017", True),
        ("train2014", "train2017", False),
        ("train", "trainval", False),
        ("train", "test", False),
        ("Default", "default", True),
        ("training_data", "train", False),
    ],
)
def test_names_of_one_split(one, other, same):
    assert same_split(one, other) is same_split(other, one) is same


def test_splits_of_paths():
    assert split_of_folders("a/Valid/images/test.jpg") == "Valid"
    assert split_of_folders("test/b/train/x.jpg") == "train"
    assert split_of_folders("trains/x.jpg") is split_of_folders("train.jpg") is None
    assert split_of_stem("labels_train2017") == "train2017"
    assert split_of_stem("train-test") is split_of_stem("strain") is None
    names = ["b/x", "train/b", "test/a", "train/a"]
    assert by_folder(names) == {"train": ["train/b", "train/a"], "test": ["test/a"]}


@pytest.mark.parametrize(
    ("splits", "split", "message"),
    [
        ({"val": 1, "train": 2}, None, "found 2 splits and none chosen, expected one of: train, val; or all"),
        (
            {"train1": 1, "train2": 2},
            "train",
            "found no single split 'train', expected one of: train1, train2; or all",
        ),
        ({}, "train", "found no split 'train', expected none, as all is in one part"),
    ],
)
def test_pick_in_vain(splits, split, message):
    with pytest.raises(DatasetError, match=f"^data: {message}$"):
        pick_split(Path("data"), splits, 0, split)
