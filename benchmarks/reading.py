"""Seconds and peak memory of reading a data set of many annotated images: python benchmarks/reading.py

Draws a folder for each format, with hard links of a small photo and two boxes for each image. The files
are read right after they were made: what the system remembers of them costs no disk access. Reading runs in
a process of its own, whose peak includes Python, NumPy and OpenCV, told as its start.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

PHOTOS_PER_FILE = 10_000  # some file systems allow no more than 65,000 links
READ = """
import sys, time
from sppnet.progress import peak_memory
from sppnet.datasets import read_dataset
before, start, used = peak_memory(), time.perf_counter(), time.process_time()
data = read_dataset(sys.argv[1])
seconds, used = time.perf_counter() - start, time.process_time() - used
objects = sum(len(sample.target.labels) for sample in data)
print(f"{data.format}: {len(data)} images, {objects} objects: {seconds:.1f} s", end=" ")
print(f"({used:.1f} s of a core), peak {peak_memory():.2f} GB, at the start {before:.2f} GB")
"""
BOXES = ((10, 20, 60, 80, "cat"), (50, 10, 90, 70, "dog"))
WIDTH, HEIGHT = 100, 90


def photos(folder, count):
    """Make the photos."""
    import cv2
    import numpy as np

    folder.mkdir(parents=True)
    for number in range(count):
        path = folder / f"{number:06d}.jpg"
        if number % PHOTOS_PER_FILE == 0:
            first = path
            cv2.imwrite(str(first), np.full((HEIGHT, WIDTH, 3), 128, np.uint8))
        else:
            os.link(first, path)


def voc(root, count):
    """Make an XML file for each image."""
    photos(root / "JPEGImages", count)
    (root / "Annotations").mkdir()
    objects = "".join(
        f"<object><name>{label}</name><pose>Unspecified</pose><difficult>0</difficult><bndbox>"
        f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for x1, y1, x2, y2, label in BOXES
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    for number in range(count):
        name = f"{number:06d}"
        text = f"<annotation><filename>{name}.jpg</filename>{size}{objects}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(text)


def coco(root, count):
    """Make one file for all images."""
    photos(root / "images", count)
    names = ["cat", "dog"]
    content = {
        "images": [
            {"id": i, "file_name": f"{i:06d}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(count)
        ],
        "annotations": [
            {
                "id": i * len(BOXES) + k,
                "image_id": i,
                "category_id": names.index(label) + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "segmentation": [],
                "iscrowd": 0,
            }
            for i in range(count)
            for k, (x1, y1, x2, y2, label) in enumerate(BOXES)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
    }
    (root / "annotations.json").write_text(json.dumps(content))


def yolo(root, count):
    """Make a text file for each image."""
    photos(root / "images", count)
    (root / "labels").mkdir()
    (root / "classes.txt").write_text("cat\ndog\n")
    lines = ""
    for k, (x1, y1, x2, y2, _) in enumerate(BOXES):
        centre = f"{(x1 + x2) / 2 / WIDTH:.6f} {(y1 + y2) / 2 / HEIGHT:.6f}"
        lines += f"{k} {centre} {(x2 - x1) / WIDTH:.6f} {(y2 - y1) / HEIGHT:.6f}\n"
    for number in range(count):
        (root / "labels" / f"{number:06d}.txt").write_text(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="where to make the files; default: the temporary folder")
    args = parser.parse_args()
    for make in (voc, coco, yolo):
        with TemporaryDirectory(dir=args.folder) as root:
            # In a process of its own, as a process starts with its parent's peak.
            child = os.fork()
            if child == 0:
                make(Path(root), args.images)
                os._exit(0)
            os.waitpid(child, 0)
            subprocess.run([sys.executable, "-c", READ, root], check=True)

    from common import commit, machine

    print(f"{machine()}, one thread, commit {commit()}")


if __name__ == "__main__":
    main()
