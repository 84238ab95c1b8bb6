"""Which windows of the training images teach what, decided before any feature is computed (section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sppnet.arrays import Boxes, FloatArray, IntArray, Pixels
from sppnet.boxes import Target, area, intersection, iou, nms
from sppnet.errors import SppnetError, check_choice

NEGATIVES = ("all", "released", "paper")


@dataclass(frozen=True)
class Examples:
    """Annotated images with their candidate windows, and the classes to learn from them.

    Attributes
    ----------
    images : sequence of Path or (H, W, 3) uint8
        The images, as files or as pixels.
    windows : sequence of (R, 4) float32
        The candidate windows of each image.
    targets : sequence of Target
        The annotations of each image.
    classes : tuple of str
        The classes to learn; other annotations teach nothing.

    Raises
    ------
    SppnetError
        If there is no image, or the sequences disagree in length.
    """

    images: Sequence[Path | Pixels]
    windows: Sequence[Boxes]
    targets: Sequence[Target]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.images) == len(self.windows) == len(self.targets) > 0:
            raise SppnetError(
                "images, windows and targets must have one length of at least 1, "
                f"got {len(self.images)}, {len(self.windows)} and {len(self.targets)}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def part(self, rows: Sequence[int], classes: tuple[str, ...] | None = None) -> Examples:
        """Return some of the images, to learn the same classes from or others."""
        return Examples(
            [self.images[i] for i in rows],
            [self.windows[i] for i in rows],
            [self.targets[i] for i in rows],
            self.classes if classes is None else classes,
        )

    def name(self, i: int) -> str:
        """Return what to call image i in a message: its file, or its number."""
        image = self.images[i]
        return str(image) if isinstance(image, Path) else f"number {i}"


@dataclass(frozen=True)
class Plan:
    """What one training image contributes, decided before any feature is computed.

    Attributes
    ----------
    boxes : (R, 4) float32
        Ground truth of the classes, then the candidate windows.
    labels : (G,) int64
        Class index of the first G boxes, the positives.
    negative : (R, K) bool
        For which classes a box is a negative.
    start : (S,) int64
        Boxes that the first SVMs are trained with.
    fitted : (R,) int64
        Class whose box regression learns from a box, or -1.
    truth : (R, 4) float32
        The ground truth that each box overlaps most.
    """

    boxes: Boxes
    labels: IntArray
    negative: npt.NDArray[np.bool_]
    start: IntArray
    fitted: IntArray
    truth: Boxes


@dataclass(frozen=True)
class SamplingRules:
    """How windows are told apart by their overlap with the ground truth.

    Attributes
    ----------
    negative_iou : float
        Windows that overlap a class by less are its negatives (paper: 0.3).
    regression_iou : float
        Windows that overlap an object by more teach its class's box regression (paper: 0.5).
    regression_windows : int
        At most so many windows, drawn at random, teach each class's box regression.
    negatives : {"all", "released", "paper"}
        Which of an image's negatives are kept. ``"paper"``: walking in the order of the windows, a class's
        negative that overlaps a kept one by more than 70 % is dropped (section 4.1). ``"released"``: of
        windows that cover the same cells at the same scale, the first. That needs the maps; a plan leaves it
        to the detector.

    Raises
    ------
    SppnetError
        If the rule for the negatives has no such name.
    """

    negative_iou: float = 0.3
    regression_iou: float = 0.5
    regression_windows: int = 4000
    negatives: str = "all"

    def __post_init__(self) -> None:
        check_choice("rule for negatives", self.negatives, NEGATIVES)


def plan_images(examples: Examples, rules: SamplingRules, seed: int) -> list[Plan]:
    """Decide what every image contributes to the detectors of the classes.

    Raises
    ------
    SppnetError
        If a class has no example that is neither difficult nor a crowd, or no negative to start with.
    """
    targets, names = examples.targets, examples.classes
    check_examples(targets, names)
    rng = np.random.default_rng(seed)
    # About 2,000 windows in all, so that the first SVMs and the mean norm are good for any number of images.
    sample = int(np.clip(2000 // len(targets), 2, 200))
    plans = [
        plan_image(w, t, names, rules, sample, rng) for w, t in zip(examples.windows, targets, strict=True)
    ]
    started = np.any([plan.negative[plan.start].any(axis=0) for plan in plans], axis=0)
    check_background(started, names, len(targets), rules)
    for k in range(len(names)):
        _thin(plans, k, rules.regression_windows, rng)
    return plans


def check_examples(targets: Sequence[Target], names: Sequence[str]) -> None:
    """Raise an error unless each class has an example that is neither difficult nor a crowd."""
    shown = {
        label for t in targets for label, ignored in zip(t.labels, t.ignored, strict=True) if not ignored
    }
    missing = [name for name in names if name not in shown]
    if missing or not names:
        raise SppnetError(
            f"no example of {', '.join(missing) or 'any class'} in {len(targets)} images; "
            "difficult and crowd boxes do not count"
        )


def check_background(
    started: npt.NDArray[np.bool_], names: Sequence[str], images: int, rules: SamplingRules
) -> None:
    """Raise an error unless each class has a negative to start with."""
    alone = [name for name, there in zip(names, started, strict=True) if not there]
    if alone:
        raise SppnetError(
            f"found no background for {', '.join(alone)} in {images} images, "
            f"expected windows that overlap it by less than {rules.negative_iou:g}"
        )


def plan_image(
    windows: Boxes,
    target: Target,
    names: Sequence[str],
    rules: SamplingRules,
    sample: int,
    rng: np.random.Generator,
) -> Plan:
    """Decide what one image contributes.

    Parameters
    ----------
    windows : (R, 4) float32
        Its candidate windows.
    target : Target
        Its annotations.
    names : sequence of str
        The classes to learn.
    rules : SamplingRules
    sample : int
        Number of boxes to start with, at most.
    rng : Generator
        Draws them.
    """
    index = {name: k for k, name in enumerate(names)}
    classes = np.array([index.get(name, -1) for name in target.labels], dtype=np.int64)
    learnable = (classes >= 0) & ~target.ignored
    truth = target.boxes[learnable]
    boxes = np.concatenate([truth, np.asarray(windows, dtype=np.float32).reshape(-1, 4)])
    overlap = _overlap(boxes, target)
    closest = [overlap[:, classes == k].max(axis=1, initial=0) for k in range(len(names))]
    negative = np.stack(closest, axis=1) < rules.negative_iou
    if rules.negatives == "paper":
        negative = _apart(boxes, negative)
    start = rng.choice(len(boxes), min(sample, len(boxes)), replace=False).astype(np.int64)
    if len(truth) == 0:
        return Plan(boxes, classes[learnable], negative, start, np.full(len(boxes), -1), boxes)
    best = iou(boxes, truth)
    nearest = best.argmax(axis=1)
    fitted = np.where(best.max(axis=1) > rules.regression_iou, classes[learnable][nearest], -1)
    return Plan(boxes, classes[learnable], negative, start, fitted, truth[nearest])


def _overlap(boxes: Boxes, target: Target) -> FloatArray:
    """Return the (R, G) IoU with what is annotated; of crowds, the share that they cover if it is more."""
    overlap = iou(boxes, target.boxes)
    covered = intersection(boxes, target.boxes[target.crowd]) / np.maximum(area(boxes), 1e-6)[:, None]
    overlap[:, target.crowd] = np.maximum(overlap[:, target.crowd], covered)
    return overlap


def _apart(boxes: Boxes, negative: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Leave of each class's negatives those that overlap no earlier one that is left by more than 70 %."""
    # Classes that the image lacks have the same negatives.
    columns, which = np.unique(negative, axis=1, return_inverse=True)
    kept = np.zeros_like(columns)
    for k, column in enumerate(columns.T):
        rows = np.flatnonzero(column)
        kept[rows[nms(boxes[rows], -rows.astype(np.float64), 0.7)], k] = True
    return kept[:, which.reshape(-1)]


def _thin(plans: Sequence[Plan], k: int, limit: int, rng: np.random.Generator) -> None:
    """Leave at most `limit` regression examples of class k, drawn at random from all images."""
    where = [(i, j) for i, plan in enumerate(plans) for j in np.flatnonzero(plan.fitted == k)]
    for drop in rng.choice(len(where), max(len(where) - limit, 0), replace=False):
        i, j = where[drop]
        plans[i].fitted[j] = -1


@dataclass(frozen=True)
class TuningPlan:
    """Which windows of an image teach the head's classes.

    Attributes
    ----------
    boxes : (R, 4) float32
        Ground truth of the classes, then the candidate windows.
    labels : (R,) int64
        Class index of each box, K for the background.
    truth : (R, 4) float32
        The ground truth that each box overlaps most.
    positive : (P,) int64
        Boxes that show a class: IoU of at least 0.5 with an object.
    background : (B,) int64
        Boxes with a largest IoU from 0.1 to 0.5.
    far : (F,) int64
        Boxes with a largest IoU below 0.1.
    """

    boxes: Boxes
    labels: IntArray
    truth: Boxes
    positive: IntArray
    background: IntArray
    far: IntArray

    def draw(self, count: int, positive: float, far: float, rng: np.random.Generator) -> IntArray:
        """Draw at most `count` boxes without repetition, at most these shares of `count` positive and far."""
        shown = rng.choice(self.positive, min(len(self.positive), round(count * positive)), replace=False)
        away = rng.choice(self.far, min(len(self.far), round(count * far)), replace=False)
        rest = min(len(self.background), count - len(shown) - len(away))
        near = rng.choice(self.background, rest, replace=False)
        return np.concatenate([shown, near, away]).astype(np.int64)


def plan_tuning(windows: Boxes, target: Target, names: Sequence[str]) -> TuningPlan:
    """Tell an image's windows into positives and background for fine-tuning (section 4.1).

    Windows that overlap a difficult object by half or more, or lie in a crowd by half or more, are neither,
    unless an object of the classes claims them.
    """
    index = {name: k for k, name in enumerate(names)}
    classes = np.array([index.get(name, -1) for name in target.labels], dtype=np.int64)
    learnable = (classes >= 0) & ~target.ignored
    truth = target.boxes[learnable]
    boxes = np.concatenate([truth, np.asarray(windows, dtype=np.float32).reshape(-1, 4)])
    doubtful = _overlap(boxes, target)[:, target.ignored].max(axis=1, initial=0) >= 0.5
    labels = np.full(len(boxes), len(names))
    if not len(truth):
        none = np.empty(0, np.int64)
        return TuningPlan(boxes, labels, boxes, none, none, np.flatnonzero(~doubtful))
    overlap = iou(boxes, truth)
    nearest, best = overlap.argmax(axis=1), overlap.max(axis=1)
    shows = best >= 0.5
    labels[shows] = classes[learnable][nearest[shows]]
    kinds = shows, ~shows & (best >= 0.1) & ~doubtful, (best < 0.1) & ~doubtful
    return TuningPlan(boxes, labels, truth[nearest], *map(np.flatnonzero, kinds))
