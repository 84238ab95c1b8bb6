"""Result files: detections as the VOC development kit and the COCO tools exchange them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sppnet.boxes import Detections
from sppnet.datasets import Dataset
from sppnet.errors import SppnetError
from sppnet.storage import atomic_path, numbered_lines, read_json

_Entry = tuple[tuple[float, float, float, float], float, str]


def write_voc_results(
    folder: str | Path,
    detections: Mapping[str, Detections],
    classes: Sequence[str],
    split: str,
    task: str = "comp4_det",
) -> None:
    """Write ``<task>_<split>_<class>.txt`` for every class, as the VOC development kit reads them.

    A line is ``image score xmin ymin xmax ymax`` with 1-based inclusive coordinates.

    Parameters
    ----------
    folder : path
        An existing folder; files of these names in it are replaced.
    detections : mapping from str to Detections
        By sample name.
    classes : sequence of str
        A class without detections gives an empty file.
    split, task : str
        Parts of the file names.

    Raises
    ------
    SppnetError
        If a label is not among `classes`.
    OSError
        If the folder is missing or not writable.
    """
    lines: dict[str, list[str]] = {name: [] for name in classes}
    for image, found in detections.items():
        for (x1, y1, x2, y2), score, label in _entries(found):
            if label not in lines:
                raise SppnetError(f"image {image}: found the label {label!r}, {_expected(classes)}")
            lines[label].append(f"{image} {score:.9g} {x1 + 1:.6f} {y1 + 1:.6f} {x2:.6f} {y2:.6f}\n")
    for name, rows in lines.items():
        with atomic_path(Path(folder) / f"{task}_{split}_{name}.txt") as temporary:
            temporary.write_text("".join(rows), "utf-8")


def write_coco_results(path: str | Path, detections: Mapping[str, Detections], dataset: Dataset) -> None:
    """Write a COCO results file: a list of ``image_id``, ``category_id``, ``bbox`` (x, y, w, h), ``score``.

    Parameters
    ----------
    path : path
        The JSON file.
    detections : mapping from str to Detections
        By sample name.
    dataset : Dataset
        Gives the ids of images and categories: `Dataset.image_ids` and `Dataset.category_ids`.

    Raises
    ------
    SppnetError
        If an image or a label is not in `dataset`, or a number is not finite.
    OSError
        If the folder is missing or not writable.
    """
    results = []
    for image, found in detections.items():
        if image not in dataset.image_ids:
            raise SppnetError(f"found detections in {image!r}, expected an image of {dataset.root}")
        for (x1, y1, x2, y2), score, label in _entries(found):
            if label not in dataset.category_ids:
                raise SppnetError(
                    f"image {image}: found the label {label!r}, {_expected(dataset.category_ids)}"
                )
            ids = {"image_id": dataset.image_ids[image], "category_id": dataset.category_ids[label]}
            results.append({**ids, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score})
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(results, allow_nan=False), "utf-8")


def read_results(path: str | Path, dataset: Dataset, classes: Collection[str] = ()) -> dict[str, Detections]:
    """Read the detections of a COCO results file, or of a folder of VOC results.

    Parameters
    ----------
    path : path
        A JSON file, whose images are given by their COCO id, sample name or file stem and whose categories by
        id (`Dataset.category_ids`) or name; or a folder with ``comp<N>_det_<split>_<class>.txt``.
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
    names = {*dataset.category_ids, *classes}
    found = (_read_voc if path.is_dir() else _read_coco)(path, dataset, names)
    return {image: _detections(entries) for image, entries in found.items()}


def _entries(found: Detections) -> list[_Entry]:
    return list(zip(found.boxes.tolist(), found.scores.tolist(), found.labels, strict=True))


def _detections(entries: Sequence[_Entry]) -> Detections:
    ordered = sorted(entries, key=lambda entry: -entry[1])
    return Detections(
        np.array([box for box, _, _ in ordered], np.float32).reshape(-1, 4),
        np.array([score for _, score, _ in ordered], np.float32),
        tuple(label for _, _, label in ordered),
    )


def _read_voc(folder: Path, dataset: Dataset, names: Collection[str]) -> dict[str, list[_Entry]]:
    found: dict[str, list[_Entry]] = {sample.name: [] for sample in dataset}
    paths = sorted(path for path in folder.glob("comp*_det_*.txt") if re.match(r"comp\d+_det_", path.name))
    if not paths:
        raise SppnetError(f"{folder}: found no results, expected files comp<N>_det_<split>_<class>.txt")
    sources: dict[str, Path] = {}
    for path in paths:
        # Both the split and the class may hold underscores: the longest class that fits.
        label = max((name for name in names if path.stem.endswith(f"_{name}")), key=len, default=None)
        if label is None:
            raise SppnetError(f"{path}: found results of an unknown class, {_expected(names)}")
        if label in sources:
            raise SppnetError(
                f"{path}: found class {label!r} again after {sources[label].name}, expected one file"
            )
        sources[label] = path
        for where, line in numbered_lines(path):
            image, *columns = line.rsplit(maxsplit=5)
            if image not in found:
                raise SppnetError(f"{where}: found the image {image!r}, expected an image of {dataset.root}")
            score, x1, y1, x2, y2 = _numbers(where, columns, 5)
            found[image].append(((x1 - 1, y1 - 1, x2, y2), score, label))
    return found


def _read_coco(path: Path, dataset: Dataset, names: Collection[str]) -> dict[str, list[_Entry]]:
    stems = Counter(sample.path.stem for sample in dataset)
    images: dict[int | str, str] = {s.path.stem: s.name for s in dataset if stems[s.path.stem] == 1}
    for sample in dataset:
        images |= {sample.name: sample.name, dataset.image_ids[sample.name]: sample.name}
    labels: dict[int | str, str] = {name: name for name in names}
    labels |= {number: name for name, number in dataset.category_ids.items()}
    entries = read_json(path)
    if not isinstance(entries, list):
        raise SppnetError(f"{path}: found a JSON {type(entries).__name__}, expected a list of results")
    keys = {"image_id": images, "category_id": labels}
    found: dict[str, list[_Entry]] = {sample.name: [] for sample in dataset}
    for i, entry in enumerate(entries):
        where = f"{path}: result {i}"
        if not isinstance(entry, dict) or not {"image_id", "category_id", "bbox", "score"} <= entry.keys():
            raise SppnetError(f"{where}: found {entry!r}, expected image_id, category_id, bbox and score")
        image, label = (_known(where, entry[key], key, known) for key, known in keys.items())
        box = entry["bbox"] if isinstance(entry["bbox"], list) else []
        x, y, width, height, score = _numbers(where, [*box, entry["score"]], 5)
        found[image].append(((x, y, x + width, y + height), score, label))
    return found


def _known(where: str, value: Any, key: str, known: Mapping[int | str, str]) -> str:
    if not isinstance(value, int | str) or value not in known:
        raise SppnetError(f"{where}: found the unknown {key} {value!r}, expected one of the dataset")
    return known[value]


def _numbers(where: str, values: Sequence[Any], count: int) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise SppnetError(f"{where}: found {values}, expected {count} numbers")
    return numbers


def _expected(names: Collection[str]) -> str:
    return f"expected one of {', '.join(sorted(names))}"
