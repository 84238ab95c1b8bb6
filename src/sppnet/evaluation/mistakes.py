"""What a detector gets wrong, one by one: false alarms and misses, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sppnet.arrays import Boxes, FloatArray
from sppnet.boxes import Detections, Target, area, iou
from sppnet.evaluation.detection import FALSE_POSITIVE, TRUE_POSITIVE, check_lengths, match, of_class

# Areas in square pixels at which COCO's evaluation calls objects medium and large.
SIZES = {"small": 0.0, "medium": 32.0**2, "large": 96.0**2}
# Less overlap is chance: a box on something else, not a loose one (TIDE: Bolya et al., ECCV 2020).
_LOOSE = 0.1


class FalseAlarm(NamedTuple):
    """A detection that is wrong.

    Attributes
    ----------
    image : int
        Number of the image, from 0.
    label : str
        What it is said to be.
    box : (4,) float32
        Where.
    score : float
        How sure the detector is.
    reason : str
        ``"really NAME"`` on an object of another class, ``"loose box"`` on one of its own that it overlaps
        too little, ``"second box"`` on one that is found already, else ``"nothing there"``: the
        kinds of error of TIDE (Bolya et al., ECCV 2020).
    """

    image: int
    label: str
    box: Boxes
    score: float
    reason: str


class Miss(NamedTuple):
    """An object that was not found.

    Attributes
    ----------
    image : int
        Number of the image, from 0.
    label : str
        What it is.
    box : (4,) float32
        Where.
    score : float
        Best score of a detection of its class that fits it and scores too little to be shown; nan of none.
    reason : str
        ``"scores too little"`` where there is one, ``"taken for NAME"`` where something else is shown there,
        ``"loose box"`` where one of its class is shown that overlaps too little, ``"one box for two"`` where
        the box that fits it was given to an object that it fits better; else ``"not seen"``.
    """

    image: int
    label: str
    box: Boxes
    score: float
    reason: str


class Mistakes(NamedTuple):
    """Everything that is wrong at the thresholds.

    Attributes
    ----------
    false_alarms : tuple of FalseAlarm
        By falling score: the surest first.
    misses : tuple of Miss
        By rising score, those without one first; of equals the largest first.
    """

    false_alarms: tuple[FalseAlarm, ...]
    misses: tuple[Miss, ...]


def find_mistakes(
    detections: Sequence[Detections],
    targets: Sequence[Target],
    classes: Sequence[str],
    thresholds: Mapping[str, float],
    overlap: float = 0.5,
) -> Mistakes:
    """List the false alarms and the misses of detections; `match` says what is one.

    Parameters
    ----------
    detections, targets : sequences of one length
        What was found and what is there, image by image.
    classes : sequence of str
        The classes that count; detections of others are passed over.
    thresholds : mapping of str to float
        Least score of a detection of each class that is shown.
    overlap : float
        Least IoU of a hit.

    Returns
    -------
    Mistakes

    Raises
    ------
    SppnetError
        If the two sequences differ in length.
    """
    check_lengths("detections", detections, targets)
    alarms: list[FalseAlarm] = []
    misses: list[Miss] = []
    for i, (found, target) in enumerate(zip(detections, targets, strict=True)):
        shown = above_thresholds(found, thresholds)
        present = {*shown.labels, *target.labels}
        for name in (name for name in classes if name in present):
            scores, boxes, truth = of_class(name, shown, target)
            verdict = match(boxes, truth, overlap)
            wrong = np.flatnonzero(verdict == FALSE_POSITIVE)
            alarms += [
                FalseAlarm(i, name, boxes[j], float(scores[j]), _why_wrong(boxes[j], name, target, overlap))
                for j in wrong
            ]
            to_find = truth.boxes[~truth.ignored]
            hit = _taken(boxes[verdict == TRUE_POSITIVE], truth)
            for box in np.delete(to_find, hit, axis=0):
                score = _best_score(box, name, found, overlap)
                reason = _why_missed(box, name, shown, overlap, score, thresholds[name])
                misses.append(Miss(i, name, box, score, reason))
    alarms.sort(key=lambda a: -a.score)
    misses.sort(key=lambda m: (-math.inf if math.isnan(m.score) else m.score, -_area(m.box)))
    return Mistakes(tuple(alarms), tuple(misses))


def recall_by_size(
    targets: Sequence[Target], classes: Sequence[str], misses: Sequence[Miss]
) -> dict[str, tuple[int, int]]:
    """Count how many small, medium and large objects were found.

    Small is what covers less than 32 x 32 pixels, large what covers at least 96 x 96, as in COCO.

    Parameters
    ----------
    targets : sequence of Target
        What is there, image by image.
    classes : sequence of str
        The classes that count.
    misses : sequence of Miss
        Those of `find_mistakes` for the same images and classes.

    Returns
    -------
    dict of str to (int, int)
        For each of `SIZES`, how many were found, and how many there are.
    """
    wanted = frozenset(classes)
    there = [
        box
        for target in targets
        for box, name, ignored in zip(target.boxes, target.labels, target.ignored, strict=True)
        if name in wanted and not ignored
    ]
    objects, lost = ([_size(box) for box in boxes] for boxes in (there, [m.box for m in misses]))
    return {name: (objects.count(name) - lost.count(name), objects.count(name)) for name in SIZES}


def above_thresholds(found: Detections, thresholds: Mapping[str, float]) -> Detections:
    """Return the detections that score enough for their class; of a class without a threshold none does."""
    least = np.array([thresholds.get(name, math.nan) for name in found.labels], found.scores.dtype)
    return found[found.scores >= least]


def _taken(boxes: FloatArray, truth: Target) -> list[int]:
    """Return which objects to find the right detections of a class have hit."""
    best = iou(boxes.astype(np.float64), truth.boxes[~truth.crowd].astype(np.float64))
    # `match` gives each detection the box it overlaps most, difficult ones among them.
    places = np.flatnonzero(~truth.difficult[~truth.crowd])
    hit = best.argmax(axis=1) if best.size else np.zeros(0, int)
    return [int(i) for i in np.searchsorted(places, hit)]


def _why_wrong(box: Boxes, name: str, target: Target, overlap: float) -> str:
    if not len(target.boxes):
        return "nothing there"
    there = iou(box[None].astype(np.float64), target.boxes.astype(np.float64))[0]
    own = np.array([label == name for label in target.labels])
    if (there[own] >= overlap).any():
        return "second box"
    others = np.where(own, 0, there)
    if others.max() >= overlap:
        return f"really {target.labels[int(others.argmax())]}"
    return "loose box" if (there[own] >= _LOOSE).any() else "nothing there"


def _why_missed(
    box: Boxes, name: str, shown: Detections, overlap: float, score: float, threshold: float
) -> str:
    if not math.isnan(score):
        return "scores too little" if score < threshold else "one box for two"
    if not len(shown.boxes):
        return "not seen"
    there = iou(box[None].astype(np.float64), shown.boxes.astype(np.float64))[0]
    own = np.array([label == name for label in shown.labels])
    others = np.where(own, 0, there)
    if others.max() >= overlap:
        return f"taken for {shown.labels[int(others.argmax())]}"
    return "loose box" if (there[own] >= _LOOSE).any() else "not seen"


def _best_score(box: Boxes, name: str, found: Detections, overlap: float) -> float:
    """Return the best score of a detection of a class that fits an object; nan of none."""
    scores, boxes, _ = of_class(name, found, Target.of([], []))
    fits = iou(box[None].astype(np.float64), boxes.astype(np.float64))[0] >= overlap
    return float(scores[fits].max()) if fits.any() else math.nan


def _size(box: Boxes) -> str:
    return [name for name, least in SIZES.items() if _area(box) >= least][-1]


def _area(box: Boxes) -> float:
    return float(area(box[None].astype(np.float64))[0])
