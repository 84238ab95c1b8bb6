import json

import pytest

from sppnet.datasets import read_dataset
from trees import only_error, save, scene, write

PLACE = {"x": 25, "y": 40, "width": 30, "height": 40}


def listed(root, *images):
    save(root / "a.png", scene(1).image)
    return write(root / "boxes.json", json.dumps(list(images)))


def image(*rows):
    return {"image": "a.png", "annotations": list(rows)}


def test_coordinates_are_those_of_the_centre(tmp_path):
    listed(tmp_path, image({"label": " cat ", "coordinates": PLACE}))
    (sample,) = read_dataset(tmp_path)
    assert (sample.target.boxes.tolist(), sample.target.labels) == ([[10, 20, 40, 60]], ("cat",))


def test_other_words_for_the_same(tmp_path):
    listed(tmp_path, {"imagefilename": "a.png", "annotation": [{"label": "cat", "coordinates": PLACE}]})
    assert read_dataset(tmp_path)[0].target.labels == ("cat",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([image(), 3], "boxes.json: image 1: found 3, expected an object with 'image'"),
        ([{"annotations": []}], "boxes.json: image 0: found nothing as 'image', expected text"),
        ([{"image": "a.png", "annotations": 3}], "image 0: found 3 as 'annotations', expected a list"),
        ([image(3)], "image 0 (a.png), annotation 0: found 3, expected an object with 'label'"),
        (
            [image({"label": "", "coordinates": PLACE})],
            "annotation 0: found an empty label, expected a class name",
        ),
        (
            [image({"label": "a", "coordinates": [1]})],
            "annotation 0: found [1] as 'coordinates', expected an object",
        ),
        (
            [image({"label": "a", "coordinates": {**PLACE, "x": None}})],
            "annotation 0: found None as 'x', expected a number",
        ),
        ([image({"label": "a", "coordinates": {**PLACE, "width": 0}})], "of 'a' is inverted or empty"),
    ],
)
def test_bad_content(content, says, tmp_path):
    listed(tmp_path, *content)
    assert says in only_error(tmp_path)
