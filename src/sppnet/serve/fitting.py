"""The process that fits: a detector on the network as it comes, from maps that are on the disk already."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sppnet import Detector, Sample, Target
from sppnet.serve.settings import NETWORK, SIDE

# What a fit does, by what it says of itself, and about how much of the time each takes.
_STAGES = (
    ("Looking into the photos", 0.12),
    ("Reading photos", 0.03),
    ("Computing feature maps", 0.25),
    ("Computing feature maps", 0.15),
    ("Fitting box regression", 0.05),
    ("Mining hard negatives", 0.25),
    ("Scoring photos not learned from", 0.14),
)
# Seconds between two reports.
_OFTEN = 0.1


class Fitting:
    """What the process answers.

    Parameters
    ----------
    folder : Path
        Of the project; its maps are shared with the engine.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tell: Callable[[Any], None] = lambda event: None

    def fit(
        self, fit: str, examples: Sequence[Sequence[Any]], classes: list[str], out: Path
    ) -> dict[str, Any]:
        """Fit a detector, write it, and return what it says of itself.

        Parameters
        ----------
        fit : str
            What to call the fit in reports on how far it is.
        examples : sequence of `sppnet.serve.training.Example`
        classes : list of str
        out : Path
            The file to write.
        """
        progress = _Progress(fit, self.tell)
        data = [sample(*example) for example in examples]
        detector = Detector(NETWORK, scales=(SIDE,))
        detector.fit(data, classes=classes, max_bad=0.5, cache=self.folder / "maps", track=progress.track)
        detector.save(out)
        return described(detector, len(data))


def described(detector: Detector, photos: int) -> dict[str, Any]:
    """Return what a detector says of itself, in plain numbers; those that are not known are None."""
    quality, facts = detector.fitted_.quality, {}
    for k, name in enumerate(detector.classes_):
        threshold = float(detector.thresholds_[k])
        counts, measured = quality.at(k, threshold), bool(quality.objects[k])
        facts[name] = {
            "objects": counts.objects,
            "ap": _known(float(quality.average_precision[k])),
            "precision": _known(counts.precision) if measured else None,
            "recall": _known(counts.recall) if measured else None,
            "threshold": threshold,
            "hits": counts.hits,
            "words": quality.sentence(k, threshold),
        }
    return {
        "classes": list(detector.classes_),
        "thresholds": {name: one["threshold"] for name, one in facts.items()},
        "mean_ap": _known(quality.mean_ap),
        "photos": photos,
        "objects": int(detector.fitted_.objects.sum()),
        "quality": facts,
    }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def sample(
    path: str, width: int, height: int, boxes: Any, labels: Sequence[str], ignored: Sequence[bool]
) -> Sample:
    """Return a photo to learn from, or to measure on, of what was sent of it."""
    return Sample(path, Path(path), Target.of(boxes, labels, ignored), (height, width))


class _Progress:
    """Tells how far a fit is, by the stages that it goes through."""

    def __init__(self, fit: str, tell: Callable[[Any], None]) -> None:
        self.fit, self.tell = fit, tell
        self.begun, self.told = time.monotonic(), 0.0
        self.left = list(_STAGES)
        self.done = 0.0

    def track(self, items: Sequence[Any], description: str) -> Iterable[Any]:
        """Yield the items of a stage."""
        share = self._enter(description)
        for i, item in enumerate(items):
            self._say(description, self.done + share * i / len(items))
            yield item
        self.done += share
        self._say(description, self.done, True)

    def _enter(self, description: str) -> float:
        """Return the share of a stage; those that were passed over count as done."""
        place = next((i for i, (name, _) in enumerate(self.left) if name == description), None)
        if place is None:
            return 0.0
        self.done += sum(share for _, share in self.left[:place])
        share = self.left[place][1]
        del self.left[: place + 1]
        return share

    def _say(self, stage: str, share: float, always: bool = False) -> None:
        now = time.monotonic()
        if always or now - self.told >= _OFTEN:
            self.told = now
            self.tell({"fit": self.fit, "stage": stage, "share": round(min(share, 0.99), 3)})
