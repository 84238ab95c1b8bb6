import re
import warnings
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from sppnet.drawing import plots
from sppnet.drawing.colours import PALETTE, class_colour
from sppnet.drawing.plots import (
    draw_classification_report,
    plot_confusion,
    plot_curves,
    precision_recall_svg,
    reliability_svg,
    threshold_svgs,
)
from sppnet.evaluation.calibration import reliability
from sppnet.evaluation.classification import evaluate_classification
from sppnet.evaluation.detection import ClassResult

NAMES = ["cat", "dog", "bird"]
HARD = ["$5 or $10", "_other", "猫", "[bold]", "<b>&"]


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def result(ap, points):
    recall, precision = np.array(points, float).reshape(-1, 2).T
    return ClassResult(
        ap,
        ap,
        precision,
        recall,
        np.linspace(0.9, 0.1, len(recall)).astype(np.float32),
        0 if np.isnan(ap) else 3,
    )


@pytest.fixture
def figures(monkeypatch):
    """The figures that are printed, in order; they are printed all the same."""
    printed = []
    plain = plots._print_figure

    def spied(figure, path):
        printed.append(figure)
        plain(figure, path)

    monkeypatch.setattr(plots, "_print_figure", spied)
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
    np.testing.assert_allclose(blue, PALETTE[4], atol=12)
    np.testing.assert_allclose(red, PALETTE[3], atol=12)
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
    monkeypatch.setattr(plots, "_print_figure", lambda figure, path: figures.append(figure))
    names = [f"class {i}" for i in range(count)]
    plot_confusion(np.eye(count, dtype=np.int64), names, None)
    axes = figures[0].axes[0]
    assert len(axes.texts) == counted
    assert len([label for label in axes.get_xticklabels() if label.get_text().startswith("class")]) == named


def test_names_in_a_confusion_are_drawn_as_they_are(tmp_path, figures):
    pytest.importorskip("manimgx_fonts_cjk")
    plot_confusion(np.eye(5, dtype=np.int64), HARD, tmp_path / "confusion.png")
    labels = figures[0].axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == HARD
    assert not any(label.get_parse_math() for label in labels)


def test_long_names_leave_room_for_the_confusion(tmp_path, figures):
    names = [f"{i} a very long name of a class that goes on" for i in range(5)]
    plot_confusion(np.eye(5, dtype=np.int64), names, tmp_path / "confusion.png")
    axes = figures[0].axes[0]
    assert all(len(label.get_text()) <= 28 for label in axes.get_yticklabels())
    figures[0].set_dpi(120)
    assert axes.get_window_extent().width > 200


def test_report_of_classes_is_drawn(tmp_path, figures):
    report = evaluate_classification(np.eye(3)[[0, 1, 1]], np.array([0, 1, 2]), NAMES)
    draw_classification_report(report, tmp_path)
    draw_classification_report(report, tmp_path, ["a", "b", "c"])
    assert [path.name for path in tmp_path.iterdir()] == ["confusion.png"]
    for figure, names in zip(figures, (NAMES, ["a", "b", "c"]), strict=True):
        assert figure.axes[0].images[0].get_array().tolist() == [[100, 0, 0], [0, 100, 0], [0, 100, 0]]
        assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == names


# --- SVG for reports ----------------------------------------------------------------------------------------


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_curves_in_the_colours_of_their_classes_the_best_first():
    results = {
        "cat": result(0.5, [(0.3, 1), (0.6, 0.5)]),
        "dog": result(0.9, [(0.2, 0.9), (0.8, 0.9)]),
        "bird": result(np.nan, [(np.nan, 0)]),
    }
    svg = precision_recall_svg(results)
    found = texts(svg)
    assert found.index("dog  90.0") < found.index("cat  50.0")
    assert not any("bird" in text for text in found)
    assert {"recall", "precision"} <= set(found)
    for name in ("cat", "dog"):
        assert "#{:02x}{:02x}{:02x}".format(*class_colour(name, list(results))) in svg
    assert "currentColor" in svg
    assert plots._INK not in svg
    assert svg == precision_recall_svg(results)


@pytest.mark.parametrize("results", [{}, {"cat": result(0.0, [])}, {"bird": result(np.nan, [])}])
def test_curves_of_nothing(results):
    assert ElementTree.fromstring(precision_recall_svg(results)) is not None
    assert len(threshold_svgs(results, dict.fromkeys(results, np.nan))) == sum(
        r.positives > 0 for r in results.values()
    )


def test_names_in_curves_are_drawn_as_they_are():
    pytest.importorskip("manimgx_fonts_cjk")
    results = {name: result(0.5, [(0.3, 1), (0.6, 0.5)]) for name in HARD}
    assert {f"{name}  50.0" for name in HARD} <= set(texts(precision_recall_svg(results)))
    drawn = threshold_svgs(results, dict.fromkeys(HARD, 0.5))
    for name, svg in zip(HARD, drawn, strict=True):
        assert name in texts(svg)


def test_many_classes_have_a_legend_outside_that_wraps():
    def size(count):
        results = {f"class {i:02}": result(i / 100, [(0.3, 1), (0.6, 0.5)]) for i in range(count)}
        svg = precision_recall_svg(results)
        return len([t for t in texts(svg) if t.startswith("class")]), float(
            re.search(r'width="([\d.]+)pt', svg)[1]
        )

    assert size(6) == (6, pytest.approx(460.8))
    assert size(7) == (7, pytest.approx(460.8 + 172.8))
    assert size(80) == (16, pytest.approx(460.8 + 172.8))


def test_thresholds_are_marked():
    results = {"cat": result(0.5, [(0.3, 1), (0.6, 0.5)]), "dog": result(0.5, [(0.3, 1), (0.6, 0.5)])}
    marked, unmarked = threshold_svgs(results, {"cat": 0.5, "dog": np.nan})
    assert len(re.findall('<path d="M[^"]*" clip-path', marked)) == 1 + len(
        re.findall('<path d="M[^"]*" clip-path', unmarked)
    )
    for colour, _ in plots.RATES.values():
        assert "#{:02x}{:02x}{:02x}".format(*colour) in marked
    many = {f"class {i}": result(0.5, [(0.3, 1)]) for i in range(40)}
    assert len(threshold_svgs(many, dict.fromkeys(many, 0.5))) == plots.PANELS


def test_long_curves_are_thinned():
    recall = np.arange(1, 50_001) / 50_000
    curve = result(0.5, np.stack([recall, 1 - recall / 2], axis=1))
    assert len(precision_recall_svg({"cat": curve})) < 60_000
    assert plots._sparse(3).tolist() == [0, 1, 2]
    assert plots._sparse(0).tolist() == []
    assert plots._sparse(50_000)[[0, -1]].tolist() == [0, 49_999]


def test_reliability():
    rng = np.random.default_rng(0)
    p = rng.random(500)
    svg = reliability_svg(reliability(p, rng.random(500) < p))
    assert "score in per cent" in texts(svg)
    assert svg.count("<use") > 10
    assert "#{:02x}{:02x}{:02x}".format(*PALETTE[4]) in svg
