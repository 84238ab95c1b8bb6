"""Many images through a detector, or an ensemble of them: each read ahead, and all together measured."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from sppnet.arrays import Boxes, Image, Pixels
from sppnet.boxes import Detections
from sppnet.datasets.records import Sample
from sppnet.detection.calibration import Scores
from sppnet.errors import SppnetError
from sppnet.evaluation.detection import DetectionReport, evaluate_detections
from sppnet.images import pixels_of
from sppnet.parallel import TOGETHER, Runner, Staged, Threads, thread_count
from sppnet.pooling.regions import load_kernels
from sppnet.progress import StageTimer, Track, no_track
from sppnet.proposals.maps import MAPS
from sppnet.proposals.method import Proposer

# Images at once, at most: more take memory, and several cores do one image well together.
_AT_ONCE = 4
_Prepared = tuple[Pixels, Boxes | None] | Exception


@dataclass(frozen=True)
class Asked:
    """How many images are looked at.

    Attributes
    ----------
    method : Proposer or None
        What proposes windows from the pixels; None where the detector's maps do.
    options : mapping of str
        What else `predict` is told, such as ``threshold``.
    timer : StageTimer
        Takes the seconds by stage.
    """

    method: Proposer | None
    options: Mapping[str, Any] = field(default_factory=dict)
    timer: StageTimer = field(default_factory=StageTimer)


class Predictor(ABC):
    """What detects: a detector, several of them, or one that looks several times.

    Attributes
    ----------
    device : str
        Where maps are computed: ``cpu``, or a PyTorch device.
    """

    device: str

    @property
    @abstractmethod
    def classes_(self) -> tuple[str, ...]:
        """Names of the classes."""

    @property
    @abstractmethod
    def thresholds_(self) -> npt.NDArray[np.float32]:
        """Least probability of a detection of each class, unless another is asked for."""

    @property
    @abstractmethod
    def predict(self) -> Callable[..., Detections]:
        """Detect objects in one image."""

    @abstractmethod
    def proposer(self, proposals: str | None = None) -> Proposer | None:
        """Return what proposes windows from pixels, by another method if asked; None where the maps do."""

    @abstractmethod
    def for_threads(self, count: int) -> Self:
        """Return the same for `count` threads at once, on the CPU each with its share of the cores."""

    @abstractmethod
    def prepare(self) -> None:
        """Do now what the first image would wait for."""

    @abstractmethod
    def seen(self, data: Sequence[Sample]) -> int:
        """Return how many of some images are among those that it was fitted on."""

    def stream(
        self,
        images: Iterable[Image],
        *,
        proposals: str | None = None,
        regress: bool = True,
        threshold: float | None = None,
        scores: Scores = "probability",
        timer: StageTimer | None = None,
        cluster: Runner | None = None,
    ) -> Iterator[tuple[Pixels, Detections] | Exception]:
        """Detect in many images: on the CPU as many at once as there are cores, at most four.

        Parameters
        ----------
        images : iterable of whatever `predict` takes
            The images; twice as many are in memory as are looked at.
        proposals : str, optional
            Other candidate windows than its own.
        regress, threshold, scores, timer
            See `predict`; of a cluster, the seconds by stage stay with its workers.
        cluster : Runner, optional
            Whose workers look at them, see `sppnet.cluster.Cluster`; by default this process.

        Yields
        ------
        (pixels, Detections), or the SppnetError or OSError that an image gave
            In the order of the images.
        """
        options = {"regress": regress, "threshold": threshold, "scores": scores}
        asked = Asked(self.proposer(proposals), options, timer or StageTimer())
        return detect_each(self, images, asked, cluster)

    def evaluate(
        self,
        data: Sequence[Sample],
        *,
        proposals: str | None = None,
        regress: bool = True,
        max_bad: float = 0.01,
        track: Track = no_track,
        timer: StageTimer | None = None,
        cluster: Runner | None = None,
    ) -> DetectionReport:
        """Measure it on annotated images.

        Parameters
        ----------
        data : sequence of Sample
            The annotated images, such as `sppnet.read_dataset` reads: others than those of the fit, or the
            figures say little.
        proposals, regress, timer, cluster
            See `stream`.
        max_bad : float
            Share of the photos that may be unreadable; these are left out, with a warning.
        track : callable
            ``track(items, description)`` yields the items and may draw progress.

        Returns
        -------
        DetectionReport
            Of all that scores at least what a detection scores at all: -1.5 for SVMs on windows of another
            source. Its ``seen`` tells how many of the images it was fitted on, its ``left_out`` which could
            not be read.

        Raises
        ------
        SppnetError
            If more photos than `max_bad` allows cannot be read.
        """
        asked = Asked(self.proposer(proposals), {"regress": regress}, timer or StageTimer())
        return measure(self, data, asked, track, max_bad, cluster)


def detect_each(
    predictor: Predictor, images: Iterable[Image], asked: Asked, cluster: Runner | None = None
) -> Iterator[tuple[Pixels, Detections] | Exception]:
    """Detect in many images: as many at once as there are cores, at most four.

    Parameters
    ----------
    predictor : Predictor
        What detects.
    images : iterable of image
        See `sppnet.images.pixels_of`.
    asked : Asked
        How they are looked at; on a cluster the seconds by stage stay with the workers.
    cluster : Runner, optional
        Whose workers look at them; by default this process.

    Yields
    ------
    (pixels, Detections), or the SppnetError or OSError that an image gave
        In the order of the images.
    """
    return _run(_Detecting(predictor, asked), images, cluster)


@dataclass(frozen=True)
class _Finding:
    """The work of detecting in an image whose pixels nobody needs afterwards.

    Attributes
    ----------
    predictor : Predictor
    asked : Asked
    threads : int
        How many do it at once, each from reading to detections; 1: the next image is read meanwhile.
    """

    predictor: Predictor
    asked: Asked
    threads: int = 1
    together: ClassVar[int] = TOGETHER

    def open(self) -> Callable[[Image], Any]:
        """Return what detects in an image; get ready meanwhile."""
        predictor = self.predictor.for_threads(self.threads) if self.threads > 1 else self.predictor
        pool = ThreadPoolExecutor(1)
        # While the first image is read and its windows are proposed; and while its maps are computed.
        ready = pool.submit(predictor.prepare)
        pool.submit(load_kernels)
        pool.shutdown(wait=False)
        stages = Staged(partial(_prepare, self.asked), partial(self._detect, predictor, ready))
        # A plain function is done whole by each thread.
        return stages if self.threads == 1 else stages.__call__

    def _detect(self, predictor: Predictor, ready: Future[None], prepared: _Prepared) -> Any:
        if isinstance(prepared, Exception):
            return prepared
        ready.result()
        pixels, windows = prepared
        found = predictor.predict(
            pixels,
            windows,
            proposals=MAPS if windows is None else None,
            timer=self.asked.timer,
            **self.asked.options,
        )
        return self._result(pixels, found)

    def _result(self, pixels: Pixels, found: Detections) -> Any:
        return found


class _Detecting(_Finding):
    """The work of detecting in an image, whose pixels come back, too."""

    together: ClassVar[int] = 16

    def _result(self, pixels: Pixels, found: Detections) -> Any:
        return pixels, found


def _run(work: _Finding, images: Iterable[Image], cluster: Runner | None) -> Iterator[Any]:
    """Do work by the workers of a cluster, or else by threads, where there are images for them."""
    if cluster is not None:
        return cluster.stream(work, images, work.together)
    count = min(len(images), _AT_ONCE) if isinstance(images, Sized) else _AT_ONCE
    threads = max(1, min(count, thread_count())) if work.predictor.device == "cpu" else 1
    return Threads(threads).stream(replace(work, threads=threads), images)


def _prepare(asked: Asked, image: Image) -> _Prepared:
    try:
        with asked.timer("read"):
            pixels = pixels_of(image)
        if asked.method is None:
            return pixels, None
        with asked.timer("proposals"):
            return pixels, asked.method(pixels).boxes
    except (SppnetError, OSError) as error:
        # What a method says of pixels does not name their file.
        unnamed = isinstance(image, str | Path) and str(image) not in str(error)
        return SppnetError(f"{image}: {error}") if unnamed else error


class Looked(NamedTuple):
    """What was found in annotated images.

    Attributes
    ----------
    found : list of Detections
        Image by image.
    kept : list of Sample
        The images.
    bad : list of int
        Places of those that could not be read.
    """

    found: list[Detections]
    kept: list[Sample]
    bad: list[int]


def look(
    predictor: Predictor,
    data: Sequence[Sample],
    asked: Asked,
    track: Track,
    max_bad: float,
    cluster: Runner | None = None,
) -> Looked:
    """Detect in annotated images, by the workers of a cluster if there is one; warn of the unreadable ones.

    Raises
    ------
    SppnetError
        If more than the share `max_bad` of the images cannot be read.
    """
    looked, errors = Looked([], [], []), []
    stream = _run(_Finding(predictor, asked), [sample.image for sample in data], cluster)
    for i in track(range(len(data)), "Detecting"):
        result = next(stream)
        if isinstance(result, Exception):
            looked.bad.append(i)
            errors.append(result)
            check_bad(errors, len(data), max_bad)
        else:
            looked.found.append(result)
            looked.kept.append(data[i])
    tell_bad(errors, len(data))
    return looked


def measure(
    predictor: Predictor,
    data: Sequence[Sample],
    asked: Asked,
    track: Track,
    max_bad: float,
    cluster: Runner | None = None,
) -> DetectionReport:
    """Detect in annotated images and measure how good that is; errors are those of `look`."""
    check_data(data)
    asked = replace(asked, options={**asked.options, "threshold": 0.0})
    found, kept, bad = look(predictor, data, asked, track, max_bad, cluster)
    targets, seen = [sample.target for sample in kept], predictor.seen(kept)
    stored = dict(zip(predictor.classes_, predictor.thresholds_.tolist(), strict=True))
    report = evaluate_detections(found, targets, predictor.classes_, seen, stored)
    return replace(report, left_out=tuple(bad))


def check_bad(bad: Collection[Exception], total: int, max_bad: float) -> None:
    """Raise an error that lists them if more than a share of some photos cannot be read."""
    if len(bad) > max_bad * total:
        raise SppnetError(
            f"found {len(bad)} of {total} photos that cannot be read, "
            f"expected at most {100 * max_bad:g} %: {'; '.join(map(str, bad))}"
        )


def tell_bad(bad: Collection[Exception], total: int) -> None:
    """Warn of the photos that are left out because they cannot be read."""
    if bad:
        listed = "; ".join(map(str, bad))
        warnings.warn(f"{len(bad)} of {total} photos left out, unreadable: {listed}", stacklevel=3)


def check_data(data: object) -> None:
    """Raise an error that says what helps where something else than a data set is given."""
    if isinstance(data, str | Path):
        raise SppnetError(f"found the path {str(data)!r}, expected a data set: read_dataset({str(data)!r})")
    if not isinstance(data, Sequence) or not all(isinstance(sample, Sample) for sample in data):
        kind = type(data).__name__
        raise SppnetError(f"found {kind}, expected a data set: what read_dataset gives, or a list of Sample")
