"""What is learned from where no split is named."""

import shutil

import numpy as np
import pytest

from sppnet.datasets import read_dataset
from sppnet.datasets.image_folder import read_image_folder
from sppnet.datasets.summary import summarise
from sppnet.datasets.training import read_training_data, read_training_images
from sppnet.errors import DatasetError
from trees import class_tree, coco_tree, voc_tree, yolo_tree


@pytest.mark.parametrize("tree", [voc_tree, coco_tree, yolo_tree])
def test_the_split_for_training_is_the_default(tmp_path, tree):
    tree(tmp_path)
    data, expected = read_training_data(tmp_path), read_dataset(tmp_path, "train")
    assert data.fingerprint == expected.fingerprint
    assert data.split == expected.split
    told = f"{tmp_path} ({data.format}): learning from the split {data.split}: {summarise(data).short}"
    assert data.notes == (told, *expected.notes)
    assert read_training_data(tmp_path, "val").fingerprint == read_dataset(tmp_path, "val").fingerprint
    assert "learning from the split val: 2 photos, " in read_training_data(tmp_path, "val").notes[0]


def test_everything_is_learned_from_without_one(tmp_path):
    voc_tree(tmp_path, {"val": 3})
    data = read_training_data(tmp_path)
    assert data.fingerprint == read_dataset(tmp_path).fingerprint
    assert data.notes[0].startswith(f"{tmp_path} (voc): learning from the split val: 3 photos, ")
    voc_tree(tmp_path, {"val": 3, "test": 1})
    with pytest.raises(
        DatasetError, match="found 2 splits and none chosen, expected one of: test, val; or all"
    ):
        read_training_data(tmp_path)
    shutil.rmtree(tmp_path / "ImageSets")
    told = "learning from everything, as there is no split for training: 4 photos, "
    assert told in read_training_data(tmp_path).notes[0]
    with pytest.raises(DatasetError, match="'test'"):
        read_training_data(tmp_path, "test")


def same(one, other):
    return list(one) == list(other) and np.array_equal(one.labels, other.labels)


def test_labelled_images(tmp_path):
    for split in ("train", "val", "test"):
        class_tree(tmp_path / split, 2)
    train, val, test = (read_image_folder(tmp_path, split) for split in ("train", "val", "test"))
    images, held = read_training_images(tmp_path)
    assert same(images, train)
    assert same(held, val)
    assert images.notes == (f"{tmp_path}: learning from the split train: {len(train)} photos", *train.notes)
    images, held = read_training_images(tmp_path, "test")
    assert same(images, test)
    assert images.notes == test.notes
    assert held is None
    images, held = read_training_images(tmp_path, "val", "test")
    assert same(images, val)
    assert same(held, test)
    images, held = read_training_images(tmp_path, validation="none")
    assert same(images, train)
    assert held is None


def test_labelled_images_without_splits(tmp_path):
    class_tree(tmp_path, 2)
    images, held = read_training_images(tmp_path)
    assert same(images, read_image_folder(tmp_path))
    assert held is None
    expected = f"learning from everything, as there is no split for training: {len(images)} photos"
    assert images.notes[0] == f"{tmp_path}: {expected}"
