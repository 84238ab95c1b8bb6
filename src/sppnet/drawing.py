"""Pictures of results: detections on an image, contact sheets, curves, confusion, whole reports.

Pictures are (H, W, 3) uint8 RGB; what draws into a file replaces it whole or not at all.
"""

from __future__ import annotations

import colorsys
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from sppnet.arrays import Boxes, Pixels
from sppnet.boxes import Detections, Target
from sppnet.errors import SppnetError
from sppnet.evaluation.classification import ClassificationReport
from sppnet.evaluation.detection import ClassResult, DetectionReport, image_f1
from sppnet.images import pixels_of, read_image, resize, write_image
from sppnet.storage import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sppnet.classification.checkpoint import EpochRecord
    from sppnet.datasets.records import Sample
    from sppnet.retrieval.index import Hit

Colour = tuple[int, int, int]
# A confusion matrix of more classes shows no names, and no numbers, that could be read.
_NAMED, _COUNTED = 60, 25
# Longer side in pixels of the copies of hits that go on a sheet: many large images would fill the memory.
_TILE = 480


def class_colour(name: str, names: Sequence[str]) -> Colour:
    """Return the RGB colour of a class, one of `names`: their hues are spread evenly, in sorted order."""
    order = sorted(set(names))
    hue = order.index(name) / max(len(order), 1)
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_detections(
    image: Pixels, detections: Detections, names: Sequence[str], target: Target | None = None
) -> Pixels:
    """Draw boxes, class names and scores on a copy of an image.

    Parameters
    ----------
    image : (H, W, 3) uint8 RGB
        Left as it is.
    detections : Detections
        Drawn each in the colour of its class, the best on top.
    names : sequence of str
        Names of all classes, so that a class has one colour on every picture.
    target : Target, optional
        What is annotated, drawn as thin white boxes.

    Returns
    -------
    (H, W, 3) uint8 RGB
    """
    picture = Image.fromarray(image)
    pen = ImageDraw.Draw(picture)
    unit = max(1, round(min(picture.size) / 200))
    font = ImageFont.load_default(size=max(10, 6 * unit))
    if target is not None:
        for box in target.boxes:
            pen.rectangle(_corners(box), outline=(255, 255, 255), width=max(1, unit // 2))
    # The best are drawn last, on top.
    for box, score, label in reversed(
        list(zip(detections.boxes, detections.scores, detections.labels, strict=True))
    ):
        colour = class_colour(label, names)
        pen.rectangle(_corners(box), outline=colour, width=2 * unit)
        text = f" {label} {score:.2f} "
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        x = min(max(0, box[0]), max(0, picture.width - (right - left)))
        y = max(0, box[1] - (bottom - top) - 2 * unit)
        pen.rectangle((x, y, x + right - left, y + bottom - top + 2 * unit), fill=colour)
        pen.text((x - left, y - top + unit), text, fill=(0, 0, 0), font=font)
    return np.asarray(picture)


def picture_paths(folder: Path, images: Sequence[Path]) -> list[Path]:
    """Return a path in a folder for the picture of each image file; equal names get a number.

    Parameters
    ----------
    folder : Path
        Where the pictures are to lie.
    images : sequence of Path
        The image files, each once.

    Returns
    -------
    list of Path
        All different, in the order of the images.
    """
    counts = Counter(path.stem for path in images)
    taken, pictures = set(counts), []
    for path in images:
        name = path.stem
        if counts[name] > 1:
            name = next(n for i in itertools.count(1) if (n := f"{path.stem}-{i}") not in taken)
            taken.add(name)
        pictures.append(folder / f"{name}.png")
    return pictures


def draw_region(image: Pixels, box: Boxes) -> Pixels:
    """Draw one box on a copy of an image.

    Parameters
    ----------
    image : (H, W, 3) uint8 RGB
        Left as it is.
    box : (4,) float32
        x1, y1, x2, y2 in pixels, 0-based and half-open.

    Returns
    -------
    (H, W, 3) uint8 RGB
    """
    picture = Image.fromarray(image)
    pen, unit = ImageDraw.Draw(picture), max(2, round(min(picture.size) / 80))
    pen.rectangle(_corners(box), outline=(0, 0, 0), width=2 * unit)
    pen.rectangle(_corners(box), outline=(255, 210, 0), width=unit)
    return np.asarray(picture)


def _corners(box: Boxes) -> tuple[float, float, float, float]:
    """Return the inclusive corners that Pillow draws for a half-open box."""
    return (
        float(box[0]),
        float(box[1]),
        max(float(box[0]), float(box[2]) - 1),
        max(float(box[1]), float(box[3]) - 1),
    )


def contact_sheet(
    pictures: Sequence[Pixels], titles: Sequence[str], columns: int = 4, side: int = 320
) -> Pixels:
    """Lay pictures out in rows, each shrunk into a square above its title.

    Parameters
    ----------
    pictures : sequence of (H, W, 3) uint8 RGB
        Of any sizes; those that are smaller than the square stay as they are.
    titles : sequence of str
        One for each picture.
    columns : int
        Pictures in a row.
    side : int
        Side of the square in pixels.

    Returns
    -------
    (rows * (side + 18), columns * side, 3) uint8 RGB
    """
    line = 18
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + line)), (24, 24, 24))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for i, (pixels, title) in enumerate(zip(pictures, titles, strict=True)):
        tile = Image.fromarray(pixels)
        tile.thumbnail((side - 4, side - 4))
        x, y = i % columns * side, i // columns * (side + line)
        sheet.paste(tile, (x + (side - tile.width) // 2, y + (side - tile.height) // 2))
        pen.text((x + 6, y + side), title, fill=(230, 230, 230), font=font)
    return np.asarray(sheet)


def draw_hits(query: Pixels, box: Boxes, hits: Sequence[Hit], folder: Path) -> tuple[Pixels, tuple[str, ...]]:
    """Draw what was searched with and what was found, each with its region, on a contact sheet.

    Parameters
    ----------
    query : (H, W, 3) uint8 RGB
        The image that was searched with.
    box : (4,) float32
        The region of it.
    hits : sequence of Hit
        What `sppnet.retrieval.index.Index.search` found.
    folder : Path
        Where the images of the index lie.

    Returns
    -------
    (H, W, 3) uint8 RGB and tuple of str
        The sheet, and a line for each image that could not be read; it is left out.
    """
    pictures, titles, failures = [_tile(query, box)], ["query"], []
    for rank, hit in enumerate(hits, 1):
        try:
            pictures.append(_tile(read_image(folder / hit.image), hit.box))
        except (SppnetError, OSError) as error:
            failures.append(str(error))
        else:
            titles.append(f"{rank}  {hit.score:.3f}  {hit.image}")
    return contact_sheet(pictures, titles), tuple(failures)


def _tile(image: Pixels, box: Boxes) -> Pixels:
    """Draw a region on a small copy of an image."""
    height, width = image.shape[:2]
    scale = min(1.0, _TILE / max(height, width))
    small = resize(image, max(1, round(scale * height)), max(1, round(scale * width)))
    return draw_region(small, box * scale)


def draw_detection_report(
    report: DetectionReport,
    data: Sequence[Sample],
    folder: Path,
    *,
    threshold: float = -0.5,
    count: int = 12,
) -> None:
    """Draw the curves of a report, and the images on which the detections are best and worst.

    Written are ``precision-recall.png``, and the contact sheets ``best.png`` and ``worst.png``. Images are
    judged by `sppnet.evaluation.detection.image_f1` of the detections that are drawn on them; of equals the
    one with the higher best score is the better.

    Parameters
    ----------
    report : DetectionReport
        How good the detections in these images are.
    data : sequence of Sample
        The annotated images, as many as the report has.
    folder : Path
        An existing folder; files of the names above are replaced.
    threshold : float
        Least score of the detections to draw; the default is a little below 0, where an SVM is undecided.
    count : int
        Most images on a sheet.
    """
    classes, found = list(report.classes), report.detections
    plot_precision_recall(report.classes, folder / "precision-recall.png")
    shown = [detections.above(threshold) for detections in found]
    quality = [image_f1(d, sample.target, classes) for d, sample in zip(shown, data, strict=True)]
    order = sorted(range(len(data)), key=lambda i: (-quality[i], -float(found[i].scores[:1].sum())))
    for name, chosen in (("best", order[:count]), ("worst", order[::-1][:count])):
        pictures = [
            draw_detections(pixels_of(data[i].image), shown[i], classes, data[i].target) for i in chosen
        ]
        titles = [f"{data[i].name}  F1 {quality[i]:.2f}" for i in chosen]
        write_image(folder / f"{name}.png", contact_sheet(pictures, titles))


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


def plot_precision_recall(results: Mapping[str, ClassResult], path: Path) -> None:
    """Draw one precision-recall curve per class into a picture file, best average precision first.

    Parameters
    ----------
    results : mapping of str to ClassResult
        Classes without objects are left out.
    path : Path
        PNG file to write.
    """
    figure, axes = _axes(7, 5.5)
    drawn = {name: r for name, r in results.items() if r.positives}
    for name, result in sorted(drawn.items(), key=lambda item: -item[1].average_precision):
        colour = np.array(class_colour(name, list(results))) / 255
        label = f"{name}  {100 * result.average_precision:.1f}"
        axes.plot(result.recall, result.precision, color=tuple(colour * 0.85), label=label)
    axes.set(
        xlabel="recall",
        ylabel="precision",
        xlim=(0, 1),
        ylim=(0, 1.02),
        title="Precision and recall, IoU 0.5",
    )
    axes.grid(alpha=0.3)
    if drawn:
        axes.legend(title="average precision")
    _print_figure(figure, path)


def plot_curves(records: Sequence[EpochRecord], path: Path) -> None:
    """Draw loss and errors over the epochs of a training into a picture file.

    Parameters
    ----------
    records : sequence of EpochRecord
        In the order of the epochs; errors in validation are drawn where there are some.
    path : Path
        PNG file to write.
    """
    figure, axes = _axes(8, 4.5)
    epochs = [record.epoch + 1 for record in records]
    loss = axes.plot(epochs, [r.loss for r in records], color="0.6", label="loss in training")
    errors = axes.twinx()
    lines = errors.plot(epochs, [100 * r.error for r in records], color="tab:blue", label="error in training")
    held = [(r.epoch + 1, 100 * r.validation_error) for r in records if r.validation_error is not None]
    if held:
        lines += errors.plot(*zip(*held, strict=True), color="tab:red", label="error in validation")
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
    side = min(12.0, 3.5 + 0.35 * len(names))
    figure, axes = _axes(side + 1, side)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="percent of the class")
    axes.set(xlabel="taken for", ylabel="class")
    if len(names) <= _NAMED:
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
    if len(names) <= _COUNTED:
        for (row, column), share in np.ndenumerate(shares):
            colour = "white" if share > 50 else "black"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour)
    _print_figure(figure, path)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _print_figure(figure: Figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, dpi=120)
