"""The best of several detectors, by what they find on photos that they did not learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sppnet.datasets.records import Sample

if TYPE_CHECKING:
    from sppnet.detection.detector import Detector


def fit_best(
    detectors: Sequence[Detector],
    data: Sequence[Sample],
    *,
    tell: Callable[[str], None] = lambda text: None,
    keep: Callable[[Detector], None] = lambda detector: None,
    **options: Any,
) -> Detector:
    """Fit detectors one after another and return the one with the highest mean average precision.

    Which network's features suit some photos is not known before: one that was trained on animals is ahead on
    animals, one that has seen a thousand kinds of things on others.

    Parameters
    ----------
    detectors : sequence of Detector
        Each with two folds or more, or nothing is measured; the first is taken where none is better.
    data : sequence of Sample
        The annotated images.
    tell : callable
        Is told what was measured, in a line, where there are several.
    keep : callable
        Takes a detector whenever there is a first or a better one.
    **options
        See `Detector.fit`.

    Raises
    ------
    SppnetError
        What `Detector.fit` raises.
    """
    best, figures = detectors[0], []
    for detector in detectors:
        detector.fit(data, keep=keep if detector is best else None, **options)
        figures.append(f"{detector.fitted_.backbone.name} {100 * detector.fitted_.quality.mean_ap:.1f}")
        if detector.fitted_.quality.mean_ap > best.fitted_.quality.mean_ap:
            best = detector
        if detector is best:
            keep(best)
    if len(figures) > 1:
        listed = ", ".join(figures)
        tell(f"average precision on photos not learned from: {listed}; {best.fitted_.backbone.name} is kept")
    return best
