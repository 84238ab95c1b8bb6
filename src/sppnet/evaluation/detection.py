"""How good detections and candidate windows are: average precision as VOC and COCO have it, F1, recall.

Everything here takes plain records and arrays, one per image, and knows no model. Boxes are 0-based and
half-open, so ``x2 - x1`` is the width that VOC's code writes as ``x2 - x1 + 1`` for its inclusive pixels: the
overlaps are the same numbers.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from sppnet.arrays import Boxes, FloatArray
from sppnet.boxes import Detections, Target, area, intersection, iou
from sppnet.errors import SppnetError

Float64Array = npt.NDArray[np.float64]

COCO_IOUS: tuple[float, ...] = tuple((50 + 5 * i) / 100 for i in range(10))
"""The overlaps 0.5, 0.55 ... 0.95 that COCO averages over."""

TRUE_POSITIVE, FALSE_POSITIVE, IGNORED = 1, 0, -1
"""What `match` says of a detection."""

Method = Literal["11point", "area"]
_METHODS: tuple[Method, ...] = ("11point", "area")
_COCO_NAMES = {
    "AP": ("", "50", "75", "_small", "_medium", "_large"),
    "AR": ("_1", "_10", "_100", "_small", "_medium", "_large"),
}


class Counts(NamedTuple):
    """How many of the objects were found, and how often the detector was wrong, at one threshold.

    Attributes
    ----------
    hits : int
        Detections that are right.
    found : int
        All detections that score enough, right or wrong.
    objects : int
        Objects to find.
    """

    hits: int
    found: int
    objects: int

    @property
    def false_alarms(self) -> int:
        """Number of detections that are wrong."""
        return self.found - self.hits

    @property
    def misses(self) -> int:
        """Number of objects that were not found."""
        return self.objects - self.hits

    @property
    def precision(self) -> float:
        """Share of the detections that are right; nan if there is none."""
        return self.hits / self.found if self.found else math.nan

    @property
    def recall(self) -> float:
        """Share of the objects that were found; nan if there is none."""
        return self.hits / self.objects if self.objects else math.nan

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; nan if there is no detection and no object."""
        both = self.found + self.objects
        return 2 * self.hits / both if both else math.nan


@dataclass(frozen=True)
class ClassResult:
    """How well one class was detected.

    Attributes
    ----------
    average_precision : float
        VOC 2007's mean of the precision at eleven recalls, in [0, 1]; nan if the class has no positives.
    area : float
        Area under the curve of precision over recall (VOC 2010 and later), in [0, 1]; nan likewise.
    precision, recall : (N,) float64
        Both after each counted detection, by falling score. Recall is nan throughout if there are no
        positives.
    scores : (N,) float32
        Scores of the counted detections: those that matched a difficult or crowd box are not among them.
    positives : int
        Number of objects to find (neither difficult nor crowd).
    """

    average_precision: float
    area: float
    precision: Float64Array
    recall: Float64Array
    scores: npt.NDArray[np.float32]
    positives: int

    @property
    def hits(self) -> npt.NDArray[np.bool_]:
        """Whether each counted detection is right, (N,), by falling score."""
        found = np.rint(self.precision * np.arange(1, len(self.precision) + 1)).astype(int)
        return np.diff(found, prepend=0) > 0

    def at(self, threshold: float) -> Counts:
        """Count hits among the detections that score at least `threshold`.

        What scores less takes no object from what scores more: these are the numbers that a detector shows
        which drops all below the threshold.
        """
        found = int(np.count_nonzero(self.scores >= threshold))
        return Counts(int(np.count_nonzero(self.hits[:found])), found, self.positives)

    def curve(self) -> tuple[npt.NDArray[np.float32], Float64Array, Float64Array, Float64Array]:
        """Return how precision, recall and F1 depend on the threshold.

        Returns
        -------
        (T,) float32 and three (T,) float64
            Each score that occurs, falling; and precision, recall and F1 of what scores at least as much.
            Recall is nan if there are no positives.
        """
        last = np.flatnonzero(np.diff(self.scores, append=-np.inf) != 0)
        hits = np.cumsum(self.hits)[last]
        f1 = 2 * hits / (last + 1 + self.positives)
        return self.scores[last], self.precision[last], self.recall[last], f1

    @property
    def best_threshold(self) -> float:
        """The threshold of the best F1, of equals the highest; nan without a hit."""
        thresholds, _, _, f1 = self.curve()
        return float(thresholds[f1.argmax()]) if f1.any() else math.nan


@dataclass(frozen=True)
class DetectionReport:
    """How good the detections on a data set are, from `evaluate_detections`.

    Attributes
    ----------
    classes : mapping of str to ClassResult
        What VOC's evaluation at an overlap of 0.5 gave for each class.
    detections : tuple of Detections
        What was found, image by image: what is measured here.
    coco : mapping of str to float, or None
        COCO's metrics, see `coco_detection`; None where pycocotools is not installed.
    seen : int
        Number of the images that are known to be among those the detector was fitted on: if there are any,
        the figures say little about new images.
    stored : mapping of str to float, or None
        From which score on the detector shows a detection of each class; None where that is not known.
    left_out : tuple of int
        Places in the data set of the images that could not be read: nothing here counts them.
    """

    classes: Mapping[str, ClassResult]
    detections: tuple[Detections, ...]
    coco: Mapping[str, float] | None
    seen: int = 0
    stored: Mapping[str, float] | None = None
    left_out: tuple[int, ...] = ()

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.detections)

    @property
    def mean_ap(self) -> float:
        """Mean of the classes' 11-point average precisions; nan if there is no object."""
        return mean_average_precision(self.classes)

    @property
    def mean_ap_area(self) -> float:
        """Mean of the areas under the classes' precision-recall curves; nan if there is no object."""
        return mean_of_known([result.area for result in self.classes.values()])

    @property
    def objects(self) -> int:
        """Number of objects to find, difficult ones and crowds aside."""
        return sum(result.positives for result in self.classes.values())

    @property
    def thresholds(self) -> dict[str, float]:
        """From which score on a detection of each class is shown: the stored ones, or else of the best F1.

        Thresholds chosen on the images that are measured flatter a little; nan where nothing is right.
        """
        best = {name: result.best_threshold for name, result in self.classes.items()}
        return best | {n: t for n, t in (self.stored or {}).items() if n in best}

    @property
    def counts(self) -> dict[str, Counts]:
        """Hits, detections and objects of each class at its threshold."""
        thresholds = self.thresholds
        return {name: result.at(thresholds[name]) for name, result in self.classes.items()}

    @property
    def total(self) -> Counts:
        """Hits, detections and objects of all classes at their thresholds."""
        return Counts(*map(sum, zip(*self.counts.values(), strict=True))) if self.classes else Counts(0, 0, 0)

    def facts(self) -> dict[str, Any]:
        """Return the numbers as JSON has them, curves aside; those that are not known are nan."""
        thresholds = self.thresholds
        facts: dict[str, Any] = {
            "mAP": self.mean_ap,
            "AP": {name: result.average_precision for name, result in self.classes.items()},
            "mAP_area": self.mean_ap_area,
            "AP_area": {name: result.area for name, result in self.classes.items()},
            "objects": {name: result.positives for name, result in self.classes.items()},
            "at_threshold": {
                name: {"threshold": thresholds[name], **_rates(counts)}
                for name, counts in self.counts.items()
            },
            "thresholds": "best F1 on these images" if self.stored is None else "stored",
            "images": self.images,
            "seen": self.seen,
            "left_out": len(self.left_out),
        }
        return facts if self.coco is None else facts | {"coco": dict(self.coco)}


@dataclass(frozen=True)
class ProposalRecall:
    """How many objects a set of candidate windows covers.

    Attributes
    ----------
    ious : (T,) float64
        Overlaps at which recall was measured.
    recall : (T,) float64
        Share of the objects whose best window overlaps by at least that much; nan without objects.
    average_recall : float
        Mean of `recall`.
    mean_windows : float
        Mean number of windows of an image.
    positives : int
        Number of objects (neither difficult nor crowd).
    """

    ious: Float64Array
    recall: Float64Array
    average_recall: float
    mean_windows: float
    positives: int


def match(boxes: FloatArray, target: Target, threshold: float = 0.5) -> npt.NDArray[np.int8]:
    """Judge the detections of one class in one image, as VOCdevkit's ``VOCevaldet`` does.

    Each detection is held against the box it overlaps most (the first of equals), taken or not. If that IoU
    is at least `threshold`, the detection is ignored when the box is difficult, a true positive when no
    earlier detection has taken the box, and otherwise a false positive (a duplicate). With less overlap it
    is a false positive. Crowd boxes come last: a false positive of which at least the share `threshold` lies
    in one of them is ignored (COCO's rule).

    Parameters
    ----------
    boxes : (D, 4) float array
        By falling score.
    target : Target
        Boxes of the same class.
    threshold : float
        Least IoU of a hit.

    Returns
    -------
    (D,) int8
        `TRUE_POSITIVE`, `FALSE_POSITIVE` or `IGNORED`.
    """
    found = np.asarray(boxes, dtype=np.float64)
    verdict = np.full(len(found), FALSE_POSITIVE, np.int8)
    truth = target.boxes[~target.crowd].astype(np.float64)
    if len(truth):
        overlap = iou(found, truth)
        best = overlap.argmax(axis=1)
        hits = np.flatnonzero(overlap.max(axis=1) >= threshold)
        _, first = np.unique(best[hits], return_index=True)
        verdict[hits[first]] = TRUE_POSITIVE
        verdict[hits[target.difficult[~target.crowd][best[hits]]]] = IGNORED
    crowd = target.boxes[target.crowd].astype(np.float64)
    if len(crowd):
        covered = intersection(found, crowd).max(axis=1) >= threshold * area(found)
        verdict[covered & (verdict == FALSE_POSITIVE)] = IGNORED
    return verdict


def average_precision(recall: FloatArray, precision: FloatArray, method: Method = "11point") -> float:
    """Summarise a precision-recall curve in one number.

    Parameters
    ----------
    recall, precision : (N,) float arrays
        The curve, recall never falling.
    method : {"11point", "area"}
        ``"11point"`` is VOC 2007's: the mean, over the recalls 0, 0.1 ... 1, of the best precision at that
        recall or more. ``"area"`` is the exact area under the same envelope (VOC 2010 and later).

    Returns
    -------
    float
        In [0, 1]; 0 for an empty curve.

    Raises
    ------
    SppnetError
        If there is no such method.

    Notes
    -----
    The eleven recalls are exact tenths. MATLAB's ``0:0.1:1`` is not (its fourth value lies above 0.3), so
    ``VOCevaldet`` misses a recall of exactly 3/10 there.
    """
    envelope = np.maximum.accumulate(np.append(precision, 0.0)[::-1])[::-1]
    if method == "11point":
        return float(envelope[np.searchsorted(recall, np.arange(11) / 10)].mean())
    if method == "area":
        return float(np.diff(recall, prepend=0.0) @ envelope[:-1])
    raise SppnetError(f"method must be '11point' or 'area', got {method!r}")


def evaluate_detections(
    detections: Sequence[Detections],
    targets: Sequence[Target],
    classes: Sequence[str],
    seen: int = 0,
    stored: Mapping[str, float] | None = None,
) -> DetectionReport:
    """Evaluate detections in every way there is: VOC's two average precisions, and COCO's metrics.

    Parameters
    ----------
    detections, targets : sequences of one length
        What was found and what is there, image by image.
    classes : sequence of str
        The classes to evaluate; detections and boxes of others are passed over.
    seen : int
        Number of the images that the detector was fitted on, for the report.
    stored : mapping of str to float, optional
        From which score on the detector shows a detection of each class, for the report.

    Returns
    -------
    DetectionReport
        Its ``coco`` is None where pycocotools is not installed.

    Raises
    ------
    SppnetError
        If the two sequences differ in length.

    Examples
    --------
    >>> target = Target.of([[0, 0, 10, 10], [20, 0, 30, 10]], ["cat", "cat"])
    >>> found = Detections(target.boxes[:1], np.array([0.9], np.float32), ("cat",))
    >>> report = evaluate_detections([found], [target], ["cat"])
    >>> report.objects, round(report.mean_ap, 3), report.mean_ap_area
    (2, 0.545, 0.5)
    """
    results = voc_detection(detections, targets, classes)
    coco = coco_detection(detections, targets, classes) if find_spec("pycocotools") else None
    return DetectionReport(results, tuple(detections), coco, seen, stored)


def voc_detection(
    detections: Sequence[Detections],
    targets: Sequence[Target],
    classes: Iterable[str],
    iou: float = 0.5,
) -> dict[str, ClassResult]:
    """Evaluate detections as VOCdevkit's ``VOCevaldet`` does; `match` has the rules.

    Detections of equal score count in the order of the images, and within an image in the order given.

    Parameters
    ----------
    detections, targets : sequences of one length
        What was found and what is there, image by image.
    classes : iterable of str
        The classes to evaluate; detections and boxes of others are passed over.
    iou : float
        Least IoU of a hit.

    Returns
    -------
    dict of str to ClassResult
        In the order of `classes`. See `mean_average_precision` for one number.

    Raises
    ------
    SppnetError
        If the two sequences differ in length.
    """
    check_lengths("detections", detections, targets)
    return {name: _evaluate_class(name, detections, targets, iou) for name in classes}


def mean_average_precision(results: Mapping[str, ClassResult]) -> float:
    """Return the mean 11-point AP over the classes that have positives; nan if none has."""
    return mean_of_known([result.average_precision for result in results.values()])


def coco_detection(
    detections: Sequence[Detections], targets: Sequence[Target], classes: Sequence[str]
) -> dict[str, float]:
    """Evaluate detections with COCO's own code, pycocotools.

    An object's size (small, medium, large) is that of its box: there are no masks here. Difficult objects are
    neither hits nor misses, as in VOC, but a second detection of one is a false positive here.

    Parameters
    ----------
    detections, targets : sequences of one length
        What was found and what is there, image by image.
    classes : sequence of str
        The classes to evaluate; detections and boxes of others are passed over.

    Returns
    -------
    dict of str to float
        ``AP, AP50, AP75, AP_small, AP_medium, AP_large, AR_1, AR_10, AR_100, AR_small, AR_medium, AR_large``;
        nan where there is no object.

    Raises
    ------
    SppnetError
        If pycocotools is missing, or the two sequences differ in length.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise SppnetError('COCO evaluation needs pycocotools: pip install "sppnet[coco]"') from error
    check_lengths("detections", detections, targets)
    category = {name: i for i, name in enumerate(classes, start=1)}

    def annotations(columns: Iterable[tuple[int, str, Boxes, dict[str, Any]]]) -> COCO:
        known = [row for row in columns if row[1] in category]
        record = COCO()
        record.dataset = {
            "images": [{"id": i} for i in range(len(targets))],
            "categories": [{"id": i, "name": name} for name, i in category.items()],
            "annotations": [
                # COCOeval takes an id of 0 for "not matched".
                {"id": i, "image_id": image, "category_id": category[name], "bbox": _xywh(box), **rest}
                for i, (image, name, box, rest) in enumerate(known, start=1)
            ],
        }
        record.createIndex()
        return record

    with contextlib.redirect_stdout(io.StringIO()):
        truth = annotations(
            # COCOeval ignores objects outside the range of areas it looks at, yet matches them by IoU: what
            # "difficult" means. (It overwrites an "ignore" flag.)
            (i, name, box, {"area": math.inf if hard else _area(box), "iscrowd": int(crowd)})
            for i, t in enumerate(targets)
            for name, box, hard, crowd in zip(t.labels, t.boxes, t.difficult, t.crowd, strict=True)
        )
        found = annotations(
            (i, name, box, {"area": _area(box), "score": float(score)})
            for i, d in enumerate(detections)
            for name, box, score in zip(d.labels, d.boxes, d.scores, strict=True)
        )
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = [f"{kind}{what}" for kind, whats in _COCO_NAMES.items() for what in whats]
    return {n: math.nan if v == -1 else float(v) for n, v in zip(names, evaluation.stats, strict=True)}


def proposal_recall(
    windows: Iterable[FloatArray],
    targets: Sequence[Target],
    ious: Sequence[float] = COCO_IOUS,
    classes: Iterable[str] | None = None,
) -> ProposalRecall:
    """Measure how many objects the candidate windows cover.

    Each object is held against the window it overlaps most; one window may cover several objects. Difficult
    and crowd boxes are left out.

    Parameters
    ----------
    windows : iterable of (R, 4) float arrays
        Candidate windows, image by image.
    targets : sequence of Target
        What is in each image.
    ious : sequence of float
        Overlaps (IoU) to measure recall at.
    classes : iterable of str, optional
        Count only objects of these classes; by default all.

    Returns
    -------
    ProposalRecall

    Raises
    ------
    SppnetError
        If there are not as many sets of windows as targets.
    """
    per_image = list(windows)
    check_lengths("windows", per_image, targets)
    wanted = None if classes is None else frozenset(classes)
    best = [np.zeros(0)]
    for candidates, target in zip(per_image, targets, strict=True):
        counted = [wanted is None or name in wanted for name in target.labels]
        truth = target.boxes[~target.ignored & np.array(counted, bool)].astype(np.float64)
        overlap = iou(truth, np.asarray(candidates, dtype=np.float64))
        best.append(overlap.max(axis=1, initial=0.0))
    overlaps, levels = np.concatenate(best), np.array(ious, np.float64)
    hits = (overlaps[:, None] >= levels).sum(axis=0)
    recall = hits / len(overlaps) if len(overlaps) else np.full(len(levels), np.nan)
    count = sum(len(w) for w in per_image)
    return ProposalRecall(levels, recall, float(recall.mean()), count / max(len(per_image), 1), len(overlaps))


def image_f1(detections: Detections, target: Target, classes: Iterable[str], threshold: float = 0.5) -> float:
    """Return the F1 measure of the detections in one image, all classes together.

    Twice the true positives over the number of detections plus objects, with `match`'s verdicts; 1 where
    there is nothing to find and nothing was found.

    Parameters
    ----------
    detections : Detections
        What was found in the image.
    target : Target
        What is there.
    classes : iterable of str
        The classes that count.
    threshold : float
        Least IoU of a hit.

    Returns
    -------
    float
        In [0, 1].
    """
    hits = counted = objects = 0
    for name in classes:
        _, boxes, truth = of_class(name, detections, target)
        verdict = match(boxes, truth, threshold)
        hits += int((verdict == TRUE_POSITIVE).sum())
        counted += int((verdict != IGNORED).sum())
        objects += int((~truth.ignored).sum())
    return 2 * hits / (counted + objects) if counted + objects else 1.0


def of_class(name: str, detections: Detections, target: Target) -> tuple[FloatArray, FloatArray, Target]:
    """Return scores and boxes of the detections of one class in an image, best first, and its objects.

    Returns
    -------
    (D,) float array, (D, 4) float array and Target
        By falling score; equal scores keep their order.
    """
    there = [i for i, label in enumerate(target.labels) if label == name]
    found = np.array([i for i, label in enumerate(detections.labels) if label == name], int)
    found = found[np.argsort(-detections.scores[found], kind="stable")]
    truth = Target.of(target.boxes[there], [name] * len(there), target.difficult[there], target.crowd[there])
    return detections.scores[found], detections.boxes[found], truth


def _evaluate_class(
    name: str,
    detections: Sequence[Detections],
    targets: Sequence[Target],
    threshold: float,
) -> ClassResult:
    scores, verdicts, positives = [np.zeros(0, np.float32)], [np.zeros(0, np.int8)], 0
    for detection, target in zip(detections, targets, strict=True):
        if name not in detection.labels and name not in target.labels:
            continue
        score, boxes, truth = of_class(name, detection, target)
        scores.append(score)
        verdicts.append(match(boxes, truth, threshold))
        positives += int((~truth.ignored).sum())
    joined, verdict = np.concatenate(scores), np.concatenate(verdicts)
    order = np.argsort(-joined, kind="stable")
    order = order[verdict[order] != IGNORED]
    hits = np.cumsum(verdict[order] == TRUE_POSITIVE)
    precision = hits / np.arange(1, len(order) + 1)
    recall = hits / positives if positives else np.full(len(order), np.nan)
    eleven, under = (
        average_precision(recall, precision, method) if positives else math.nan for method in _METHODS
    )
    return ClassResult(eleven, under, precision, recall, joined[order], positives)


def mean_of_known(values: Iterable[float]) -> float:
    """Return the mean of the values that are not nan; nan if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _rates(counts: Counts) -> dict[str, float]:
    """Return counts, and the shares that follow, as JSON has them."""
    rates = {"precision": counts.precision, "recall": counts.recall, "f1": counts.f1}
    return {"hits": counts.hits, "false_alarms": counts.false_alarms, "misses": counts.misses, **rates}


def check_lengths(name: str, per_image: Sequence[object], targets: Sequence[Target]) -> None:
    """Raise an error unless there is something for each target."""
    if len(per_image) != len(targets):
        raise SppnetError(
            f"{name} and targets must be of one length, got {len(per_image)} and {len(targets)}"
        )


def _xywh(box: npt.NDArray[np.float32]) -> list[float]:
    x1, y1, x2, y2 = map(float, box)
    return [x1, y1, x2 - x1, y2 - y1]


def _area(box: npt.NDArray[np.float32]) -> float:
    return float(area(box[None])[0])
