"""Results: what was detected elsewhere, as the VOC development kit and the COCO tools exchange it.

They are written by `write_voc_results` and `write_coco_results`, beside the readers of the same formats.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sppnet.boxes import Detections
from sppnet.datasets.coco import known_images, read_coco_results
from sppnet.datasets.findings import Scored, expected_classes, finite_numbers
from sppnet.datasets.records import Dataset, class_names
from sppnet.datasets.voc import read_voc_results
from sppnet.errors import SppnetError
from sppnet.storage import read_json


def read_results(path: str | Path, dataset: Dataset, classes: Collection[str] = ()) -> dict[str, Detections]:
    """Read detections: a COCO results file, the JSON of ``sppnet detect run``, or a folder of VOC results.

    Parameters
    ----------
    path : path
        A JSON file of COCO results, whose images are given by their COCO id, sample name, file stem or the
        number that this is, and whose categories by id (`Dataset.category_ids`) or name; or a JSON file that
        ``sppnet detect run --json`` wrote, of any version, whose images are given by their paths or names; or
        a folder with ``comp<N>_det_<split>_<class>.txt``.
    dataset : Dataset
        What the detections were made on.
    classes : collection of str
        Names to accept besides those of the dataset: a detector may know classes that a split does not show.

    Returns
    -------
    dict from str to Detections
        For the name of every sample, by falling score; without detections where the file has none.

    Raises
    ------
    SppnetError
        If an image or a class is unknown or an entry malformed; names file and line.
    FileNotFoundError
        If there is no `path`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: found no such file or folder, expected results")
    names = {*dataset.category_ids, *class_names(classes)}
    if path.is_dir():
        found = read_voc_results(path, dataset, names)
    else:
        content = read_json(path)
        own = _own_images(content)
        found = (
            read_coco_results(path, content, dataset, names)
            if own is None
            else _own_results(path, own, dataset, names)
        )
    return {image: _detections(rows) for image, rows in found.items()}


def _own_images(content: Any) -> list[Any] | None:
    """Return the images in the JSON of ``sppnet detect run``; None if it is something else."""
    images = content.get("images") if isinstance(content, dict) else content
    if not isinstance(images, list) or not images:
        return [] if isinstance(content, dict) and images == [] else None
    return images if isinstance(images[0], dict) and "detections" in images[0] else None


def _own_results(
    path: Path, images: Sequence[Any], dataset: Dataset, names: Collection[str]
) -> dict[str, list[Scored]]:
    """Return the detections in images, by the sample that each is of."""
    known = _known_paths(dataset)
    found: dict[str, list[Scored]] = {sample.name: [] for sample in dataset}
    for i, image in enumerate(images):
        where = f"{path}: image {i}"
        if not isinstance(image, dict) or not isinstance(image.get("detections"), list):
            raise SppnetError(f"{where}: found {image!r:.80}, expected image and detections")
        file = str(image.get("image"))
        sample = next((known[key] for key in (os.path.abspath(file), *_names_of(file)) if key in known), None)
        if sample is None:
            raise SppnetError(f"{where}: found the image {file!r}, expected an image of {dataset.root}")
        for entry in image["detections"]:
            if not isinstance(entry, dict) or not {"label", "score", "box"} <= entry.keys():
                raise SppnetError(f"{where}: found {entry!r:.80}, expected label, score and box")
            label, box = entry["label"], entry["box"] if isinstance(entry["box"], list) else []
            if label not in names:
                raise SppnetError(f"{where}: found the label {label!r}, {expected_classes(names)}")
            x1, y1, x2, y2, score = finite_numbers(where, [*box, entry["score"]], 5)
            found[sample].append(Scored((x1, y1, x2, y2), score, label))
    return found


def _known_paths(dataset: Dataset) -> dict[int | str, str]:
    """Return the samples by the paths of their files, and by what `known_images` knows."""
    files = [(sample.image, sample.name) for sample in dataset if isinstance(sample.image, Path)]
    times = Counter(file.name for file, _ in files)
    known = known_images(dataset)
    known |= {file.name: name for file, name in files if times[file.name] == 1}
    return known | {os.path.abspath(file): name for file, name in files}


def _names_of(file: str) -> tuple[str, str, str]:
    """Return what else a path may be known by: itself, its name, its stem."""
    name = file.replace("\\", "/").rpartition("/")[2]
    return file, name, os.path.splitext(name)[0]


def _detections(rows: Sequence[Scored]) -> Detections:
    """Return detections by falling score; equal ones keep their order."""
    ordered = sorted(rows, key=lambda row: -row.score)
    return Detections(
        np.array([row.box for row in ordered], np.float32).reshape(-1, 4),
        np.array([row.score for row in ordered], np.float32),
        tuple(row.label for row in ordered),
    )
