"""Detection datasets: PASCAL VOC, COCO and YOLO folders, and CSV files, as one sequence of samples.

The formats' own conventions end here: what comes out has 0-based half-open boxes (see docs/conventions.md).
What is wrong in a dataset is an error that names file and line; what is merely odd is put right, counted and
told in `Dataset.notes`. Nothing is skipped silently.
"""

from __future__ import annotations

import csv
import glob
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, overload
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np
import yaml

from sppnet.boxes import Target, clip
from sppnet.errors import DatasetError, ImageError, SppnetError
from sppnet.images import image_files, image_size
from sppnet.storage import numbered_lines, read_json

Format = Literal["voc", "coco", "yolo", "csv"]
K = TypeVar("K")
T = TypeVar("T")

_ERRORS_SHOWN = 10
_ROUNDING = 0.01  # pixels by which a box may pass the border without being counted
_YOLO_TOLERANCE = 1e-3  # by which a relative coordinate may pass 0 or 1
_UNLABELLED = "images without a label file, taken as negatives"


@dataclass(frozen=True, eq=False)
class Sample:
    """An annotated image.

    Attributes
    ----------
    name : str
        Identifies the image in its dataset: the file stem (VOC), the image id (COCO), the path without suffix
        relative to the folder or list of the split (YOLO).
    path : Path
        The image file.
    target : Target
        Its objects; none for a negative image.
    """

    name: str
    path: Path
    target: Target


@dataclass(frozen=True, eq=False)
class Dataset(Sequence[Sample]):
    """A sequence of samples; a slice of it is again a dataset.

    Attributes
    ----------
    samples : tuple of Sample
    classes : tuple of str
        The class names met, sorted.
    root : Path
        What was read.
    split : str or None
        The part that was read; None for all of a VOC folder.
    notes : tuple of str
        What was put right or left out, each with its count.
    category_ids : mapping from str to int
        Class name to the number that stands for it in COCO results: the category id of a COCO dataset (also
        of categories not met), else the 1-based position in `classes`.
    image_ids : mapping from str to int or str
        Sample name to the image id in COCO results: that of a COCO dataset, else the name itself.
    """

    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    root: Path
    split: str | None
    notes: tuple[str, ...]
    category_ids: Mapping[str, int]
    image_ids: Mapping[str, int | str]

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> Sample | Dataset:
        if isinstance(index, slice):
            return replace(self, samples=self.samples[index])
        return self.samples[index]


def read_dataset(root: str | Path, split: str | None = None, *, format: Format | None = None) -> Dataset:
    """Read a detection dataset, recognising its format.

    - VOC: a folder with ``Annotations/*.xml`` and ``JPEGImages``, or with one such folder at most two levels
      down. Splits are the files ``ImageSets/Main/<split>.txt``; their second column, if any, is not read.
    - COCO: a JSON file, or a folder with ``annotations/instances_<split>.json`` or
      ``<split>/_annotations.coco.json``. Images are searched beside the file and one folder up, in both
      places also in ``images``, ``<split>`` and ``images/<split>``.
    - YOLO: a YAML file, or a folder with ``data.yaml`` or ``dataset.yaml``, whose ``train``, ``val`` and
      ``test`` are the splits; or a folder with ``images``, ``labels`` and ``classes.txt`` or ``obj.names``,
      where ``all`` and each folder in ``images`` are splits.
    - CSV: a file with the columns ``path`` (relative to its folder, or absolute), ``x1, y1, x2, y2`` (pixels,
      0-based and half-open), and possibly ``label`` and ``split``; a line for each box.

    Boxes that reach beyond their image are clipped, and counted in `Dataset.notes`. Images without objects
    are kept as negatives; in YOLO folders also those without a label file, unless no image has one.

    Parameters
    ----------
    root : path
        Folder or file.
    split : str, optional
        Name of the part to read, or a beginning that only one has (``train`` finds ``train2017``). By default
        everything that is annotated (VOC), or the only split there is (COCO, YOLO). Of a COCO file it is just
        a name, and that of a folder where its images may be.
    format : {"voc", "coco", "yolo", "csv"}, optional
        Needed where a folder can be read in more than one way.

    Raises
    ------
    DatasetError
        If there is no dataset, no such split, no image, or anything wrong in its files: a missing image, a
        repeated image id, a malformed file, a box that is inverted, empty, or wholly outside its image. Up to
        10 errors are listed, a line each, under their total.
    FileNotFoundError
        If there is no `root`.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"{root}: found no such folder or file, expected a dataset")
    if format is not None and format not in _FORMATS:
        raise SppnetError(f"found the format {format!r}, expected one of {', '.join(_FORMATS)}")
    wanted = {name: _FORMATS[name] for name in ([format] if format else _FORMATS)}
    fitting = [name for name, known in wanted.items() if known.locate(root)]
    if not fitting:
        looks = "; or ".join(f"{name} ({known.looks})" for name, known in wanted.items())
        raise DatasetError(f"{root}: found no dataset, expected {looks}")
    if len(fitting) > 1:
        raise DatasetError(f"{root}: found {' and '.join(fitting)} data, expected format= to choose one")
    return wanted[fitting[0]].read(root, split)


class _Row(NamedTuple):
    """An annotated box; `where` names its file, line and original coordinates."""

    box: tuple[float, float, float, float]
    label: str
    where: str
    difficult: bool = False
    crowd: bool = False


class _Findings:
    """What a reader met on its way: errors, of which any forbids the dataset, and things to count."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.counts: Counter[str] = Counter()

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Note an error and go on behind the ``with`` block."""
        try:
            yield
        except (DatasetError, ImageError, OSError) as error:
            self.errors.append(str(error))

    def target(self, rows: Sequence[_Row], height: int, width: int) -> Target:
        """Judge the boxes of an image and clip them to it."""
        boxes = np.array([row.box for row in rows], np.float64).reshape(-1, 4)
        inside = clip(boxes, width, height)
        proper = np.isfinite(boxes).all(axis=1) & np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
        seen = proper & np.all(inside[:, 2:] > inside[:, :2], axis=1)
        for i in map(int, np.flatnonzero(~seen)):
            what = f"lies outside the image of {width} x {height}" if proper[i] else "is inverted or empty"
            self.errors.append(f"{rows[i].where} {what}, expected a box with an area inside the image")
        clipped = seen & np.any(np.abs(inside - boxes) > _ROUNDING, axis=1)
        self.counts["boxes that reached beyond their image, clipped"] += int(clipped.sum())
        labels = [row.label for row in rows]
        return Target.of(inside, labels, [row.difficult for row in rows], [row.crowd for row in rows])

    def dataset(
        self,
        root: Path,
        split: str | None,
        samples: Sequence[Sample],
        category_ids: Mapping[str, int] | None = None,
        image_ids: Mapping[str, int | str] | None = None,
    ) -> Dataset:
        """Close the reading: raise what was wrong, or return the samples with what was counted."""
        if len(self.errors) == 1:
            raise DatasetError(self.errors[0])
        if self.errors:
            rest = len(self.errors) - _ERRORS_SHOWN
            shown = [f"{root}: found {len(self.errors)} errors, expected none", *self.errors[:_ERRORS_SHOWN]]
            raise DatasetError("\n".join([*shown, f"and {rest} more"] if rest > 0 else shown))
        if not samples:
            part = f" in split {split!r}" if split else ""
            raise DatasetError(f"{root}: found no image{part}, expected at least one")
        self.counts["images without objects"] = sum(not sample.target.labels for sample in samples)
        classes = tuple(sorted({label for sample in samples for label in sample.target.labels}))
        return Dataset(
            tuple(samples),
            classes,
            root,
            split,
            tuple(f"{what}: {count}" for what, count in self.counts.items() if count),
            category_ids or {name: i for i, name in enumerate(classes, 1)},
            image_ids or {sample.name: sample.name for sample in samples},
        )


def _pick(root: Path, splits: Mapping[str, T], split: str | None) -> tuple[str, T]:
    """Choose a split by its name, by a beginning that only it has, or as the only one there is."""
    fitting = [name for name in splits if name == split] or [n for n in splits if n.startswith(split or "")]
    if len(fitting) != 1:
        found = f"no single split {split!r}" if split else f"{len(splits)} splits and none chosen"
        raise DatasetError(f"{root}: found {found}, expected one of: {', '.join(sorted(splits)) or '(none)'}")
    return fitting[0], splits[fitting[0]]


@contextmanager
def _as_dataset_error() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DatasetError(str(error)) from None


def _voc_homes(root: Path) -> list[Path]:
    """Return the topmost folders, at most two levels down, that hold annotations."""
    for depth in ("", "*/", "*/*/"):
        homes = [p.parent for p in sorted(root.glob(f"{depth}Annotations")) if any(p.glob("[!.]*.xml"))]
        if homes:
            return homes
    return []


def _read_voc(root: Path, split: str | None) -> Dataset:
    home, *others = _voc_homes(root)
    if others:
        names = ", ".join(str(folder.relative_to(root)) for folder in (home, *others))
        raise DatasetError(f"{root}: found several VOC folders ({names}), expected one; name it")
    findings = _Findings()
    images: dict[str, list[Path]] = {}
    with _as_dataset_error():
        paths = image_files([home / "JPEGImages"])
    for path in paths:
        images.setdefault(path.stem, []).append(path)
    if split is None:
        annotations = sorted(home.glob("Annotations/[!.]*.xml"))
        listed = [(str(path), path.stem) for path in annotations]
        unused = images.keys() - {name for _, name in listed}
        findings.counts["images without an annotation file, left out"] = len(unused)
    else:
        sets = {path.stem: path for path in home.glob("ImageSets/Main/*.txt")}
        split, file = _pick(root, sets, split)
        listed = [(where, line.split()[0]) for where, line in numbered_lines(file)]
    samples: dict[str, Sample] = {}
    for where, name in listed:
        with findings.collect():
            if name in samples:
                raise DatasetError(f"{where}: found image {name!r} again, expected it once")
            samples[name] = _voc_sample(home, name, images.get(name, []), where, findings)
    return findings.dataset(root, split, list(samples.values()))


def _voc_sample(home: Path, name: str, images: list[Path], where: str, findings: _Findings) -> Sample:
    annotation = home / "Annotations" / f"{name}.xml"
    if len(images) != 1:
        found = f"{len(images)} images" if images else "no image"
        raise DatasetError(f"{where}: found {found} for {name!r} in {home / 'JPEGImages'}, expected one")
    if not annotation.is_file():
        raise DatasetError(f"{where}: found no annotation of {name!r}, expected {annotation}")
    xml = _Xml(annotation)
    rows = []
    for element in xml.root.iterfind("object"):
        with findings.collect():
            rows.append(_voc_row(xml, element))
    height, width = xml.size() or image_size(images[0])
    return Sample(name, images[0], findings.target(rows, height, width))


def _voc_row(xml: _Xml, element: Element) -> _Row:
    label = (xml.child(element, "name").text or "").strip()
    if not label:
        raise DatasetError(f"{xml.at(element)}: found an object without a name, expected a class name")
    box = xml.child(element, "bndbox")
    x1, y1, x2, y2 = (xml.number(box, side) for side in ("xmin", "ymin", "xmax", "ymax"))
    where = f"{xml.at(box)}: box {x1:g} {y1:g} {x2:g} {y2:g} of {label!r}"
    return _Row((x1 - 1, y1 - 1, x2, y2), label, where, difficult=xml.number(element, "difficult", 0) != 0)


class _Xml:
    """A VOC annotation as a tree that knows the line of each element."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[Element, int] = {}
        parser, builder = expat.ParserCreate(), TreeBuilder()

        def start(tag: str, attributes: dict[str, str]) -> None:
            self.lines[builder.start(tag, attributes)] = parser.CurrentLineNumber

        parser.buffer_text = True
        parser.StartElementHandler = start
        parser.EndElementHandler = builder.end
        parser.CharacterDataHandler = builder.data
        try:
            parser.Parse(path.read_bytes(), True)
        except (expat.ExpatError, ValueError, LookupError) as error:  # the latter two: an unknown encoding
            line = getattr(error, "lineno", 1)
            raise DatasetError(f"{path}:{line}: found malformed XML ({error}), expected XML") from None
        self.root: Element = builder.close()
        if self.root.tag != "annotation":
            raise DatasetError(f"{self.at(self.root)}: found <{self.root.tag}>, expected <annotation>")

    def at(self, element: Element) -> str:
        return f"{self.path}:{self.lines[element]}"

    def child(self, parent: Element, tag: str) -> Element:
        found = parent.find(tag)
        if found is None:
            raise DatasetError(f"{self.at(parent)}: found <{parent.tag}> without <{tag}>, expected one")
        return found

    def size(self) -> tuple[int, int] | None:
        """Return the annotated height and width, or None where they are missing or 0."""
        size = self.root.find("size")
        if size is None:
            return None
        height, width = int(self.number(size, "height", 0)), int(self.number(size, "width", 0))
        return (height, width) if height > 0 and width > 0 else None

    def number(self, parent: Element, tag: str, default: float | None = None) -> float:
        if default is not None and parent.find(tag) is None:
            return default
        element = self.child(parent, tag)
        try:
            value = float(element.text or "")
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DatasetError(f"{self.at(element)}: found {element.text!r} as <{tag}>, expected a number")
        return value


def _coco_files(root: Path) -> dict[str, Path]:
    """Return the annotation files by split."""
    if root.is_file():
        return {root.stem: root} if root.suffix.lower() == ".json" else {}
    instances = {p.stem.removeprefix("instances_"): p for p in root.glob("annotations/instances_*.json")}
    exports = [*root.glob("_annotations.coco.json"), *root.glob("*/_annotations.coco.json")]
    return instances | {path.absolute().parent.name: path for path in exports}


def _read_coco(root: Path, split: str | None) -> Dataset:
    if root.is_file():
        split, file = split or root.stem.removeprefix("instances_"), root
    else:
        split, file = _pick(root, _coco_files(root), split)
    with _as_dataset_error():
        content = read_json(file)
    findings = _Findings()
    classes: dict[int, str] = {}
    for where, record in _records(file, content, "categories"):
        with findings.collect():
            _add(classes, _field(where, record, "id", int), _field(where, record, "name", str), where)
    images: dict[str, dict[str, Any]] = {}
    for where, record in _records(file, content, "images"):
        with findings.collect():
            _field(where, record, "file_name", str)
            _add(images, str(_field(where, record, "id", int, str)), record, where)
    rows: dict[str, list[_Row]] = {name: [] for name in images}
    met: set[int] = set()
    for where, record in _records(file, content, "annotations"):
        with findings.collect():
            name, row = _coco_row(where, record, classes)
            if name not in rows:
                raise DatasetError(f"{where}: found the image_id {name}, expected that of an image")
            rows[name].append(row)
            met.add(record["category_id"])
    folder = _coco_folder(file, split, [record["file_name"] for record in images.values()])
    samples = []
    for name, record in images.items():
        with findings.collect():
            path = folder / record["file_name"]
            if not path.is_file():
                raise DatasetError(f"{file}: found no image file {path} of image {name}, expected one")
            samples.append(Sample(name, path, findings.target(rows[name], *_coco_size(record, path))))
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
    if key in known:
        raise DatasetError(f"{where}: found the id {key} again, expected it once")
    known[key] = value


def _coco_row(where: str, record: dict[str, Any], classes: Mapping[int, str]) -> tuple[str, _Row]:
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
    return name, _Row((x, y, x + width, y + height), label, place, crowd=bool(record.get("iscrowd", 0)))


def _coco_size(record: dict[str, Any], path: Path) -> tuple[int, int]:
    height, width = record.get("height"), record.get("width")
    if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
        return height, width
    return image_size(path)


def _coco_folder(file: Path, split: str, names: Sequence[str]) -> Path:
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
    value = record.get(key)
    if not isinstance(value, kinds):
        found = repr(value) if key in record else "nothing"
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise DatasetError(f"{where}: found {found} as {key!r}, expected {expected}")
    return value


def _yolo_files(root: Path) -> list[Path]:
    """Return the files that may name the classes, the most telling first."""
    if root.is_file():
        return [root] if root.suffix.lower() in (".yaml", ".yml") else []
    names = ["data.yaml", "dataset.yaml"]
    if (root / "images").is_dir() and (root / "labels").is_dir():
        names += ["classes.txt", "obj.names", "labels/classes.txt"]
    return [root / name for name in names if (root / name).is_file()]


def _read_yolo(root: Path, split: str | None) -> Dataset:
    file = _yolo_files(root)[0]
    describe = _yolo_yaml if file.suffix.lower() in (".yaml", ".yml") else _yolo_folders
    split, classes, sources = describe(root, file, split)
    findings = _Findings()
    samples: dict[str, Sample] = {}
    labels: dict[Path, Path] = {}
    for source in sources:
        for where, path in _yolo_images(source):
            with findings.collect():
                base = source if source.is_dir() else source.parent
                name = Path(os.path.relpath(path.with_suffix(""), base)).as_posix()
                if name in samples:
                    raise DatasetError(f"{where}: found image {name!r} again, expected it once")
                labels[_label_path(path)] = path
                samples[name] = _yolo_sample(where, name, path, classes, findings)
    if samples and findings.counts[_UNLABELLED] == len(samples):
        raise DatasetError(f"{root}: found no label file for any image, expected for example {min(labels)}")
    if all(source.is_dir() for source in sources):
        findings.errors += [f"{path}: found labels, expected an image for them" for path in _orphans(labels)]
    return findings.dataset(root, split, list(samples.values()))


def _yolo_yaml(root: Path, file: Path, split: str | None) -> tuple[str, dict[int, str], list[Path]]:
    """Return split, classes, and folders or lists of images by a YAML description."""
    try:
        content = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = mark.line + 1 if mark else 1
        raise DatasetError(f"{file}:{line}: found no YAML ({problem or 'not text'}), expected YAML") from None
    content = content if isinstance(content, dict) else {}
    names = content.get("names")
    classes = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(classes, dict) or not all(isinstance(name, str) for name in classes.values()):
        raise DatasetError(f"{file}: found {names!r} as names, expected class names, or index: name")
    splits = {key: content[key] for key in ("train", "val", "test") if content.get(key)}
    split, entries = _pick(root, splits, split)
    base = file.parent / str(content.get("path") or "")
    sources = []
    for entry in entries if isinstance(entries, list) else [entries]:
        # Exports often write ../train/images where train/images is meant.
        places = [base / str(entry), file.parent / str(entry), file.parent / str(entry).removeprefix("../")]
        found = [place for place in places if place.exists()]
        if not found:
            raise DatasetError(f"{file}: found no {places[0]} ({split}), expected a folder or list of images")
        sources.append(found[0])
    return split, classes, sources


def _yolo_folders(root: Path, file: Path, split: str | None) -> tuple[str, dict[int, str], list[Path]]:
    """Return split, classes and the folder of images by a list of class names."""
    images = root / "images"
    folders = {path.name: path for path in images.glob("[!.]*") if path.is_dir()}
    split, folder = _pick(root, {"all": images} | folders, split)
    return split, dict(enumerate(text for _, text in numbered_lines(file))), [folder]


def _yolo_images(source: Path) -> Iterator[tuple[str, Path]]:
    """Yield the place that names an image, and its path."""
    if source.is_dir():
        with _as_dataset_error():
            yield from ((str(path), path) for path in image_files([glob.escape(str(source)) + "/**/*"]))
    else:
        yield from ((where, source.parent / line) for where, line in numbered_lines(source))


def _label_path(image: Path) -> Path:
    """Return the label file of an image: in ``labels`` for the last folder ``images``, or else beside it."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        parts[-2 - parts[-2::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def _yolo_sample(
    where: str, name: str, path: Path, classes: Mapping[int, str], findings: _Findings
) -> Sample:
    if not path.is_file():
        raise DatasetError(f"{where}: found no image file {path}, expected one")
    height, width = image_size(path)
    labels = _label_path(path)
    rows = []
    if labels.is_file():
        for place, text in numbered_lines(labels):
            with findings.collect():
                rows.append(_yolo_row(place, text, classes, height, width))
    else:
        findings.counts[_UNLABELLED] += 1
    return Sample(name, path, findings.target(rows, height, width))


def _yolo_row(where: str, text: str, classes: Mapping[int, str], height: int, width: int) -> _Row:
    try:
        number, x, y, w, h = map(float, text.split())
    except ValueError:
        columns = "class, centre x, centre y, width, height"
        raise DatasetError(f"{where}: found {text[:80]!r}, expected 5 numbers: {columns}") from None
    if number not in classes:
        found = text.split()[0]
        raise DatasetError(f"{where}: found the class {found}, expected one of the {len(classes)} named")
    if not all(-_YOLO_TOLERANCE <= value <= 1 + _YOLO_TOLERANCE for value in (x, y, w, h)):
        raise DatasetError(f"{where}: found {text!r}, expected coordinates from 0 to 1")
    box = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
    label = classes[int(number)]
    return _Row(box, label, f"{where}: box {x:g} {y:g} {w:g} {h:g} of {label!r}")


def _orphans(labels: Mapping[Path, Path]) -> list[Path]:
    """Return the files in label folders that belong to no image, by a map from label file to image."""
    folders = {label.parent for label, image in labels.items() if label.parent != image.parent}
    found = {path for folder in folders for path in folder.glob("*.txt") if path.name != "classes.txt"}
    return sorted(found - labels.keys())


_CORNERS = ("x1", "y1", "x2", "y2")
_UNNAMED = "box"  # the label of boxes without one


def _csv_files(root: Path) -> list[Path]:
    return [root] if root.is_file() and root.suffix.lower() == ".csv" else []


def _read_csv(root: Path, split: str | None) -> Dataset:
    findings = _Findings()
    boxes: dict[str, list[_Row]] = {}
    places: dict[str, str] = {}
    splits: set[str] = set()
    with root.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, skipinitialspace=True, restkey="", restval="")
        columns = reader.fieldnames or []
        if not {"path", *_CORNERS} <= set(columns):
            raise DatasetError(
                f"{root}:1: found the columns {', '.join(columns) or '(none)'}, expected path, x1, y1, x2, y2"
            )
        try:
            for line in reader:
                splits.add(line.get("split", ""))
                if split is not None and line.get("split") != split:
                    continue
                where = f"{root}:{reader.line_num}"
                with findings.collect():
                    row = _csv_row(where, line)
                    boxes.setdefault(line["path"], []).append(row)
                    places.setdefault(line["path"], where)
        except csv.Error as error:
            raise DatasetError(f"{root}:{reader.line_num}: found no CSV ({error}), expected CSV") from None
    if split is not None and split not in splits:
        raise DatasetError(f"{root}: found no split {split!r}, expected one of: {', '.join(sorted(splits))}")
    samples = []
    for name, rows in boxes.items():
        with findings.collect():
            path = root.parent / name
            if not path.is_file():
                raise DatasetError(f"{places[name]}: found no image file {path}, expected one")
            height, width = image_size(path)
            samples.append(Sample(name, path, findings.target(rows, height, width)))
    return findings.dataset(root, split, samples)


def _csv_row(where: str, line: Mapping[str, str]) -> _Row:
    texts = [line[name] for name in _CORNERS]
    try:
        x1, y1, x2, y2 = map(float, texts)
    except ValueError:
        raise DatasetError(
            f"{where}: found {', '.join(texts)}, expected the numbers x1, y1, x2, y2"
        ) from None
    label = line.get("label") or _UNNAMED
    return _Row((x1, y1, x2, y2), label, f"{where}: box {', '.join(texts)} of {label!r}")


class _Known(NamedTuple):
    """A format: how to tell it, how to read it, what it looks like."""

    locate: Callable[[Path], Collection[object]]
    read: Callable[[Path, str | None], Dataset]
    looks: str


_FORMATS: dict[str, _Known] = {
    "voc": _Known(_voc_homes, _read_voc, "Annotations/*.xml and JPEGImages"),
    "coco": _Known(
        _coco_files, _read_coco, "a .json file, annotations/instances_*.json or _annotations.coco.json"
    ),
    "yolo": _Known(_yolo_files, _read_yolo, "data.yaml, dataset.yaml, or images, labels and classes.txt"),
    "csv": _Known(_csv_files, _read_csv, "a .csv file of path, x1, y1, x2, y2"),
}
