"""Boxes and detections of a project as files that other programs open."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sppnet.boxes import Detections, Target
from sppnet.datasets.predictions import Prediction, write_counts, write_predictions
from sppnet.datasets.records import Dataset, Sample
from sppnet.datasets.writing import write_dataset
from sppnet.serve.errors import Refused

if TYPE_CHECKING:
    from sppnet.serve.labels import Labels
    from sppnet.serve.results import ResultList
    from sppnet.serve.schema import ExportFormat, ExportWhat, Found

_SUFFIXES = {"csv": ".csv", "coco": ".json", "labelstudio": ".json", "json": ".json", "voc": "", "yolo": ""}


class Exporter:
    """Writes what is known of a project's photos.

    Parameters
    ----------
    labels : Labels
    results : ResultList
    """

    def __init__(self, labels: Labels, results: ResultList) -> None:
        self.labels, self.photos, self.results = labels, labels.photos, results

    def write(self, what: ExportWhat, format: ExportFormat, with_photos: bool, place: Path) -> Path:
        """Write boxes or detections, and return the file: what is several files becomes a ZIP archive.

        Parameters
        ----------
        what : {"boxes", "detections"}
            What people said, or what the model in use finds at the thresholds, but for what was rejected.
        format : {"csv", "coco", "voc", "yolo", "labelstudio", "json"}
        with_photos : bool
            Whether copies of the labelled photos come with their boxes.
        place : Path
            An empty folder.

        Raises
        ------
        Refused
            If there is nothing to write.
        SppnetError
            If the format cannot hold a name.
        """
        folder = place / what
        if what == "boxes" and format != "json":
            write_dataset(self.dataset(), folder, format, "copy" if with_photos else "none")
        else:
            folder.mkdir()
            predictions = self.predictions() if what == "detections" else self._as_predictions()
            name = f"{what}{_SUFFIXES[format]}" if _SUFFIXES[format] else format
            write_predictions(predictions, self._classes(predictions), format, folder / name)
        return _packed(folder, place, f"{what}-{format}")

    def counts(self, place: Path) -> Path:
        """Write how many objects of each class the model in use finds in each photo, as a CSV file."""
        predictions, path = self.predictions(named=True), place / "counts.csv"
        write_counts(predictions, self._classes(predictions), path)
        return path

    def dataset(self) -> Dataset:
        """Return the labelled photos as `sppnet.read_dataset` gives them.

        Raises
        ------
        Refused
            If there are none.
        """
        samples = [self._sample(photo) for photo in self.photos.all("(boxes > 0 OR reviewed)")]
        if not samples:
            raise Refused(409, "no labelled photo", "some boxes first")
        classes = tuple(sorted({label for sample in samples for label in sample.target.labels}))
        places = {name: place for place, name in enumerate(classes, 1)}
        names = {sample.name: sample.name for sample in samples}
        root = next(iter(self.photos.folders.values())).root
        return Dataset(tuple(samples), classes, root, None, (), places, names)

    def _sample(self, photo: str) -> Sample:
        known, (width, height) = self.labels.of(photo), self.photos.size(photo)
        target = Target.of([box.box for box in known.boxes], [box.label for box in known.boxes])
        row = self.photos.row(photo)
        return Sample(os.path.splitext(row["name"])[0], self.photos.path(photo), target, (height, width))

    def predictions(self, *, named: bool = False) -> list[Prediction]:
        """Return what the model in use finds in each photo, at the thresholds.

        Parameters
        ----------
        named : bool
            Whether photos are given by their names below their folder, in place of where they lie.

        Raises
        ------
        Refused
            If there is no model.
        """
        found = self.results.all()
        if found.model is None:
            raise Refused(409, "no model", "a fit first, or a model to begin with")
        predictions = []
        for photo in self.photos.all("state = 'encoded'"):
            shown = _shown(found.photos.get(photo, []), found.thresholds)
            predictions.append(self._prediction(photo, shown, named))
        return predictions

    def _as_predictions(self) -> list[Prediction]:
        """Return boxes that people drew as detections that are certain."""
        found = []
        for sample in self.dataset():
            target, (height, width) = sample.target, sample.size or (0, 0)
            sure = Detections(target.boxes, np.ones(len(target.labels), np.float32), target.labels)
            found.append(Prediction(sample.path, height, width, sure))
        return found

    def _prediction(self, photo: str, found: Sequence[Found], named: bool) -> Prediction:
        width, height = self.photos.size(photo)
        row = self.photos.row(photo)
        path = Path(row["name"] if named else self.photos.place(row))
        boxes = np.array([one.box for one in found], np.float32).reshape(-1, 4)
        scores = np.array([one.score for one in found], np.float32)
        return Prediction(path, height, width, Detections(boxes, scores, tuple(one.label for one in found)))

    def _classes(self, predictions: Sequence[Prediction]) -> list[str]:
        """Return the classes of the project and of predictions, the former first."""
        met = (label for one in predictions for label in one.detections.labels)
        return list(dict.fromkeys([*(one.name for one in self.labels.classes()), *met]))


def _shown(found: Sequence[Found], thresholds: Mapping[str, float]) -> list[Found]:
    return [one for one in found if one.state != "rejected" and one.score >= thresholds[one.label]]


def _packed(folder: Path, place: Path, name: str) -> Path:
    """Return the one file of a folder, or a ZIP archive of all of them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if len(files) == 1:
        return files[0].rename(place / f"{name}{files[0].suffix}")
    archive = place / f"{name}.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in files:
            packed.write(path, path.relative_to(folder))
    return archive
