import math
import shutil
from dataclasses import replace

import numpy as np
import pytest

from sppnet.boxes import Target
from sppnet.datasets import read_dataset
from sppnet.datasets.summary import equal_photos, shared_photos, summarise
from trees import save, scene, voc_tree, voc_xml, write


@pytest.fixture
def data(tmp_path):
    boxes = {
        "a": [(0, 0, 10, 10, "cat"), (10, 10, 30, 30, "cat"), (0, 0, 40, 40, "dog")],
        "b": [(0, 0, 20, 5, "cat")],
        "c": [],
    }
    for number, (name, rows) in enumerate(boxes.items()):
        save(tmp_path / f"{name}.jpg", scene(number, 50, 80).image)
        text = voc_xml([row[:4] for row in rows], [row[4] for row in rows], (50, 80))
        write(tmp_path / f"{name}.xml", text.replace("<difficult>0", "<difficult>1", 1))
    return read_dataset(tmp_path)


def test_counts_and_sizes(data):
    summary = summarise(data)
    assert (summary.images, summary.objects, summary.empty) == (3, 4, 1)
    cat, dog = summary.classes
    assert (cat.name, cat.objects, cat.images, cat.ignored) == ("cat", 3, 2, 2)
    np.testing.assert_allclose(cat.sides, np.percentile([10, 20, 10], [25, 50, 75]))
    assert cat.share == pytest.approx(100 / 4000)
    assert (dog.name, dog.objects, dog.images, dog.ignored) == ("dog", 1, 1, 0)
    assert (dog.sides, dog.share) == ((40, 40, 40), pytest.approx(1600 / 4000))
    assert summary.warnings == ("the class 'dog' has one box",)


def test_part_of_a_data_set(data):
    assert [one.name for one in summarise(data[1:]).classes] == ["cat"]
    assert summarise(data[2:])[:4] == (1, 0, 1, ())


def test_images_in_memory_and_of_unknown_size(data):
    pixels = replace(data[0], image=scene(0, 50, 80).image, size=None)
    cat = summarise(replace(data, samples=(pixels,))).classes[0]
    assert cat.share == pytest.approx(np.median([100, 400]) / 4000)
    unknown = replace(data[0], size=None)
    assert math.isnan(summarise(replace(data, samples=(unknown,)), compare=True).classes[0].share)


def test_names_and_boxes_that_look_odd(data):
    target = Target.of([(0, 0, 7, 7), (0, 0, 8, 8)] * 3, ["Cat", "cat", "c at", "dog", "dog", "Cat"])
    odd = replace(data, samples=(replace(data[0], target=target),), classes=("Cat", "c at", "cat", "dog"))
    assert summarise(odd).warnings == (
        "the class 'c at' has one box",
        "the class 'cat' has one box",
        "the classes 'Cat' and 'c at' and 'cat' differ in capitals or spaces only",
        "boxes of less than 8 x 8 pixels: 3",
    )


def test_equal_photos(tmp_path, data):
    shutil.copy(tmp_path / "a.jpg", tmp_path / "d.jpg")
    shutil.copy(tmp_path / "a.xml", tmp_path / "d.xml")
    (tmp_path / "e.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-1] + b" ")  # of the same length
    shutil.copy(tmp_path / "a.xml", tmp_path / "e.xml")
    data = read_dataset(tmp_path)
    assert not any("equal" in warning for warning in summarise(data).warnings)
    warning = f"equal photos: {tmp_path / 'a.jpg'} and {tmp_path / 'd.jpg'}"
    assert summarise(data, compare=True).warnings == (warning,)


def test_photos_of_several_splits(tmp_path):
    voc_tree(tmp_path, {"train": 2, "val": 2})
    photos = tmp_path / "JPEGImages"
    shutil.copy(photos / "000001.jpg", photos / "000003.jpg")
    shutil.copy(photos / "000001.jpg", photos / "000002.jpg")
    parts = {split: read_dataset(tmp_path, split) for split in ("train", "val")}
    (group,) = shared_photos(parts)
    assert [(place.split, place.path.stem) for place in group] == [
        ("train", "000001"),
        ("train", "000002"),
        ("val", "000003"),
    ]
    assert shared_photos({"train": parts["train"]}) == []
    assert equal_photos([]) == []
    (photos / "000001.jpg").unlink()
    assert len(shared_photos(parts)[0]) == 2
