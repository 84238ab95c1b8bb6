"""What to learn from where no split is named: the one for training, if there is one, and else everything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sppnet.datasets.image_folder import LabelledImages, image_folder_splits, read_image_folder
from sppnet.datasets.reading import dataset_splits, read_dataset
from sppnet.datasets.records import Dataset
from sppnet.datasets.splits import default_training_split
from sppnet.datasets.summary import summarise

_VALIDATION = ("val", "valid", "validation")


def read_training_data(root: str | Path, split: str | None = None, *, max_bad: float = 0.01) -> Dataset:
    """Read the part of a detection data set to learn from.

    Parameters
    ----------
    root : path
        Folder or file, as `sppnet.read_dataset` takes it.
    split : str, optional
        The part to learn from; by default the one that `default_training_split` chooses, the only one there
        is, or everything where there are no splits.
    max_bad : float
        As in `sppnet.read_dataset`.

    Returns
    -------
    Dataset
        The first of its notes tells what is learned from: the format, the split, and what it holds.

    Raises
    ------
    DatasetError, FileNotFoundError
        As `sppnet.read_dataset` does.
    """
    chosen = default_training_split(dataset_splits(root)) if split is None else split
    data = read_dataset(root, chosen, max_bad=max_bad)
    told = _told(f"{root} ({data.format})", data.split, summarise(data).short)
    return replace(data, notes=(told, *data.notes))


def read_training_images(
    root: str | Path, split: str | None = None, validation: str | None = None
) -> tuple[LabelledImages, LabelledImages | None]:
    """Read the labelled images to learn from, and those that tell how far the learning is.

    Parameters
    ----------
    root : path
        Folder or file, as `sppnet.read_image_folder` takes it.
    split : str, optional
        The part to learn from; by default as in `read_training_data`.
    validation : str, optional
        The part for validation, or ``"none"``; by default val, where no split is named and there is one.

    Returns
    -------
    tuple of LabelledImages, and LabelledImages or None

    Raises
    ------
    DatasetError, FileNotFoundError
        As `sppnet.read_image_folder` does.
    """
    splits = image_folder_splits(root)
    if split is None and validation is None:
        validation = next((name for name in _VALIDATION if name in splits), None)
    chosen = default_training_split(splits) if split is None else split
    images = read_image_folder(root, chosen)
    if split is None:
        images = replace(images, notes=(_told(str(root), chosen, f"{len(images)} photos"), *images.notes))
    return images, None if validation in (None, "none") else read_image_folder(root, validation)


def _told(root: str, split: str | None, what: str) -> str:
    part = f"the split {split}:" if split else "everything, as there is no split for training:"
    return f"{root}: learning from {part} {what}"
