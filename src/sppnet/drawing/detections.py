"""Boxes on images: what was found, what is annotated, and regions."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from sppnet.arrays import Boxes, Pixels
from sppnet.boxes import Detections, Target, area, intersection, score_texts
from sppnet.drawing.colours import BLACK, WHITE, Colour, class_colour, text_colour
from sppnet.drawing.fonts import LINE, draw_text, joined, legible, shortened, text_width
from sppnet.drawing.labels import Placed, place_labels

_ANNOTATED = "annotated"
# Of the geometric mean of an image's sides, or its shorter side: what stays legible when it is seen whole.
_LINE_SHARE, _FONT_SHARE, _LARGEST_FONT = 0.004, 0.022, 0.06
_LEAST_FONT = 11
# A line of two pixels would hide what is on pictures of a shorter side.
_SMALL = 64
# The most of a picture that a legend, and of its width that a label, may cover.
_LEGEND, _LABEL = 0.12, 0.6
# From so many boxes on their labels may cover no more than this share of a picture.
_MANY, _LABELS = 12, 0.15
# Height of their letters then, of that of a few.
_SMALLER = 0.6


class _Label(NamedTuple):
    """What is written at a box: a name, a score or nothing, and their ground."""

    name: str
    score: str
    ground: Colour

    def forms(self, size: int, most: float) -> list[str]:
        """Return the texts that it may have, the fullest first: a long name loses its end, or all of it."""
        score = self.score and f" {self.score}"
        name = shortened(legible(self.name), size, most - text_width(score, size))
        return [*filter(None, [joined(name, score) if name else "", self.score])]


def draw_detections(
    image: Pixels,
    detections: Detections,
    names: Sequence[str],
    target: Target | None = None,
    *,
    percent: bool = True,
    labels: bool = True,
) -> Pixels:
    """Draw boxes, class names and scores on a copy of an image.

    Lines and text are as large as the image asks for. A label covers no other one; where many boxes leave no
    room for all, those of the lowest scores keep the score alone, or nothing, and a legend names the colours.

    Parameters
    ----------
    image : (H, W, 3) uint8 RGB
        Left as it is.
    detections : Detections
        Drawn each in the colour of its class, the best on top.
    names : sequence of str
        Names of all classes, so that a class has one colour on every picture.
    target : Target, optional
        What is annotated, drawn in white dashes, with its name on white.
    percent : bool
        Whether scores between 0 and 1 are probabilities, written in per cent: "cow 93 %". Other scores, those
        of SVMs, are written as they are: "cow 0.42".
    labels : bool
        Whether names and scores are written.

    Returns
    -------
    (H, W, 3) uint8 RGB
    """
    picture = Image.fromarray(image)
    pen, line = ImageDraw.Draw(picture), line_width(picture.size)
    colours = {name: class_colour(name, names) for name in dict.fromkeys(detections.labels)}
    _draw_boxes(pen, detections.boxes, detections.labels, colours, line)
    there = Target.of([], []) if target is None else target
    for box in there.boxes:
        _draw_dashed(pen, box, min(line, max(2, line // 2)))
    if labels:
        scores = score_texts(detections.scores, percent)
        written = [
            _Label(name, score, colours[name]) for name, score in zip(detections.labels, scores, strict=True)
        ]
        written += [_Label(name, "", WHITE) for name in _annotated_names(there)]
        keys = {name: (colours[name], n) for name, n in Counter(detections.labels).items()}
        keys |= {_ANNOTATED: (WHITE, len(there.labels))} if there.labels else {}
        _draw_labels(pen, picture.size, np.concatenate([detections.boxes, there.boxes]), written, keys)
    return np.asarray(picture)


def draw_target(image: Pixels, target: Target, names: Sequence[str]) -> Pixels:
    """Draw what is annotated on a copy of an image, each object in the colour of its class.

    Parameters
    ----------
    image : (H, W, 3) uint8 RGB
        Left as it is.
    target : Target
        The objects; what is difficult or a crowd says so beside its name.
    names : sequence of str
        Names of all classes, so that a class has one colour on every picture.

    Returns
    -------
    (H, W, 3) uint8 RGB
    """
    picture = Image.fromarray(image)
    pen = ImageDraw.Draw(picture)
    colours = {name: class_colour(name, names) for name in dict.fromkeys(target.labels)}
    _draw_boxes(pen, target.boxes, target.labels, colours, line_width(picture.size))
    texts = zip(target.labels, _annotated_names(target), strict=True)
    labels = [_Label(text, "", colours[name]) for name, text in texts]
    keys = {name: (colours[name], n) for name, n in Counter(target.labels).items()}
    _draw_labels(pen, picture.size, target.boxes, labels, keys)
    return np.asarray(picture)


def line_width(size: tuple[int, int]) -> int:
    """Return the width in pixels of the lines on a picture of that width and height."""
    least = 2 if min(size) >= _SMALL else 1
    return max(least, round(_LINE_SHARE * math.sqrt(size[0] * size[1])))


def font_size(size: tuple[int, int]) -> int:
    """Return the height in pixels of the letters on a picture of that width and height."""
    wanted = min(_FONT_SHARE * math.sqrt(size[0] * size[1]), _LARGEST_FONT * min(size))
    return max(_LEAST_FONT, round(wanted))


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


def _annotated_names(target: Target) -> list[str]:
    """Return what is written at annotated boxes."""
    flags = zip(target.labels, target.difficult, target.crowd, strict=True)
    return [f"{n} (crowd)" if crowd else f"{n} (difficult)" if hard else n for n, hard, crowd in flags]


def _draw_boxes(
    pen: ImageDraw.ImageDraw, boxes: Boxes, labels: Sequence[str], colours: Mapping[str, Colour], line: int
) -> None:
    """Draw boxes, the first on top, each with a hair line inside that is seen where its colour is not."""
    for box, label in reversed(list(zip(boxes, labels, strict=True))):
        corners, colour = _corners(box), colours[label]
        if line > 1 and min(corners[2] - corners[0], corners[3] - corners[1]) > 4 * line + 2:
            pen.rectangle(corners, outline=text_colour(colour), width=line + max(1, line // 3))
        pen.rectangle(corners, outline=colour, width=line)


def _draw_dashed(pen: ImageDraw.ImageDraw, box: Boxes, line: int) -> None:
    """Draw a box in white dashes on black."""
    x1, y1, x2, y2 = corners = [round(edge) for edge in _corners(box)]
    pen.rectangle(corners, outline=BLACK, width=line)
    dash = 4 * line + 2
    for start in range(x1, x2 + 1, 2 * dash):
        end = min(start + dash - 1, x2)
        pen.rectangle((start, y1, end, min(y1 + line - 1, y2)), fill=WHITE)
        pen.rectangle((start, max(y2 - line + 1, y1), end, y2), fill=WHITE)
    for start in range(y1, y2 + 1, 2 * dash):
        end = min(start + dash - 1, y2)
        pen.rectangle((x1, start, min(x1 + line - 1, x2), end), fill=WHITE)
        pen.rectangle((max(x2 - line + 1, x1), start, x2, end), fill=WHITE)


def _draw_labels(
    pen: ImageDraw.ImageDraw,
    picture: tuple[int, int],
    boxes: Boxes,
    labels: Sequence[_Label],
    keys: Mapping[str, tuple[Colour, int]],
) -> None:
    """Draw labels where there is room, and a legend of the classes of which some have none."""
    size, texts = _texts(labels, picture)
    sizes = [[_label_size(text, size) for text in forms] for forms in texts]
    legend = np.zeros((0, 4))
    found = place_labels(boxes, sizes, picture, legend)
    lacking = {
        label.ground
        for label, forms, place in zip(labels, texts, found, strict=True)
        if place is None or forms[place.form] == label.score
    }
    if lacking:
        named = {name: key for name, key in keys.items() if key[0] in lacking}
        rows = _legend_rows(named, size, picture)
        legend = _legend_place(rows, size, picture, boxes)
        if len(legend):
            _draw_legend(pen, legend[0], rows, size)
            found = place_labels(boxes, sizes, picture, legend)
    for forms, label, place in zip(texts, labels, found, strict=True):
        if place is not None:
            _draw_label(pen, place, forms[place.form], label.ground, size)


def _texts(labels: Sequence[_Label], picture: tuple[int, int]) -> tuple[int, list[list[str]]]:
    """Return the height of the letters, and the forms that each label may have.

    Names of very many labels would hide the picture. So letters become smaller, then names are left out, and
    at last the labels of the last boxes.
    """
    room = _LABELS * picture[0] * picture[1] if len(labels) > _MANY else math.inf
    size = font_size(picture)
    for height in (size, max(_LEAST_FONT, round(_SMALLER * size))):
        most = max(_LABEL * picture[0], 8 * height)
        texts = [label.forms(height, most) for label in labels]
        if sum(map(math.prod, (_label_size(forms[0], height) for forms in texts if forms))) <= room:
            return height, texts
    shortest = [forms[-1:] for forms in texts]
    spent = np.cumsum([math.prod(_label_size(forms[0], height)) if forms else 0 for forms in shortest])
    return height, [forms if area <= room else [] for forms, area in zip(shortest, spent, strict=True)]


def _draw_label(pen: ImageDraw.ImageDraw, place: Placed, text: str, ground: Colour, size: int) -> None:
    x1, y1, x2, y2 = (round(edge) for edge in place.box)
    pen.rectangle((x1, y1, x2 - 1, y2 - 1), fill=ground)
    draw_text(pen, (x1 + _padding(size), y1), text, size, text_colour(ground))


def _label_size(text: str, size: int) -> tuple[float, float]:
    return math.ceil(text_width(text, size)) + 2 * _padding(size), round(LINE * size)


def _padding(size: int) -> int:
    return max(1, round(0.25 * size))


def _legend_rows(
    keys: Mapping[str, tuple[Colour, int]], size: int, picture: tuple[int, int]
) -> list[tuple[str, Colour | None]]:
    """Return the lines of a legend, no more than fit: text and colour."""
    width, height = picture
    widest = min(0.4 * width, max(text_width(legible(name), size) for name in keys)) + 6 * size
    most = int(min(_LEGEND * width / widest, 0.8) * height / (LINE * size))
    rows: list[tuple[str, Colour | None]] = [
        (joined(shortened(legible(name), size, 0.4 * width), f"  {count}"), colour)
        for name, (colour, count) in keys.items()
    ]
    if len(rows) > most:
        rows = [*rows[: max(most - 1, 0)], (f"and {len(rows) - max(most - 1, 0)} more", None)]
    return rows


def _legend_place(
    rows: Sequence[tuple[str, Colour | None]], size: int, picture: tuple[int, int], boxes: Boxes
) -> npt.NDArray[np.float64]:
    """Return the corner where a legend hides least, (1, 4); (0, 4) if the picture is too small for one."""
    width, height = picture
    w = max(text_width(text, size) for text, _ in rows) + 3 * size
    h = (len(rows) * LINE + 0.6) * size
    if w * h > 2 * _LEGEND * width * height or w > width or h > height:
        return np.zeros((0, 4))
    corners = np.array([(x, y, x + w, y + h) for y in (0, height - h) for x in (width - w, 0)])
    places = boxes.astype(np.float64)
    hidden = (intersection(corners, places) / np.maximum(area(places), 1)).sum(axis=1)
    return corners[[int(hidden.argmin())]]


def _draw_legend(
    pen: ImageDraw.ImageDraw,
    place: npt.NDArray[np.float64],
    rows: Sequence[tuple[str, Colour | None]],
    size: int,
) -> None:
    x, y = (int(edge) for edge in place[:2])
    pen.rectangle((x, y, round(place[2]), round(place[3])), fill=(30, 30, 30), outline=(120, 120, 120))
    for i, (text, colour) in enumerate(rows):
        top = y + round((0.3 + i * LINE) * size)
        if colour is not None:
            swatch = (x + size // 2, top + size // 4, x + size // 2 + size, top + size)
            pen.rectangle(swatch, fill=colour)
        draw_text(pen, (x + 2 * size, top), text, size, WHITE)


def _corners(box: Boxes) -> tuple[float, float, float, float]:
    """Return the inclusive corners that Pillow draws for a half-open box."""
    return (
        float(box[0]),
        float(box[1]),
        max(float(box[0]), float(box[2]) - 1),
        max(float(box[1]), float(box[3]) - 1),
    )
