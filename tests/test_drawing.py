import warnings

import numpy as np
import pytest
from PIL import Image

from sppnet.boxes import Detections, Target
from sppnet.drawing import class_colour, contact_sheet, draw_detections, draw_region, plot_precision_recall
from sppnet.evaluation.detection import ClassResult

NAMES = ["cat", "dog", "bird"]


def detections(*rows):
    """Make detections of ``(x1, y1, x2, y2, score, label)``."""
    return Detections(
        np.array([r[:4] for r in rows], np.float32).reshape(-1, 4),
        np.array([r[4] for r in rows], np.float32),
        tuple(r[5] for r in rows),
    )


def grey(height=120, width=160):
    return np.full((height, width, 3), 128, np.uint8)


def test_colours_are_distinct_and_do_not_depend_on_order():
    colours = [class_colour(name, NAMES) for name in NAMES]
    assert len(set(colours)) == 3
    assert colours == [class_colour(name, NAMES[::-1] + NAMES) for name in NAMES]
    assert all(0 <= value <= 255 for colour in colours for value in colour)
    many = [f"class {i}" for i in range(80)]
    assert len({class_colour(name, many) for name in many}) == 80


def test_a_box_is_drawn_in_the_colour_of_its_class_inside_its_pixels():
    image = grey()
    picture = draw_detections(image, detections((30, 60, 80, 100, 0.5, "dog")), NAMES)
    assert picture.shape == image.shape
    assert picture.dtype == np.uint8
    assert (image == 128).all(), "the image itself stays"
    colour = class_colour("dog", NAMES)
    for y, x in [(60, 30), (60, 79), (99, 30), (99, 79), (80, 30), (99, 50)]:
        assert tuple(picture[y, x]) == colour
    changed = (picture != image).any(axis=2)
    assert not changed[65:95, 35:75].any(), "the middle stays"
    assert not changed[100:].any(), "the box ends at its last pixel"
    assert not changed[61:, :30].any()
    assert not changed[61:, 80:].any()
    assert changed[45:59, 31:60].any(), "the label stands above"


def test_the_best_detection_is_on_top():
    both = detections((20, 40, 90, 100, 2.0, "cat"), (20, 40, 90, 100, 1.0, "dog"))
    assert tuple(draw_detections(grey(), both, NAMES)[99, 50]) == class_colour("cat", NAMES)


def test_ground_truth_is_drawn_white():
    target = Target.of([[30, 60, 80, 100]], ["cat"])
    picture = draw_detections(grey(), detections(), NAMES, target)
    assert (picture[60, 30:80] == 255).all()
    assert (picture[60:100, 79] == 255).all()
    assert (picture != 128).any(axis=2).sum() == 2 * 50 + 2 * 38


def test_no_detections_leave_the_picture_as_it_is():
    np.testing.assert_array_equal(draw_detections(grey(), detections(), NAMES), grey())


@pytest.mark.parametrize("height_width", [(1, 1), (1, 300), (300, 1), (7, 5), (2000, 1500)])
def test_pictures_of_any_size(height_width):
    height, width = height_width
    found = detections((0, 0, width, height, 1.25, "a very long name"), (0, 0, 0.5, 0.5, -3, "b"))
    target = Target.of([[0, 0, width, height]], ["b"])
    picture = draw_detections(grey(height, width), found, ["a very long name", "b"], target)
    assert picture.shape == (height, width, 3)
    assert (picture != 128).any()


def test_boxes_at_and_over_the_border():
    found = detections(
        (-50, -50, 10, 10, 1, "cat"), (150, 110, 400, 300, 1, "dog"), (500, 500, 600, 600, 0, "bird")
    )
    assert draw_detections(grey(), found, NAMES).shape == (120, 160, 3)


def test_contact_sheet_shrinks_pictures_into_a_grid():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
    pictures = [np.full((100 + 50 * i, 300, 3), colour, np.uint8) for i, colour in enumerate(colours)]
    sheet = contact_sheet(pictures, [f"picture {i}" for i in range(5)], columns=2, side=100)
    assert sheet.dtype == np.uint8
    assert sheet.shape == (3 * 118, 2 * 100, 3)
    for i, colour in enumerate(colours):
        row, column = divmod(i, 2)
        tile = sheet[row * 118 : row * 118 + 100, column * 100 : column * 100 + 100]
        assert tuple(tile[50, 50]) == colour
        assert tuple(tile[50, 0]) == (24, 24, 24)
        line = sheet[row * 118 + 100 : row * 118 + 118, column * 100 : column * 100 + 100]
        assert (line > 150).any(), "the title"
    assert (sheet[2 * 118 :, 100:] == 24).all(), "the last place is empty"


def test_contact_sheet_of_one_pixel_and_of_nothing():
    sheet = contact_sheet([np.zeros((1, 1, 3), np.uint8)], ["dot"], columns=1, side=50)
    assert sheet.shape == (68, 50, 3)
    assert contact_sheet([], [], columns=3, side=50).shape == (0, 150, 3)
    with pytest.raises(ValueError, match="argument"):
        contact_sheet([grey()], [])


def result(ap, points):
    recall, precision = np.array(points, float).reshape(-1, 2).T
    return ClassResult(ap, ap, precision, recall, np.zeros(len(recall), np.float32), 0 if np.isnan(ap) else 3)


@pytest.mark.parametrize(
    "results",
    [
        {"cat": result(0.5, [(0.3, 1), (0.6, 0.5)]), "dog": result(0.9, [(1, 0.9)])},
        {"cat": result(0.0, []), "bird": result(np.nan, [(np.nan, 0)])},
        {"bird": result(np.nan, [])},
        {},
    ],
)
def test_curves_are_written_without_a_warning(tmp_path, results):
    path = tmp_path / "curves.png"
    path.write_text("an older file")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_precision_recall(results, path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
        assert np.asarray(picture.convert("RGB")).std() > 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_region_is_drawn_on_a_copy():
    image = np.full((60, 80, 3), 100, np.uint8)
    found = draw_region(image, np.array([10, 20, 50, 40], np.float32))
    assert (image == 100).all()
    assert (found[20, 10:50] != 100).all()
    assert (found[:18] == 100).all()
    assert (found[28:32, 20:40] == 100).all()
