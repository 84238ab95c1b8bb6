import base64
import json
import math
from urllib.parse import quote

import numpy as np
import pytest

from sppnet.datasets import read_dataset
from trees import only_error, save, scene, write

SIZE = {"original_width": 128, "original_height": 96}


def region(kind="rectanglelabels", labels=("cat",), number="r1", **value):
    """Return a result: by default the box 32, 24, 64, 72."""
    value = value or {"x": 25, "y": 25, "width": 25, "height": 50, "rotation": 0}
    return {"id": number, "type": kind, **SIZE, "value": {**value, kind: list(labels)}}


def task(*results, image="/data/upload/1/a.png", **more):
    return {"id": 5, "data": {"image": image}, "annotations": [{"result": list(results)}], **more}


def project(root, *tasks, photo="a.png"):
    save(root / photo, scene(1).image)
    return write(root / "project.json", json.dumps(list(tasks)))


@pytest.mark.parametrize(
    ("kind", "value", "box"),
    [
        ("rectanglelabels", {"x": 25, "y": 25, "width": 25, "height": 50}, (32, 24, 64, 72)),
        ("polygonlabels", {"points": [[25, 25], [50, 50], [37.5, 75]]}, (32, 24, 64, 72)),
        ("ellipselabels", {"x": 50, "y": 50, "radiusX": 25, "radiusY": 25, "rotation": 0}, (32, 24, 96, 72)),
        ("ellipselabels", {"x": 50, "y": 50, "radiusX": 25, "radiusY": 25, "rotation": 90}, (40, 16, 88, 80)),
        # Turned clockwise about its upper left corner, which is 64, 24.
        ("rectanglelabels", {"x": 50, "y": 25, "width": 25, "height": 25, "rotation": 90}, (40, 24, 64, 56)),
    ],
)
def test_shapes_as_boxes(kind, value, box, tmp_path):
    project(tmp_path, task(region(kind, **value)))
    (sample,) = read_dataset(tmp_path)
    np.testing.assert_allclose(sample.target.boxes, [box], atol=1e-4)
    assert sample.target.labels == ("cat",)


def test_a_box_that_is_turned(tmp_path):
    project(tmp_path, task(region(x=50, y=25, width=25, height=25, rotation=30)))
    turn = math.radians(30)
    corners = [
        (64 + u * math.cos(turn) - v * math.sin(turn), 24 + u * math.sin(turn) + v * math.cos(turn))
        for u in (0, 32)
        for v in (0, 24)
    ]
    x, y = zip(*corners, strict=True)
    np.testing.assert_allclose(
        read_dataset(tmp_path)[0].target.boxes, [[min(x), min(y), max(x), max(y)]], atol=1e-4
    )


@pytest.mark.parametrize("number", [None, 1, [1], {"a": 1}])
def test_ids_of_any_kind(tmp_path, number):
    project(tmp_path, task(region(x=50, y=25, width=25, height=25) | {"id": number}))
    assert read_dataset(tmp_path)[0].target.boxes.tolist() == [[64, 24, 96, 48]]


def test_shapes_without_a_box_or_a_label_are_counted(tmp_path):
    brush = region("brushlabels", format="rle", rle=[1, 2])
    point = region("keypointlabels", number="r2", x=1, y=2, width=1)
    choice = {"id": "r3", "type": "choices", "value": {"choices": ["good"]}}
    bare = region("rectangle", (), "r4", x=1, y=1, width=2, height=2)
    del bare["value"]["rectangle"]
    project(tmp_path, task(region(number="r0"), brush, point, choice, bare))
    data = read_dataset(tmp_path)
    assert len(data[0].target.labels) == 1
    assert data.notes == (
        "shapes of the kind brush, left out: 1",
        "shapes of the kind point, left out: 1",
        "shapes of the kind choice or text, left out: 1",
        "shapes of the kind rectangle without a label, left out: 1",
    )


def test_rectangles_and_labels_apart(tmp_path):
    """``<Rectangle>`` with ``<Labels>`` gives two results of one id."""
    value = {"x": 25, "y": 25, "width": 25, "height": 50}
    shape = {"id": "r", "type": "rectangle", **SIZE, "value": value}
    labels = {"id": "r", "type": "labels", **SIZE, "value": {**value, "labels": ["cat"]}}
    project(tmp_path, task(shape, labels))
    assert read_dataset(tmp_path)[0].target.boxes.tolist() == [[32, 24, 64, 72]]


def test_the_last_annotation_that_was_not_cancelled_counts(tmp_path):
    annotations = [
        {"result": [region(labels=["first"])]},
        {"result": [region(labels=["second"])], "was_cancelled": False},
        {"result": [region(labels=["third"])], "was_cancelled": True},
    ]
    skipped = task(image="b.png", annotations=[{"result": [], "was_cancelled": True}])
    untouched = task(image="c.png", annotations=[], predictions=[{"result": [region()]}])
    project(tmp_path, task(annotations=annotations), skipped, untouched)
    for name in "bc":
        save(tmp_path / f"{name}.png", scene(2).image)
    data = read_dataset(tmp_path)
    assert [s.target.labels for s in data] == [("second",)]
    assert data.notes == (
        "tasks annotated several times, the last one taken: 1",
        "tasks that nobody has annotated, or skipped, left out: 2",
        "2 files left out: 2 without annotation, first b.png",
    )


def test_predictions_where_nothing_is_annotated(tmp_path):
    project(tmp_path, {"data": {"image": "a.png"}, "predictions": [{"result": [region()], "score": 0.5}]})
    data = read_dataset(tmp_path)
    assert data[0].target.labels == ("cat",)
    assert data.notes == ("tasks with predictions, taken as annotations: 1",)


def test_completions_of_before_version_1(tmp_path):
    old = task()
    old["completions"] = [{"result": [region()]}]
    del old["annotations"]
    project(tmp_path, old)
    assert read_dataset(tmp_path)[0].target.labels == ("cat",)


def test_json_min(tmp_path):
    label = [{"x": 25, "y": 25, "width": 25, "height": 50, "rotation": 0, "rectanglelabels": ["cat"], **SIZE}]
    project(tmp_path, {"image": "/data/upload/1/0a1b2c3d-a.png", "id": 1, "label": label, "annotator": 1})
    (sample,) = read_dataset(tmp_path)
    assert (sample.target.labels, sample.target.boxes.tolist()) == (("cat",), [[32, 24, 64, 72]])


@pytest.mark.parametrize(
    ("photo", "image"),
    [
        ("a.png", "/data/upload/12/0a1b2c3d-a.png"),
        ("0a1b2c3d-a.png", "/data/upload/12/0a1b2c3d-a.png"),
        ("IMG 1 (1).png", "/data/upload/12/0a1b2c3d-IMG_1_1.png"),
        ("日本 é.png", "/data/upload/12/0a1b2c3d-" + quote("日本_é.png")),
        ("sub/a b.png", "/data/local-files/?d=photos/sub/a%20b.png"),
        ("sub/a b.png", "/data/local-files/?d=photos%5Csub%5Ca%20b.png"),
        ("a b.png", "https://host:8080/bucket/a%20b.png?X-Signature=abc&x=.jpg"),
        ("a.png", "s3://bucket/deep/a.png"),
        ("a.png", "/tasks/3/resolve/?fileuri=" + base64.b64encode(b"gs://bucket/a.png").decode()),
        ("a #1?.png", "a #1?.png"),
        ("a.png", "C:\\photos\\a.png"),
    ],
)
def test_names_of_photos(photo, image, tmp_path):
    project(tmp_path, task(region(), image=image), photo=photo)
    assert read_dataset(tmp_path)[0].path == tmp_path / photo


def test_the_image_may_have_another_key(tmp_path):
    odd = task(region())
    odd["data"] = {"text": "a cat", "photo": "/data/upload/1/a.png", "n": 3}
    project(tmp_path, odd)
    assert read_dataset(tmp_path)[0].target.labels == ("cat",)


def test_without_original_sizes(tmp_path):
    bare = region()
    del bare["original_width"], bare["original_height"]
    project(tmp_path, task(bare))
    assert read_dataset(tmp_path)[0].target.boxes.tolist() == [[32, 24, 64, 72]]


def changed(**change):
    return {**region(), **change}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([3, task()], "project.json: task 0: found 3, expected an object"),
        ([{**task(), "data": 3}], "task 0 (id 5): found 3 as 'data', expected an object"),
        ([{**task(), "annotations": {}}], "task 0 (id 5): found {} as 'annotations', expected a list"),
        ([task(annotations=[{"result": 1}])], "task 0 (id 5): found 1 as 'result', expected a list"),
        ([task(7)], "task 0 (id 5): found 7 as result 0, expected an object"),
        ([task(changed(value=[1]))], "task 0 (id 5): result 0: found [1] as its value, expected an object"),
        ([task(region(x=1, y=2, width="w", height=3))], "result 0: found 'w' as 'width', expected a number"),
        ([task(region(points=[[1]]))], "result 0: found [1] in 'points', expected x, y"),
        ([task(changed(image_rotation=90))], "result 0: found it drawn on a turned image"),
        ([task(region(x=25, y=25, width=0, height=5))], "is inverted or empty"),
        ([task(region(x=125, y=25, width=9, height=5))], "lies outside the image of 128 x 96"),
        ([{**task(), "data": {"text": "x"}}], "found 0 images in its data, expected one"),
        ([{**task(), "data": {"one": "a.png", "two": "b.png"}}], "found 2 images in its data, expected one"),
        (
            [task(region(), {**region(number="r2"), "original_width": 500})],
            "found regions of images of several sizes, expected one",
        ),
        ([task({**region(), "original_width": 500})], "annotated as 500 x 96, the photo"),
    ],
)
def test_bad_content(content, says, tmp_path):
    project(tmp_path).write_text(json.dumps(content))
    assert says in only_error(tmp_path)


def test_bad_json(tmp_path):
    project(tmp_path).write_text('[{"data":\n {]')
    assert "project.json:2: found no JSON" in only_error(tmp_path)
