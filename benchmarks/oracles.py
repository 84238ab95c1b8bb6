"""Where a detector loses: mAP with an oracle in the place of each of its parts. Run as::

    python benchmarks/oracles.py MODEL DATA --split val

As it is; with every window moved onto the object that it overlaps most, if it does by a tenth (localisation);
with the scores of windows on objects, overlapping one by half, exchanged so that the object's class has the
best of them (classes); without windows on nothing, overlapping no object by a tenth (background); with one
window of each object, exactly on it, added and scored by the detector (windows). And the windows' recall.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from rich.progress import track

from common import commit, machine, table
from sppnet.boxes import Target, iou
from sppnet.datasets import read_dataset
from sppnet.detection.detector import Detector
from sppnet.detection.postprocess import postprocess
from sppnet.evaluation.detection import evaluate_detections

NOTHING, HALF, NEVER = 0.1, 0.5, -1e3
Scored = tuple[np.ndarray, np.ndarray]


def localised(boxes: np.ndarray, scores: np.ndarray, target: Target, classes: tuple[str, ...]) -> Scored:
    moved = boxes.copy()
    for k in range(len(classes)):
        overlap = iou(boxes[:, k], target.boxes)
        near = overlap.max(axis=1) >= NOTHING
        moved[near, k] = target.boxes[overlap.argmax(axis=1)[near]]
    return moved, scores


def classified(boxes: np.ndarray, scores: np.ndarray, target: Target, classes: tuple[str, ...]) -> Scored:
    known, scores = np.array([label in classes for label in target.labels]), scores.copy()
    overlap = iou(boxes[:, 0], target.boxes)
    for row in np.flatnonzero(overlap.max(axis=1) >= HALF):
        best, label = scores[row].max(), target.labels[overlap[row].argmax()]
        scores[row] = NEVER
        if known[overlap[row].argmax()]:
            scores[row, classes.index(label)] = best
    return boxes, scores


def silent(boxes: np.ndarray, scores: np.ndarray, target: Target, classes: tuple[str, ...]) -> Scored:
    nothing = iou(boxes[:, 0], target.boxes).max(axis=1) < NOTHING
    return boxes, np.where(nothing[:, None], NEVER, scores)


ORACLES: dict[str, Callable[..., Scored]] = {
    "localisation": localised,
    "classes": classified,
    "background": silent,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--split")
    parser.add_argument("--images", type=int)
    args = parser.parse_args()
    detector, samples = Detector.load(args.model), list(read_dataset(args.data, args.split))[: args.images]
    classes, fitted = detector.classes_, detector.fitted_
    found: dict[str, list] = {name: [] for name in ("as it is", *ORACLES, "windows")}
    covered: list[float] = []
    for sample in track(samples, "Detecting"):
        encoded, target = detector.encode(sample.image), sample.target
        assert encoded.windows is not None
        windows = encoded.windows.boxes
        mine = np.array([label in classes for label in target.labels]) & ~target.ignored
        if mine.any():
            covered += iou(target.boxes[mine], windows).max(axis=1).tolist()
        boxes, scores = detector.score(encoded, windows)
        ways = {"as it is": (boxes, scores)}
        for name, change in ORACLES.items():
            ways[name] = change(boxes, scores, target, classes) if len(target.boxes) else (boxes, scores)
        ways["windows"] = detector.score(encoded, np.concatenate([windows, target.boxes[mine]]))
        for name, (places, values) in ways.items():
            limits = detector.suppression, fitted.least_score, detector.limit
            found[name].append(postprocess(places, values, classes, encoded.size, *limits))
    rows = []
    for name, results in found.items():
        thresholds = dict.fromkeys(classes, 0.0)
        report = evaluate_detections(results, [s.target for s in samples], classes, 0, thresholds)
        rows.append((name, f"{100 * report.mean_ap:.1f}", f"{100 * report.mean_ap_area:.1f}"))
    recalls = ", ".join(
        f"{100 * np.mean(np.array(covered) >= least):.1f} % at {least}" for least in (0.5, 0.7)
    )
    print(f"{machine()}; commit {commit()}; {args.model}, {len(samples)} photos; windows find {recalls}\n")
    print(table(("oracle", "mAP", "mAP area"), rows))


if __name__ == "__main__":
    main()
