"""How good a detector is, as far as it knows: as a table and in words."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from typing import TYPE_CHECKING

import sppnet.cli.console as console

if TYPE_CHECKING:
    from sppnet.detection.detector import Detector
    from sppnet.detection.quality import Quality


def print_quality(detector: Detector, names: Sequence[str], others: Sequence[float] = ()) -> None:
    """Say how good classes are on photos that they were not learned from: in a table, and in words.

    `others` are thresholds to tell of besides the stored ones.
    """
    quality, rows = detector.fitted_.quality, []
    stored = dict(zip(detector.classes_, detector.thresholds_.tolist(), strict=True))
    for name in names:
        k = detector.classes_.index(name)
        known = f"{100 * quality.average_precision[k]:.1f}" if quality.objects[k] else "-"
        counts = str(quality.photos[k]), str(quality.objects[k])
        rows.append((name, *counts, known, *_row(quality, k, stored[name])))
        rows += [("", "", "", "", *_row(quality, k, threshold)) for threshold in others]
    columns = ("class", "photos", "objects", "AP", "threshold", "precision", "recall", "F1")
    console.print_rows(columns, rows, "On photos not learned from")
    for name in names:
        print(f"{name}: {quality.sentence(detector.classes_.index(name), stored[name])}")


def _row(quality: Quality, k: int, threshold: float) -> tuple[str, ...]:
    counts = quality.at(k, threshold)
    shares = (counts.precision, counts.recall, counts.f1)
    shown = ("-" if isnan(share) else f"{100 * share:.0f} %" for share in shares)
    return (f"{100 * threshold:.0f} %", *shown)
