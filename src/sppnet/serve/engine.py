"""The process that knows the network: it encodes photos, finds what is alike, and detects.

It owns the warm backbone, the vectors of regions and the model in use. Several threads answer at once, so
that a search need not wait for the photo that is being encoded.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sppnet import Detector
from sppnet.errors import SppnetError
from sppnet.features.backbone import Backbone
from sppnet.features.cache import MapCache
from sppnet.features.encoded import EncodedImage
from sppnet.features.graph import STAGES, STRIDES
from sppnet.images import image_size, read_image
from sppnet.parallel import thread_count
from sppnet.pooling.regions import load_kernels
from sppnet.progress import StageTimer
from sppnet.serve.regions import RegionIndex
from sppnet.serve.settings import NETWORK, SIDE

LEAST = 0.05
"""Detections of a smaller probability are not kept."""

_KEPT = 64
# Maps of so many photos are kept on the disk, some 3 GB; those of others are computed where they are needed.
_MOST_MAPS = 5000


class Engine:
    """What the process answers.

    Parameters
    ----------
    folder : Path
        Of the project; maps and regions are kept in it.
    """

    def __init__(self, folder: Path) -> None:
        # A core for each photo: many photos take less time so than each on all cores (benchmarks/serve.py).
        self.threads = thread_count()
        self.backbone = Backbone.shared(NETWORK, STAGES, max(STRIDES)).for_threads(self.threads)
        self.backbone.compile()
        load_kernels()
        self.maps = MapCache(folder / "maps", self.backbone, (SIDE,), _MOST_MAPS)
        self.regions = RegionIndex(folder / "regions.sqlite")
        self._recent: OrderedDict[Path, tuple[int, EncodedImage]] = OrderedDict()
        self._models: OrderedDict[Path, Detector] = OrderedDict()
        self._lock = threading.Lock()

    def encode(self, photo: str, stamp: str, path: Path) -> tuple[int, int]:
        """Compute the maps of a photo and the vectors of its regions; return its height and width."""
        if self.regions.has(photo, stamp):
            return image_size(path)
        encoded = self._encoded(path)
        self.maps.remove(self.regions.add(photo, stamp, self.maps.name(path), encoded))
        return encoded.size

    def known(self, gone: list[str]) -> list[str]:
        """Drop the regions and maps of photos that are not there any more; return whose are known."""
        self.maps.remove(self.regions.remove(gone))
        return self.regions.photos()

    def search(self, photo: str, path: Path, box: tuple[float, ...], limit: int) -> dict[str, Any]:
        """Return the regions most like a region of a photo, at most three of each photo."""
        begun = time.perf_counter()
        query = self.regions.vector(self._encoded(path), np.array([box], np.float32))
        found = self.regions.nearest(query, photo, box, limit)
        regions = [{"photo": one, "box": place, "score": score} for one, place, score in found]
        return {"regions": regions, "seconds": time.perf_counter() - begun}

    def results(self, model: Path, path: Path) -> list[dict[str, Any]]:
        """Return what a model finds in a photo, down to a small probability."""
        detector = self._model(model)
        if detector.fitted_.backbone is self.backbone and detector.fitted_.side == SIDE:
            return detector.predict(self._encoded(path), threshold=LEAST).facts()
        return detector.predict(path, threshold=LEAST).facts()

    def detect(self, model: Path, path: Path, threshold: float | None, chosen: dict[str, float]) -> Any:
        """Return what a model finds in an image file, as our JSON has it.

        Parameters
        ----------
        model, path : Path
            The file of the detector, and of the image.
        threshold : float or None
            Least probability; None for those of the classes.
        chosen : dict of str to float
            Those that somebody chose in place of the model's own.
        """
        from sppnet.datasets.predictions import Prediction, json_content

        detector = self._chosen(model, chosen)
        pixels = read_image(path)
        found = detector.predict(pixels, threshold=threshold)
        height, width = pixels.shape[:2]
        return json_content([Prediction(Path("image"), height, width, found)])

    def embed(self, path: Path, boxes: list[tuple[float, ...]]) -> list[list[float]]:
        """Return the vectors of boxes of an image file, or of the whole of it."""
        encoded = self.backbone.encode(path, (SIDE,))
        height, width = encoded.size
        asked = np.array(boxes or [(0, 0, width, height)], np.float32)
        inside = np.clip(asked, 0, [width, height, width, height])
        if not ((inside[:, 2:] - inside[:, :2]) > 0).all():
            raise SppnetError(
                f"found a box outside the image, expected x1 < x2 <= {width} and y1 < y2 <= {height}"
            )
        vectors: list[list[float]] = self.regions.vector(encoded, inside).tolist()
        return vectors

    def annotations(self, folder: Path) -> list[tuple[str, list[tuple[Any, ...]]]]:
        """Return the annotations in a folder, in any format that is read: path, and boxes with labels."""
        from sppnet.datasets.reading import dataset_splits, read_dataset

        # Somebody may have drawn the first boxes already: those that lie beside the photos are meant.
        split = "all" if len(dataset_splits(folder, pages=False)) > 1 else None
        found = []
        for sample in read_dataset(folder, split, max_bad=1.0, pages=False):
            rows = zip(sample.target.boxes.tolist(), sample.target.labels, strict=True)
            found.append((str(sample.path), [(tuple(box), label) for box, label in rows]))
        return found

    def rename(self, model: Path, names: dict[str, str], out: Path) -> None:
        """Write a model with other names of classes."""
        self._model(model).renamed(names).save(out)

    def save(self, model: Path, thresholds: dict[str, float], out: Path) -> None:
        """Write a model with other thresholds."""
        self._chosen(model, thresholds).save(out)

    def report(
        self, model: Path, thresholds: dict[str, float], data: list[tuple[Any, ...]], out: Path
    ) -> None:
        """Write how good a model is on labelled photos as a page; it says on how many of them it was fitted.

        Parameters
        ----------
        model : Path
        thresholds : dict of str to float
            Those that somebody chose.
        data : list of `sppnet.serve.training.Example`
        out : Path
            The page.
        """
        from sppnet.drawing.report import write_detection_report
        from sppnet.serve.fitting import sample

        detector = self._chosen(model, thresholds)
        samples = [sample(*example) for example in data]
        report = detector.evaluate(samples, max_bad=0.5)
        quality, least = detector.fitted_.quality, detector.thresholds_.tolist()
        said = [f"{name} {quality.sentence(k, least[k])}" for k, name in enumerate(detector.classes_)]
        notes = [f"On photos not learned from: {'; '.join(said)}"]
        about = {"model": model.stem, "photos": str(len(samples)), "made by": "sppnet serve"}
        write_detection_report(report, samples, out, about=about, notes=notes)

    def describe(self, model: Path) -> dict[str, Any]:
        """Return what a model says of itself."""
        detector = self._model(model)
        mean_ap = detector.fitted_.quality.mean_ap
        return {
            "classes": list(detector.classes_),
            "thresholds": dict(zip(detector.classes_, detector.thresholds_.tolist(), strict=True)),
            "mean_ap": mean_ap if np.isfinite(mean_ap) else None,
        }

    def _loaded(self, path: Path) -> Detector:
        """Return the detector of a file, on the network that is warm already if it stands on that."""
        detector = Detector.load(path)
        own = detector.fitted_.backbone
        same = own.signature == self.backbone.signature
        detector.fitted_ = replace(
            detector.fitted_, backbone=self.backbone if same else own.for_threads(self.threads)
        )
        return detector

    def _encoded(self, path: Path) -> EncodedImage:
        """Return the maps of a photo, from memory if it was asked for lately."""
        stamp = path.stat().st_mtime_ns
        with self._lock:
            known = self._recent.get(path)
            if known is not None and known[0] == stamp:
                self._recent.move_to_end(path)
                return known[1]
        encoded = self.maps(path, StageTimer())
        with self._lock:
            self._recent[path] = stamp, encoded
            while len(self._recent) > _KEPT:
                self._recent.popitem(last=False)
        return encoded

    def _chosen(self, model: Path, thresholds: dict[str, float]) -> Detector:
        """Return a detector with the thresholds that somebody chose."""
        detector = self._model(model)
        known = {name: value for name, value in thresholds.items() if name in detector.classes_}
        return detector.with_thresholds(known) if known else detector

    def _model(self, path: Path) -> Detector:
        """Return a detector; the last few stay."""
        with self._lock:
            if path not in self._models:
                self._models[path] = self._loaded(path)
                while len(self._models) > 2:
                    self._models.popitem(last=False)
            return self._models[path]
