"""COCO: a JSON file of images, annotations and categories, and one of results."""

from __future__ import annotations

import json
import math
import mmap
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sppnet.boxes import Detections
from sppnet.datasets.entries import DEFAULT_SPLIT, Entry, by_split, decimals, rounded
from sppnet.datasets.findings import (
    Annotation,
    Corners,
    Findings,
    Record,
    Scored,
    expected_classes,
    finite_numbers,
)
from sppnet.datasets.records import Dataset
from sppnet.datasets.runs import run_lengths
from sppnet.datasets.shapes import around_turned, size_of
from sppnet.datasets.splits import split_of_folders, split_of_stem
from sppnet.datasets.tree import Format, Layout, Tree
from sppnet.errors import DatasetError, SppnetError
from sppnet.storage import atomic_path, encoding_of, read_json, write_json

_NAME = re.compile(r"(instances_.*|.*[._]coco)\.json", re.IGNORECASE)
_KEYS = tuple(re.compile(rb'"%s"\s*:\s*\[' % key) for key in (b"images", b"annotations", b"categories"))
_INSTANCES = "instances_"


def _fits(path: Path, head: bytes) -> bool:
    if _NAME.fullmatch(path.name):
        return True
    if b'"shapes"' in head or not head.lstrip().startswith(b"{"):
        return False
    with path.open("rb") as file:
        if encoding_of(file.read(2)) == "utf-16":
            return all(key.search(path.read_bytes().replace(b"\0", b"")) for key in _KEYS)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return all(key.search(content) for key in _KEYS)


def _locate(tree: Tree, names: Sequence[str]) -> Layout:
    """Understand JSON files in any folders; see `sppnet.datasets.tree.Format`."""
    # COCO's own folder also has the same images with keypoints and captions.
    official = [name for name in names if _stem(name).startswith(_INSTANCES)]
    for name in () if not official else names:
        if name not in official:
            tree.left.add("beside instances_*.json", name)
    files = _highest(tree, [(name, _split_of(name)) for name in official or names])
    if len(files) > 1:
        files = [(name, split or _stem(name)) for name, split in files]
    splits: dict[str, list[tuple[str, str | None]]] = {}
    for name, split in files:
        if split is not None:
            splits.setdefault(split, []).append((name, split))
    return Layout(splits, files, partial(_read, tree), files[0][0])


def _highest(tree: Tree, files: Sequence[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
    """Leave out files of a split and a name that another one higher up has: a data set within the other."""
    depths: dict[tuple[str, str | None], int] = {}
    for name, split in files:
        key = name.rpartition("/")[2], split
        depths[key] = min(name.count("/"), depths.get(key, name.count("/")))
    kept = []
    for name, split in files:
        if name.count("/") == depths[name.rpartition("/")[2], split]:
            kept.append((name, split))
        else:
            tree.left.add("of a data set inside this one", name)
    return kept


def _split_of(name: str) -> str | None:
    """Return the split that a file is named after, or the folder that it lies in."""
    stem = _stem(name)
    if stem.startswith(_INSTANCES):
        return stem.removeprefix(_INSTANCES)
    return split_of_folders(name) or split_of_stem(stem)


def _stem(name: str) -> str:
    return Path(name).stem


def _read(tree: Tree, files: Sequence[tuple[str, str | None]], findings: Findings) -> Iterator[Record]:
    """Yield the images of files of annotations, each named with its split."""
    for name, split in files:
        yield from _records(tree.path(name), split, findings)


def _records(file: Path, split: str | None, findings: Findings) -> Iterator[Record]:
    """Yield the images of a file of annotations."""
    content = read_json(file)
    classes: dict[str, tuple[int | str, str]] = {}
    for i, record in _listed(file, content, "categories"):
        with findings.collect():
            number = _field(file, "categories", i, record, "id", int, str)
            label = "name" if "name" in record else "supercategory"
            name = _field(file, "categories", i, record, label, str)
            if not name.strip():
                where = _at(file, "categories", i, record)
                raise DatasetError(f"{where}: found an empty name, expected a class name")
            _add(classes, str(number), (number, name), (file, "categories", i, record))
    images: dict[str, tuple[int, dict[str, Any]]] = {}
    for i, record in _listed(file, content, "images"):
        with findings.collect():
            _field(file, "images", i, record, "file_name", str)
            number = _field(file, "images", i, record, "id", int, str)
            _add(images, str(number), (i, record), (file, "images", i, record))
    rows: dict[str, list[Annotation]] = {name: [] for name in images}
    met: set[str] = set()
    for i, record in _listed(file, content, "annotations"):
        with findings.collect():
            image = str(_field(file, "annotations", i, record, "image_id", int, str))
            if image not in rows:
                where = _at(file, "annotations", i, record)
                raise DatasetError(f"{where}: found the image_id {image}, expected that of an image")
            rows[image].append(_row(file, i, record, classes))
            met.add(str(record["category_id"]))
    with findings.collect():
        findings.number(_category_ids(file, classes, met))
    del content
    for image, (i, record) in images.items():
        where, size = _at(file, "images", i, record), size_of(record, "height", "width")
        yield Record(image, record["file_name"], file, where, size, rows.pop(image), record["id"], split)


def _category_ids(
    file: Path, classes: Mapping[str, tuple[int | str, str]], met: Collection[str]
) -> dict[str, int | str]:
    """Return the numbers of classes; of two of one name (parents may have a child's) the one met counts."""
    numbers: dict[str, int | str] = {}
    for number, name in sorted(classes.values(), key=lambda item: str(item[0]) in met):
        if str(numbers.get(name)) in met:
            same = f"{numbers[name]} and {number}"
            raise DatasetError(f"{file}: found the categories {same} both named {name!r}, expected one")
        numbers[name] = number
    return numbers


def _add(known: dict[str, Any], key: str, value: Any, place: tuple[Path, str, int, dict[str, Any]]) -> None:
    """Add what an id stands for, which nothing did before."""
    if key in known:
        raise DatasetError(f"{_at(*place)}: found the id {key} again, expected it once")
    known[key] = value


def _row(
    file: Path, index: int, record: dict[str, Any], classes: Mapping[str, tuple[int | str, str]]
) -> Annotation:
    """Return the box of an annotation: its own, or that around its segmentation."""
    number = _field(file, "annotations", index, record, "category_id", int, str)
    if str(number) not in classes:
        where = _at(file, "annotations", index, record)
        raise DatasetError(f"{where}: found the category_id {number}, expected that of a category")
    label = classes[str(number)][1]
    if not record.get("bbox") and record.get("segmentation"):
        box, kind = _around(file, index, record), "segmentation"
    else:
        written = _field(file, "annotations", index, record, "bbox", list)
        try:
            x, y, width, height = map(float, written)
        except (TypeError, ValueError, OverflowError):
            found = f"found the bbox {written}, expected 4 numbers: x, y, width, height"
            raise DatasetError(f"{_at(file, 'annotations', index, record)}: {found}") from None
        box, kind = _turned((x, y, x + width, y + height), record), f"bbox {written}"
    place = partial(_place, file, index, record.get("id"), f"{kind} of {label!r}")
    # ignore marks what VOC calls difficult, where it was converted to COCO.
    return Annotation(box, label, place, bool(record.get("ignore", 0)), bool(record.get("iscrowd", 0)))


def _turned(box: Corners, record: Mapping[str, Any]) -> Corners:
    """Return the box around one that CVAT turned about its middle, by the degrees in its attributes."""
    attributes = record.get("attributes")
    rotation = attributes.get("rotation") if isinstance(attributes, dict) else None
    if not isinstance(rotation, int | float) or not math.isfinite(rotation):
        return box
    return around_turned(box, rotation, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2)


def _place(file: Path, index: int, number: Any, what: str) -> str:
    return f"{file}: annotations[{index}] (id {number}): {what}"


def _around(file: Path, index: int, record: dict[str, Any]) -> Corners:
    """Return the box around a segmentation: polygons, or run lengths over the columns of the image."""
    segmentation = record["segmentation"]
    try:
        if isinstance(segmentation, dict):
            return run_lengths(segmentation["counts"], *map(int, segmentation["size"]))
        numbers = [float(value) for polygon in segmentation for value in polygon]
        if not numbers or len(numbers) % 2:
            raise ValueError
    except (TypeError, ValueError, KeyError, OverflowError):
        found = (
            "found no bbox, and a segmentation that is neither polygons nor run lengths; expected one of them"
        )
        raise DatasetError(f"{_at(file, 'annotations', index, record)}: {found}") from None
    x, y = numbers[::2], numbers[1::2]
    return min(x), min(y), max(x), max(y)


def _listed(file: Path, content: Any, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and content of the objects in one of the lists of a COCO file."""
    records = content.get(key) if isinstance(content, dict) else None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DatasetError(f"{file}: found no list of {key}, expected images, annotations and categories")
    yield from enumerate(records)


def _at(file: Path, key: str, index: int, record: Mapping[str, Any]) -> str:
    """Return the place of an object in one of the lists of a COCO file."""
    return f"{file}: {key}[{index}] (id {record.get('id')})"


def _field(file: Path, key: str, index: int, record: Mapping[str, Any], name: str, *kinds: type) -> Any:
    """Return a value of an object in one of the lists, which must be of one of some types."""
    value = record.get(name)
    if not isinstance(value, kinds) or isinstance(value, bool):
        found = repr(value) if name in record else "nothing"
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise DatasetError(f"{_at(file, key, index, record)}: found {found} as {name!r}, expected {expected}")
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


def read_coco_results(
    path: Path, entries: Any, dataset: Dataset, names: Collection[str]
) -> dict[str, list[Scored]]:
    """Read the content of a COCO results file, as `read_results` says.

    Parameters
    ----------
    path : Path
        The JSON file, for errors.
    entries : value
        Its content.
    dataset : Dataset
        What the detections were made on.
    names : collection of str
        The classes that there may be.

    Returns
    -------
    dict from str to list of Scored
        For every sample, by its name, in the order of the file.
    """
    images = known_images(dataset)
    labels: dict[int | str, str] = {name: name for name in names}
    labels |= {number: name for name, number in dataset.category_ids.items()}
    if not isinstance(entries, list):
        raise SppnetError(
            f"{path}: found a JSON {type(entries).__name__}, expected a list of COCO results, "
            "or what sppnet detect run --json wrote"
        )
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


def known_images(dataset: Dataset) -> dict[int | str, str]:
    """Return the samples by all that a result may call them: id, name, stem of the file, number in it."""
    known: dict[int | str, str] = {}
    for keys in (_number_of, _stem_of):
        named = [(keys(sample.name, sample.image), sample.name) for sample in dataset]
        times = Counter(key for key, _ in named)
        known |= {key: name for key, name in named if key is not None and times[key] == 1}
    for sample in dataset:
        known |= {sample.name: sample.name, dataset.image_ids[sample.name]: sample.name}
    return known


def _stem_of(name: str, image: object) -> str | None:
    return image.stem if isinstance(image, Path) else None


def _number_of(name: str, image: object) -> int | None:
    """Return the number that a stem is, such as 139 of 000000000139."""
    stem = _stem_of(name, image) or name
    return int(stem) if stem.isdecimal() else None


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


COCO = Format((".json",), _fits, _locate, "a .json file of images, annotations and categories")
