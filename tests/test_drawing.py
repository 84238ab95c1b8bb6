import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sppnet import drawing
from sppnet.boxes import Detections, Target
from sppnet.datasets.records import Sample
from sppnet.drawing import (
    class_colour,
    contact_sheet,
    draw_classification_report,
    draw_detection_report,
    draw_detections,
    draw_hits,
    draw_region,
    plot_confusion,
    plot_curves,
    plot_precision_recall,
)
from sppnet.evaluation.classification import evaluate_classification
from sppnet.evaluation.detection import ClassResult, evaluate_detections
from sppnet.images import read_image, resize
from sppnet.retrieval.index import Hit

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
    # Two pixels wide in an image this small.
    for y, x in [(60, 30), (60, 79), (99, 30), (99, 79), (80, 30), (99, 50), (61, 60), (80, 31), (98, 50)]:
        assert tuple(picture[y, x]) == colour
    changed = (picture != image).any(axis=2)
    assert not changed[62:98, 32:78].any(), "the middle stays"
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
    names = ["a very long name", "b"]
    picture = draw_detections(grey(height, width), found, names, target)
    assert picture.shape == (height, width, 3)
    # Without detections the annotated box is the border, and nothing else changes.
    plain = draw_detections(grey(height, width), detections(), names, target)
    unit = max(1, max(1, round(min(height, width) / 200)) // 2)
    for border in (plain[:unit], plain[-unit:], plain[:, :unit], plain[:, -unit:]):
        assert (border == 255).all()
    assert (plain[unit:-unit, unit:-unit] == 128).all()
    assert (picture != plain).any(), "the detections are drawn over it"
    if min(height, width) > 100:  # smaller ones are covered by the label
        assert tuple(picture[-1, -1]) == class_colour("a very long name", names)


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
    assert rows.max() <= 60
    assert columns.max() == 159


def test_the_label_names_class_and_score():
    first = draw_detections(grey(), detections((30, 60, 80, 100, 0.5, "dog")), NAMES)
    same = draw_detections(grey(), detections((30, 60, 80, 100, 0.501, "dog")), NAMES)
    np.testing.assert_array_equal(first, same)  # two digits
    for score, name in ((0.75, "dog"), (0.5, "cat")):
        other = draw_detections(grey(), detections((30, 60, 80, 100, score, name)), NAMES)
        changed = (other[:60] != first[:60]).any(axis=2)
        assert changed.any()
        if name == "dog":
            assert (other[60:] == first[60:]).all(), "the score changes the label alone"


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
        titles = [f"picture {n}" if n != i else "another" for n in range(5)]
        differs = (contact_sheet(pictures, titles, columns=2, side=100) != sheet).any(axis=2)
        rows, columns = np.nonzero(differs)
        assert row * 118 + 100 <= rows.min(), "the title stands below its picture"
        assert rows.max() < (row + 1) * 118
        assert column * 100 <= columns.min() <= columns.max() < (column + 1) * 100
        assert (line > 150).any(), "the title is light"
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


@pytest.fixture
def figures(monkeypatch):
    """The figures that are printed, in order; they are printed all the same."""
    printed = []
    plain = drawing._print_figure

    def spied(figure, path):
        printed.append(figure)
        plain(figure, path)

    monkeypatch.setattr(drawing, "_print_figure", spied)
    return printed


def pixel(figure, path, x, y, axes=0):
    """Return the colour of the picture of a figure at a point of its data, the darkest of 3 x 3 pixels."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    figure.set_dpi(120)
    column, row = figure.axes[axes].transData.transform((x, y))
    row = len(pixels) - 1 - round(row)
    around = pixels[row - 1 : row + 2, round(column) - 1 : round(column) + 2].reshape(-1, 3).astype(float)
    return around[around.sum(axis=1).argmin()]


def points(line):
    return np.stack(line.get_data(), axis=1).tolist()


@pytest.mark.parametrize(
    ("results", "drawn"),
    [
        (
            {"cat": result(0.5, [(0.3, 1), (0.6, 0.5)]), "dog": result(0.9, [(0.2, 0.9), (0.8, 0.9)])},
            {"dog  90.0": [[0.2, 0.9], [0.8, 0.9]], "cat  50.0": [[0.3, 1], [0.6, 0.5]]},
        ),
        ({"cat": result(0.0, []), "bird": result(np.nan, [(np.nan, 0)])}, {"cat  0.0": []}),
        ({"bird": result(np.nan, [])}, {}),
        ({}, {}),
    ],
)
def test_curves_are_written_without_a_warning(tmp_path, figures, results, drawn):
    path = tmp_path / "curves.png"
    path.write_text("an older file")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_precision_recall(results, path)
    (axes,) = figures[0].axes
    assert {line.get_label(): points(line) for line in axes.lines} == drawn
    assert [line.get_label() for line in axes.lines] == list(drawn), "the best comes first"
    legend = [] if axes.get_legend() is None else [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == list(drawn)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("recall", "precision")
    assert axes.get_xlim() == (0, 1)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.size == (840, 660)
    assert list(tmp_path.iterdir()) == [path]


def test_a_curve_has_the_colour_of_its_class_where_its_data_are(tmp_path, figures):
    results = {"cat": result(0.5, [(0.1, 0.5), (0.7, 0.5)]), "dog": result(0.2, [(0.1, 0.25), (0.7, 0.25)])}
    plot_precision_recall(results, tmp_path / "curves.png")
    for name, height in (("cat", 0.5), ("dog", 0.25)):
        colour = 0.85 * np.array(class_colour(name, list(results)))
        found = pixel(figures[0], tmp_path / "curves.png", 0.33, height)
        # Lines are 2.5 pixels thick: one pixel at least has the colour as it is.
        np.testing.assert_allclose(found, colour, atol=2)
        beside = pixel(figures[0], tmp_path / "curves.png", 0.33, height + 0.07)
        np.testing.assert_allclose(beside, 255)


def epoch(number, loss, error, validation_error=None):
    return SimpleNamespace(epoch=number, loss=loss, error=error, validation_error=validation_error)


def test_curves_of_a_training(tmp_path, figures):
    records = [epoch(0, 2.0, 0.8), epoch(1, 1.0, 0.5, 0.75), epoch(2, 0.5, 0.25, 0.5)]
    plot_curves(records, tmp_path / "training.png")
    losses, errors = figures[0].axes
    assert points(losses.lines[0]) == [[1, 2], [2, 1], [3, 0.5]]
    assert {line.get_label(): points(line) for line in errors.lines} == {
        "error in training": [[1, 80], [2, 50], [3, 25]],
        "error in validation": [[2, 75], [3, 50]],
    }
    assert losses.get_ylim()[0] == 0
    assert errors.get_ylim() == (0, 100)
    legend = [text.get_text() for text in losses.get_legend().get_texts()]
    assert legend == ["loss in training", "error in training", "error in validation"]
    blue, red = (pixel(figures[0], tmp_path / "training.png", 2.5, y, axes=1) for y in (37.5, 62.5))
    np.testing.assert_allclose(blue, (31, 119, 180), atol=12)
    np.testing.assert_allclose(red, (214, 39, 40), atol=12)
    # Without a validation there is no curve of it.
    plot_curves(records[:1], tmp_path / "training.png")
    assert [line.get_label() for line in figures[1].axes[1].lines] == ["error in training"]


def test_confusion_in_percent_of_the_class(tmp_path, figures):
    matrix = np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    plot_confusion(matrix, NAMES, tmp_path / "confusion.png")
    axes = figures[0].axes[0]
    expected = [[75, 25, 0], [0, 100, 0], [0, 0, 0]]
    assert axes.images[0].get_array().tolist() == expected
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (column, row): str(expected[row][column]) for row in range(3) for column in range(3)
    }
    assert [label.get_text() for label in axes.get_xticklabels()] == NAMES
    assert [label.get_text() for label in axes.get_yticklabels()] == NAMES
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("taken for", "class")
    # Beside the numbers: rows are classes, the more the darker.
    dark, middle, none = (
        pixel(figures[0], tmp_path / "confusion.png", x + 0.4, y + 0.4).mean()
        for x, y in ((1, 1), (0, 0), (2, 2))
    )
    assert dark < middle < none
    np.testing.assert_allclose(
        pixel(figures[0], tmp_path / "confusion.png", 0.4, 1.4),
        pixel(figures[0], tmp_path / "confusion.png", 2.4, 2.4),
    )


@pytest.mark.parametrize(("count", "named", "counted"), [(25, 25, 625), (26, 26, 0), (60, 60, 0), (61, 0, 0)])
def test_confusion_of_many_classes_says_only_what_can_be_read(monkeypatch, count, named, counted):
    figures = []
    monkeypatch.setattr(drawing, "_print_figure", lambda figure, path: figures.append(figure))
    names = [f"class {i}" for i in range(count)]
    plot_confusion(np.eye(count, dtype=np.int64), names, None)
    axes = figures[0].axes[0]
    assert len(axes.texts) == counted
    assert len([label for label in axes.get_xticklabels() if label.get_text().startswith("class")]) == named


def test_report_of_detections_is_drawn(tmp_path, figures):
    # Shown are a hit, a miss, and a duplicate that scores too little to be shown; and in the last image two
    # misses: F1 of 1, 0, 1 and 0. Of equals the one with the higher score is the better.
    boxes = [[30, 60, 80, 100]]
    samples = [Sample(f"image {i}", grey() + i, Target.of(boxes, ["cat"])) for i in range(4)]
    hit, miss = (30, 60, 80, 100), (90, 10, 120, 40)
    found = [
        detections((*hit, 0.5, "cat")),
        detections((*miss, 0.25, "cat")),
        detections((*hit, 0.75, "cat"), (*hit, -0.75, "cat")),
        detections((*miss, 0.2, "dog"), (*miss, 0.1, "cat")),
    ]
    report = evaluate_detections(found, [sample.target for sample in samples], ["cat", "dog"])
    draw_detection_report(report, samples, tmp_path, count=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.png",
        "precision-recall.png",
        "worst.png",
    ]
    assert [line.get_label() for line in figures[0].axes[0].lines] == [
        f"cat  {100 * report.classes['cat'].average_precision:.1f}"
    ]

    def sheet(order, threshold=-0.5):
        pictures = [
            draw_detections(samples[i].image, found[i].above(threshold), ["cat", "dog"], samples[i].target)
            for i in order
        ]
        return contact_sheet(pictures, [f"image {i}  F1 {(1, 0, 1, 0)[i]:.2f}" for i in order])

    np.testing.assert_array_equal(read_image(tmp_path / "best.png"), sheet([2, 0, 1]))
    np.testing.assert_array_equal(read_image(tmp_path / "worst.png"), sheet([3, 1, 0]))
    draw_detection_report(report, samples, tmp_path, threshold=0.6, count=1)
    np.testing.assert_array_equal(read_image(tmp_path / "best.png"), sheet([2], 0.6))


def test_report_of_classes_is_drawn(tmp_path, figures):
    report = evaluate_classification(np.eye(3)[[0, 1, 1]], np.array([0, 1, 2]), NAMES)
    draw_classification_report(report, tmp_path)
    draw_classification_report(report, tmp_path, ["a", "b", "c"])
    assert [path.name for path in tmp_path.iterdir()] == ["confusion.png"]
    for figure, names in zip(figures, (NAMES, ["a", "b", "c"]), strict=True):
        assert figure.axes[0].images[0].get_array().tolist() == [[100, 0, 0], [0, 100, 0], [0, 100, 0]]
        assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == names


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


def test_hits_lie_on_a_sheet_behind_the_query_each_with_its_region(tmp_path):
    Image.fromarray(grey(960, 1280)).save(tmp_path / "large.png")
    box = np.array([40, 30, 120, 100], np.float32)
    hits = [Hit("large.png", 8 * box, 0.9), Hit("none.png", box, 0.8)]
    sheet, failures = draw_hits(grey(), box, hits, tmp_path)
    assert len(failures) == 1
    assert "none.png" in failures[0]
    large = resize(grey(960, 1280), 360, 480)
    expected = contact_sheet(
        [draw_region(grey(), box), draw_region(large, 3 * box)], ["query", "1  0.900  large.png"]
    )
    assert np.array_equal(sheet, expected)
