"""What is taken for what by a detector: a confusion matrix with a row and a column for the background."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sppnet.arrays import FloatArray, IntArray
from sppnet.boxes import Detections, Target, area, intersection, iou
from sppnet.evaluation.detection import check_lengths


def detection_confusion(
    detections: Sequence[Detections],
    targets: Sequence[Target],
    classes: Sequence[str],
    thresholds: Mapping[str, float],
    overlap: float = 0.5,
) -> IntArray:
    """Count which classes objects are taken for, and how many come from, or are lost to, the background.

    In each image, the detections that score enough for their class are taken by falling score. Each is given
    the object, *of any class*, that it overlaps most among those that are still free, if that IoU is at least
    `overlap`; of equals one of its own class, then the first. What gets none is a false alarm on the
    background, unless it overlaps a difficult object by that much, or lies by that share in a crowd: then it
    does not count. Objects that are left are missed.

    Unlike in `match`, a detection of a wrong class takes the object. So a hit there may be none here, and the
    other way round.

    Parameters
    ----------
    detections, targets : sequences of one length
        What was found and what is there, image by image.
    classes : sequence of K str
        The classes that count; detections and boxes of others are passed over.
    thresholds : mapping of str to float
        Least score of a detection of each class.
    overlap : float
        Least IoU of a detection and its object.

    Returns
    -------
    (K + 1, K + 1) int64
        Numbers of objects: what they are (rows) by what they are taken for (columns). The last row holds the
        false alarms on the background, the last column what was missed.

    Raises
    ------
    SppnetError
        If the two sequences differ in length.

    Examples
    --------
    >>> target = Target.of([[0, 0, 10, 10], [20, 0, 30, 10]], ["cat", "dog"])
    >>> found = Detections(target.boxes[:1], np.array([0.9], np.float32), ("dog",))
    >>> detection_confusion([found], [target], ["cat", "dog"], {"cat": 0.5, "dog": 0.5}).tolist()
    [[0, 1, 0], [0, 0, 1], [0, 0, 0]]
    """
    check_lengths("detections", detections, targets)
    number = {name: i for i, name in enumerate(classes)}
    background, matrix = len(number), np.zeros((len(number) + 1,) * 2, np.int64)
    for found, target in zip(detections, targets, strict=True):
        rows = [i for i, name in enumerate(target.labels) if name in number]
        labels = np.array([number[target.labels[i]] for i in rows], int)
        counts, boxes = ~target.ignored[rows], target.boxes[rows]
        shown = [i for i, n in enumerate(found.labels) if n in number and found.scores[i] >= thresholds[n]]
        shown.sort(key=lambda i: -found.scores[i])
        guesses = np.array([number[found.labels[i]] for i in shown], int)
        places = found.boxes[shown].astype(np.float64)
        taken = _assign(
            iou(places, boxes[counts].astype(np.float64)), guesses[:, None] == labels[counts], overlap
        )
        ignored = _ignored(places, Target(boxes, (), target.difficult[rows], target.crowd[rows]), overlap)
        truth = np.append(labels[counts], background)[taken]
        keep = (taken >= 0) | ~ignored
        np.add.at(matrix, (truth[keep], guesses[keep]), 1)
        missed = np.setdiff1d(np.arange(counts.sum()), taken)
        np.add.at(matrix, (labels[counts][missed], background), 1)
    return matrix


def _assign(overlaps: FloatArray, same: np.ndarray, least: float) -> IntArray:
    """Return for each detection, in their order, the object that it gets, -1 for none."""
    free = np.ones(overlaps.shape[1], bool)
    taken = np.full(len(overlaps), -1)
    for i, row in enumerate(overlaps):
        open_ = np.flatnonzero(free & (row >= least))
        if len(open_):
            taken[i] = max(open_, key=lambda j: (row[j], same[i, j]))
            free[taken[i]] = False
    return taken


def _ignored(boxes: FloatArray, target: Target, least: float) -> np.ndarray:
    """Return whether each box lies on a difficult object or in a crowd."""
    difficult, crowd = (
        target.boxes[flags].astype(np.float64) for flags in (target.difficult & ~target.crowd, target.crowd)
    )
    on = iou(boxes, difficult).max(axis=1, initial=0) >= least
    return np.asarray(on | (intersection(boxes, crowd).max(axis=1, initial=-1) >= least * area(boxes)))
