import numpy as np
import pytest

from sppnet.boxes import Detections, Target
from sppnet.drawing.colours import BLACK, WHITE, class_colour
from sppnet.drawing.detections import (
    draw_detections,
    draw_region,
    draw_target,
    font_size,
    line_width,
    picture_paths,
    score_texts,
)

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


def has(picture, colour):
    """Return which pixels have a colour."""
    return (picture == colour).all(axis=2)


def test_a_box_is_drawn_in_the_colour_of_its_class_inside_its_pixels():
    image = grey()
    picture = draw_detections(image, detections((30, 60, 80, 100, 0.5, "dog")), NAMES)
    assert picture.shape == image.shape
    assert picture.dtype == np.uint8
    assert (image == 128).all(), "the image itself stays"
    colour = class_colour("dog", NAMES)
    # Two pixels wide in an image this small.
    for y, x in [(60, 30), (60, 79), (99, 30), (99, 79), (80, 30), (99, 50), (61, 60), (80, 31), (98, 50)]:
        assert tuple(picture[y, x]) == colour
    changed = (picture != image).any(axis=2)
    # A hair line inside it is seen where the colour is not.
    assert tuple(picture[80, 32]) == tuple(picture[62, 50]) == BLACK
    assert not changed[63:97, 33:77].any(), "the middle stays"
    assert not changed[100:].any(), "the box ends at its last pixel"
    assert not changed[61:, :30].any()
    assert not changed[61:, 80:].any()
    assert changed[46:60, 31:60].any(), "the label stands above"


def test_the_best_detection_is_on_top():
    both = detections((20, 40, 90, 100, 0.9, "cat"), (20, 40, 90, 100, 0.5, "dog"))
    assert tuple(draw_detections(grey(), both, NAMES)[99, 50]) == class_colour("cat", NAMES)


def test_ground_truth_is_dashed_and_named():
    target = Target.of([[30, 60, 80, 100]], ["cat"])
    bare = draw_detections(grey(), detections(), NAMES, target, labels=False)
    border = bare[60, 30:80]
    white = (border == 255).all(axis=1)
    assert white.any()
    assert ((border == 0).all(axis=1) == ~white).all(), "white on black"
    assert 3 <= (np.diff(white.astype(int)) != 0).sum() <= 12, "dashes"
    changed = (bare != 128).any(axis=2)
    assert changed[60:100, 30:80].sum() == changed.sum() == 50 * 40 - 46 * 36
    named = draw_detections(grey(), detections(), NAMES, target)
    label = (named != bare).any(axis=2)
    assert label.any()
    assert label[:60].sum() > 0.9 * label.sum(), "the name stands above"
    assert has(named, WHITE)[40:60].sum() > 100, "on white"
    difficult = Target.of([[30, 60, 80, 100]], ["cat"], [True])
    assert (draw_detections(grey(), detections(), NAMES, difficult) != named).any()


def test_annotated_objects_alone_have_the_colours_of_their_classes():
    target = Target.of([[30, 60, 80, 100], [100, 60, 150, 100]], ["cat", "dog"])
    picture = draw_target(grey(), target, NAMES)
    assert tuple(picture[80, 30]) == class_colour("cat", NAMES)
    assert tuple(picture[80, 100]) == class_colour("dog", NAMES)
    np.testing.assert_array_equal(draw_target(grey(), Target.of([], []), NAMES), grey())


def test_no_detections_leave_the_picture_as_it_is():
    np.testing.assert_array_equal(draw_detections(grey(), detections(), NAMES), grey())
    np.testing.assert_array_equal(draw_detections(grey(), detections(), NAMES, Target.of([], [])), grey())


@pytest.mark.parametrize("height_width", [(1, 1), (1, 300), (300, 1), (7, 5), (2000, 1500), (40, 4000)])
def test_pictures_of_any_size(height_width):
    height, width = height_width
    found = detections((0, 0, width, height, 1.25, "a very long name"), (0, 0, 0.5, 0.5, -3, "b"))
    target = Target.of([[0, 0, width, height], [0.4, 0.3, 0.4, 0.3]], ["b", "b"])
    names = ["a very long name", "b"]
    picture = draw_detections(grey(height, width), found, names, target)
    assert picture.shape == (height, width, 3)
    plain = draw_detections(grey(height, width), found, names, labels=False)
    line = line_width((width, height))
    for border in (plain[-line:], plain[:, -line:]):
        if min(height, width) > 5:
            assert has(border[line:, line:], class_colour("a very long name", names)).all()
    assert (picture != grey(height, width)).any()


def test_lines_and_text_grow_with_the_picture():
    sizes = [(32, 24), (160, 120), (500, 375), (1920, 1080), (8000, 6000)]
    lines, letters = ([measure(size) for size in sizes] for measure in (line_width, font_size))
    assert lines == [1, 2, 2, 6, 28]
    assert letters == [11, 11, 11, 32, 152]
    assert font_size((8000, 400)) == 24, "letters are no more than a part of the height"


def test_boxes_at_and_over_the_border():
    found = detections((-50, -50, 10, 30, 1, "cat"), (150, 110, 400, 300, 1, "dog"))
    picture = draw_detections(grey(), found, NAMES)
    assert picture.shape == (120, 160, 3)
    assert tuple(picture[29, 0]) == tuple(picture[25, 9]) == class_colour("cat", NAMES)
    assert tuple(picture[110, 159]) == tuple(picture[119, 150]) == class_colour("dog", NAMES)
    # The label is pushed inside: it ends at the right border, above the box.
    assert tuple(picture[108, 159]) == class_colour("dog", NAMES)
    # What lies outside altogether shows its label at the border nearest to it, and no box.
    outside = draw_detections(grey(), detections((500, 60, 600, 70, 0, "bird")), NAMES)
    rows, columns = np.nonzero((outside != 128).any(axis=2))
    assert rows.min() >= 40
    assert rows.max() <= 85
    assert columns.max() == 159


def test_the_label_names_class_and_score():
    first = draw_detections(grey(), detections((30, 60, 80, 100, 0.5, "dog")), NAMES)
    same = draw_detections(grey(), detections((30, 60, 80, 100, 0.501, "dog")), NAMES)
    np.testing.assert_array_equal(first, same)  # no decimals
    for score, name in ((0.75, "dog"), (0.5, "cat")):
        other = draw_detections(grey(), detections((30, 60, 80, 100, score, name)), NAMES)
        changed = (other[:60] != first[:60]).any(axis=2)
        assert changed.any()
        if name == "dog":
            assert (other[60:] == first[60:]).all(), "the score changes the label alone"
    number = draw_detections(grey(), detections((30, 60, 80, 100, 0.5, "dog")), NAMES, percent=False)
    assert (number != first).any()


def test_scores():
    assert score_texts([0.934, 0.5, 0, 1]) == ["93 %", "50 %", "0 %", "100 %"]
    assert score_texts([0.934, 0.5], percent=False) == ["0.93", "0.50"]
    assert score_texts([0.934, -0.42]) == ["0.93", "-0.42"], "scores of SVMs"
    assert score_texts([]) == []


def test_labels_do_not_hide_each_other():
    # Three boxes that overlap: each label has an area of its own colour that is as large as of a box alone.
    rows = [(40 + 8 * i, 100 + 6 * i, 200, 180, 0.9 - i / 10, name) for i, name in enumerate(NAMES)]
    picture = draw_detections(grey(240, 320), detections(*rows), NAMES)
    for row in rows:
        colour = class_colour(row[5], NAMES)
        alone = draw_detections(grey(240, 320), detections(row), NAMES)
        bare = draw_detections(grey(240, 320), detections(row), NAMES, labels=False)
        label = has(alone, colour).sum() - has(bare, colour).sum()
        lines = draw_detections(grey(240, 320), detections(*rows), NAMES, labels=False)
        assert has(picture, colour).sum() - has(lines, colour).sum() > 0.8 * label


@pytest.mark.parametrize(("size", "legend"), [((375, 500), True), ((1800, 2400), False)])
def test_a_hundred_boxes_stay_seen_and_a_legend_names_the_colours(size, legend):
    rng, scale = np.random.default_rng(0), size[0] / 375
    rows = []
    for i in range(100):
        x, y, w, h = scale * rng.uniform([0, 0, 20, 20], [450, 320, 70, 70])
        rows.append((x, y, x + w, y + h, 0.99 - i / 110, NAMES[i % 3]))
    picture = draw_detections(grey(*size), detections(*rows), NAMES)
    bare = draw_detections(grey(*size), detections(*rows), NAMES, labels=False)
    assert (picture != bare).any(axis=2).mean() < 0.25, "most of the picture stays seen"
    assert has(picture, (30, 30, 30)).any() == legend, "where names are left out"
    np.testing.assert_array_equal(picture, draw_detections(grey(*size), detections(*rows), NAMES))


def test_names_in_any_script_and_of_any_length():
    for name in ("$5 or $10", "_other", "кошка", "x" * 500, "", " ", "a\nb"):
        picture = draw_detections(grey(), detections((30, 60, 80, 100, 0.5, name)), [name])
        assert has(picture[:60], class_colour(name, [name])).sum() > 100, name


def test_a_region_is_drawn_on_a_copy():
    image = np.full((60, 80, 3), 100, np.uint8)
    found = draw_region(image, np.array([10, 20, 50, 40], np.float32))
    assert (image == 100).all()
    for y, x in ((20, 10), (20, 49), (39, 10), (39, 49), (21, 30)):
        assert tuple(found[y, x]) == (255, 210, 0)
    for y, x in ((22, 30), (23, 30), (30, 12), (30, 46)):
        assert tuple(found[y, x]) == (0, 0, 0), "a dark line inside the bright one"
    assert (found[:18] == 100).all()
    assert (found[28:32, 20:40] == 100).all()


def test_paths_of_pictures(tmp_path):
    from pathlib import Path

    images = [Path("a/x.jpg"), Path("b/x.png"), Path("y.jpg"), Path("x-1.jpg")]
    names = [path.name for path in picture_paths(tmp_path, images)]
    assert names == ["x-2.png", "x-3.png", "y.png", "x-1.png"]
