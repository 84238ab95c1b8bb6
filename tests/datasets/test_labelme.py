import json

import numpy as np
import pytest

from sppnet.datasets import read_dataset
from trees import only_error, save, scene, write


def shape(kind="rectangle", points=((10, 20), (40, 60)), label="cat", **more):
    return {"label": label, "points": [list(p) for p in points], "shape_type": kind, **more}


def labelled(root, *shapes, **content):
    """Write a photo and what LabelMe says of it; return the file."""
    save(root / "a.png", scene(1).image)
    about = {
        "version": "5",
        "shapes": list(shapes),
        "imagePath": "a.png",
        "imageHeight": 96,
        "imageWidth": 128,
    }
    return write(root / "a.json", json.dumps({**about, **content}))


@pytest.mark.parametrize(
    ("kind", "points", "box"),
    [
        ("rectangle", [(40, 60), (10, 20)], (10, 20, 40, 60)),
        ("rectangle", [(10, 20), (40, 20), (40, 60), (10, 60)], (10, 20, 40, 60)),
        ("polygon", [(10.5, 20), (40, 30), (20, 60)], (10.5, 20, 40, 60)),
        ("circle", [(50, 40), (53, 44)], (45, 35, 55, 45)),
        ("rotation", [(20, 10), (30, 20), (20, 30), (10, 20)], (10, 10, 30, 30)),
        ("mask", [(10, 20), (39, 59)], (10, 20, 40, 60)),
    ],
)
def test_shapes_as_boxes(kind, points, box, tmp_path):
    labelled(tmp_path, shape(kind, points, mask="iVBOR"))
    (sample,) = read_dataset(tmp_path)
    np.testing.assert_allclose(sample.target.boxes, [box], atol=1e-5)
    assert sample.target.labels == ("cat",)


def test_shapes_without_a_box_are_counted(tmp_path):
    more = (shape("point", [(1, 2)]), shape("line"), shape("linestrip"), shape("point", [(3, 4)]))
    labelled(tmp_path, shape(), *more)
    data = read_dataset(tmp_path)
    assert len(data[0].target.labels) == 1
    assert data.notes == (
        "shapes of the kind point, left out: 2",
        "shapes of the kind line, left out: 1",
        "shapes of the kind linestrip, left out: 1",
    )


def test_old_files_and_files_in_another_order(tmp_path):
    old = shape()
    del old["shape_type"]
    file = labelled(tmp_path, old)
    content = json.loads(file.read_text())
    del content["imageHeight"], content["imageWidth"], content["version"]
    content = {"imageData": "A" * 10_000, **content}  # The picture itself, before all else.
    file.write_text(json.dumps(content))
    (sample,) = read_dataset(tmp_path)
    assert sample.target.boxes.tolist() == [[10, 20, 40, 60]]


def test_difficult_as_anylabeling_marks_it(tmp_path):
    labelled(tmp_path, shape(difficult=True), shape(label="dog", difficult=False))
    assert read_dataset(tmp_path)[0].target.difficult.tolist() == [True, False]


def test_the_photo_of_the_same_name_wins_over_what_is_written(tmp_path):
    labelled(tmp_path, shape(), imagePath="..\\..\\elsewhere\\b.png")
    save(tmp_path / "b.png", scene(2).image)
    data = read_dataset(tmp_path)
    assert [s.path.name for s in data] == ["a.png"]
    assert data.notes == ("1 file left out: 1 without annotation, first b.png",)


def test_the_photo_that_is_written_where_none_has_the_name(tmp_path):
    labelled(tmp_path / "labels", shape(), imagePath="..\\pictures\\b.png")
    (tmp_path / "labels" / "a.png").unlink()
    save(tmp_path / "pictures" / "b.png", scene(2).image)
    assert read_dataset(tmp_path)[0].path == tmp_path / "pictures" / "b.png"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label": ""}, "a.json: shapes[0]: found a shape without a label, expected a class name"),
        ({"label": 3}, "a.json: shapes[0]: found 3 as 'label', expected text"),
        ({"points": [[1, 2]]}, "a.json: shapes[0]: found 1 points in 'points', expected at least 2"),
        ({"points": [[1, "x"], [3, 4]]}, "a.json: shapes[0]: found [1, 'x'] in 'points', expected x, y"),
        (
            {"points": [[1, float("nan")], [3, 4]]},
            "a.json: shapes[0]: found nan as 'points', expected a finite",
        ),
        ({"points": None}, "a.json: shapes[0]: found None as 'points', expected a list"),
        ({"points": [[200, 1], [300, 9]]}, "lies outside the image of 128 x 96"),
        ({"points": [[5, 5], [5, 9]]}, "of 'cat' is inverted or empty"),
    ],
    ids=str,
)
def test_bad_shapes(change, says, tmp_path):
    labelled(tmp_path, {**shape(), **change})
    assert says in only_error(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"shapes": [}', "a.json:1: found no JSON"),
        ('{"shapes": {}, "imagePath": "a.png"}', "a.json: found {} as 'shapes', expected a list"),
        (
            '{"shapes": [3], "imagePath": "a.png"}',
            "a.json: shapes[0]: found 3, expected an object with 'label'",
        ),
        ('{"imagePath": "a.png"}', "a.json: found nothing as 'shapes', expected a list"),
    ],
)
def test_bad_files(text, says, tmp_path):
    labelled(tmp_path).write_text(text)
    assert says in only_error(tmp_path)


def test_another_size_than_annotated(tmp_path):
    labelled(tmp_path, shape(), imageHeight=100, imageWidth=300)
    assert "a.json: annotated as 300 x 100, the photo" in only_error(tmp_path)
