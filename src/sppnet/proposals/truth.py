"""What the anchors of an annotated image are: objects, background, or neither."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sppnet.arrays import BoolArray, Boxes, FloatArray, IntArray
from sppnet.boxes import Target, area, intersection, iou

# Overlap with an object from which an anchor is one, and below which it is none (Ren et al.: 0.7 and 0.3). At
# 0.5 more anchors teach the regression, and the second step ranks what they give.
POSITIVE, NEGATIVE = 0.5, 0.3


@dataclass(frozen=True)
class Truth:
    """The objects of an image, and the boxes that are neither objects nor background.

    Attributes
    ----------
    boxes : (G, 4) float32
        The objects.
    ignored : (I, 4) float32
        What is annotated but no object: difficult ones, crowds, and other classes.
    crowd : (C, 4) float32
        Boxes about groups of objects.
    """

    boxes: Boxes
    ignored: Boxes
    crowd: Boxes

    @classmethod
    def of(cls, target: Target, classes: Sequence[str] | None) -> Truth:
        """Return what annotations say of the objects of some classes, by default of all."""
        wanted = np.array([classes is None or name in classes for name in target.labels], bool)
        counts = wanted & ~target.ignored
        return cls(target.boxes[counts], target.boxes[~counts], target.boxes[target.crowd])

    def ignores(self, boxes: FloatArray) -> BoolArray:
        """Return the (R,) bools of which boxes overlap something ignored, or lie in a crowd."""
        overlap = iou(boxes, self.ignored).max(axis=1, initial=0)
        inside = intersection(boxes, self.crowd).max(axis=1, initial=0) / np.maximum(area(boxes), 1e-6)
        result: BoolArray = np.maximum(overlap, inside) >= NEGATIVE
        return result

    def label(self, anchors: Boxes) -> tuple[npt.NDArray[np.int8], IntArray]:
        """Return 1 (object), 0 (background) or -1 (neither) of each anchor, and the object nearest to it.

        The anchors that overlap an object most are its own, too, however little that is above the background.
        """
        labels = np.where(self.ignores(anchors), -1, 0).astype(np.int8)
        if not len(self.boxes):
            return labels, np.zeros(len(anchors), np.int64)
        overlap = iou(anchors, self.boxes)
        best, nearest = overlap.max(axis=1), overlap.argmax(axis=1)
        labels[best >= NEGATIVE] = -1
        labels[best >= POSITIVE] = 1
        for g, most in enumerate(overlap.max(axis=0)):
            if most > 0:
                own = overlap[:, g] == most
                labels[own], nearest[own] = 1, g
        return labels, nearest.astype(np.int64)
