"""YOLO: a text file of relative boxes for each image, and a YAML file or a list that names the classes."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sppnet.datasets.entries import Entry, by_split, check_lines, check_stems, decimals
from sppnet.datasets.findings import Annotation, Findings, as_dataset_error
from sppnet.datasets.records import Dataset, Sample
from sppnet.datasets.splits import pick_split
from sppnet.errors import DatasetError
from sppnet.images import find_images, image_size
from sppnet.storage import atomic_path, numbered_lines

_SPLITS = ("train", "val", "test")
_TOLERANCE = 1e-3  # by which a relative coordinate may pass 0 or 1
_UNLABELLED = "images without a label file, taken as negatives"


def yolo_files(root: Path) -> list[Path]:
    """Return the files that may name the classes, the most telling first."""
    if root.is_file():
        return [root] if root.suffix.lower() in (".yaml", ".yml") else []
    names = ["data.yaml", "dataset.yaml"]
    if (root / "images").is_dir() and (root / "labels").is_dir():
        names += ["classes.txt", "obj.names", "labels/classes.txt"]
    return [root / name for name in names if (root / name).is_file()]


def yolo_splits(root: Path) -> tuple[str, ...]:
    """Return the names of the splits, sorted: those that a YAML file names, or ``all`` and the image folders.

    A folder without either has none.
    """
    file = yolo_files(root)[0]
    names = sorted(_named(_description(file)) if _is_yaml(file) else _folders(root))
    return () if names == ["all"] else tuple(names)


def read_yolo(root: Path, split: str | None) -> Dataset:
    """Read a YOLO file or folder, as `read_dataset` says."""
    file = yolo_files(root)[0]
    split, classes, sources = (_by_yaml if _is_yaml(file) else _by_folders)(root, file, split)
    findings = Findings()
    samples: dict[str, Sample] = {}
    labels: dict[Path, Path] = {}
    for source in sources:
        for where, path in _images(source):
            with findings.collect():
                base = source if source.is_dir() else source.parent
                name = Path(os.path.relpath(path.with_suffix(""), base)).as_posix()
                if name in samples:
                    raise DatasetError(f"{where}: found image {name!r} again, expected it once")
                labels[_label_path(path)] = path
                samples[name] = _sample(where, name, path, classes, findings)
    if samples and findings.counts[_UNLABELLED] == len(samples):
        raise DatasetError(f"{root}: found no label file for any image, expected for example {min(labels)}")
    if all(source.is_dir() for source in sources):
        findings.errors += [f"{path}: found labels, expected an image for them" for path in _orphans(labels)]
    return findings.dataset(root, split, list(samples.values()))


def _is_yaml(file: Path) -> bool:
    return file.suffix.lower() in (".yaml", ".yml")


def _description(file: Path) -> dict[Any, Any]:
    """Return what a YAML file says."""
    try:
        content = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = mark.line + 1 if mark else 1
        raise DatasetError(f"{file}:{line}: found no YAML ({problem or 'not text'}), expected YAML") from None
    return content if isinstance(content, dict) else {}


def _named(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the splits that a YAML file names, and what it says of them."""
    return {key: content[key] for key in _SPLITS if content.get(key)}


def _folders(root: Path) -> dict[str, Path]:
    """Return the splits of a folder without a YAML file: all its images, and those of each folder."""
    images = root / "images"
    return {"all": images} | {path.name: path for path in images.glob("[!.]*") if path.is_dir()}


def _by_yaml(root: Path, file: Path, split: str | None) -> tuple[str, dict[int, str], list[Path]]:
    """Return split, classes, and folders or lists of images by a YAML file."""
    content = _description(file)
    names = content.get("names")
    classes = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(classes, dict) or not all(isinstance(name, str) for name in classes.values()):
        raise DatasetError(f"{file}: found {names!r} as names, expected class names, or index: name")
    split, entries = pick_split(root, _named(content), split)
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


def _by_folders(root: Path, file: Path, split: str | None) -> tuple[str, dict[int, str], list[Path]]:
    """Return split, classes and the folder of images by a list of class names."""
    split, folder = pick_split(root, _folders(root), split)
    return split, dict(enumerate(text for _, text in numbered_lines(file))), [folder]


def _images(source: Path) -> Iterator[tuple[str, Path]]:
    """Yield the place that names an image, and its path."""
    if source.is_dir():
        with as_dataset_error():
            yield from ((str(path), path) for path in find_images([source]).paths)
    else:
        yield from ((where, source.parent / line) for where, line in numbered_lines(source))


def _label_path(image: Path) -> Path:
    """Return the label file of an image: in ``labels`` for the last folder ``images``, or else beside it."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        parts[-2 - parts[-2::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def _sample(where: str, name: str, path: Path, classes: Mapping[int, str], findings: Findings) -> Sample:
    """Return an image with the boxes of its label file."""
    if not path.is_file():
        raise DatasetError(f"{where}: found no image file {path}, expected one")
    height, width = image_size(path)
    labels = _label_path(path)
    rows = []
    if labels.is_file():
        for place, text in numbered_lines(labels):
            with findings.collect():
                rows.append(_row(place, text, classes, height, width))
    else:
        findings.counts[_UNLABELLED] += 1
    return Sample(name, path, findings.target(rows, height, width))


def _row(where: str, text: str, classes: Mapping[int, str], height: int, width: int) -> Annotation:
    """Return the box of a line of a label file."""
    try:
        number, x, y, w, h = map(float, text.split())
    except ValueError:
        columns = "class, centre x, centre y, width, height"
        raise DatasetError(f"{where}: found {text[:80]!r}, expected 5 numbers: {columns}") from None
    if number not in classes:
        found = text.split()[0]
        raise DatasetError(f"{where}: found the class {found}, expected one of the {len(classes)} named")
    if not all(-_TOLERANCE <= value <= 1 + _TOLERANCE for value in (x, y, w, h)):
        raise DatasetError(f"{where}: found {text!r}, expected coordinates from 0 to 1")
    box = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
    label = classes[int(number)]
    return Annotation(box, label, f"{where}: box {x:g} {y:g} {w:g} {h:g} of {label!r}")


def _orphans(labels: Mapping[Path, Path]) -> list[Path]:
    """Return the files in label folders that belong to no image, by a map from label file to image."""
    folders = {label.parent for label, image in labels.items() if label.parent != image.parent}
    found = {path for folder in folders for path in folder.glob("*.txt") if path.name != "classes.txt"}
    return sorted(found - labels.keys())


def write_yolo(folder: Path, entries: Sequence[Entry], classes: Sequence[str]) -> list[Path]:
    """Write ``data.yaml``, and in ``labels`` a text file for each image and the ``classes.txt`` of LabelImg.

    Boxes are written with all digits. Difficult objects and crowds cannot be held, nor can scores.

    Parameters
    ----------
    folder : Path
        An existing folder.
    entries : sequence of Entry
        The images, whose places begin with ``images/``; names must differ in more than their suffix.
    classes : sequence of str
        All class names; their numbers count from 0 in this order.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    SppnetError
        If a class name has more than one line, or two names of images differ in their suffix.
    OSError
        If a file cannot be written.
    """
    check_lines(classes, "YOLO")
    sources: dict[str, str] = {}
    files = [folder / "data.yaml"]
    for split, part in by_split(entries).items():
        check_stems((entry.name for entry in part), "YOLO")
        sources[split or "train"] = "/".join(filter(None, ["images", split]))
        labels = folder / "/".join(filter(None, ["labels", split]))
        texts = {labels / "classes.txt": "".join(f"{name}\n" for name in classes)}
        texts |= {folder / _label_path(Path(entry.place)): _label_text(entry, classes) for entry in part}
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                temporary.write_text(text, "utf-8", "surrogateescape")
        files += texts
    keys = _keys(sources)
    description = {
        **{keys[split]: source for split, source in sources.items()},
        "names": dict(enumerate(classes)),
    }
    with atomic_path(files[0]) as temporary:
        temporary.write_text(yaml.safe_dump(description, sort_keys=False, allow_unicode=True), "utf-8")
    return files


def _keys(splits: Collection[str]) -> dict[str, str]:
    """Return the key of each split in a YAML file: train, val or test where its name begins so."""
    keys = {split: split for split in _SPLITS if split in splits}
    for split in splits:
        free = (key for key in _SPLITS if split.startswith(key) and key not in keys.values())
        keys.setdefault(split, next(free, split))
    return keys


def _label_text(entry: Entry, classes: Sequence[str]) -> str:
    """Return the boxes of an image, a line each: class, centre, width and height as shares of the image."""
    lines = []
    for box, label in zip(entry.target.boxes, entry.target.labels, strict=True):
        x1, y1, x2, y2 = decimals(box)
        x, y = (x1 + x2) / 2 / entry.width, (y1 + y2) / 2 / entry.height
        w, h = (x2 - x1) / entry.width, (y2 - y1) / entry.height
        lines.append(f"{classes.index(label)} {x!r} {y!r} {w!r} {h!r}\n")
    return "".join(lines)
