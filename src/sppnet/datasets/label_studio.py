"""Label Studio: a JSON file of tasks, images with regions in per cent, and the XML of its interface."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import quoteattr

from sppnet.datasets.entries import Entry, check_xml, decimals
from sppnet.datasets.findings import Annotation, Corners, Findings, Record
from sppnet.datasets.shapes import (
    around,
    around_ellipse,
    around_turned,
    field,
    numbers,
    points,
    size_of,
)
from sppnet.datasets.splits import split_of_file
from sppnet.datasets.tree import Format, Layout, Tree, file_key, suffix_of
from sppnet.errors import DatasetError
from sppnet.images import SUFFIXES
from sppnet.storage import atomic_path, read_json, write_json

_LOCAL = "/data/local-files/?d="  # where Label Studio serves files of its own machine
_SOURCES = ("annotations", "completions", "predictions")  # the second are annotations of before version 1
_MARKS = (b'"data"', b'"original_width"')
_HASH = re.compile(r"[0-9a-f]{8}-(.+)", re.DOTALL)  # before the name of a photo that was uploaded
_NO_NAME = re.compile(r"[^-\w.]")  # what the server drops from such a name, after spaces became _


class _Task(NamedTuple):
    """A task: the file and the place in it, what it is, and the split that it belongs to."""

    path: Path
    where: str
    content: dict[str, Any]
    split: str | None

    @property
    def data(self) -> dict[str, Any]:
        """What was labelled; the short export, JSON-MIN, has it beside the labels."""
        return field(self.where, self.content, "data", dict) if "data" in self.content else self.content


def _fits(path: Path, head: bytes) -> bool:
    if not head.lstrip().startswith(b"["):
        return False
    if any(mark in head for mark in _MARKS):
        return True
    # A task may begin with many regions. Without its zeros UTF-16 is ASCII, where that matters.
    content = path.read_bytes().replace(b"\0", b"")
    return any(mark in content for mark in _MARKS)


def _locate(tree: Tree, names: Sequence[str]) -> Layout:
    """Understand JSON files in any folders; see `sppnet.datasets.tree.Format`."""
    tasks = [task for name in names for task in _tasks(tree.path(name), split_of_file(name))]
    splits: dict[str, list[_Task]] = {}
    for task in tasks:
        if task.split is not None:
            splits.setdefault(task.split, []).append(task)
    return Layout(splits, tasks, partial(_records, tree), names[0])


def _tasks(path: Path, split: str | None) -> Iterator[_Task]:
    """Yield the tasks of a file; data that we wrote names their splits."""
    content = read_json(path)
    for i, task in enumerate(content):
        where = f"{path}: task {i}"
        if not isinstance(task, dict):
            raise DatasetError(f"{where}: found {str(task)[:80]}, expected an object")
        read = _Task(path, f"{where} (id {task.get('id')})", task, split)
        own = read.data.get("split")
        yield read._replace(split=own) if isinstance(own, str) and own else read


def _records(tree: Tree, tasks: Sequence[_Task], findings: Findings) -> Iterator[Record]:
    """Yield the tasks that somebody has annotated; where nobody has any, those with predictions."""
    is_predicted = not any(
        "data" not in task.content or set(_SOURCES[:2]) & task.content.keys() for task in tasks
    )
    uploaded = {file_key(_uploaded(name)): name for name in tree.photos.names}
    for task in tasks:
        with findings.collect():
            results = _results(task, is_predicted, findings)
            if results is None:
                continue
            file = _file(tree, task, uploaded)
            # Tasks that we wrote hold the size also where nothing is in the image.
            sizes = {size_of(part, "original_height", "original_width") for part in (*results, task.data)}
            sizes.discard(None)
            if len(sizes) > 1:
                raise DatasetError(f"{task.where}: found regions of images of several sizes, expected one")
            size = sizes.pop() if sizes else None
            rows = _rows(task, results, size, findings)
            number = task.content.get("id")
            yield Record(
                *(file, file, task.path, task.where, size, rows),
                id=number if isinstance(number, int | str) else None,
                split=task.split,
                relative=size is None,
            )


def _results(task: _Task, is_predicted: bool, findings: Findings) -> list[dict[str, Any]] | None:
    """Return the results of a task, those of the last annotation that counts; None if there is none."""
    if "data" not in task.content:
        lists = [value for value in task.content.values() if isinstance(value, list)]
        return [result for results in lists for result in results if isinstance(result, dict)]
    key = _SOURCES[2] if is_predicted else next((key for key in _SOURCES[:2] if key in task.content), None)
    given = field(task.where, task.content, key, list) if key in task.content else []
    skipped = ("was_cancelled", "skipped")
    kept = [one for one in given if not (isinstance(one, dict) and any(one.get(key) for key in skipped))]
    if not kept:
        findings.counts["tasks that nobody has annotated, or skipped, left out"] += 1
        return None
    findings.counts["tasks annotated several times, the last one taken"] += len(kept) > 1
    findings.counts["tasks with predictions, taken as annotations"] += is_predicted
    results: list[dict[str, Any]] = field(task.where, kept[-1], "result", list)
    for i, result in enumerate(results):
        if not isinstance(result, dict):
            raise DatasetError(f"{task.where}: found {str(result)[:80]} as result {i}, expected an object")
    return results


def _rows(
    task: _Task, results: Sequence[dict[str, Any]], size: tuple[int, int] | None, findings: Findings
) -> list[Annotation]:
    """Return the boxes of a task: what carries one id is one region, its shape and its labels."""
    regions: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for i, result in enumerate(results):
        value = result.get("value", result)
        where = f"{task.where}: result {i}"
        if not isinstance(value, dict):
            raise DatasetError(f"{where}: found {str(value)[:80]} as its value, expected an object")
        if result.get("image_rotation", 0):
            raise DatasetError(f"{where}: found it drawn on a turned image, expected an image_rotation of 0")
        regions.setdefault(str(result.get("id", f"result {i}")), []).append((where, value))
    rows = []
    for parts in regions.values():
        labels = dict.fromkeys(label for _, value in parts for label in _labels(value))
        where, value = next((part for part in parts if _kind(part[1])), parts[0])
        kind = _kind(value)
        box = _box(where, value, kind, size)
        if box is None:
            findings.leave_out(kind or "choice or text")
        elif not labels:
            findings.leave_out(f"{kind} without a label")
        else:
            rows += [Annotation(box, label, f"{where}: {kind} of {label!r}") for label in labels]
    return rows


def _labels(value: Mapping[str, Any]) -> list[str]:
    """Return the class names of a region."""
    lists = [names for key, names in value.items() if key.endswith("labels") and isinstance(names, list)]
    return [name.strip() for names in lists for name in names if isinstance(name, str) and name.strip()]


def _kind(value: Mapping[str, Any]) -> str:
    """Return the kind of a shape by its numbers; empty if it is none."""
    if "rle" in value:
        return "brush"
    if "radiusX" in value:
        return "ellipse"
    if "points" in value:
        return "polygon"
    if {"x", "y"} <= value.keys():
        return "rectangle" if "height" in value else "point"
    return "line" if "vertices" in value else ""


def _box(where: str, value: Mapping[str, Any], kind: str, size: tuple[int, int] | None) -> Corners | None:
    """Return the box around a shape in pixels; in shares of the image where its size is not known."""
    height, width = size or (1, 1)
    degrees = numbers(where, value, "rotation")[0] if value.get("rotation") else 0.0
    if degrees % 360 and size is None:
        raise DatasetError(f"{where}: found a rotation and no original_width, expected both")
    across, down = width / 100, height / 100
    if kind == "rectangle":
        x, y, w, h = numbers(where, value, "x", "y", "width", "height")
        box = x * across, y * down, (x + w) * across, (y + h) * down
        return around_turned(box, degrees, x * across, y * down)
    if kind == "ellipse":
        x, y, rx, ry = numbers(where, value, "x", "y", "radiusX", "radiusY")
        return around_ellipse(x * across, y * down, rx * across, ry * down, degrees)
    if kind == "polygon":
        return around([(x * across, y * down) for x, y in points(where, value, "points")])
    return None


def _file(tree: Tree, task: _Task, uploaded: Mapping[str, str]) -> str:
    """Return the photo of a task: by its name on disk, where the server has made another of it."""
    texts = {key: _path(value) for key, value in task.data.items() if isinstance(value, str)}
    photos = {key: path for key, path in texts.items() if suffix_of(path) in SUFFIXES}
    if not photos or (len(photos) > 1 and "image" not in photos):
        raise DatasetError(
            f"{task.where}: found {len(photos)} images in its data, expected one, or one named image"
        )
    path = photos.get("image", next(iter(photos.values())))
    name = path.rpartition("/")[2]
    if file_key(name) in tree.photos.by_name:
        return path
    hashed = _HASH.fullmatch(name)
    plain = hashed[1] if hashed else name
    return plain if file_key(plain) in tree.photos.by_name else uploaded.get(file_key(plain), path)


def _path(text: str) -> str:
    """Return the path in what names an image: a URL of the server's or of a cloud's, or the path itself."""
    if "://" not in text and not text.startswith("/data/") and "?fileuri=" not in text:
        return text
    parts = urlsplit(text)
    query = parse_qs(parts.query, errors="surrogateescape")
    if "fileuri" in query:
        try:
            return _path(base64.b64decode(query["fileuri"][0], validate=True).decode())
        except ValueError:
            return text
    return query["d"][0] if "d" in query else unquote(parts.path, errors="surrogateescape")


def _uploaded(name: str) -> str:
    """Return the name that the server gives to a photo that is uploaded, without what it puts in front."""
    return _NO_NAME.sub("", name.rpartition("/")[2].strip().replace(" ", "_"))


def write_label_studio(file: Path, entries: Sequence[Entry], classes: Sequence[str]) -> list[Path]:
    """Write the tasks of a Label Studio project, and beside them the XML of its labelling interface.

    Images are named as files that Label Studio serves from the folder in its setting
    ``LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT``. Difficult objects and crowds cannot be held.

    Parameters
    ----------
    file : Path
        The JSON file; the interface has its name with the suffix ``.xml``.
    entries : sequence of Entry
        The images. Boxes with scores become predictions, others annotations.
    classes : sequence of str
        All class names, as the interface offers them.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    SppnetError
        If XML has no place for a class name.
    OSError
        If a file cannot be written.
    """
    check_xml(classes, "Label Studio")
    write_json(file, label_studio_tasks(entries))
    interface = file.with_suffix(".xml")
    with atomic_path(interface) as temporary:
        temporary.write_text(_interface(classes), "utf-8")
    return [file, interface]


def label_studio_tasks(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return images as Label Studio imports them: a prediction's score is the mean of its boxes."""
    tasks = []
    for number, entry in enumerate(entries, 1):
        regions = [_region(entry, k) for k in range(len(entry.target.labels))]
        content: dict[str, Any] = {"result": regions}
        if entry.scores is not None:
            score = float(entry.scores.mean()) if len(entry.scores) else 0.0
            content = {"model_version": "sppnet", "score": round(score, 6), **content}
        about: dict[str, Any] = {"image": _LOCAL + quote(entry.place, errors="surrogateescape")}
        about |= {"original_width": entry.width, "original_height": entry.height}
        about |= {"split": entry.split} if entry.split else {}
        kind = "annotations" if entry.scores is None else "predictions"
        tasks.append({"id": number, "data": about, kind: [content]})
    return tasks


def _region(entry: Entry, k: int) -> dict[str, Any]:
    """Return a box as a region: its corner and sides in per cent of the image."""
    x1, y1, x2, y2 = decimals(entry.target.boxes[k])
    box = {
        **{"x": 100 * x1 / entry.width, "y": 100 * y1 / entry.height},
        **{"width": 100 * (x2 - x1) / entry.width, "height": 100 * (y2 - y1) / entry.height},
    }
    return {
        **{"id": f"box{k + 1}", "type": "rectanglelabels", "from_name": "label", "to_name": "image"},
        **{"original_width": entry.width, "original_height": entry.height, "image_rotation": 0},
        "value": {**box, "rotation": 0, "rectanglelabels": [entry.target.labels[k]]},
        **({} if entry.scores is None else {"score": decimals(entry.scores)[k]}),
    }


def _interface(classes: Sequence[str]) -> str:
    """Return the interface to which the tasks fit, for "Labeling Interface, Code" in a project's settings."""
    labels = "".join(f"    <Label value={quoteattr(name)}/>\n" for name in classes)
    return (
        '<View>\n  <Image name="image" value="$image"/>\n'
        f'  <RectangleLabels name="label" toName="image">\n{labels}  </RectangleLabels>\n</View>\n'
    )


LABEL_STUDIO = Format(
    (".json",), _fits, _locate, "a .json file of tasks with data and annotations (Label Studio)"
)
