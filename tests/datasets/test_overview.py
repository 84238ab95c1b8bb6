import shutil

import pytest

from sppnet.datasets.overview import overview
from sppnet.errors import DatasetError
from trees import scenes, voc_tree, voc_xml, write, yolo_tree


def test_splits_side_by_side(tmp_path):
    voc_tree(tmp_path, {"train": 3, "val": 2})
    found = overview(tmp_path)
    assert (found.whole.format, found.splits, tuple(found.parts)) == (
        "voc",
        ("train", "val"),
        ("train", "val"),
    )
    assert [part.images for part in found.parts.values()] == [3, 2]
    assert (found.summary.images, len(found.whole)) == (5, 5)
    assert found.summary.objects == sum(part.objects for part in found.parts.values())
    facts = found.facts()
    assert (facts["format"], facts["splits"]["val"]["images"], facts["images"]) == ("voc", 2, 5)


def test_one_split_alone(tmp_path):
    voc_tree(tmp_path, {"train": 3, "val": 2})
    found = overview(tmp_path, "val")
    assert (found.summary.images, found.parts, found.splits) == (2, {}, ("train", "val"))
    with pytest.raises(DatasetError, match="no single split 'tset'"):
        overview(tmp_path, "tset")


def test_a_list_of_images_for_each_class_is_not_read(tmp_path):
    voc_tree(tmp_path, {"train": 3, "val": 2})
    for number in range(8):
        write(tmp_path / f"ImageSets/Main/kind{number}_train.txt", "000001 1\n")
    found = overview(tmp_path)
    assert (len(found.splits), found.parts, found.summary.images) == (10, {}, 5)
    assert len(found.facts()["splits"]) == 10


def test_photos_in_several_splits_and_twice_in_one(tmp_path):
    voc_tree(tmp_path, {"train": 3, "val": 2})
    lists = tmp_path / "ImageSets/Main"
    write(lists / "trainval.txt", (lists / "train.txt").read_text() + (lists / "val.txt").read_text())
    photos = tmp_path / "JPEGImages"
    shutil.copy(photos / "000001.jpg", photos / "000004.jpg")
    shutil.copy(photos / "000002.jpg", photos / "000003.jpg")
    warnings = "\n".join(overview(tmp_path).warnings)
    first, second = photos / "000001.jpg", photos / "000004.jpg"
    assert f"photos in more than one split: 1 (first: {first} and {second})" in warnings
    assert f"photos that are there twice: 1 (first: {photos / '000002.jpg'} and" in warnings


def test_a_data_set_without_splits(tmp_path):
    drawn = scenes({"train": 4})["train"]
    yolo_tree(tmp_path, {"train": 4})
    assert overview(tmp_path).summary.objects == sum(len(scene.labels) for scene in drawn.values())
    assert overview(tmp_path).warnings == ("the class 'square' has one box",)


def test_a_photo_in_no_split_is_part_of_the_whole(tmp_path):
    voc_tree(tmp_path, {"train": 2, "val": 2})
    shutil.copy(tmp_path / "JPEGImages/000001.jpg", tmp_path / "JPEGImages/more.jpg")
    write(tmp_path / "Annotations/more.xml", voc_xml([(1, 1, 9, 9)], ["disc"]))
    found = overview(tmp_path)
    assert (found.summary.images, sum(part.images for part in found.parts.values())) == (5, 4)
