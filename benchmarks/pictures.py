"""The same boxes drawn side by side: left by sppnet, right by the package supervision.

    python benchmarks/pictures.py ../shared/data/voc2012-animals --out ten.jpg    # photos of many objects
    python benchmarks/pictures.py --out docs/pictures.jpg                         # a photo, drawn scenes

Boxes are those annotated, with scores drawn at random: it is the drawing that is compared. Supervision has
its own palette, its line width and text size for the resolution, and its labels where it finds room for them
(smart_position). Printed is how much of the pictures the labels cover.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common import commit, table
from sppnet.boxes import Detections
from sppnet.drawing import draw_detections
from sppnet.photos import demo_photo

COUNT, GAP, QUALITY = 10, 8, 75
NAMES = ("cat", "cow", "dog", "horse", "person", "sheep")
SCRIPTS = ("$5 or $10", "_other", "猫", "кошка", "قطة", "고양이")


def with_scores(boxes, labels, rng):
    """Return boxes as if they had been detected, by falling score."""
    scores = np.sort(rng.uniform(0.3, 1, len(labels)))[::-1].astype(np.float32)
    return Detections(np.asarray(boxes, np.float32).reshape(-1, 4), scores, tuple(labels))


def photos(data):
    """Yield those images of a data set that show most objects, with detections and classes."""
    from sppnet.datasets import read_dataset
    from sppnet.images import read_image

    rng = np.random.default_rng(0)
    dataset = read_dataset(data, "val")
    for sample in sorted(dataset, key=lambda s: -len(s.target.labels))[:COUNT]:
        found = with_scores(sample.target.boxes, sample.target.labels, rng)
        yield read_image(sample.path), found, dataset.classes


def drawn():
    """Yield the photo that comes with sppnet and scenes of shapes, with detections and classes."""
    rng = np.random.default_rng(0)
    cows = np.asarray(Image.open(demo_photo()).convert("RGB"))
    boxes = [(136, 102, 545, 333), (160, 36, 250, 94), (473, 38, 534, 92)]
    found = with_scores(boxes, ["cow"] * 3, rng)
    yield cows, found, NAMES
    yield (cows * 0.1).astype(np.uint8), found, NAMES
    for count, names, size in ((60, NAMES, (40, 90)), (8, NAMES, (120, 260)), (6, SCRIPTS, (60, 120))):
        boxes = [scattered(rng, size) for _ in range(count)]
        labels = [names[i % len(names)] for i in range(count)]
        yield shapes(boxes), with_scores(boxes, labels, rng), names


def scattered(rng, size, width=600, height=450):
    w, h = rng.integers(*size, 2)
    x, y = rng.integers(0, [width - w, height - h])
    return (int(x), int(y), int(x + w), int(y + h))


def shapes(boxes, width=600, height=450):
    """Draw a grey scene with an ellipse in each box."""
    picture = Image.new("RGB", (width, height), (150, 160, 150))
    pen = ImageDraw.Draw(picture)
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        grey = 90 + 15 * (i % 8)
        pen.ellipse((x1, y1, x2 - 1, y2 - 1), fill=(grey, grey, grey + 20), outline=(60, 60, 60))
    return np.asarray(picture)


def by_sppnet(image, found, classes):
    """Draw detections as sppnet does, with labels and without."""
    return tuple(draw_detections(image, found, classes, labels=labels) for labels in (True, False))


def by_supervision(image, found, classes):
    """Draw detections as supervision does, with labels and without."""
    import supervision as sv

    size, theirs = (image.shape[1], image.shape[0]), found.to_supervision(classes)
    boxes = sv.BoxAnnotator(thickness=sv.calculate_optimal_line_thickness(size))
    scale = sv.calculate_optimal_text_scale(size)
    labels = sv.LabelAnnotator(text_scale=scale, smart_position=True)
    texts = [f"{name} {100 * score:.0f} %" for _, score, name in found]
    # Their pictures are in OpenCV's order of channels.
    bare = boxes.annotate(np.ascontiguousarray(image[..., ::-1]), theirs)
    return labels.annotate(bare.copy(), theirs, texts)[..., ::-1], bare[..., ::-1]


def sheet(pairs):
    """Lay pairs of pictures out below each other: left sppnet, right supervision."""
    rows = [
        np.concatenate([ours, np.full((len(ours), GAP, 3), 255, np.uint8), theirs], 1)
        for ours, theirs in pairs
    ]
    width = max(row.shape[1] for row in rows)
    height = sum(len(row) + GAP for row in rows) - GAP
    paper, top = Image.new("RGB", (width, height), "white"), 0
    for row in rows:
        paper.paste(Image.fromarray(row), (0, top))
        top += len(row) + GAP
    return paper


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", help="data set with a split val; default: drawn scenes")
    parser.add_argument("--out", type=Path, default=Path("pictures.jpg"), help="JPEG file to write")
    args = parser.parse_args()
    pairs, covered = [], []
    for image, found, classes in drawn() if args.data is None else photos(args.data):
        drawings = [by(image, found, classes) for by in (by_sppnet, by_supervision)]
        pairs.append([labelled for labelled, _ in drawings])
        covered.append([(labelled != bare).any(axis=2).mean() for labelled, bare in drawings])
    sheet(pairs).save(args.out, quality=QUALITY)
    rows = [[i, *(f"{100 * share:.1f} %" for share in shares)] for i, shares in enumerate(covered, 1)]
    rows.append(["mean", *(f"{100 * share:.1f} %" for share in np.mean(covered, axis=0))])
    print(table(["picture", "covered by labels, sppnet", "supervision"], rows))
    print(f"commit {commit()}")


if __name__ == "__main__":
    main()
