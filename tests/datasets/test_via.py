import json

import numpy as np
import pytest

from sppnet.datasets import read_dataset
from trees import only_error, save, scene, write

RECT = {"name": "rect", "x": 10, "y": 20, "width": 30, "height": 40}


def region(shape=RECT, **attributes):
    return {"shape_attributes": shape, "region_attributes": attributes}


def project(root, *regions, **content):
    save(root / "a.png", scene(1).image)
    image = {"filename": "a.png", "size": 5, "regions": list(regions), "file_attributes": {}}
    about = {"_via_settings": {}, "_via_img_metadata": {"a.png5": image}, "_via_attributes": {}}
    return write(root / "via.json", json.dumps({**about, **content}))


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        (RECT, (10, 20, 40, 60)),
        ({"name": "circle", "cx": 50, "cy": 40, "r": 10}, (40, 30, 60, 50)),
        ({"name": "ellipse", "cx": 50, "cy": 40, "rx": 10, "ry": 20}, (40, 20, 60, 60)),
        ({"name": "ellipse", "cx": 50, "cy": 40, "rx": 10, "ry": 20, "theta": np.pi / 2}, (30, 30, 70, 50)),
        ({"name": "polygon", "all_points_x": [10, 40, 20], "all_points_y": [20, 30.5, 60]}, (10, 20, 40, 60)),
    ],
)
def test_shapes_as_boxes(shape, box, tmp_path):
    project(tmp_path, region(shape, label="cat"))
    (sample,) = read_dataset(tmp_path)
    np.testing.assert_allclose(sample.target.boxes, [box], atol=1e-5)
    assert sample.target.labels == ("cat",)


def test_shapes_without_a_box_are_counted(tmp_path):
    line = {"name": "polyline", "all_points_x": [1, 2], "all_points_y": [1, 2]}
    project(
        tmp_path, region(k="cat"), region({"name": "point", "cx": 1, "cy": 2}, k="cat"), region(line, k="cat")
    )
    data = read_dataset(tmp_path)
    assert len(data[0].target.labels) == 1
    assert data.notes == ("shapes of the kind point, left out: 1", "shapes of the kind polyline, left out: 1")


@pytest.mark.parametrize(
    ("attributes", "labels"),
    [
        ([{"animal": "cat"}, {"animal": "dog", "note": "small"}], ("cat", "dog")),
        ([{"animal": "cat", "note": ""}, {"animal": "dog", "note": "small"}], ("cat", "dog")),
        ([{"animal": {"cat": True, "dog": False}}, {"animal": {"dog": True}}], ("cat", "dog")),
        ([{"quality": "good", "class": "cat"}, {"quality": "poor", "class": "dog"}], ("cat", "dog")),
        ([{"Name": "cat", "id": "1"}, {"Name": "dog", "id": "2"}], ("cat", "dog")),
        ([{}, {}], ("box", "box")),
    ],
)
def test_the_attribute_that_all_have_is_the_class(attributes, labels, tmp_path):
    project(tmp_path, *(region({**RECT, "x": 10 + i}, **a) for i, a in enumerate(attributes)))
    assert read_dataset(tmp_path)[0].target.labels == labels


def test_exports_of_regions_alone_and_of_the_first_version(tmp_path):
    file = project(tmp_path, region(k="cat"))
    images = json.loads(file.read_text())["_via_img_metadata"]
    file.write_text(json.dumps(images))
    assert read_dataset(tmp_path)[0].target.labels == ("cat",)
    (image,) = images.values()
    first = {**image, "fileref": "", "base64_img_data": "", "regions": {"0": region(k="dog")}}
    file.write_text(json.dumps({"a.png5": first}))
    assert read_dataset(tmp_path)[0].target.labels == ("dog",)


def test_the_csv_of_the_first_version(tmp_path):
    save(tmp_path / "a.png", scene(1).image)
    shape = json.dumps(RECT).replace('"', '""')
    columns = (
        "#filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"
    )
    write(tmp_path / "via.csv", f'{columns}\na.png,5,"{{}}",1,0,"{shape}","{{""k"":""cat""}}"\n')
    assert read_dataset(tmp_path)[0].target.boxes.tolist() == [[10, 20, 40, 60]]


@pytest.mark.parametrize(
    ("regions", "says"),
    [
        (
            [region(a="x", b="y"), region(a="x", b="z")],
            "via.json: found the attributes 'a' (2), 'b' (2) of 2 regions, expected one in all of them",
        ),
        ([region(a="x"), region(b="y")], "found the attributes 'a' (1), 'b' (1) of 2 regions"),
        (
            [region(label="x"), region()],
            "a.png, region 1: found 0 values of the attribute 'label', expected one",
        ),
        (
            [region(label={"x": True, "y": True})],
            "region 0: found 2 values of the attribute 'label', expected one",
        ),
        ([region({**RECT, "width": "w"}, k="x")], "region 0: found 'w' as 'width', expected a number"),
        ([region({"x": 1}, k="x")], "region 0: found nothing as 'name', expected text"),
        (
            [region({"name": "polygon", "all_points_x": [1], "all_points_y": []}, k="x")],
            "region 0: found 1 and 0 coordinates of a polygon, expected as many x as y",
        ),
        ([{"shape_attributes": RECT}], "region 0: found nothing as 'region_attributes', expected an object"),
        ([3], "region 0: found 3, expected an object with 'shape_attributes'"),
        ([region({**RECT, "x": 500}, k="x")], "lies outside the image of 128 x 96"),
    ],
)
def test_bad_regions(regions, says, tmp_path):
    project(tmp_path, *regions)
    assert says in only_error(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"_via_img_metadata": []}, "via.json: found no photos, expected an object with one for each"),
        (
            {"_via_img_metadata": {"a": {"regions": []}}},
            "image 0: found nothing as 'filename', expected text",
        ),
        (
            {"_via_img_metadata": {"a": {"filename": "a", "regions": 3}}},
            "image 0: found 3 as 'regions', expected a list or an object",
        ),
        ({"_via_img_metadata": {"a": 3}}, "via.json: image 0: found 3, expected an object with 'filename'"),
    ],
)
def test_bad_files(content, says, tmp_path):
    project(tmp_path, **content)
    assert says in only_error(tmp_path)


@pytest.mark.parametrize("cell", ["{", "3", '""'])
def test_bad_cells(cell, tmp_path):
    columns = (
        "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"
    )
    quoted = cell.replace('"', '""')
    write(tmp_path / "via.csv", f'{columns}\na.png,5,"{{}}",1,0,"{quoted}","{{}}"\n')
    assert "via.csv:2: found" in only_error(tmp_path)
    assert "in region_shape_attributes, expected a JSON object" in only_error(tmp_path)
