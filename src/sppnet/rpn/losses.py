"""Which cells are to find which objects, and what a network's answers cost.

Cells are assigned by how well the network already does (Feng et al., "TOOD: Task-aligned One-stage Object
Detection", ICCV 2021), whatever the class: the windows are those of any object. Its class is learned on
assigned cells alone, without background, so that many classes learn as fast as one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sppnet.rpn.network import Answers

# Cells that learn an object, and how much its score and its box count for the choice.
_CELLS, _SCORE_POWER, _BOX_POWER = 10, 0.5, 6.0
# Half of a side that even the smallest object has where cells inside it are looked for, in pixels.
_LEAST_HALF = 4.0
_BOX_WEIGHT, _OBJECT_WEIGHT, _KIND_WEIGHT = 7.5, 0.5, 1.0
_TINY = 1e-7


class Truth(NamedTuple):
    """What a picture shows.

    Attributes
    ----------
    boxes : (G, 4) float32
        The objects to find, in pixels of the picture.
    kinds : (G,) int64
        Their classes.
    ignored : (I, 4) float32
        Where objects may be found or not: difficult ones, crowds, other classes.
    """

    boxes: Tensor
    kinds: Tensor
    ignored: Tensor


class Losses(NamedTuple):
    """The losses of a batch: of log-odds, boxes and classes."""

    objects: Tensor
    boxes: Tensor
    kinds: Tensor

    @property
    def total(self) -> Tensor:
        """What is minimised."""
        return _OBJECT_WEIGHT * self.objects + _BOX_WEIGHT * self.boxes + _KIND_WEIGHT * self.kinds


def losses(answers: Answers, truths: list[Truth]) -> Losses:
    """Return what the answers to a batch of pictures cost."""
    goals, counted = torch.zeros_like(answers.objects), torch.ones_like(answers.objects)
    box_losses, kind_losses = [], []
    for i, truth in enumerate(truths):
        boxes = answers.boxes[i]
        which, goal = assign(answers.objects[i].detach().sigmoid(), boxes.detach(), answers, truth.boxes)
        taken = torch.nonzero(which >= 0).flatten()
        goals[i, taken] = goal[taken]
        counted[i] = _counted(answers.centres, truth.ignored) | (which >= 0)
        if not len(taken):
            continue
        mine, share = which[taken], goal[taken]
        box_losses.append(((1 - complete_iou(boxes[taken], truth.boxes[mine])) * share).sum())
        kinds = F.cross_entropy(answers.kinds[i, taken].float(), truth.kinds[mine], reduction="none")
        kind_losses.append((kinds * share).sum())
    size = goals.sum().clamp(min=1)
    objects = F.binary_cross_entropy_with_logits(answers.objects, goals, counted, reduction="sum")
    none = answers.objects.new_zeros(())
    return Losses(objects / size, sum(box_losses, none) / size, sum(kind_losses, none) / size)


def _counted(centres: Tensor, ignored: Tensor) -> Tensor:
    """Return the (A,) bool of which cells lie in no ignored box."""
    inside = (centres > ignored[:, None, :2]) & (centres < ignored[:, None, 2:])
    return ~inside.all(-1).any(0)


@torch.no_grad()
def assign(scores: Tensor, boxes: Tensor, answers: Answers, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Assign cells to the objects of one picture.

    Of the cells that lie in an object, the ten with the highest ``score ** 0.5 * IoU ** 6`` learn it; a cell
    that several objects want takes the one that its box overlaps most.

    Parameters
    ----------
    scores : (A,)
        Probabilities of an object.
    boxes : (A, 4)
        What the cells propose.
    answers : Answers
        For where the cells are.
    objects : (G, 4)

    Returns
    -------
    (A,) int64
        The object of each cell, -1 of most.
    (A,) float
        The score that it should have: the best IoU of all cells of the object, less where its own product is
        less than the best.
    """
    count = len(boxes)
    if not len(objects):
        return boxes.new_full((count,), -1, dtype=torch.long), boxes.new_zeros(count)
    middle, half = (objects[:, :2] + objects[:, 2:]) / 2, (objects[:, 2:] - objects[:, :2]) / 2
    away = (answers.centres - middle[:, None]).abs()
    inside = (away < half.clamp(min=_LEAST_HALF)[:, None]).all(-1)
    overlap = iou(objects, boxes) * inside
    product = scores.clamp(min=1e-9) ** _SCORE_POWER * overlap**_BOX_POWER
    # Cells inside come before all others, even where no box overlaps yet.
    product = torch.where(inside, product + 1e-12, 0.0)
    best, places = product.topk(min(_CELLS, count), 1)
    chosen = torch.zeros_like(inside).scatter_(1, places, best > 0)
    largest, which = torch.where(chosen, overlap + 1e-9, 0.0).max(0)
    chosen = torch.zeros_like(inside).scatter_(0, which[None], (largest > 0)[None])
    product, overlap = torch.where(chosen, product, 0.0), torch.where(chosen, overlap, 0.0)
    top = product.amax(1, keepdim=True)
    goal = (product / (top + 1e-12) * overlap.amax(1, keepdim=True)).amax(0)
    return torch.where(largest > 0, which, -1), goal


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the (A, B) intersections over unions of (A, 4) and (B, 4) boxes."""
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    areas = [(x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b)]
    return common / (areas[0][:, None] + areas[1] - common + _TINY)


def complete_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the (R,) complete IoU of pairs of boxes (Zheng et al., "Distance-IoU Loss", AAAI 2020).

    The IoU, less the squared distance of the centres as a share of the squared diagonal of the box about
    both, less a term for unlike aspects.
    """
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    size_a, size_b = a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]
    overlap = common / (size_a.prod(-1) + size_b.prod(-1) - common + _TINY)
    about = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    apart = ((a[:, :2] + a[:, 2:] - b[:, :2] - b[:, 2:]) ** 2).sum(-1) / 4
    angles = [torch.atan(s[:, 0] / (s[:, 1] + _TINY)) for s in (size_b, size_a)]
    unlike = 4 / math.pi**2 * (angles[0] - angles[1]) ** 2
    with torch.no_grad():
        weight = unlike / (1 - overlap + unlike + _TINY)
    return overlap - apart / ((about**2).sum(-1) + _TINY) - weight * unlike
