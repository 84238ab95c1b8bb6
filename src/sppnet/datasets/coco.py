"""COCO: a JSON file of images, annotations and categories, and one of results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sppnet.boxes import Detections
from sppnet.datasets.entries import DEFAULT_SPLIT, Entry, by_split, decimals, rounded
from sppnet.datasets.findings import (
    Annotation,
    Findings,
    Scored,
    as_dataset_error,
    expected_classes,
    finite_numbers,
)
from sppnet.datasets.records import Dataset, Sample
from sppnet.datasets.splits import pick_split
from sppnet.errors import DatasetError, SppnetError
from sppnet.images import image_size
from sppnet.storage import atomic_path, read_json, write_json

K = TypeVar("K")
T = TypeVar("T")


def coco_files(root: Path) -> dict[str, Path]:
    """Return the annotation files by split."""
    if root.is_file():
        return {root.stem: root} if root.suffix.lower() == ".json" else {}
    instances = {p.stem.removeprefix("instances_"): p for p in root.glob("annotations/instances_*.json")}
    exports = [*root.glob("_annotations.coco.json"), *root.glob("*/_annotations.coco.json")]
    return instances | {path.absolute().parent.name: path for path in exports}


def coco_splits(root: Path) -> tuple[str, ...]:
    """Return the names of the splits, sorted: those with a file of annotations; none of a file."""
    return () if root.is_file() else tuple(sorted(coco_files(root)))


def read_coco(root: Path, split: str | None) -> Dataset:
    """Read a COCO file or folder, as `read_dataset` says."""
    if root.is_file():
        split, file = split or root.stem.removeprefix("instances_"), root
    else:
        split, file = pick_split(root, coco_files(root), split)
    with as_dataset_error():
        content = read_json(file)
    findings = Findings()
    classes: dict[int, str] = {}
    for where, record in _records(file, content, "categories"):
        with findings.collect():
            _add(classes, _field(where, record, "id", int), _field(where, record, "name", str), where)
    images: dict[str, dict[str, Any]] = {}
    for where, record in _records(file, content, "images"):
        with findings.collect():
            _field(where, record, "file_name", str)
            _add(images, str(_field(where, record, "id", int, str)), record, where)
    rows: dict[str, list[Annotation]] = {name: [] for name in images}
    met: set[int] = set()
    for where, record in _records(file, content, "annotations"):
        with findings.collect():
            name, row = _row(where, record, classes)
            if name not in rows:
                raise DatasetError(f"{where}: found the image_id {name}, expected that of an image")
            rows[name].append(row)
            met.add(record["category_id"])
    folder = _folder(file, split, [record["file_name"] for record in images.values()])
    samples = []
    for name, record in images.items():
        with findings.collect():
            path = folder / record["file_name"]
            if not path.is_file():
                raise DatasetError(f"{file}: found no image file {path} of image {name}, expected one")
            samples.append(Sample(name, path, findings.target(rows[name], *_size(record, path))))
    image_ids = {name: record["id"] for name, record in images.items()}
    category_ids: dict[str, int] = {}
    with findings.collect():
        category_ids = _category_ids(file, classes, met)
    return findings.dataset(root, split, samples, category_ids, image_ids)


def _category_ids(file: Path, classes: Mapping[int, str], met: Collection[int]) -> dict[str, int]:
    """Invert `classes`; of two categories of one name (a parent may carry its child's) the one met counts."""
    numbers: dict[str, int] = {}
    for number, name in sorted(classes.items(), key=lambda item: item[0] in met):
        if numbers.get(name) in met:
            same = f"{numbers[name]} and {number}"
            raise DatasetError(f"{file}: found the categories {same} both named {name!r}, expected one")
        numbers[name] = number
    return numbers


def _add(known: dict[K, T], key: K, value: T, where: str) -> None:
    """Add what an id stands for, which nothing did before."""
    if key in known:
        raise DatasetError(f"{where}: found the id {key} again, expected it once")
    known[key] = value


def _row(where: str, record: dict[str, Any], classes: Mapping[int, str]) -> tuple[str, Annotation]:
    """Return an annotation as the id of its image and its box."""
    name = str(_field(where, record, "image_id", int, str))
    number = _field(where, record, "category_id", int)
    if number not in classes:
        raise DatasetError(f"{where}: found the category_id {number}, expected that of a category")
    box = _field(where, record, "bbox", list)
    try:
        x, y, width, height = map(float, box)
    except (TypeError, ValueError, OverflowError):
        raise DatasetError(
            f"{where}: found the bbox {box}, expected 4 numbers: x, y, width, height"
        ) from None
    label = classes[number]
    place = f"{where}: bbox {box} of {label!r}"
    return name, Annotation((x, y, x + width, y + height), label, place, crowd=bool(record.get("iscrowd", 0)))


def _size(record: dict[str, Any], path: Path) -> tuple[int, int]:
    """Return the height and width of an image: those annotated, or those of its header."""
    height, width = record.get("height"), record.get("width")
    if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
        return height, width
    return image_size(path)


def _folder(file: Path, split: str, names: Sequence[str]) -> Path:
    """Find the folder to which the file names of an annotation file are relative, by the first 20 of them."""
    part = file.stem.removeprefix("instances_")
    below = dict.fromkeys(("", "images", split, f"images/{split}", part, f"images/{part}"))
    folders = [base / folder for base in (file.parent, file.parent.parent) for folder in below]
    held = [sum((folder / name).is_file() for name in names[:20]) for folder in folders]
    if names and not any(held):
        places = ", ".join(map(str, folders))
        raise DatasetError(f"{file}: found none of its images ({names[0]}, ...), expected them in {places}")
    return folders[held.index(max(held))]


def _records(file: Path, content: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and content of the objects in one of the lists of a COCO file."""
    records = content.get(key) if isinstance(content, dict) else None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DatasetError(f"{file}: found no list of {key}, expected images, annotations and categories")
    for i, record in enumerate(records):
        yield f"{file}: {key}[{i}] (id {record.get('id')})", record


def _field(where: str, record: Mapping[str, Any], key: str, *kinds: type) -> Any:
    """Return a value of a record, which must be of one of some types."""
    value = record.get(key)
    if not isinstance(value, kinds):
        found = repr(value) if key in record else "nothing"
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise DatasetError(f"{where}: found {found} as {key!r}, expected {expected}")
    return value


def write_coco_results(path: str | Path, detections: Mapping[str, Detections], dataset: Dataset) -> None:
    """Write a COCO results file: a list of ``image_id``, ``category_id``, ``bbox`` (x, y, w, h), ``score``.

    Parameters
    ----------
    path : path
        The JSON file.
    detections : mapping from str to Detections
        The detections in each image, by sample name.
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
        rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels, strict=True)
        for (x1, y1, x2, y2), score, label in rows:
            if label not in dataset.category_ids:
                known = expected_classes(dataset.category_ids)
                raise SppnetError(f"image {image}: found the label {label!r}, {known}")
            ids = {"image_id": dataset.image_ids[image], "category_id": dataset.category_ids[label]}
            results.append({**ids, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score})
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(results, allow_nan=False), "utf-8")


def read_coco_results(path: Path, dataset: Dataset, names: Collection[str]) -> dict[str, list[Scored]]:
    """Read a COCO results file, as `read_results` says.

    Parameters
    ----------
    path : Path
        The JSON file.
    dataset : Dataset
        What the detections were made on.
    names : collection of str
        The classes that there may be.

    Returns
    -------
    dict from str to list of Scored
        For every sample, by its name, in the order of the file.
    """
    stems = [(sample.image.stem, sample.name) for sample in dataset if isinstance(sample.image, Path)]
    times = Counter(stem for stem, _ in stems)
    images: dict[int | str, str] = {stem: name for stem, name in stems if times[stem] == 1}
    for sample in dataset:
        images |= {sample.name: sample.name, dataset.image_ids[sample.name]: sample.name}
    labels: dict[int | str, str] = {name: name for name in names}
    labels |= {number: name for name, number in dataset.category_ids.items()}
    entries = read_json(path)
    if not isinstance(entries, list):
        raise SppnetError(f"{path}: found a JSON {type(entries).__name__}, expected a list of results")
    keys = {"image_id": images, "category_id": labels}
    found: dict[str, list[Scored]] = {sample.name: [] for sample in dataset}
    for i, entry in enumerate(entries):
        where = f"{path}: result {i}"
        if not isinstance(entry, dict) or not {"image_id", "category_id", "bbox", "score"} <= entry.keys():
            raise SppnetError(f"{where}: found {entry!r}, expected image_id, category_id, bbox and score")
        image, label = (_known(where, entry[key], key, known) for key, known in keys.items())
        box = entry["bbox"] if isinstance(entry["bbox"], list) else []
        x, y, width, height, score = finite_numbers(where, [*box, entry["score"]], 5)
        found[image].append(Scored((x, y, x + width, y + height), score, label))
    return found


def _known(where: str, value: Any, key: str, known: Mapping[int | str, str]) -> str:
    """Return the name that an id of a result stands for."""
    if not isinstance(value, int | str) or value not in known:
        raise SppnetError(f"{where}: found the unknown {key} {value!r}, expected one of the dataset")
    return known[value]


def write_coco(folder: Path, entries: Sequence[Entry], classes: Sequence[str]) -> list[Path]:
    """Write ``annotations/instances_<split>.json`` of a COCO folder.

    Parameters
    ----------
    folder : Path
        An existing folder.
    entries : sequence of Entry
        The images.
    classes : sequence of str
        All class names; their ids count from 1 in this order.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    files = []
    (folder / "annotations").mkdir(exist_ok=True)
    for split, part in by_split(entries).items():
        files.append(folder / "annotations" / f"instances_{split or DEFAULT_SPLIT}.json")
        write_json(files[-1], coco_content(part, classes))
    return files


def coco_content(entries: Sequence[Entry], classes: Sequence[str]) -> dict[str, Any]:
    """Return what a COCO file holds of images: numbers count from 1, ``ignore`` marks difficult objects."""
    numbers = {name: number for number, name in enumerate(classes, 1)}
    images = [
        {"id": i, "file_name": entry.name, "width": entry.width, "height": entry.height}
        for i, entry in enumerate(entries, 1)
    ]
    annotations: list[dict[str, Any]] = []
    for i, entry in enumerate(entries, 1):
        target = entry.target
        scores = [] if entry.scores is None else decimals(entry.scores)
        for k, label in enumerate(target.labels):
            x1, y1, x2, y2 = decimals(target.boxes[k])
            width, height = rounded(x2 - x1), rounded(y2 - y1)
            annotations.append(
                {
                    **{"id": len(annotations) + 1, "image_id": i, "category_id": numbers[label]},
                    **{"bbox": [x1, y1, width, height], "area": rounded(width * height)},
                    **{"segmentation": [], "iscrowd": int(target.crowd[k])},
                    **({"ignore": 1} if target.difficult[k] else {}),
                    **({"score": scores[k]} if scores else {}),
                }
            )
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    # The COCO tools expect info and licenses, empty or not.
    return {
        **{"info": {}, "licenses": [], "categories": categories},
        **{"images": images, "annotations": annotations},
    }
