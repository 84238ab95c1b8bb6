"""Little datasets drawn on the fly: the same scenes of coloured shapes in every format."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
from PIL import Image

from sppnet.boxes import Target
from sppnet.datasets import read_dataset
from sppnet.datasets.records import Sample
from sppnet.errors import DatasetError

COLOURS = {"disc": (220, 40, 40), "square": (40, 180, 60), "triangle": (50, 70, 220)}
SHAPES = tuple(COLOURS)
SPLITS = {"train": 4, "val": 2}

Box = tuple[int, int, int, int]


class Scene(NamedTuple):
    """A picture, its boxes (0-based, half-open) and their shapes."""

    image: np.ndarray
    boxes: list[Box]
    labels: list[str]


def scene(seed: int, height: int = 96, width: int = 128) -> Scene:
    """Draw a shape in the left half and, for odd seeds, another in the right half, on noise."""
    rng = np.random.default_rng(seed)
    image = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
    boxes, labels = [], []
    for half in range(1 + seed % 2):
        side = int(rng.integers(min(height, width // 2) // 3, min(height, width // 2) - 8))
        x = half * width // 2 + int(rng.integers(2, width // 2 - side - 2))
        y = int(rng.integers(2, height - side - 2))
        label = SHAPES[int(rng.integers(len(SHAPES)))]
        draw(image, label, (x, y, x + side, y + side))
        boxes.append((x, y, x + side, y + side))
        labels.append(label)
    return Scene(image, boxes, labels)


def draw(image: np.ndarray, label: str, box: Box) -> None:
    """Draw a shape that fills its box."""
    x1, y1, x2, y2 = box[0], box[1], box[2] - 1, box[3] - 1
    if label == "square":
        cv2.rectangle(image, (x1, y1), (x2, y2), COLOURS[label], -1)
    elif label == "disc":
        centre, axes = ((x1 + x2) // 2, (y1 + y2) // 2), ((x2 - x1) // 2, (y2 - y1) // 2)
        cv2.ellipse(image, centre, axes, 0, 0, 360, COLOURS[label], -1)
    else:
        corners = np.array([(x1, y2), (x2, y2), ((x1 + x2) // 2, y1)])
        cv2.fillPoly(image, [corners], COLOURS[label])


def grid(height: int = 96, width: int = 128) -> np.ndarray:
    """Return squares of four sizes all over an image."""
    return np.array(
        [
            (x, y, x + side, y + side)
            for side in (24, 32, 42, 54)
            for y in range(0, height - side + 1, 8)
            for x in range(0, width - side + 1, 8)
        ],
        np.float32,
    )


def drawn(numbers: Iterable[int]) -> tuple[list[np.ndarray], list[np.ndarray], list[Target]]:
    """Return images, windows and targets of the scenes of these numbers."""
    pictures = [scene(n) for n in numbers]
    targets = [Target.of(s.boxes, s.labels) for s in pictures]
    return [s.image for s in pictures], [grid()] * len(pictures), targets


def samples(images: Sequence[np.ndarray | Path], targets: Sequence[Target]) -> list[Sample]:
    """Return a data set of these images, in memory or as files, and targets."""
    return [Sample(f"{i}", image, t) for i, (image, t) in enumerate(zip(images, targets, strict=True))]


def scenes(splits: dict[str, int]) -> dict[str, dict[str, Scene]]:
    """Return the scenes of each split by image name: ``000001``, ``000002``, ..."""
    numbers = iter(range(1, 1 + sum(splits.values())))
    return {
        split: {f"{n:06d}": scene(n) for _, n in zip(range(count), numbers, strict=False)}
        for split, count in splits.items()
    }


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def voc_xml(boxes: list[Box], labels: list[str], size: tuple[int, int] | None = (96, 128)) -> str:
    """Return an annotation of one element a line: object `i` (from 0) starts at line ``6 + 10 * i``."""
    height, width = size or (0, 0)
    lines = ["<annotation>", "<size>", f"<width>{width}</width>", f"<height>{height}</height>", "</size>"]
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        lines += ["<object>", f"<name>{label}</name>", "<difficult>0</difficult>", "<bndbox>"]
        lines += [
            f"<xmin>{x1 + 1}</xmin>",
            f"<ymin>{y1 + 1}</ymin>",
            f"<xmax>{x2}</xmax>",
            f"<ymax>{y2}</ymax>",
        ]
        lines += ["</bndbox>", "</object>"]
    return "\n".join([*lines, "</annotation>"])


def voc_tree(root: Path, splits: dict[str, int] = SPLITS) -> dict[str, dict[str, Scene]]:
    """Draw a PASCAL VOC folder; return its scenes by split and name."""
    drawn = scenes(splits)
    for split, named in drawn.items():
        write(root / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{name}\n" for name in named))
        for name, (image, boxes, labels) in named.items():
            save(root / "JPEGImages" / f"{name}.jpg", image)
            write(root / "Annotations" / f"{name}.xml", voc_xml(boxes, labels))
    return drawn


def coco_json(named: dict[str, Scene]) -> dict:
    """Return an annotation file; category ids are 10, 20, 30 and image ids the numbers in the names."""
    ids = {label: 10 * i for i, label in enumerate(SHAPES, 1)}
    images = [
        {"id": int(name), "file_name": f"{name}.jpg", "height": image.shape[0], "width": image.shape[1]}
        for name, (image, _, _) in named.items()
    ]
    annotations = [
        {"image_id": int(name), "category_id": ids[label], "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0}
        for name, (_, boxes, labels) in named.items()
        for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True)
    ]
    return {
        "images": images,
        "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations, 1)],
        "categories": [{"id": number, "name": label} for label, number in ids.items()],
    }


def coco_tree(root: Path, splits: dict[str, int] = SPLITS) -> dict[str, dict[str, Scene]]:
    """Draw a COCO folder (``annotations/instances_<split>.json``, ``<split>/``); return its scenes."""
    drawn = scenes(splits)
    for split, named in drawn.items():
        write(root / "annotations" / f"instances_{split}.json", json.dumps(coco_json(named)))
        for name, (image, _, _) in named.items():
            save(root / split / f"{name}.jpg", image)
    return drawn


def yolo_tree(root: Path, splits: dict[str, int] = SPLITS) -> dict[str, dict[str, Scene]]:
    """Draw a YOLO folder (``data.yaml``, ``images/<split>``, ``labels/<split>``); return its scenes."""
    drawn = scenes(splits)
    paths = "".join(f"{split}: images/{split}\n" for split in splits)
    write(root / "data.yaml", f"names: [{', '.join(SHAPES)}]\n{paths}")
    for split, named in drawn.items():
        for name, (image, boxes, labels) in named.items():
            save(root / "images" / split / f"{name}.jpg", image)
            height, width = image.shape[:2]
            lines = [
                f"{SHAPES.index(label)} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} "
                f"{(x2 - x1) / width} {(y2 - y1) / height}\n"
                for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True)
            ]
            write(root / "labels" / split / f"{name}.txt", "".join(lines))
    return drawn


def class_tree(root: Path, count: int = 2, seed: int = 0) -> list[tuple[Path, str]]:
    """Draw `count` images of each shape in a folder of its name; return paths and shapes, sorted."""
    drawn = []
    for shape in sorted(SHAPES):
        for number in range(1, count + 1):
            image = np.random.default_rng(seed + number).integers(90, 130, (32, 40, 3), dtype=np.uint8)
            draw(image, shape, (4 + number, 4, 28 + number, 28))
            drawn.append((root / shape / f"{number:06d}.jpg", shape))
            save(drawn[-1][0], image)
    return drawn


def errors(root: Path, split: str | None = None, **options: str) -> list[str]:
    """Return the lines of the error that reading a data set must end in."""
    with pytest.raises(DatasetError) as caught:
        read_dataset(root, split, **options)
    return str(caught.value).splitlines()


def only_error(root: Path, split: str | None = None, **options: str) -> str:
    """Return the one line of the error that reading a data set must end in."""
    lines = errors(root, split, **options)
    assert len(lines) == 1
    return lines[0]
