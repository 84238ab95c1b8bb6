import numpy as np
import pytest

from sppnet.datasets import dataset_splits, read_dataset
from trees import only_error, save, scene, write

BOX = '<box label="cat" xtl="10" ytl="20" xbr="40" ybr="60"/>'


def annotated(root, *lines, image='<image id="0" name="a.png" width="128" height="96">'):
    """Write a photo and what CVAT says of it, each of `lines` on a line of its own, from the fifth."""
    save(root / "a.png", scene(1).image)
    head = ['<?xml version="1.0"?>', "<annotations>", "<version>1.1</version>", image]
    return write(root / "annotations.xml", "\n".join([*head, *lines, "</image>", "</annotations>"]))


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        (BOX, (10, 20, 40, 60)),
        ('<box label="cat" xtl="10" ytl="20" xbr="40" ybr="60" rotation="90"/>', (5, 25, 45, 55)),
        ('<box label="cat" xtl="10" ytl="20" xbr="40" ybr="60" rotation="180.0"/>', (10, 20, 40, 60)),
        ('<polygon label="cat" points="10,20;40.5,30;20,60"/>', (10, 20, 40.5, 60)),
        ('<ellipse label="cat" cx="50" cy="40" rx="10" ry="20"/>', (40, 20, 60, 60)),
        ('<mask label="cat" rle="1, 2" left="10" top="20" width="30" height="40"/>', (10, 20, 40, 60)),
    ],
)
def test_shapes_as_boxes(shape, box, tmp_path):
    annotated(tmp_path, shape)
    (sample,) = read_dataset(tmp_path)
    np.testing.assert_allclose(sample.target.boxes, [box], atol=1e-4)
    assert sample.target.labels == ("cat",)


def test_shapes_without_a_box_are_counted(tmp_path):
    skeleton = '<skeleton label="cat">\n<points label="1" points="1,2"/>\n</skeleton>'
    annotated(
        tmp_path,
        BOX,
        '<points label="cat" points="1,2"/>',
        '<polyline label="cat" points="1,2;3,4"/>',
        skeleton,
    )
    data = read_dataset(tmp_path)
    assert len(data[0].target.labels) == 1
    assert data.notes == (
        "shapes of the kind points, left out: 1",
        "shapes of the kind polyline, left out: 1",
        "shapes of the kind skeleton, left out: 1",
    )


def test_subsets_are_splits(tmp_path):
    save(tmp_path / "b.png", scene(2).image)
    second = f'</image>\n<image id="1" name="b.png" subset="val" width="128" height="96">\n{BOX}'
    annotated(
        tmp_path, BOX, second, image='<image id="0" name="a.png" subset="train" width="128" height="96">'
    )
    assert dataset_splits(tmp_path) == ("train", "val")
    assert [s.path.name for s in read_dataset(tmp_path, "val")] == ["b.png"]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            ['<box label="cat" xtl="10" ytl="20" xbr="40"/>'],
            "annotations.xml:5: found no ybr, expected a number",
        ),
        ([BOX, BOX.replace("10", "x")], "annotations.xml:6: found 'x' as xtl, expected a number"),
        ([BOX.replace("10", "inf")], "annotations.xml:5: found inf as 'xtl', expected a finite number"),
        (
            [BOX.replace("cat", " ")],
            "annotations.xml:5: found a <box> without a label, expected a class name",
        ),
        (
            [BOX.replace("40", "5")],
            "annotations.xml:5: box (10.0, 20.0, 5.0, 60.0) of 'cat' is inverted or empty",
        ),
        (
            ['<polygon label="cat" points="1,2;3"/>'],
            "annotations.xml:5: found the points '1,2;3', expected x,y;",
        ),
        (['<polygon label="cat"/>'], "annotations.xml:5: found the points '', expected x,y;"),
        (["<box"], "annotations.xml:6: found malformed XML"),
    ],
)
def test_bad_shapes(lines, says, tmp_path):
    annotated(tmp_path, *lines)
    assert says in only_error(tmp_path)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (
            '<image id="0" width="128" height="96">',
            "annotations.xml:4: found an image without a name, expected one",
        ),
        (
            '<image id="0" name="a.png" width="x" height="96">',
            "annotations.xml:4: found 'x' as width, expected",
        ),
        ('<image id="0" name="a.png" width="300" height="96">', "annotations.xml:4: annotated as 300 x 96"),
        (
            '<track id="0"/><image name="a.png" width="128" height="96">',
            "annotations.xml:4: found a <track> of a video",
        ),
    ],
)
def test_bad_images(image, says, tmp_path):
    annotated(tmp_path, BOX, image=image)
    assert says in only_error(tmp_path)
