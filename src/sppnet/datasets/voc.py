"""PASCAL VOC: a folder with an XML file for each image, and results as a text file for each class.

VOC counts pixels from 1 and includes the last one: a box from 1 to 10 covers the columns 0 to 9. That
convention ends in this file, in `_from_corners` and `_to_corners`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, TreeBuilder, indent, tostring
from xml.parsers import expat

from sppnet.boxes import Detections
from sppnet.datasets.entries import (
    DEFAULT_SPLIT,
    Entry,
    by_split,
    check_lines,
    check_stems,
    check_xml,
    decimals,
    rounded,
)
from sppnet.datasets.findings import (
    Annotation,
    Corners,
    Findings,
    Scored,
    as_dataset_error,
    expected_classes,
    finite_numbers,
)
from sppnet.datasets.records import Dataset, Sample, class_names
from sppnet.datasets.splits import pick_split
from sppnet.errors import DatasetError, SppnetError
from sppnet.images import find_images, image_size
from sppnet.storage import atomic_path, numbered_lines


def _from_corners(xmin: float, ymin: float, xmax: float, ymax: float) -> Corners:
    """Return a 0-based half-open box of VOC's 1-based inclusive corners."""
    return xmin - 1, ymin - 1, xmax, ymax


def _to_corners(x1: float, y1: float, x2: float, y2: float) -> Corners:
    """Return VOC's 1-based inclusive corners of a 0-based half-open box."""
    return x1 + 1, y1 + 1, x2, y2


def voc_homes(root: Path) -> list[Path]:
    """Return the topmost folders, at most two levels down, that hold annotations."""
    for depth in ("", "*/", "*/*/"):
        homes = [p.parent for p in sorted(root.glob(f"{depth}Annotations")) if any(p.glob("[!.]*.xml"))]
        if homes:
            return homes
    return []


def voc_splits(root: Path) -> tuple[str, ...]:
    """Return the names of the splits, sorted: those of the files ``ImageSets/Main/*.txt``."""
    return tuple(sorted(_sets(_home(root))))


def read_voc(root: Path, split: str | None) -> Dataset:
    """Read a VOC folder, as `read_dataset` says; without a split everything that is annotated."""
    home = _home(root)
    findings = Findings()
    images: dict[str, list[Path]] = {}
    with as_dataset_error():
        paths = find_images([home / "JPEGImages"]).paths
    for path in paths:
        images.setdefault(path.stem, []).append(path)
    if split is None:
        annotations = sorted(home.glob("Annotations/[!.]*.xml"))
        listed = [(str(path), path.stem) for path in annotations]
        unused = images.keys() - {name for _, name in listed}
        findings.counts["images without an annotation file, left out"] = len(unused)
    else:
        split, file = pick_split(root, _sets(home), split)
        listed = [(where, line.split()[0]) for where, line in numbered_lines(file)]
    samples: dict[str, Sample] = {}
    for where, name in listed:
        with findings.collect():
            if name in samples:
                raise DatasetError(f"{where}: found image {name!r} again, expected it once")
            samples[name] = _sample(home, name, images.get(name, []), where, findings)
    return findings.dataset(root, split, list(samples.values()))


def _home(root: Path) -> Path:
    """Return the only folder that holds annotations."""
    home, *others = voc_homes(root)
    if others:
        names = ", ".join(str(folder.relative_to(root)) for folder in (home, *others))
        raise DatasetError(f"{root}: found several VOC folders ({names}), expected one; name it")
    return home


def _sets(home: Path) -> dict[str, Path]:
    """Return the files that list the images of each split."""
    return {path.stem: path for path in home.glob("ImageSets/Main/*.txt")}


def _sample(home: Path, name: str, images: list[Path], where: str, findings: Findings) -> Sample:
    """Return an image of a VOC folder with what its XML file says."""
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
            rows.append(_row(xml, element))
    height, width = xml.size() or image_size(images[0])
    return Sample(name, images[0], findings.target(rows, height, width))


def _row(xml: _Xml, element: Element) -> Annotation:
    """Return the box of an object."""
    label = (xml.child(element, "name").text or "").strip()
    if not label:
        raise DatasetError(f"{xml.at(element)}: found an object without a name, expected a class name")
    box = xml.child(element, "bndbox")
    x1, y1, x2, y2 = (xml.number(box, side) for side in ("xmin", "ymin", "xmax", "ymax"))
    where = f"{xml.at(box)}: box {x1:g} {y1:g} {x2:g} {y2:g} of {label!r}"
    difficult = xml.number(element, "difficult", 0) != 0
    return Annotation(_from_corners(x1, y1, x2, y2), label, where, difficult)


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
        """Return file and line of an element."""
        return f"{self.path}:{self.lines[element]}"

    def child(self, parent: Element, tag: str) -> Element:
        """Return the first element of that tag below another, which must have one."""
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
        """Return the finite number in a child; the default, if there is one, where no such child is."""
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
        The detections in each image, by sample name.
    classes : sequence of str
        The classes to write a file of; one without detections gives an empty file.
    split, task : str
        Parts of the file names.

    Raises
    ------
    SppnetError
        If a label is not among `classes`.
    OSError
        If the folder is missing or not writable.
    """
    lines: dict[str, list[str]] = {name: [] for name in class_names(classes)}
    for image, found in detections.items():
        rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels, strict=True)
        for box, score, label in rows:
            if label not in lines:
                raise SppnetError(f"image {image}: found the label {label!r}, {expected_classes(classes)}")
            corners = " ".join(f"{value:.6f}" for value in _to_corners(*box))
            lines[label].append(f"{image} {score:.9g} {corners}\n")
    for name, texts in lines.items():
        with atomic_path(Path(folder) / f"{task}_{split}_{name}.txt") as temporary:
            temporary.write_text("".join(texts), "utf-8")


def read_voc_results(folder: Path, dataset: Dataset, names: Collection[str]) -> dict[str, list[Scored]]:
    """Read the files ``comp<N>_det_<split>_<class>.txt`` of a folder, as `read_results` says.

    Parameters
    ----------
    folder : Path
        Where the files lie, one for each class at most.
    dataset : Dataset
        What the detections were made on.
    names : collection of str
        The classes that there may be.

    Returns
    -------
    dict from str to list of Scored
        For every sample, by its name, in the order of the files.
    """
    found: dict[str, list[Scored]] = {sample.name: [] for sample in dataset}
    paths = sorted(path for path in folder.glob("comp*_det_*.txt") if re.match(r"comp\d+_det_", path.name))
    if not paths:
        raise SppnetError(f"{folder}: found no results, expected files comp<N>_det_<split>_<class>.txt")
    sources: dict[str, Path] = {}
    for path in paths:
        # Both the split and the class may hold underscores: the longest class that fits.
        label = max((name for name in names if path.stem.endswith(f"_{name}")), key=len, default=None)
        if label is None:
            raise SppnetError(f"{path}: found results of an unknown class, {expected_classes(names)}")
        if label in sources:
            again = f"found class {label!r} again after {sources[label].name}"
            raise SppnetError(f"{path}: {again}, expected one file")
        sources[label] = path
        for where, line in numbered_lines(path):
            image, *columns = line.rsplit(maxsplit=5)
            if image not in found:
                raise SppnetError(f"{where}: found the image {image!r}, expected an image of {dataset.root}")
            score, *corners = finite_numbers(where, columns, 5)
            found[image].append(Scored(_from_corners(*corners), score, label))
    return found


def write_voc(folder: Path, entries: Sequence[Entry]) -> list[Path]:
    """Write ``Annotations`` and ``ImageSets/Main`` of a VOC folder.

    Boxes come back equal: corners are decimals where boxes are. A photo in folders has its annotation in
    folders of the same names. Crowds cannot be held.

    Parameters
    ----------
    folder : Path
        An existing folder.
    entries : sequence of Entry
        The images; their names must differ in more than their suffix.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    SppnetError
        If VOC cannot hold a name: one that XML has no characters for, or two that differ in their suffix.
    OSError
        If a file cannot be written.
    """
    check_stems((entry.name for entry in entries), "VOC")
    check_lines((entry.stem for entry in entries), "VOC")
    for entry in entries:
        check_xml((entry.place, *entry.target.labels), "VOC")
    files = []
    for entry in entries:
        files.append(folder / "Annotations" / f"{entry.stem}.xml")
        top = _annotation(entry)
        indent(top)
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(files[-1]) as temporary:
            temporary.write_text(tostring(top, "unicode") + "\n", "utf-8")
    sets = folder / "ImageSets" / "Main"
    sets.mkdir(parents=True, exist_ok=True)
    for split, part in by_split(entries).items():
        files.append(sets / f"{split or DEFAULT_SPLIT}.txt")
        with atomic_path(files[-1]) as temporary:
            temporary.write_text("".join(f"{entry.stem}\n" for entry in part), "utf-8", "surrogateescape")
    return files


def _annotation(entry: Entry) -> Element:
    """Return an image as VOC annotates it; the absolute path is that of LabelImg."""
    top = Element("annotation")
    folder, name = os.path.split(entry.place)
    about = {"folder": os.path.basename(folder), "filename": name}
    about |= {"path": entry.place} if os.path.isabs(entry.place) else {}
    _add(top, about)
    _add(SubElement(top, "size"), {"width": entry.width, "height": entry.height, "depth": 3})
    _add(top, {"segmented": 0})
    target = entry.target
    for box, label, difficult in zip(target.boxes, target.labels, target.difficult, strict=True):
        element = SubElement(top, "object")
        _add(element, {"name": label, "pose": "Unspecified", "truncated": 0, "difficult": int(difficult)})
        corners = map(rounded, _to_corners(*decimals(box)))
        sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        _add(
            SubElement(element, "bndbox"),
            {side: f"{value:.9f}".rstrip("0").rstrip(".") for side, value in sides},
        )
    return top


def _add(parent: Element, texts: Mapping[str, object]) -> None:
    for tag, text in texts.items():
        SubElement(parent, tag).text = str(text)
