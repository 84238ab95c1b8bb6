"""What is to be embedded: image files, whole or some boxes of them, with the labels that they have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sppnet.arrays import Boxes
from sppnet.datasets.image_folder import read_image_folder
from sppnet.datasets.reading import dataset_format, read_dataset
from sppnet.errors import SppnetError
from sppnet.images import SUFFIXES, find_images, image_size

_TABLES = (".csv", ".json", ".yaml", ".yml")


class Job(NamedTuple):
    """An image to embed: whole or some boxes of it, and the label of each row."""

    path: Path
    boxes: Boxes | None
    labels: tuple[str, ...]

    def embedded(self) -> Boxes:
        """Return the (R, 4) boxes that its vectors stand for."""
        if self.boxes is not None:
            return self.boxes
        height, width = image_size(self.path)
        return np.array([[0, 0, width, height]], np.float32)


def read_jobs(
    sources: Sequence[str | Path], boxes: str | Path | None, split: str | None
) -> tuple[list[Job], tuple[str, ...]]:
    """Return the images to embed, and notes on what was left out; see `sppnet.retrieval.embed.embed`."""
    return _whole_images(sources, split) if boxes is None else _boxes(Path(boxes), split, sources)


def _whole_images(sources: Sequence[str | Path], split: str | None) -> tuple[list[Job], tuple[str, ...]]:
    """Return the images to embed, with the labels that folders of classes give them, and notes."""
    if not sources:
        raise SppnetError("found no image, expected image files, folders or patterns, or boxes")
    place = Path(sources[0])
    if len(sources) > 1 or not _is_dataset(place):
        paths, notes = find_images(sources)
        return [Job(path, None, ("",)) for path in _distinct(paths)], notes
    if dataset_format(place) is not None:
        dataset = read_dataset(place, split)
        return [Job(sample.path, None, ("",)) for sample in dataset], dataset.notes
    labelled = read_image_folder(place, split)
    return [Job(path, None, (labelled.classes[label],)) for path, label in labelled], labelled.notes


def _is_dataset(place: Path) -> bool:
    """Tell a folder of folders, or a table, from images and a folder of images."""
    if place.is_dir():
        return not any(path.suffix.lower() in SUFFIXES for path in place.iterdir())
    return place.suffix.lower() in _TABLES


def _boxes(
    place: Path, split: str | None, sources: Sequence[str | Path]
) -> tuple[list[Job], tuple[str, ...]]:
    """Return the images with boxes, all of a data set or some, with the boxes' labels, and notes."""
    dataset = read_dataset(place, split)
    own = _distinct([sample.path for sample in dataset])
    targets = {sample.path.resolve(): sample.target for sample in dataset if sample.target.labels}
    paths, beside = find_images(sources) if sources else (own, ())
    found = [(path, targets[path.resolve()]) for path in _distinct(paths) if path.resolve() in targets]
    if not found:
        raise SppnetError(f"{place}: found no box of the {len(paths)} images, expected some")
    notes = (*dataset.notes, *beside)
    if len(found) < len(paths):
        notes = (*notes, f"images without boxes, left out: {len(paths) - len(found)}")
    return [Job(path, target.boxes, target.labels) for path, target in found], notes


def _distinct(paths: Sequence[Path]) -> Sequence[Path]:
    """Return the paths, unless two are one file."""
    files: dict[Path, Path] = {}
    for path in paths:
        first = files.setdefault(path.resolve(), path)
        if first is not path:
            raise SppnetError(f"{path}: found the same file as {first}, expected each image once")
    return paths
