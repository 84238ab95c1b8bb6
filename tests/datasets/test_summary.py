import math
from dataclasses import replace

import numpy as np
import pytest

from sppnet.boxes import Target
from sppnet.datasets import read_dataset
from sppnet.datasets.summary import Place, equal_photos, summarise
from trees import save, scene, voc_xml, write


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
    assert math.isnan(summarise(replace(data, samples=(unknown,))).classes[0].share)


def test_names_and_boxes_that_look_odd(data):
    target = Target.of([(0, 0, 7, 7), (0, 0, 8, 8)] * 3, ["Cat", "cat", "c at", "dog", "dog", "Cat"])
    odd = replace(data, samples=(replace(data[0], target=target),), classes=("Cat", "c at", "cat", "dog"))
    assert summarise(odd).warnings == (
        "the class 'c at' has one box",
        "the class 'cat' has one box",
        "the classes 'Cat' and 'c at' and 'cat' differ in capitals or spaces only",
        "boxes of less than 8 x 8 pixels: 3",
    )


def test_equal_photos(tmp_path):
    for name, content in {"a": b"one", "b": b"two", "c": b"one", "d": b"longer"}.items():
        (tmp_path / name).write_bytes(content)
    places = [Place(split, tmp_path / name) for split, name in zip("xxyy", "abcd", strict=True)]
    assert equal_photos(places) == [[places[0], places[2]]]
    assert equal_photos([]) == []
    places[2].path.unlink()
    assert equal_photos(places) == []


def test_the_short_form(data):
    assert summarise(data).short == "3 photos, 4 objects: cat 3, dog 1; 1 photos without objects"
    many = replace(data, classes=tuple(f"{i:02}" for i in range(14)))
    target = Target.of([(0, 0, 9, 9)] * 14, many.classes)
    short = summarise(replace(many, samples=(replace(data[0], target=target),))).short
    assert short.startswith("1 photos, 14 objects: 00 1, 01 1, ")
    assert short.endswith(", 11 1, 2 more classes")
