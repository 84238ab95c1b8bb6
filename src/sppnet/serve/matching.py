"""When two boxes are one object: of one class, and over each other by half."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from sppnet.boxes import iou

if TYPE_CHECKING:
    from sppnet.serve.schema import Labelled

Kind = TypeVar("Kind", bound="Labelled")

SAME = 0.5
"""Overlap from which a detection and a box of its class are one object."""


def same(box: Labelled, others: Sequence[Labelled]) -> bool:
    """Tell whether a box and one of some others are the same object: of one class, and over each other."""
    alike = [other.box for other in others if other.label == box.label]
    if not alike:
        return False
    overlaps = iou(np.array([box.box], np.float32), np.array(alike, np.float32))
    return bool(overlaps.max() >= SAME)


def without_same(boxes: Sequence[Kind], others: Sequence[Labelled]) -> list[Kind]:
    """Return the boxes that are none of some other ones."""
    return [box for box in boxes if not same(box, others)]
