"""Contact sheets: many pictures on one, each with its title."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from sppnet.arrays import Boxes, Pixels
from sppnet.boxes import Target
from sppnet.drawing.detections import draw_region, draw_target
from sppnet.drawing.fonts import LINE, draw_text, legible, shortened
from sppnet.errors import SppnetError
from sppnet.images import pixels_of, read_image, resize

if TYPE_CHECKING:
    from sppnet.datasets.records import Dataset, Sample
    from sppnet.retrieval.index import Hit

# Longer side in pixels of the copies of hits that go on a sheet: many large images would fill the memory.
_TILE = 480
# Height in pixels of the letters of a title, and of its line.
_TITLE, _LINE = 14, 22


def contact_sheet(
    pictures: Sequence[Pixels], titles: Sequence[str], columns: int = 4, side: int = 320
) -> Pixels:
    """Lay pictures out in rows, each shrunk into a square above its title.

    Parameters
    ----------
    pictures : sequence of (H, W, 3) uint8 RGB
        Of any sizes; those that are smaller than the square stay as they are.
    titles : sequence of str
        One for each picture; the end of a long one is left out.
    columns : int
        Pictures in a row.
    side : int
        Side of the square in pixels.

    Returns
    -------
    (rows * (side + 22), columns * side, 3) uint8 RGB
    """
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + _LINE)), (24, 24, 24))
    pen = ImageDraw.Draw(sheet)
    for i, (pixels, title) in enumerate(zip(pictures, titles, strict=True)):
        tile = Image.fromarray(pixels)
        tile.thumbnail((side - 4, side - 4))
        x, y = i % columns * side, i // columns * (side + _LINE)
        sheet.paste(tile, (x + (side - tile.width) // 2, y + (side - tile.height) // 2))
        text = shortened(legible(title), _TITLE, side - 12)
        draw_text(pen, (x + 6, y + side), text, _TITLE, (230, 230, 230))
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


def draw_dataset(data: Dataset, count: int = 24) -> Pixels:
    """Draw some images of a data set with their named boxes on a contact sheet.

    As many classes as possible are shown, rare ones first; then images from all parts of the data. The same
    data give the same sheet. An image that cannot be read has a tile that says so.

    Parameters
    ----------
    data : Dataset
        What `sppnet.read_dataset` read.
    count : int
        Most images on the sheet.

    Returns
    -------
    (H, W, 3) uint8 RGB
        1280 pixels wide.
    """
    side = 320
    pictures, titles = [], []
    for i in chosen_samples(data, count):
        sample = data[i]
        pictures.append(_annotated_tile(sample, data.classes, side - 4))
        objects = len(sample.target.labels)
        titles.append(f"{sample.name}  {objects} object{'s' * (objects != 1)}")
    return contact_sheet(pictures, titles, side=side)


def chosen_samples(data: Sequence[Sample], count: int) -> list[int]:
    """Return numbers of samples, rising, that show every class and all parts of the data if there is room."""
    frequency = Counter(label for sample in data for label in set(sample.target.labels))
    chosen: list[int] = []
    shown: set[str] = set()
    for label in sorted(frequency, key=lambda name: (frequency[name], name)):
        if label not in shown and len(chosen) < count:
            chosen.append(next(i for i, sample in enumerate(data) if label in sample.target.labels))
            shown.update(data[chosen[-1]].target.labels)
    rest = [i for i in range(len(data)) if i not in set(chosen)]
    free = min(count - len(chosen), len(rest))
    return sorted([*chosen, *(rest[k * len(rest) // free] for k in range(free))])


def scaled(image: Pixels, target: Target, side: int) -> tuple[Pixels, Target]:
    """Return an image and its boxes, shrunk to have no longer side than `side` pixels."""
    height, width = image.shape[:2]
    scale = min(1.0, side / max(height, width))
    small = resize(image, max(1, round(scale * height)), max(1, round(scale * width)))
    return small, Target(target.boxes * np.float32(scale), target.labels, target.difficult, target.crowd)


def message_tile(text: str, side: int) -> Pixels:
    """Return a grey square that says why there is no picture."""
    size = 14
    tile = Image.new("RGB", (side, side), (70, 70, 70))
    pen = ImageDraw.Draw(tile)
    # Letters are about half as wide as they are high.
    lines = textwrap.wrap(legible(text), max(8, int(1.7 * side / size)))[: int(side / (LINE * size)) - 1]
    for i, line in enumerate(lines):
        draw_text(pen, (10, 10 + i * LINE * size), line, size, (240, 240, 240))
    return np.asarray(tile)


def _annotated_tile(sample: Sample, names: Sequence[str], side: int) -> Pixels:
    try:
        pixels, target = scaled(pixels_of(sample.image), sample.target, side)
    except (SppnetError, OSError) as error:
        return message_tile(f"cannot be read: {error}", side)
    return draw_target(pixels, target, names)


def _tile(image: Pixels, box: Boxes) -> Pixels:
    """Draw a region on a small copy of an image."""
    height, width = image.shape[:2]
    scale = min(1.0, _TILE / max(height, width))
    small = resize(image, max(1, round(scale * height)), max(1, round(scale * width)))
    return draw_region(small, box * scale)
