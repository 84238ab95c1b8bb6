"""PASCAL VOC: a folder with an XML file for each image, and results as a text file for each class.

VOC counts pixels from 1 and includes the last one: a box from 1 to 10 covers the columns 0 to 9. That
convention ends in this file, in `_from_corners` and `_to_corners`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError, SubElement, fromstring, indent, tostring
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
    Record,
    Scored,
    expected_classes,
    finite_numbers,
)
from sppnet.datasets.records import Dataset, class_names
from sppnet.datasets.shapes import around_turned
from sppnet.datasets.splits import by_folder, split_of_folders
from sppnet.datasets.tree import Format, Layout, Names, Tree, clean, file_key, stem_key
from sppnet.errors import DatasetError, SppnetError
from sppnet.storage import atomic_path, numbered_lines

_ROOT = re.compile(rb"<annotation[\s>]")
_SET = re.compile(r"(^|/)ImageSets/Main/[^/]+\.txt$")
_FLAG = re.compile(r"\s(-1|0|1)$")


def _from_corners(xmin: float, ymin: float, xmax: float, ymax: float) -> Corners:
    """Return a 0-based half-open box of VOC's 1-based inclusive corners."""
    return xmin - 1, ymin - 1, xmax, ymax


def _to_corners(x1: float, y1: float, x2: float, y2: float) -> Corners:
    """Return VOC's 1-based inclusive corners of a 0-based half-open box."""
    return x1 + 1, y1 + 1, x2, y2


def _fits(path: Path, head: bytes) -> bool:
    return bool(_ROOT.search(head)) or (path.parent.name == "Annotations" and b"<annotations" not in head)


def _locate(tree: Tree, names: Sequence[str]) -> Layout:
    """Understand XML files in any folders; see `sppnet.datasets.tree.Format`."""
    fitting, kept = set(names), []
    for name in tree.candidates[".xml"]:
        # A damaged file shows in the reading, if it is one of a photo.
        if name in fitting or stem_key(name) in tree.photos.by_stem:
            kept.append(name)
        else:
            tree.left.add(".xml of another kind", name)
    lists: dict[str, list[Path]] = {}
    for name in filter(_SET.search, tree.files if tree.root.is_dir() else ()):
        place = tree.path(name)
        if any(True for _ in numbered_lines(place, names=True)):
            lists.setdefault(place.stem, []).append(place)
    if lists:
        reader = partial(_listed_records, tree, Names(tree.base, kept), len(lists) == 1)
        return Layout(lists, (), reader, names[0])
    return Layout(by_folder(kept), kept, partial(_records, tree), names[0])


def _records(tree: Tree, names: Sequence[str], findings: Findings) -> Iterator[Record]:
    """Yield what XML files say."""
    for name in names:
        with findings.collect():
            yield _record(tree, name, split_of_folders(name), findings)


def _listed_records(
    tree: Tree, known: Names, only: bool, lists: Sequence[Path], findings: Findings
) -> Iterator[Record]:
    """Yield what the XML files say that files of ``ImageSets/Main`` list, or all."""
    found: dict[str, None] = {}
    for file in lists:
        for where, line in numbered_lines(file, names=True):
            with findings.collect():
                found[_listed(known, where, line, file)] = None
    if only and lists:
        left = len(known.names) - len(found)
        findings.counts[f"annotation files that {lists[0].name} does not list, left out"] = left
    for name in found if lists else known.names:
        with findings.collect():
            yield _record(tree, name, None, findings)


def _listed(known: Names, where: str, line: str, file: Path) -> str:
    """Return the XML file that a line of a list names."""
    # Lists of a class have a column that tells whether it is there: 1, -1, or 0 for difficult.
    for text in (line, *([line.rsplit(None, 1)[0]] if _FLAG.search(line) else [])):
        written = clean(text)
        for stem in dict.fromkeys((written, os.path.splitext(written)[0])):
            for named in known.called(stem, file_key(stem), by_stem=True):
                name = known.find(named, stem, file, None, ())
                if name is not None:
                    return name
    raise DatasetError(f"{where}: found no annotation of {line!r}, expected an XML file of this name")


def _record(tree: Tree, name: str, split: str | None, findings: Findings) -> Record:
    """Return what an XML file says."""
    path = tree.path(name)
    xml = _Xml(path)
    rows = []
    for i, element in enumerate(xml.root.iterfind("object")):
        with findings.collect():
            rows.append(_row(xml, element, i))
    stem = name[: name.rindex(".")]
    file = (xml.root.findtext("filename") or "").strip()
    return Record(stem[stem.rfind("/") + 1 :], file, path, str(path), xml.size(), rows, None, split, stem)


def _row(xml: _Xml, element: Element, index: int) -> Annotation:
    """Return the box of an object."""
    label = (xml.child(element, "name").text or "").strip()
    if not label:
        raise DatasetError(f"{xml.at(element)}: found an object without a name, expected a class name")
    box = xml.child(element, "bndbox")
    x1, y1, x2, y2 = _from_corners(*[xml.number(box, side) for side in ("xmin", "ymin", "xmax", "ymax")])
    # CVAT writes a box as it was before it was turned about its middle.
    named = (one for one in element.iterfind("attributes/attribute") if one.findtext("name") == "rotation")
    degrees = sum(xml.number(one, "value", 0) for one in named)
    seen = around_turned((x1, y1, x2, y2), degrees, (x1 + x2) / 2, (y1 + y2) / 2)
    difficult = xml.number(element, "difficult", 0) != 0
    return Annotation(seen, label, partial(_place, xml.path, index), difficult)


def _place(path: Path, index: int) -> str:
    """Return file, line and coordinates of an object, as they are written."""
    xml = _Xml(path)
    element = xml.root.findall("object")[index]
    box = xml.child(element, "bndbox")
    numbers = " ".join(f"{xml.number(box, side):g}" for side in ("xmin", "ymin", "xmax", "ymax"))
    return f"{xml.at(box)}: box {numbers} of {(xml.child(element, 'name').text or '').strip()!r}"


class _Xml:
    """A VOC annotation as a tree; where its elements stand is found out only when something is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.root: Element = fromstring(path.read_bytes())
        except (ParseError, ValueError, LookupError) as error:  # the latter two: an unknown encoding
            line = error.position[0] if isinstance(error, ParseError) else 1
            raise DatasetError(f"{path}:{line}: found malformed XML ({error}), expected XML") from None
        if self.root.tag != "annotation":
            raise DatasetError(f"{self.at(self.root)}: found <{self.root.tag}>, expected <annotation>")

    def at(self, element: Element) -> str:
        """Return file and line of an element."""
        lines: list[int] = []
        parser = expat.ParserCreate()
        parser.StartElementHandler = lambda *_: lines.append(parser.CurrentLineNumber)
        parser.Parse(self.path.read_bytes(), True)
        place = next(i for i, other in enumerate(self.root.iter()) if other is element)
        return f"{self.path}:{lines[place]}"

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
        """Return the finite number in a child; the default, if there is one, where none or no text is."""
        element = parent.find(tag)
        if default is not None and (element is None or not (element.text or "").strip()):
            return default
        if element is None:
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
    files: list[Path] = []
    for entry in entries:
        files.append(folder / "Annotations" / f"{entry.stem}.xml")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        write_annotation(files[-1], entry)
    sets = folder / "ImageSets" / "Main"
    sets.mkdir(parents=True, exist_ok=True)
    for split, part in by_split(entries).items():
        files.append(sets / f"{split or DEFAULT_SPLIT}.txt")
        with atomic_path(files[-1]) as temporary:
            temporary.write_text("".join(f"{entry.stem}\n" for entry in part), "utf-8", "surrogateescape")
    return files


def write_annotation(path: Path, entry: Entry) -> None:
    """Write the XML file of one image, as a whole or not at all.

    Parameters
    ----------
    path : Path
        Replaced if it exists; its folder must exist.
    entry : Entry
        The image.

    Raises
    ------
    SppnetError
        If XML has no characters for a name.
    OSError
        If the file cannot be written.
    """
    check_xml((entry.place, *entry.target.labels), "VOC")
    top = _annotation(entry)
    indent(top)
    with atomic_path(path) as temporary:
        temporary.write_text(tostring(top, "unicode") + "\n", "utf-8")


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


VOC = Format((".xml",), _fits, _locate, "XML files of <annotation>, one for each photo")
