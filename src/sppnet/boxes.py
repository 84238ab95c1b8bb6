"""Boxes, the records that carry them, and the arithmetic on them.

Everywhere in sppnet a set of boxes is an ``(R, 4)`` float32 array of ``x1, y1, x2, y2`` in pixels of the
original image, 0-based and half-open: a box covers the pixels ``x1 <= x < x2``, so its width is ``x2 - x1``
and the box of a whole image is ``0, 0, width, height``. See docs/conventions.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from sppnet.arrays import Boxes, FloatArray, IntArray
from sppnet.errors import SppnetError

Corners = TypeVar("Corners", Boxes, IntArray)


class Windows(NamedTuple):
    """Candidate windows of an image, best first.

    Attributes
    ----------
    boxes : (R, 4) float32
        Boxes, 0-based half-open pixels of the original image.
    scores : (R,) float32
        Falling scores. Those of most methods tell the rank and nothing more.
    """

    boxes: Boxes
    scores: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Target:
    """What is annotated in one image.

    Attributes
    ----------
    boxes : (G, 4) float32
        Ground-truth boxes, 0-based half-open pixels of the original image.
    labels : tuple of G str
        Class name of each box.
    difficult : (G,) bool
        Boxes that neither count as positives or negatives in training, nor as hits or misses in evaluation
        (VOC ``difficult``).
    crowd : (G,) bool
        Boxes around a group of objects (COCO ``iscrowd``); ignored like difficult ones, and matched by the
        share of the *detection* that they cover.
    """

    boxes: Boxes
    labels: tuple[str, ...]
    difficult: npt.NDArray[np.bool_]
    crowd: npt.NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        boxes: npt.ArrayLike,
        labels: Sequence[str],
        difficult: npt.ArrayLike | None = None,
        crowd: npt.ArrayLike | None = None,
    ) -> Target:
        """Build a target from anything array-like.

        Parameters
        ----------
        boxes : (G, 4) array-like
            Ground-truth boxes, 0-based half-open pixels of the original image.
        labels : sequence of G str
            Class name of each box.
        difficult, crowd : (G,) array-like of bool, optional
            As the attributes; False of all boxes by default.

        Raises
        ------
        SppnetError
            If the lengths of the arguments disagree, or `labels` is one str.
        """
        if isinstance(labels, str):
            raise SppnetError(f"found the str {labels!r} as labels, expected a class name for each box")
        b = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
        flags = [np.zeros(len(b), bool) if f is None else np.asarray(f, bool) for f in (difficult, crowd)]
        if not len(b) == len(labels) == len(flags[0]) == len(flags[1]):
            raise SppnetError(
                f"boxes, labels, difficult and crowd must have one length, "
                f"got {len(b)}, {len(labels)}, {len(flags[0])} and {len(flags[1])}"
            )
        return cls(b, tuple(labels), flags[0], flags[1])

    @property
    def ignored(self) -> npt.NDArray[np.bool_]:
        """(G,) bool: boxes that are neither positive nor negative."""
        return self.difficult | self.crowd


@dataclass(frozen=True)
class Detections:
    """What was found in one image, by falling score.

    Attributes
    ----------
    boxes : (D, 4) float32
        Boxes, 0-based half-open pixels of the original image.
    scores : (D,) float32
        Unbounded scores; comparable within a class.
    labels : tuple of D str
        Class names.
    """

    boxes: Boxes
    scores: npt.NDArray[np.float32]
    labels: tuple[str, ...]

    def above(self, threshold: float) -> Detections:
        """Return the detections whose score is at least `threshold`."""
        keep = np.flatnonzero(self.scores >= threshold)
        return Detections(self.boxes[keep], self.scores[keep], tuple(self.labels[i] for i in keep))

    def facts(self) -> list[dict[str, Any]]:
        """Return the detections as JSON has them: label, score and box of each."""
        rows = zip(self.labels, self.scores.tolist(), self.boxes.tolist(), strict=True)
        return [{"label": label, "score": score, "box": box} for label, score, box in rows]


def area(boxes: FloatArray) -> FloatArray:
    """Return the (R,) areas of (R, 4) boxes in square pixels; inverted boxes count as 0."""
    result: FloatArray = np.clip(boxes[:, 2] - boxes[:, 0], 0, None) * np.clip(
        boxes[:, 3] - boxes[:, 1], 0, None
    )
    return result


def intersection(a: FloatArray, b: FloatArray) -> FloatArray:
    """Return the (A, B) areas of overlap between (A, 4) and (B, 4) boxes, in square pixels."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = np.clip(high - low, 0, None)
    result: FloatArray = sides[..., 0] * sides[..., 1]
    return result


def iou(a: FloatArray, b: FloatArray) -> FloatArray:
    """Return the (A, B) intersection over union of (A, 4) and (B, 4) boxes; 0 where both are empty."""
    shared = intersection(a, b)
    union = area(a)[:, None] + area(b)[None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def clip(boxes: FloatArray, width: int, height: int) -> Boxes:
    """Return a copy of (R, 4) boxes cut off at the borders of a `width` x `height` image."""
    limits = np.array([width, height, width, height], dtype=np.float32)
    return np.clip(boxes, 0, limits).astype(np.float32)


def flip(boxes: Corners, width: int) -> Corners:
    """Return where (R, 4) boxes lie in the mirror image of an image of that width, in the dtype they have."""
    flipped = boxes.copy()
    flipped[:, [0, 2]] = width - boxes[:, [2, 0]]
    return flipped


def nms(boxes: FloatArray, scores: FloatArray, threshold: float = 0.3, limit: int | None = None) -> IntArray:
    """Greedy non-maximum suppression: walk by falling score, drop what overlaps a kept box too much.

    Parameters
    ----------
    boxes : (R, 4) float array
        Boxes, 0-based half-open pixels.
    scores : (R,) float array
        The higher of two overlapping boxes is kept.
    threshold : float
        A box is dropped when its IoU with a kept box is *strictly* greater (0.3 in the paper, section 4.1).
    limit : int, optional
        Most boxes to keep; by default all that are left.

    Returns
    -------
    (K,) int64
        Indices of the kept boxes, by falling score; equal scores keep their order.
    """
    # Imported late: numba takes long to start.
    from sppnet.suppression import suppress

    order = np.argsort(-scores, kind="stable")
    ordered = np.ascontiguousarray(boxes[order], dtype=np.float32)
    kept: IntArray = order[suppress(ordered, threshold, len(order) if limit is None else limit)]
    return kept


def batched_nms(
    boxes: FloatArray,
    scores: FloatArray,
    groups: IntArray,
    threshold: float = 0.3,
    limit: int | None = None,
) -> IntArray:
    """Suppress as `nms` does, only within the same group.

    Parameters
    ----------
    boxes : (R, 4) float array
        Boxes, 0-based half-open pixels.
    scores : (R,) float array
        The higher of two overlapping boxes of a group is kept.
    groups : (R,) int64
        Number of the group of each box, such as its class.
    threshold : float
        As in `nms`.
    limit : int, optional
        Most boxes to keep of a group; by default all that are left.

    Returns
    -------
    (K,) int64
        Indices of the kept boxes, by falling score; equal scores keep their order.
    """
    rows = np.argsort(groups, kind="stable")
    parts = np.split(rows, np.flatnonzero(np.diff(groups[rows])) + 1)
    kept = np.sort(np.concatenate([part[nms(boxes[part], scores[part], threshold, limit)] for part in parts]))
    result: IntArray = kept[np.argsort(-scores[kept], kind="stable")]
    return result
