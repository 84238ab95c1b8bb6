"""A data set of any format, recognised by what lies there."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from sppnet.datasets.coco import COCO
from sppnet.datasets.createml import CREATEML
from sppnet.datasets.csv import CSV
from sppnet.datasets.cvat import CVAT
from sppnet.datasets.findings import Findings, as_dataset_error
from sppnet.datasets.finishing import finish
from sppnet.datasets.label_studio import LABEL_STUDIO
from sppnet.datasets.labelme import LABELME
from sppnet.datasets.records import Dataset, Sample
from sppnet.datasets.splits import pick_split, same_split
from sppnet.datasets.supervisely import SUPERVISELY
from sppnet.datasets.tree import PROJECT, Layout, Tree, is_of_page
from sppnet.datasets.tree import Format as FormatReader
from sppnet.datasets.via import VIA
from sppnet.datasets.voc import VOC
from sppnet.datasets.yolo import YOLO
from sppnet.errors import DatasetError, SppnetError, check_choice
from sppnet.images import SUFFIXES

Format = Literal[
    "voc", "coco", "yolo", "csv", "labelme", "labelstudio", "via", "cvat", "createml", "supervisely"
]

_FORMATS = {
    **{"voc": VOC, "coco": COCO, "yolo": YOLO, "csv": CSV, "labelme": LABELME, "labelstudio": LABEL_STUDIO},
    **{"via": VIA, "cvat": CVAT, "createml": CREATEML, "supervisely": SUPERVISELY},
}
_ADVICE = "annotate them with a tool that writes one of these, such as LabelImg, CVAT or Label Studio"


def read_dataset(
    root: str | Path,
    split: str | None = None,
    *,
    format: Format | None = None,
    photos: bool = True,
    max_bad: float = 0.01,
    pages: bool = True,
) -> Dataset:
    """Read a detection data set, recognising its format by the content of its files, in whatever folders.

    - VOC: XML files of ``<annotation>``, beside the photos or apart. The splits are the files
      ``ImageSets/Main/<split>.txt``, or else folders named ``train``, ``valid``, ``val`` or ``test``.
    - COCO: JSON files of images, annotations and categories. Each is a split, named by its folder
      (``train/_annotations.coco.json``) or itself (``instances_<split>.json``, ``train.json``).
    - YOLO: text files with a line for each object, and a YAML file with ``names``, whose ``train``, ``val``
      and ``test`` are the splits; or an ``obj.data``; or ``classes.txt`` or ``obj.names``, where folders are
      the splits. Polygons count as the boxes around them.
    - CSV: the columns ``path`` (relative to the file's folder, or absolute), ``x1, y1, x2, y2`` (pixels,
      0-based and half-open), and possibly ``label``, ``width``, ``height``, ``split``, ``difficult`` and
      ``crowd``; a line for each box, or one without corners for an image without boxes. Also the tables of
      TensorFlow (``filename, width, height, class, xmin, ...``), DeepForest, keras-retinanet (which do not
      name their columns) and Open Images (in shares of the image); with ``,``, ``;`` or tabs.
    - LabelMe: a JSON file beside each photo. VGG Image Annotator: a JSON file, project or export, or a CSV
      file; the class is the attribute that all regions have. Label Studio: a JSON file, full or JSON-MIN; the
      last annotation of a task counts. CVAT for images: an XML file. CreateML: JSON. Supervisely: JSON files
      in folders ``ann``. Of circles, polygons, turned boxes the box around them is taken; shapes without
      one, such as points, lines and brush strokes, are left out and counted.

    A photo is looked for by the path that is written, and then by its name in the whole folder: in a folder
    named after the split first, never in one named after another split, then where the last folders agree
    with what is written, then nearest to the file that names it. Of two that fit equally well, none is taken.

    Boxes are those of the upright photo. An annotated size is held against that of the photo: boxes drawn
    before EXIF turned the photo, or before it was shrunk, are turned and scaled with it. What was put right
    is counted in `Dataset.notes`: also boxes clipped to their image, and the same object annotated twice.
    Images without objects are kept as negatives; in YOLO folders also those without a label file.

    Parameters
    ----------
    root : path
        Folder, or one file that holds annotations.
    split : str, optional
        Name of the part to read, or a beginning that only one has (``train`` finds ``train2017``); ``"all"``
        for everything. Needed where there are several; the only one there is, or a data set without splits,
        is read without.
    format : {"voc", "coco", "yolo", "csv", "labelme", "labelstudio", "via", "cvat", ...}, optional
        Needed where a folder holds annotations in more than one.
    photos : bool
        Whether the photos are there to be looked at. Without them the annotated sizes count as they are, and
        a photo need not exist; only where no size is written, that of the photo is read.
    max_bad : float
        Share of photos that may be missing, unreadable, or of another size than annotated: they are left out,
        counted and named in `Dataset.notes`.
    pages : bool
        Whether boxes count that ``sppnet serve`` keeps in the folder ``sppnet-project`` of `root`; where they
        do, others beside them are an error.

    Raises
    ------
    DatasetError
        If there is no data set, no such split, no image, too many bad photos, or anything wrong in the files:
        a malformed file, two photos that a name may mean, a box that is inverted, empty, or wholly outside
        its image. Up to 10 errors are listed, a line each, under their total.
    FileNotFoundError
        If there is no `root`.
    """
    if not 0 <= max_bad <= 1:
        raise SppnetError(f"found {max_bad} as max_bad, expected a share from 0 to 1")
    findings = Findings()
    with as_dataset_error(), _without_collection():
        name, layout, tree = _recognised(root, format, photos, pages)
        chosen, part = pick_split(tree.root, layout.splits, layout.whole, split, layout.has_rest)
        records = layout.read(part, findings)
        samples, ids = finish(tree, records, findings, layout.splits, photos, max_bad)
    if not samples:
        within = f" in split {chosen!r}" if chosen else ""
        raise DatasetError(f"{root}: found no image{within}, expected at least one")
    if photos:
        tree.leave_out(lambda photo: chosen is None or _lies_in(photo, chosen))
    return _dataset(samples, ids, findings, tree, (name, chosen))


def dataset_splits(root: str | Path, *, format: Format | None = None, pages: bool = True) -> tuple[str, ...]:
    """List the splits of a detection data set, without reading its annotations.

    Parameters
    ----------
    root : path
        Folder or file, as `read_dataset` takes it.
    format : {"voc", "coco", "yolo", "csv"}, optional
        Needed where a folder can be read in more than one way.
    pages : bool
        As of `read_dataset`.

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
    return tuple(sorted(_recognised(root, format, False, pages)[1].splits))


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep Python from looking for garbage among records: most stay, and it took a quarter of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _dataset(
    samples: list[Sample],
    ids: list[int | str | None],
    findings: Findings,
    tree: Tree,
    read: tuple[str, str | None],
) -> Dataset:
    """Return samples as the data set of a format and a split, `read`."""
    classes = tuple(sorted({label for sample in samples for label in sample.target.labels}))
    for name in {*classes, *findings.numbers}:
        if any("\ud800" <= character <= "\udfff" for character in name):  # halves of letters, from JSON
            raise DatasetError(f"{tree.root}: found the class {name!r}, expected letters")
    names = [sample.name for sample in samples]
    told = [name if own is None else own for name, own in zip(names, ids, strict=True)]
    counted = tuple(f"{what}: {count}" for what, count in findings.counts.items() if count)
    return Dataset(
        tuple(samples),
        classes,
        tree.root,
        read[1],
        (*counted, *tree.left.notes()),
        findings.numbers or {name: i for i, name in enumerate(classes, 1)},
        # Several COCO files count their images each from 1.
        dict(zip(names, told if len(set(told)) == len(told) else names, strict=True)),
        read[0],
    )


def _lies_in(photo: str, split: str) -> bool:
    return any(same_split(folder, split) for folder in photo.split("/")[:-1])


def dataset_format(root: str | Path) -> str | None:
    """Tell whether there are annotations that `read_dataset` reads, without reading them.

    Parameters
    ----------
    root : path
        Folder or file.

    Returns
    -------
    str or None
        The name of their format; None if nothing is recognised.

    Raises
    ------
    DatasetError
        If there is more than one format, or what names the splits of one is wrong.
    FileNotFoundError
        If there is no `root`.
    """
    found = _located(_existing(root), _FORMATS)[0]
    return next(iter(found), None)


def _existing(root: str | Path, pages: bool = True) -> Tree:
    """Return the files of a data set, which must be there."""
    if not Path(root).exists():
        raise FileNotFoundError(f"{root}: found no such folder or file, expected a dataset")
    return Tree(Path(root), pages=pages)


def _recognised(
    root: str | Path, format: Format | None, photos: bool, pages: bool
) -> tuple[str, Layout, Tree]:
    """Return the format of a data set, what it understood, and the files."""
    tree = _existing(root, pages)
    tree.looks_up = photos
    if format is not None:
        check_choice("format", format, _FORMATS)
    wanted = {name: _FORMATS[name] for name in ([format] if format else _FORMATS)}
    found, fitting = _located(tree, wanted)
    if not found:
        raise DatasetError(f"{root}: found {_instead(tree, format, fitting)}")
    return *next(iter(found.items())), tree


def _located(
    tree: Tree, wanted: Mapping[str, FormatReader]
) -> tuple[dict[str, Layout], Mapping[str, Sequence[str]]]:
    """Return what the one format that is met understood, if any is, and the files that fit each format."""
    found: dict[str, Layout] = {}
    with as_dataset_error():
        fitting = tree.fitting(wanted)
        for name, names in fitting.items():
            layout = wanted[name].locate(tree, names) if names else None
            if layout is not None:
                found[name] = layout
    _check_project(tree, fitting.get("voc", ()), [found[name].shown for name in found if name != "voc"])
    if len(found) > 1:
        both = " and ".join(f"{name} data ({layout.shown})" for name, layout in found.items())
        raise DatasetError(f"{tree.root}: found {both}, expected one: name its file or folder, or format=")
    return found, fitting


def _check_project(tree: Tree, voc: Sequence[str], others: Sequence[str]) -> None:
    """Raise a `DatasetError` if there are the boxes of a page and others: whoever put some right wants one.

    Parameters
    ----------
    tree : Tree
    voc : sequence of str
        The files that fit the format that a page writes.
    others : sequence of str
        Of each other format that is there a file.
    """
    others = [*(name for name in voc if not is_of_page(name)), *others]
    if tree.root.is_dir() and others and any(map(is_of_page, voc)):
        both = f"found the boxes of sppnet serve ({PROJECT}) and others ({others[0]})"
        page = f"name {tree.root / PROJECT} for those of the page"
        raise DatasetError(f"{tree.root}: {both}, expected one: {page}, or a file or folder of others")


def _instead(tree: Tree, format: Format | None, fitting: Mapping[str, Sequence[str]]) -> str:
    """Say what lies where no data set was found, and what is expected."""
    if fitting.get("yolo"):
        found = f"YOLO boxes ({fitting['yolo'][0]}) and no names of their classes"
        return f"{found}, expected data.yaml, obj.names or classes.txt"
    looks = f"{format}: {_FORMATS[format].looks}" if format else f"boxes in one of {', '.join(_FORMATS)}"
    if tree.root.is_file():
        suffix = tree.root.suffix.lower()
        found = "an image" if suffix in SUFFIXES else f"a {suffix} file of none of the formats known here"
        return f"{found}, expected {looks}"
    count = len(tree.photos.names) if tree.photos.base == tree.base else 0
    if not count:
        return f"no dataset, expected {looks}"
    images = f"{count} image{'s' * (count > 1)}"
    return f"{images} and no annotations known here, expected {looks}; {_ADVICE}"
