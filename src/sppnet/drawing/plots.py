"""Plots: curves of trainings and detections, confusion, reliability; as PNG files, or as SVG for reports."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sppnet.drawing.colours import PALETTE, class_colour
from sppnet.drawing.fonts import legible, plot_families
from sppnet.evaluation.calibration import Reliability
from sppnet.evaluation.classification import ClassificationReport
from sppnet.evaluation.detection import ClassResult
from sppnet.storage import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sppnet.classification.checkpoint import EpochRecord

# A confusion matrix of more classes shows no names, and no numbers, that could be read.
_NAMED, _COUNTED = 60, 25
# A plot of more curves, or more panels, could not be read; the classes of most objects are taken.
CURVES, PANELS = 16, 12
# Letters of a name in a legend or at an axis, and entries of one column of a legend.
_LETTERS, _COLUMN = 28, 16
# Points of a curve in a report: more are not seen.
_POINTS = 400
_STYLES = ("-", "--", "-.", ":")
RATES = {"precision": (PALETTE[4], "--"), "recall": (PALETTE[0], "-."), "F1": (PALETTE[2], "-")}
"""Colour and dashes of what depends on the threshold."""

# Stands for the colour of the text around a plot, light on dark pages and dark on light ones.
_INK = "#010203"


def draw_classification_report(
    report: ClassificationReport, folder: Path, titles: Sequence[str] | None = None
) -> None:
    """Draw what is taken for what into ``confusion.png``.

    Parameters
    ----------
    report : ClassificationReport
    folder : Path
        An existing folder; a file of the name above is replaced.
    titles : sequence of K str, optional
        What to call the classes, by default their names.
    """
    plot_confusion(report.confusion, report.classes if titles is None else titles, folder / "confusion.png")


def plot_curves(records: Sequence[EpochRecord], path: Path) -> None:
    """Draw loss and errors over the epochs of a training into a picture file.

    Parameters
    ----------
    records : sequence of EpochRecord
        In the order of the epochs; errors in validation are drawn where there are some.
    path : Path
        PNG file to write.
    """
    blue, red = (_share(PALETTE[i]) for i in (4, 3))
    with _figure(8, 4.5) as (figure, axes):
        epochs = [record.epoch + 1 for record in records]
        loss = axes.plot(epochs, [r.loss for r in records], color="0.6", label="loss in training")
        errors = axes.twinx()
        lines = errors.plot(epochs, [100 * r.error for r in records], color=blue, label="error in training")
        held = [(r.epoch + 1, 100 * r.validation_error) for r in records if r.validation_error is not None]
        if held:
            lines += errors.plot(*zip(*held, strict=True), color=red, label="error in validation")
        axes.set(xlabel="epoch", ylabel="loss", ylim=(0, None), title="Training")
        errors.set(ylabel="error in percent", ylim=(0, 100))
        axes.legend(handles=loss + lines, loc="upper right")
        _print_figure(figure, path)


def plot_confusion(matrix: npt.NDArray[np.int64], names: Sequence[str], path: Path) -> None:
    """Draw how often each class (rows) is taken for each (columns), in percent of the row.

    Parameters
    ----------
    matrix : (K, K) int64
        Numbers of images; rows without any are drawn as 0 percent.
    names : sequence of K str
        Names of the classes, shown of up to 60; the percentages are written of up to 25.
    path : Path
        PNG file to write.
    """
    counts = matrix.sum(axis=1, keepdims=True)
    shares = 100 * matrix / np.maximum(counts, 1)
    titles = [_short(name) for name in names] if len(names) <= _NAMED else []
    # Inches: a cell for each class, and room for the longest name beside and below them.
    side = min(12.0, 3.0 + 0.35 * len(names)) + 0.07 * max(map(len, titles), default=0)
    with _figure(side + 1, side, titles) as (figure, axes):
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        figure.colorbar(image, label="percent of the class", shrink=0.8)
        axes.set(xlabel="taken for", ylabel="class")
        if titles:
            axes.set_xticks(range(len(titles)), titles, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(len(titles)), titles)
        if len(names) <= _COUNTED:
            for (row, column), share in np.ndenumerate(shares):
                colour = "white" if share > 50 else "black"
                axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour)
        _print_figure(figure, path)


def precision_recall_svg(results: Mapping[str, ClassResult]) -> str:
    """Draw one precision-recall curve per class, best average precision first.

    Parameters
    ----------
    results : mapping of str to ClassResult
        Classes without objects are left out; of more than `CURVES` those of most objects are drawn.

    Returns
    -------
    str
        SVG.
    """
    drawn = sorted(_of_most_objects(results, CURVES), key=lambda n: -results[n].average_precision)
    labels = [f"{_short(name)}  {100 * results[name].average_precision:.1f}" for name in drawn]
    columns = max(1, math.ceil(len(drawn) / _COLUMN))
    outside = len(drawn) > 6 or max(map(len, labels), default=0) > 20
    with _figure(6.4 + 2.4 * columns * outside, 4.6, labels) as (figure, axes):
        lines = []
        for name in drawn:
            result = results[name]
            keep = _sparse(len(result.recall))
            style = _STYLES[sorted(results).index(name) // len(PALETTE) % len(_STYLES)]
            colour = _share(class_colour(name, list(results)))
            lines += axes.plot(result.recall[keep], result.precision[keep], style, color=colour, lw=1.8)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        if drawn:
            _legend(figure if outside else axes, lines, labels, "average precision", outside, columns)
        return _svg(figure)


def threshold_svgs(results: Mapping[str, ClassResult], thresholds: Mapping[str, float]) -> list[str]:
    """Draw how precision, recall and F1 of each class depend on the threshold, and where it lies.

    Parameters
    ----------
    results : mapping of str to ClassResult
        Classes without objects are left out; of more than `PANELS` those of most objects are drawn.
    thresholds : mapping of str to float
        From which score on a detection of each class is shown.

    Returns
    -------
    list of str
        An SVG for each class, in the colours and dashes of `RATES`.
    """
    plots = []
    for name in _of_most_objects(results, PANELS):
        with _figure(3.2, 2.3, [name]) as (figure, axes):
            scores, *curves = results[name].curve()
            keep = _sparse(len(scores))
            for curve, (colour, style) in zip(curves, RATES.values(), strict=True):
                axes.plot(scores[keep], curve[keep], style, color=_share(colour), lw=1.6)
            if not math.isnan(thresholds[name]):
                axes.axvline(thresholds[name], color=_INK, lw=1, ls=":")
            axes.set(ylim=(0, 1.02))
            axes.set_title(_short(name), fontsize=10)
            axes.grid(alpha=0.3)
            plots.append(_svg(figure))
    return plots


def reliability_svg(found: Reliability) -> str:
    """Draw how often detections are right against how probable they are said to be.

    Parameters
    ----------
    found : Reliability
        Of the probabilities of all detections.

    Returns
    -------
    str
        SVG: a point for each bin, the larger the more detections it holds.
    """
    with _figure(4.6, 4.2) as (figure, axes):
        axes.plot([0, 100], [0, 100], ":", color=_INK, lw=1)
        colour = _share(PALETTE[4])
        axes.plot(100 * found.mean, 100 * found.observed, "-", color=colour, lw=1.6)
        share = found.counts / max(1, found.counts.max(initial=1))
        axes.scatter(100 * found.mean, 100 * found.observed, 20 + 100 * share, color=[colour])
        axes.set(xlim=(-2, 102), ylim=(-2, 102), xlabel="score in per cent", ylabel="right in 100 of them")
        axes.grid(alpha=0.3)
        return _svg(figure)


def _of_most_objects(results: Mapping[str, ClassResult], count: int) -> list[str]:
    """Return the classes that have objects, in their order; if they are too many, those of most objects."""
    there = [name for name, result in results.items() if result.positives]
    most = set(sorted(there, key=lambda name: -results[name].positives)[:count])
    return [name for name in there if name in most]


def _sparse(count: int) -> npt.NDArray[np.int64]:
    """Return which points of a curve to draw: all, or some of equal distance with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, _POINTS)).astype(np.int64))


def _short(name: str) -> str:
    """Return a name that can be drawn, without the end of a long one."""
    text = legible(name)
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS - 1].rstrip()}…"


def _share(colour: tuple[int, int, int]) -> tuple[float, float, float]:
    """Return a colour as matplotlib has it."""
    red, green, blue = (value / 255 for value in colour)
    return red, green, blue


def _legend(
    owner: Any, lines: Sequence[Any], labels: Sequence[str], title: str, outside: bool, columns: int
) -> None:
    """Draw a legend inside the axes, or in columns outside of them; names may begin with an underscore."""
    place = {"loc": "outside right upper", "ncols": columns} if outside else {}
    owner.legend(lines, labels, title=title, frameon=False, **place)


@contextmanager
def _figure(width: float, height: float, texts: Iterable[str] = ()) -> Iterator[tuple[Figure, Axes]]:
    """Lend a figure whose texts are drawn as they are, in fonts that have their letters."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: Any = {
        **dict.fromkeys(inked, _INK),
        "font.family": plot_families(legible(text) for text in texts),
        "text.parse_math": False,  # Dollars in names are no formulas.
        "svg.fonttype": "none",
        "svg.hashsalt": "sppnet",
    }
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    """Return a figure as SVG for a page: text takes colour and font of the page."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def _print_figure(figure: Figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, dpi=120)
