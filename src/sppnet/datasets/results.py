"""Results: what was detected elsewhere, as the VOC development kit and the COCO tools exchange it.

They are written by `write_voc_results` and `write_coco_results`, beside the readers of the same formats.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from sppnet.boxes import Detections
from sppnet.datasets.coco import read_coco_results
from sppnet.datasets.findings import Scored
from sppnet.datasets.records import Dataset, class_names
from sppnet.datasets.voc import read_voc_results


def read_results(path: str | Path, dataset: Dataset, classes: Collection[str] = ()) -> dict[str, Detections]:
    """Read the detections of a COCO results file, or of a folder of VOC results.

    Parameters
    ----------
    path : path
        A JSON file, whose images are given by their COCO id, sample name or file stem and whose categories by
        id (`Dataset.category_ids`) or name; or a folder with ``comp<N>_det_<split>_<class>.txt``.
    dataset : Dataset
        What the detections were made on.
    classes : collection of str
        Names to accept besides those of the dataset: a detector may know classes that a split does not show.

    Returns
    -------
    dict from str to Detections
        For the name of every sample, by falling score; without detections where the file has none.

    Raises
    ------
    SppnetError
        If an image or a class is unknown or an entry malformed; names file and line.
    FileNotFoundError
        If there is no `path`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: found no such file or folder, expected results")
    names = {*dataset.category_ids, *class_names(classes)}
    found = (read_voc_results if path.is_dir() else read_coco_results)(path, dataset, names)
    return {image: _detections(rows) for image, rows in found.items()}


def _detections(rows: Sequence[Scored]) -> Detections:
    """Return detections by falling score; equal ones keep their order."""
    ordered = sorted(rows, key=lambda row: -row.score)
    return Detections(
        np.array([row.box for row in ordered], np.float32).reshape(-1, 4),
        np.array([row.score for row in ordered], np.float32),
        tuple(row.label for row in ordered),
    )
