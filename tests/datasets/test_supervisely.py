import json

import pytest

from sppnet.datasets import read_dataset
from trees import only_error, save, scene, write


def shape(kind="rectangle", exterior=((10, 20), (39, 59)), label="cat"):
    points = {"exterior": [list(p) for p in exterior], "interior": []}
    return {"classTitle": label, "geometryType": kind, "points": points}


def labelled(root, *shapes, **content):
    save(root / "ds 1" / "img" / "a.png", scene(1).image)
    about = {"description": "", "size": {"height": 96, "width": 128}, "objects": list(shapes)}
    return write(root / "ds 1" / "ann" / "a.png.json", json.dumps({**about, **content}))


@pytest.mark.parametrize(
    ("kind", "exterior", "box"),
    [
        ("rectangle", [(10, 20), (39, 59)], (10, 20, 40, 60)),
        ("rectangle", [(39, 20), (10, 59)], (10, 20, 40, 60)),
        ("rectangle", [(10.5, 20), (40, 60)], (10.5, 20, 40, 60)),
        ("polygon", [(10, 20), (40, 30), (20, 60)], (10, 20, 40, 60)),
    ],
)
def test_shapes_as_boxes(kind, exterior, box, tmp_path):
    labelled(tmp_path, shape(kind, exterior))
    (sample,) = read_dataset(tmp_path)
    assert (sample.target.boxes.tolist(), sample.target.labels) == ([list(box)], ("cat",))


def test_shapes_without_a_box_are_counted(tmp_path):
    labelled(tmp_path, shape(), shape("point"), {"classTitle": "cat", "geometryType": "bitmap", "bitmap": {}})
    assert read_dataset(tmp_path).notes == (
        "shapes of the kind point, left out: 1",
        "shapes of the kind bitmap, left out: 1",
    )


def test_photos_of_one_name_in_two_data_sets(tmp_path):
    for folder, n in (("one", 1), ("two", 2)):
        save(tmp_path / folder / "img" / "a.png", scene(n).image)
        content = {"size": {"height": 96, "width": 128}, "objects": [shape(label=folder)]}
        write(tmp_path / folder / "ann" / "a.png.json", json.dumps(content))
    found = {s.path.parts[-3]: s.target.labels for s in read_dataset(tmp_path)}
    assert found == {"one": ("one",), "two": ("two",)}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"objects": {}}, "a.png.json: found {} as 'objects', expected a list"),
        ({"size": {"height": 96, "width": 300}}, "a.png.json: annotated as 300 x 96"),
        ({"objects": [3]}, "objects[0]: found 3, expected an object with 'classTitle'"),
        (
            {"objects": [shape(label="")]},
            "objects[0]: found an object without a class, expected its classTitle",
        ),
        (
            {"objects": [shape(exterior=[(1, 2)])]},
            "objects[0]: found 1 points in 'exterior', expected at least 2",
        ),
        (
            {"objects": [shape(exterior=[(1, 2, 3)] * 2)]},
            "objects[0]: found [1, 2, 3] in 'exterior', expected x, y",
        ),
        ({"objects": [shape(exterior=[(200, 2), (300, 9)])]}, "lies outside the image of 128 x 96"),
    ],
)
def test_bad_content(content, says, tmp_path):
    labelled(tmp_path, **content)
    assert says in only_error(tmp_path)
