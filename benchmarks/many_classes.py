"""Scoring and suppression of one photo for many classes, at the least score of ``evaluate``. Run as::

    python benchmarks/many_classes.py --classes 200

Random windows and vectors, as long as those of the network that comes with sppnet: 300 windows as it proposes
them, and 2,000 as selective search and edge boxes do. Median seconds of some calls: SVMs, box regressions,
suppression, and scores made probabilities.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from common import commit, machine, table
from sppnet.detection.calibration import Calibration
from sppnet.detection.postprocess import LEAST_SCORE, postprocess
from sppnet.detection.svm import LinearSVMs
from sppnet.regression import BoxRegression, decode_deltas

LENGTH, SIZE, TIMED = 3 * 96 * 14, (600, 800), 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=200)
    args = parser.parse_args()
    rng, count = np.random.default_rng(0), args.classes
    names = [f"class {k}" for k in range(count)]

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    svms = LinearSVMs(normal(count, LENGTH) * np.float32(0.008), np.full(count, -1.2, np.float32))
    regression = BoxRegression(normal(count, 4, LENGTH) * np.float32(1e-3), np.zeros((count, 4), np.float32))
    calibration = Calibration(*(np.zeros(count, np.float32),) * 2, np.ones((count, 2), np.float32))
    rows = []
    for windows in (300, 1000, 2000):
        corner, vectors = rng.uniform(0, 500, (windows, 2)), normal(windows, LENGTH)
        boxes = np.concatenate([corner, corner + rng.uniform(20, 200, (windows, 2))], 1).astype(np.float32)
        seconds = []
        for _ in range(TIMED):
            start = time.perf_counter()
            moved = decode_deltas(boxes[:, None], regression(vectors))
            found = postprocess(moved, svms(vectors), names, SIZE, 0.3, LEAST_SCORE, 100)
            shown = calibration.applied(found, names, 0.0, "probability")
            seconds.append(time.perf_counter() - start)
        rows.append((windows, len(shown), f"{statistics.median(seconds):.3f}"))
    print(f"{machine()}; commit {commit()}; {count} classes\n")
    print(table(("windows", "detections", "seconds"), rows))


if __name__ == "__main__":
    main()
