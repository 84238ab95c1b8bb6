"""A data set of any format, recognised by what lies there."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal, NamedTuple

from sppnet.datasets.coco import coco_files, coco_splits, read_coco
from sppnet.datasets.csv import csv_files, csv_splits, read_csv
from sppnet.datasets.records import Dataset
from sppnet.datasets.voc import read_voc, voc_homes, voc_splits
from sppnet.datasets.yolo import read_yolo, yolo_files, yolo_splits
from sppnet.errors import DatasetError, check_choice
from sppnet.images import SUFFIXES

Format = Literal["voc", "coco", "yolo", "csv"]

_ADVICE = "annotate them with a tool that writes one of these, such as LabelImg, CVAT or Label Studio"


class _Known(NamedTuple):
    """A format: how to tell it, how to list its splits, how to read it, what it looks like."""

    locate: Callable[[Path], Collection[object]]
    splits: Callable[[Path], tuple[str, ...]]
    read: Callable[[Path, str | None], Dataset]
    looks: str


_FORMATS: dict[str, _Known] = {
    "voc": _Known(
        voc_homes,
        voc_splits,
        read_voc,
        "Annotations/*.xml and JPEGImages",
    ),
    "coco": _Known(
        coco_files,
        coco_splits,
        read_coco,
        "a .json file, annotations/instances_*.json or _annotations.coco.json",
    ),
    "yolo": _Known(
        yolo_files,
        yolo_splits,
        read_yolo,
        "data.yaml, dataset.yaml, or images, labels and classes.txt",
    ),
    "csv": _Known(
        csv_files,
        csv_splits,
        read_csv,
        "a .csv file of path, x1, y1, x2, y2",
    ),
}


def read_dataset(root: str | Path, split: str | None = None, *, format: Format | None = None) -> Dataset:
    """Read a detection data set, recognising its format.

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
        If there is no data set, no such split, no image, or anything wrong in its files: a missing image, a
        repeated image id, a malformed file, a box that is inverted, empty, or wholly outside its image. Up to
        10 errors are listed, a line each, under their total.
    FileNotFoundError
        If there is no `root`.
    """
    known, root = _recognised(root, format)
    return known.read(root, split)


def dataset_splits(root: str | Path, *, format: Format | None = None) -> tuple[str, ...]:
    """List the splits of a detection data set, without reading its annotations.

    Parameters
    ----------
    root : path
        Folder or file, as `read_dataset` takes it.
    format : {"voc", "coco", "yolo", "csv"}, optional
        Needed where a folder can be read in more than one way.

    Returns
    -------
    tuple of str
        Names that `read_dataset` takes as `split`, sorted; empty if the data set has no splits.
        `default_training_split` chooses the one to learn from.

    Raises
    ------
    DatasetError
        If there is no data set, or what names its splits is wrong.
    FileNotFoundError
        If there is no `root`.
    """
    known, root = _recognised(root, format)
    return known.splits(root)


def _recognised(root: str | Path, format: Format | None) -> tuple[_Known, Path]:
    """Return the format of a data set, and its path."""
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"{root}: found no such folder or file, expected a dataset")
    if format is not None:
        check_choice("format", format, _FORMATS)
    wanted = {name: _FORMATS[name] for name in ([format] if format else _FORMATS)}
    fitting = [name for name, known in wanted.items() if known.locate(root)]
    if not fitting:
        looks = "; or ".join(f"{name} ({known.looks})" for name, known in wanted.items())
        found = _instead(root)
        advice = "" if found == "no dataset" else f"; {_ADVICE}"
        raise DatasetError(f"{root}: found {found}, expected {looks}{advice}")
    if len(fitting) > 1:
        raise DatasetError(f"{root}: found {' and '.join(fitting)} data, expected format= to choose one")
    return wanted[fitting[0]], root


def _instead(root: Path) -> str:
    """Say what lies where no data set was found."""
    if root.is_file():
        return "an image" if root.suffix.lower() in SUFFIXES else "no dataset"
    photos = sum(
        os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")
        for _, _, names in os.walk(root)
        for name in names
    )
    return f"{photos} image{'s' * (photos > 1)} and no annotations known here" if photos else "no dataset"
