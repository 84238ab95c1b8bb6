"""Are scores probabilities, and are the stored thresholds good ones? Run as::

    python benchmarks/calibration.py raccoon=DATA chess=DATA animals=DATA@val@animals --out calibration.png

Each argument is NAME=DATA, fitted to the split train and measured on test; NAME=DATA@SPLIT measures on
another split, and NAME=DATA@SPLIT@MODEL takes a detector that is fitted already. Printed are the expected
calibration error over ten bins of equal mass, of detections after suppression that an SVM gives -1.5 or more,
and of those of 5 % and more, which are drawn; and F1 at the stored thresholds beside the best that thresholds
chosen on the test photos reach: one for all classes, and one for each. ``--compare`` tells instead what is
known without the test photos: errors and F1 when the calibration, by Platt or isotonic, and the thresholds
are learned from half of the out-of-fold photos and measured on the other half.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from common import commit, machine, write_json
from sppnet import Detector
from sppnet.datasets import read_dataset
from sppnet.detection import fit as fitting
from sppnet.detection import quality as qualities
from sppnet.detection.calibration import fit_calibration
from sppnet.evaluation.calibration import LIKELY, expected_calibration_error, reliability
from sppnet.evaluation.detection import ClassResult, Counts, DetectionReport, voc_detection

OutOfFold = tuple[Any, ...]


def fitted(data: str, cache: Path | None) -> tuple[Detector, OutOfFold]:
    """Fit a detector; return it with the detections, targets, classes and masks that calibrated it."""
    given: list[OutOfFold] = []
    plain = fitting.learn_scores

    def spied(*arguments: Any) -> qualities.Learned:
        given.append(arguments)
        return plain(*arguments)

    with mock.patch.object(fitting, "learn_scores", spied):
        detector = Detector().fit(read_dataset(data, "train"), cache=cache)
    return detector, given[-1]


def measured(report: DetectionReport) -> dict[str, Any]:
    """Return calibration errors and F1 of a report, whose scores are probabilities."""
    results = report.classes.values()
    chances = np.concatenate([result.scores for result in results])
    hits = np.concatenate([result.hits for result in results])
    errors = {n: expected_calibration_error(r.scores, r.hits) for n, r in report.classes.items()}
    likely = chances >= LIKELY
    total = report.total
    best = [r.curve()[3].max(initial=0) for r in results]
    return {
        "photos": report.images,
        "objects": report.objects,
        "mAP": report.mean_ap,
        "error": expected_calibration_error(chances, hits),
        f"error of {LIKELY:.0%} and more": expected_calibration_error(chances[likely], hits[likely]),
        "error by class": errors,
        "F1": total.f1,
        "best F1, one threshold": float(best_f1(chances, hits, report.objects)),
        "mean F1 of classes": float(np.mean([report.counts[name].f1 for name in report.classes])),
        "best F1 of classes, a threshold each": float(np.mean(best)),
        "precision": total.precision,
        "recall": total.recall,
        "curve": [values.tolist() for values in vars(reliability(chances[likely], hits[likely])).values()],
    }


def best_f1(chances: npt.NDArray[Any], hits: npt.NDArray[np.bool_], objects: int) -> float:
    """Return the largest F1 of all thresholds."""
    right = np.cumsum(hits[np.argsort(-chances, kind="stable")])
    return (2 * right / (np.arange(1, len(right) + 1) + objects)).max(initial=0)


def isotonic(scores: Sequence[Any], hits: Sequence[Any]) -> Callable[[Any, int], Any]:
    from sklearn.isotonic import IsotonicRegression

    rules: list[Any] = [
        IsotonicRegression(out_of_bounds="clip").fit(s, h) if len(s) else None
        for s, h in zip(scores, hits, strict=True)
    ]
    return lambda s, k: rules[k].predict(s) if rules[k] is not None and len(s) else np.zeros(len(s))


def platt(scores: Sequence[Any], hits: Sequence[Any]) -> Callable[[Any, int], Any]:
    rule = fit_calibration(scores, hits)
    return lambda s, k: rule(s, np.full(len(s), k))


def compared(given: OutOfFold, seeds: int = 10) -> dict[str, float]:
    """Learn from half of the out-of-fold photos, measure on the other half, and return the means."""
    found, targets, classes, masks, folds = given
    rows: dict[str, list[float]] = {}

    def judged(half: Sequence[int], k: int) -> ClassResult:
        kept = [i for i in half if masks[i, k]]
        return voc_detection([found[i] for i in kept], [targets[i] for i in kept], [classes[k]])[classes[k]]

    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(found))
        one, other = (sorted(part.tolist()) for part in np.array_split(order, 2))
        first, second = ([judged(half, k) for k in range(len(classes))] for half in (one, other))
        came = np.concatenate([r.hits for r in second])
        for name, rule in (("platt", platt), ("isotonic", isotonic)):
            chance = rule([r.scores for r in first], [r.hits for r in first])
            later = np.concatenate([chance(r.scores, k) for k, r in enumerate(second)])
            likely = later >= LIKELY
            error = expected_calibration_error(later[likely], came[likely])
            rows.setdefault(f"error, {name}", []).append(error)
        for smoothing in (0.1, 10, 30, 100, 10**6):
            with mock.patch.object(qualities, "SMOOTHING", smoothing):
                known = [found[i] for i in one], [targets[i] for i in one]
                learned = qualities.learn_scores(*known, classes, masks[one], folds)
            total = Counts(0, 0, 0)
            for k, r in enumerate(second):
                shown = learned.calibration(r.scores, np.full(len(r.scores), k)) >= learned.thresholds[k]
                more = int(r.hits[shown].sum()), int(shown.sum()), r.positives
                total = Counts(*(a + b for a, b in zip(total, more, strict=True)))
            rows.setdefault(f"F1, smoothing {smoothing}", []).append(total.f1)
    return {name: float(np.mean(values)) for name, values in rows.items()}


def draw(results: dict[str, dict[str, Any]], out: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 4), squeeze=False)
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        _, mean, observed, _ = result["curve"]
        axis.plot([0, 100], [0, 100], color="#999999", linewidth=1)
        axis.plot(100 * np.array(mean), 100 * np.array(observed), "o-", color="#0072b2")
        error = 100 * result[f"error of {LIKELY:.0%} and more"]
        axis.set_title(f"{name}: error {error:.1f} points")
        axis.set_xlabel("promised, %")
        axis.set_ylabel("right, %")
        axis.set_aspect("equal")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="+", metavar="NAME=DATA[@SPLIT[@MODEL]]")
    parser.add_argument("--compare", action="store_true", help="out of fold alone, without test photos")
    parser.add_argument("--cache", type=Path, help="folder that keeps feature maps")
    parser.add_argument("--out", type=Path, help="picture to draw")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for given in args.sets:
        name, _, place = given.partition("=")
        data, split, model = [*place.split("@"), "", ""][:3]
        if model:
            detector = Detector.load(model)
        else:
            detector, out_of_fold = fitted(data, args.cache and args.cache / name)
            if args.compare:
                results[name] = compared(out_of_fold)
        if not args.compare:
            results[name] = measured(detector.evaluate(read_dataset(data, split or "test")))
        print(name, {k: v for k, v in results[name].items() if k != "curve"})
    print(f"{machine()}, commit {commit()}")
    if args.out is not None:
        draw(results, args.out)
    write_json(args.json, {"machine": machine(), "commit": commit(), "results": results})


if __name__ == "__main__":
    main()
