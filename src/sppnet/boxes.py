"""Boxes, the records that carry them, and the arithmetic on them.

Everywhere in sppnet a set of boxes is an ``(R, 4)`` float32 array of ``x1, y1, x2, y2`` in pixels of the
original image, 0-based and half-open: a box covers the pixels ``x1 <= x < x2``, so its width is ``x2 - x1``
and the box of a whole image is ``0, 0, width, height``. See docs/conventions.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

import numpy as np
import numpy.typing as npt

from sppnet.arrays import Boxes, FloatArray, IntArray
from sppnet.errors import SppnetError, check_extra

if TYPE_CHECKING:
    import pandas
    import supervision

Corners = TypeVar("Corners", Boxes, IntArray)

_ROWS_SHOWN = 50  # of detections, where a notebook shows them


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


class Detection(NamedTuple):
    """One object that was found.

    Attributes
    ----------
    box : tuple of 4 float
        x1, y1, x2, y2, 0-based half-open pixels of the original image.
    score : float
        As in `Detections`.
    label : str
        Class name.
    """

    box: tuple[float, float, float, float]
    score: float
    label: str


@dataclass(frozen=True)
class Detections:
    """What was found in one image, by falling score: a sequence of `Detection`.

    ``len(found)`` is how many there are, ``found[0]`` is the best; a slice, an array of indices or a mask of
    bools gives `Detections` again, in the order asked for.

    Attributes
    ----------
    boxes : (D, 4) float32
        Boxes, 0-based half-open pixels of the original image.
    scores : (D,) float32
        Unbounded scores; comparable within a class.
    labels : tuple of D str
        Class names.

    Examples
    --------
    >>> import numpy as np
    >>> boxes = np.array([[10, 20, 50, 60], [0, 0, 30, 30]], np.float32)
    >>> found = Detections(boxes, np.array([0.9, 0.4], np.float32), ("cow", "dog"))
    >>> len(found), found[0].label
    (2, 'cow')
    >>> [label for box, score, label in found if box[0] == 0]
    ['dog']
    >>> found[found.scores > 0.5].labels
    ('cow',)
    """

    boxes: Boxes
    scores: npt.NDArray[np.float32]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Detection]:
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.labels, strict=True)
        return (Detection(tuple(box), score, label) for box, score, label in rows)

    @overload
    def __getitem__(self, index: int) -> Detection: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | Sequence[bool] | npt.NDArray[Any]) -> Detections: ...
    def __getitem__(
        self, index: int | slice | Sequence[int] | Sequence[bool] | npt.NDArray[Any]
    ) -> Detection | Detections:
        rows = np.arange(len(self))[np.array([], int) if isinstance(index, list) and not index else index]
        if rows.ndim == 0:
            box, score = self.boxes[rows].tolist(), float(self.scores[rows])
            return Detection(tuple(box), score, self.labels[int(rows)])
        return Detections(self.boxes[rows], self.scores[rows], tuple(self.labels[i] for i in rows))

    def above(self, threshold: float) -> Detections:
        """Return the detections whose score is at least `threshold`."""
        return self[self.scores >= threshold]

    def facts(self) -> list[dict[str, Any]]:
        """Return the detections as JSON has them: label, score and box of each."""
        return [{"label": label, "score": score, "box": list(box)} for box, score, label in self]

    def to_pandas(self) -> pandas.DataFrame:
        """Return the detections as a table of pandas, a row each, in their order.

        Returns
        -------
        pandas.DataFrame
            With the columns ``label`` (str), ``score``, ``x1``, ``y1``, ``x2``, ``y2`` (float32; corners in
            pixels of the original image, 0-based and half-open). The index counts the rows from 0.

        Raises
        ------
        SppnetError
            If pandas is not installed.
        """
        check_extra("pandas", "a table of detections")
        import pandas

        corners = dict(zip(("x1", "y1", "x2", "y2"), self.boxes.T, strict=True))
        return pandas.DataFrame({"label": list(self.labels), "score": self.scores, **corners})

    def to_supervision(self, classes: Sequence[str] | None = None) -> supervision.Detections:
        """Return the detections as the package supervision has them, for its annotators, trackers and zones.

        Parameters
        ----------
        classes : sequence of str, optional
            What ``class_id`` counts, from 0: such as ``detector.classes_``, so that ids are the same for all
            images. By default the names met in these detections, sorted.

        Returns
        -------
        supervision.Detections
            ``xyxy`` are the boxes as they are, ``confidence`` the scores; ``data["class_name"]`` holds the
            class names.

        Raises
        ------
        SppnetError
            If supervision is not installed, or a label is not among `classes`.
        """
        check_extra("supervision", "a conversion of detections")
        import supervision

        names = sorted(set(self.labels)) if classes is None else list(classes)
        unknown = sorted(set(self.labels) - set(names))
        if unknown:
            raise SppnetError(f"found the label {unknown[0]!r}, expected one of {', '.join(names)}")
        return supervision.Detections(
            xyxy=self.boxes.reshape(-1, 4),
            confidence=self.scores,
            class_id=np.array([names.index(label) for label in self.labels], int),
            data={"class_name": np.array(self.labels, str)},
        )

    def _repr_html_(self) -> str:
        """Return a table of the best detections, for notebooks; scores as `score_texts` has them."""
        shown = self[:_ROWS_SHOWN]
        places = [", ".join(f"{edge:.0f}" for edge in box) for box, _, _ in shown]
        cells = zip(map(escape, shown.labels), score_texts(self.scores), places, strict=False)
        rows = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in cells)
        rest = len(self) - _ROWS_SHOWN
        more = f'<tr><td colspan="3">and {rest} more</td></tr>' if rest > 0 else ""
        head = "<tr><th>class</th><th>score</th><th>box (x1, y1, x2, y2)</th></tr>"
        many = f"{len(self)} detection{'s' * (len(self) != 1)}"
        return f"<table><caption>{many}</caption><thead>{head}</thead><tbody>{rows}{more}</tbody></table>"


def score_texts(scores: Iterable[float], percent: bool = True) -> list[str]:
    """Return scores as they are read: in per cent if all are between 0 and 1, and that is asked for."""
    values = [float(score) for score in scores]
    percent = percent and all(0 <= value <= 1 for value in values)
    return [f"{100 * value:.0f} %" if percent else f"{value:.2f}" for value in values]


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
    """Return a copy of (..., 4) boxes cut off at the borders of a `width` x `height` image."""
    limits = np.array([width, height, width, height], dtype=np.float32)
    return np.clip(boxes, 0, limits).astype(np.float32, copy=False)


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
