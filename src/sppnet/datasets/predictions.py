"""Predictions: what was detected in many images, in the formats that other tools open.

The JSON is our own; docs/results.schema.json describes it. The files of labelling tools are pre-annotations:
boxes to be looked through and put right there.
"""

from __future__ import annotations

import io
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from sppnet.boxes import Detections, Target
from sppnet.datasets.coco import coco_content
from sppnet.datasets.csv import csv_text, write_csv
from sppnet.datasets.entries import Entry, check_lines, check_stems, check_xml, names_below, stem
from sppnet.datasets.findings import expected_classes
from sppnet.datasets.label_studio import label_studio_tasks, write_label_studio
from sppnet.datasets.records import class_names
from sppnet.datasets.rows import csv_bytes, table_text
from sppnet.datasets.voc import write_voc
from sppnet.datasets.yolo import write_yolo
from sppnet.errors import SppnetError, check_choice
from sppnet.storage import (
    atomic_folder,
    atomic_path,
    check_new_folder,
    check_suffix,
    check_writable,
    json_text,
    write_json,
)

PredictionFormat = Literal["csv", "coco", "voc", "yolo", "labelstudio", "json"]
ScoreKind = Literal["probability", "svm"]

JSON_VERSION = 1
"""Of the JSON that `write_predictions` writes; it grows when a reader of the last one could go wrong."""

_SUFFIXES = {"csv": ".csv", "coco": ".json", "labelstudio": ".json", "json": ".json"}
_FOLDERS = ("voc", "yolo")


class Prediction(NamedTuple):
    """What was detected in an image or in a frame of a video.

    Attributes
    ----------
    image : Path
        The file of the image, or of the video.
    height, width : int
        Of the upright image or the frame, in pixels.
    detections : Detections
        What was found, by falling score.
    frame : int, optional
        Number of the frame in its video, from 0.
    seconds : float, optional
        Time of the frame from the beginning of the video.
    """

    image: Path
    height: int
    width: int
    detections: Detections
    frame: int | None = None
    seconds: float | None = None


def write_predictions(
    predictions: Sequence[Prediction],
    classes: Sequence[str],
    format: PredictionFormat,
    path: Path | None,
    *,
    scores: ScoreKind = "probability",
) -> list[Path]:
    """Write what was detected in the format of another tool, or as JSON or CSV.

    Parameters
    ----------
    predictions : sequence of Prediction
        In any order, also those without detections.
    classes : sequence of str
        All classes there are; their numbers follow this order.
    format : {"csv", "coco", "voc", "yolo", "labelstudio", "json"}
        ``json``: the whole of it, as docs/results.schema.json says. ``csv``: a row for each box, that
        `read_dataset` opens; an image without boxes has a row without corners. ``coco``: a file of images,
        annotations with ``score``, and categories. ``labelstudio``: tasks with predictions, and beside them
        the XML of the interface. ``voc``: ``Annotations`` with an XML file for each image. ``yolo``:
        ``labels`` with a text file for each image and ``classes.txt``, and ``data.yaml``; neither of the two
        holds scores. Boxes are written so that they come back equal.
    path : Path or None
        The file to write; of ``voc`` and ``yolo`` a folder, empty or yet to be made. None prints: only the
        formats of one file, and no interface of Label Studio.
    scores : {"probability", "svm"}
        What the scores are. JSON says it; no other format has a place for it.

    Returns
    -------
    list of Path
        The files written; none where it is printed.

    Raises
    ------
    SppnetError
        As `check_predictions`; if a label is not among `classes`, or a number is not finite.
    OSError
        If a file cannot be written.
    """
    check_predictions(list(dict.fromkeys(p.image for p in predictions)), classes, format, path)
    _check_content(predictions, classes)
    if format == "json":
        return _written(json_content(predictions, scores), path)
    entries = _entries(predictions, format, path)
    if format == "csv":
        return _printed(csv_text(entries)) if path is None else write_csv(path, entries)
    if format == "coco":
        return _written(coco_content(entries, classes), path)
    if path is None:
        return _written(label_studio_tasks(entries), None)
    if format == "labelstudio":
        return write_label_studio(path, entries, classes)
    with atomic_folder(path) as folder:
        files = write_voc(folder, entries) if format == "voc" else write_yolo(folder, entries, classes)
    return [path / file.relative_to(folder) for file in files]


def check_predictions(
    images: Sequence[Path], classes: Sequence[str], format: PredictionFormat, path: Path | None
) -> None:
    """Raise now, before long work, what `write_predictions` would raise after it.

    Parameters
    ----------
    images : sequence of Path
        The images that will be looked at, each once.
    classes, format, path
        As in `write_predictions`.

    Raises
    ------
    SppnetError
        If there is no such format, the path has another suffix than its files, or the format cannot hold
        the name of an image or a class.
    OSError
        If the path cannot be written; if what is to become a folder is there and not empty.
    """
    check_choice("format", format, get_args(PredictionFormat))
    if format in _SUFFIXES and path is not None:
        check_suffix(path, _SUFFIXES[format], f" for {format}")
        check_writable(path)
    if format in _FOLDERS:
        if path is None:
            raise SppnetError(f"found no place for {format}, which is many files, expected a folder")
        check_new_folder(path)
        check_stems(names_below(images), format)
        check_lines(classes, format)
    if format == "voc":
        check_xml([*map(os.path.abspath, images), *classes], format)
    if format == "labelstudio":
        check_xml(classes, format)


def json_content(predictions: Sequence[Prediction], scores: ScoreKind = "probability") -> dict[str, Any]:
    r"""Return predictions as our JSON has them, docs/results.schema.json.

    A name that is no UTF-8 has a lone surrogate ``\udc80`` to ``\udcff`` for each byte that does not fit,
    which `os.fsencode` turns back.
    """
    images = []
    for image, height, width, detections, frame, seconds in predictions:
        moment = {"frame": frame, "seconds": seconds}
        about = {name: value for name, value in moment.items() if value is not None}
        size = {"height": height, "width": width}
        images.append({"image": str(image), **size, **about, "detections": detections.facts()})
    return {"version": JSON_VERSION, "scores": scores, "images": images}


def write_counts(predictions: Sequence[Prediction], classes: Sequence[str], path: Path) -> None:
    """Write how many objects of each class were found in each image, as a CSV file for a spreadsheet.

    Parameters
    ----------
    predictions : sequence of Prediction
        A row each, in their order; frames of videos have their number and time.
    classes : sequence of str
        A column each, in their order; the last column is the sum of a row, the last row that of a column.
    path : Path
        The file, with the suffix ``.csv``; replaced if it exists.

    Raises
    ------
    SppnetError
        If the suffix is another, or a label is not among `classes`.
    OSError
        If it cannot be written.
    """
    check_suffix(path, ".csv", " for counts")
    _check_content(predictions, classes)
    moments = any(p.frame is not None for p in predictions)
    rows: list[list[object]] = []
    totals: Counter[str] = Counter()
    for p in predictions:
        counts = Counter(p.detections.labels)
        totals += counts
        moment = [p.frame, p.seconds] if moments else []
        rows.append([str(p.image), *moment, *(counts[name] for name in classes), len(p.detections)])
    last = [totals[name] for name in classes]
    rows.append(["total", *([""] * 2 if moments else []), *last, sum(last)])
    columns = ["image", *(["frame", "seconds"] if moments else []), *classes, "total"]
    with atomic_path(path) as temporary:
        temporary.write_bytes(csv_bytes(table_text(columns, rows)))


def _check_content(predictions: Sequence[Prediction], classes: Sequence[str]) -> None:
    """Raise a `SppnetError` for labels that are no class, and numbers that no file can hold."""
    known = set(class_names(classes))
    for p in predictions:
        unknown = sorted(set(p.detections.labels) - known)
        if unknown:
            raise SppnetError(f"{p.image}: found the label {unknown[0]!r}, {expected_classes(classes)}")
        if not (np.isfinite(p.detections.boxes).all() and np.isfinite(p.detections.scores).all()):
            raise SppnetError(f"{p.image}: found a box or score that is not finite, expected numbers")


def _entries(predictions: Sequence[Prediction], format: PredictionFormat, path: Path | None) -> list[Entry]:
    """Return predictions as entries: frames by the names that images of them would have."""
    entries = []
    names = names_below([p.image for p in predictions])
    for name, (image, height, width, found, frame, seconds) in zip(names, predictions, strict=True):
        if frame is not None and format != "csv":
            name, image = f"{stem(name)}-{frame:06d}.jpg", image.with_name(f"{image.stem}-{frame:06d}.jpg")
        places = {"voc": os.path.abspath(image), "yolo": f"images/{name}"}
        if format == "csv":
            places["csv"] = str(image) if path is None else _relative(image, path.parent)
        target = Target.of(found.boxes, found.labels)
        place = places.get(format, name)
        entries.append(Entry(name, place, height, width, target, found.scores, None, frame, seconds))
    return entries


def _relative(image: Path, folder: Path) -> str:
    """Return the path of an image relative to a folder; absolute if it was, or lies on another drive."""
    try:
        return str(image) if image.is_absolute() else Path(os.path.relpath(image, folder)).as_posix()
    except ValueError:
        return os.path.abspath(image)


def _written(content: Any, path: Path | None) -> list[Path]:
    """Write JSON to a file, or print it."""
    if path is None:
        return _printed(json_text(content))
    write_json(path, content)
    return [path]


def _printed(text: str) -> list[Path]:
    """Print text with the bytes of names as they are."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
        sys.stdout.buffer.flush()
    else:
        sys.stdout.write(text)
    return []
