"""Many images through a detector, or an ensemble of them: each read ahead, and all together measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from sppnet.arrays import Boxes, Image, Pixels
from sppnet.boxes import Detections
from sppnet.datasets.records import Sample
from sppnet.errors import SppnetError
from sppnet.evaluation.detection import DetectionReport, evaluate_detections
from sppnet.images import pixels_of
from sppnet.parallel import in_order
from sppnet.pooling.regions import load_kernels
from sppnet.progress import StageTimer, Track
from sppnet.proposals.maps import MAPS
from sppnet.proposals.method import Proposer

# The least score of a detection, as in the released code; at 0 an SVM is undecided.
LEAST_SCORE = -1.5


class Predictor(Protocol):
    """What a detector and an ensemble of detectors have in common."""

    @property
    def classes_(self) -> tuple[str, ...]:
        """Names of the classes."""
        ...

    def prepare(self) -> None:
        """Do now what the first image would wait for."""
        ...

    def predict(
        self,
        image: Pixels,
        windows: Boxes | None,
        *,
        proposals: str | None,
        regress: bool,
        threshold: float,
        timer: StageTimer,
    ) -> Detections:
        """Detect objects in one image."""
        ...

    def seen(self, data: Sequence[Sample]) -> int:
        """Return how many of some images are among those that it was fitted on."""
        ...


@dataclass(frozen=True)
class Asked:
    """How many images are looked at.

    Attributes
    ----------
    method : Proposer or None
        What proposes windows from the pixels; None where the detector's maps do.
    regress : bool
        Whether boxes are moved by the box regression.
    threshold : float
        Least score of a detection.
    timer : StageTimer
        Takes the seconds by stage.
    """

    method: Proposer | None
    regress: bool = True
    threshold: float = LEAST_SCORE
    timer: StageTimer = field(default_factory=StageTimer)


def detect_each(
    predictor: Predictor, images: Iterable[Image], asked: Asked
) -> Iterator[tuple[Pixels, Detections] | Exception]:
    """Detect in many images; the next one is read, and its windows proposed, while one is looked at.

    Yields
    ------
    (pixels, Detections), or the SppnetError or OSError that an image gave
        In the order of the images.
    """
    with ThreadPoolExecutor(1) as pool:
        # While the first image is read and its windows are proposed; and while its maps are computed.
        ready = pool.submit(predictor.prepare)
        pool.submit(load_kernels)
        for prepared in in_order(partial(_prepare, asked), images, 1):
            if isinstance(prepared, Exception):
                yield prepared
                continue
            ready.result()
            pixels, windows = prepared
            found = predictor.predict(
                pixels,
                windows,
                proposals=MAPS if windows is None else None,
                regress=asked.regress,
                threshold=asked.threshold,
                timer=asked.timer,
            )
            yield pixels, found


def _prepare(asked: Asked, image: Image) -> tuple[Pixels, Boxes | None] | Exception:
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


def measure(predictor: Predictor, data: Sequence[Sample], asked: Asked, track: Track) -> DetectionReport:
    """Detect in annotated images and measure how good that is.

    Raises
    ------
    SppnetError, OSError
        From the first image that cannot be read.
    """
    check_data(data)
    found = []
    stream = detect_each(predictor, [sample.image for sample in data], asked)
    for _ in track(data, "Detecting"):
        result = next(stream)
        if isinstance(result, Exception):
            raise result
        found.append(result[1])
    targets = [sample.target for sample in data]
    return evaluate_detections(found, targets, predictor.classes_, seen=predictor.seen(data))


def check_data(data: object) -> None:
    """Raise an error that says what helps where something else than a data set is given."""
    if isinstance(data, str | Path):
        raise SppnetError(f"found the path {str(data)!r}, expected a data set: read_dataset({str(data)!r})")
    if not isinstance(data, Sequence) or not all(isinstance(sample, Sample) for sample in data):
        kind = type(data).__name__
        raise SppnetError(f"found {kind}, expected a data set: what read_dataset gives, or a list of Sample")
