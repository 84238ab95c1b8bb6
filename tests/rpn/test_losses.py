import numpy as np
import pytest
import torch

from sppnet.rpn.losses import Truth, assign, complete_iou, iou, losses
from sppnet.rpn.network import Answers


def answers_of(seed, objects, size=64, kinds=3, close=False):
    """Answers of random boxes to one picture, some of which lie about objects."""
    rng = np.random.default_rng(seed)
    centres, strides = [], []
    for stride in (8, 16, 32):
        y, x = np.mgrid[: size // stride, : size // stride]
        centres.append((np.stack([x, y], -1).reshape(-1, 2) + 0.5) * stride)
        strides.append(np.full(len(centres[-1]), stride))
    centres = np.concatenate(centres)
    distances = rng.uniform(2, 30, (len(centres), 4))
    boxes = np.concatenate([centres - distances[:, :2], centres + distances[:, 2:]], 1)
    if close and len(objects):
        boxes[::3] = objects[rng.integers(len(objects), size=len(boxes[::3]))] + rng.normal(
            0, 2, (len(boxes[::3]), 4)
        )
    made = rng.normal(size=len(centres)), boxes, rng.normal(size=(len(centres), kinds))
    objects, boxes, kinds = (torch.tensor(v, dtype=torch.float32, requires_grad=True) for v in made)
    return Answers(
        objects[None],
        boxes[None],
        kinds[None],
        torch.tensor(centres, dtype=torch.float32),
        torch.tensor(np.concatenate(strides)),
    )


def random_objects(seed, count, size=64):
    rng = np.random.default_rng([seed, 1])
    corner = rng.uniform(0, size - 20, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(3, 40, (count, 2))], 1).astype(np.float32)


def plain_assignment(scores, boxes, centres, objects):
    """Which object each cell learns, and how well, one by one."""
    taken, products = {}, {}
    for g, box in enumerate(objects):
        wanted = []
        for a, (x, y) in enumerate(centres):
            half = np.maximum((box[2:] - box[:2]) / 2, 4)
            middle = (box[:2] + box[2:]) / 2
            if (np.abs(np.array([x, y]) - middle) < half).all():
                overlap = float(iou(torch.tensor(boxes[a : a + 1]), torch.tensor(box[None]))[0, 0])
                wanted.append((float(scores[a]) ** 0.5 * overlap**6 + 1e-12, a, overlap))
        for product, a, overlap in sorted(wanted, reverse=True)[:10]:
            products[a, g] = (product, overlap)
            if a not in taken or overlap > products[a, taken[a]][1]:
                taken[a] = g
    goals = np.zeros(len(centres))
    for a, g in taken.items():
        mine = [products[b, g] for b in taken if taken[b] == g]
        goals[a] = products[a, g][0] / (max(p for p, _ in mine) + 1e-12) * max(o for _, o in mine)
    return taken, goals


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [1, 2, 6])
def test_cells_are_assigned_as_one_by_one(seed, count):
    objects = random_objects(seed, count)
    answers = answers_of(seed, objects, close=True)
    scores, boxes = answers.objects[0].detach().sigmoid(), answers.boxes[0].detach()
    which, goals = assign(scores, boxes, answers, torch.tensor(objects))
    taken, expected = plain_assignment(scores.numpy(), boxes.numpy(), answers.centres.numpy(), objects)
    assert {a: int(g) for a, g in enumerate(which) if g >= 0} == taken
    np.testing.assert_allclose(goals.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_every_object_has_a_cell_even_where_no_box_overlaps_and_it_is_tiny():
    objects = torch.tensor([[10.0, 10, 13, 13], [40, 40, 43, 43]])
    answers = answers_of(0, objects.numpy())
    far = answers.boxes[0].detach() + 1000
    which, goals = assign(answers.objects[0].detach().sigmoid(), far, answers, objects)
    assert set(which.tolist()) == {-1, 0, 1}
    assert (goals >= 0).all()


def test_a_picture_without_objects_teaches_background_alone():
    answers = answers_of(0, np.zeros((0, 4)))
    none = Truth(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, 4))
    found = losses(answers, [none])
    expected = torch.nn.functional.softplus(answers.objects).sum()
    torch.testing.assert_close(found.objects, expected)
    assert found.boxes == found.kinds == 0
    found.total.backward()


def test_cells_in_ignored_boxes_teach_nothing():
    answers = answers_of(0, np.zeros((0, 4)))
    none = Truth(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.tensor([[0.0, 0, 32, 64]]))
    left = answers.centres[:, 0] < 32
    expected = torch.nn.functional.softplus(answers.objects[0, ~left]).sum()
    torch.testing.assert_close(losses(answers, [none]).objects, expected)


def test_objects_come_before_ignored_boxes_about_them():
    objects = random_objects(3, 2)
    answers = answers_of(3, objects, close=True)
    boxes, kinds = torch.tensor(objects), torch.tensor([0, 2])
    alone = losses(answers, [Truth(boxes, kinds, torch.zeros(0, 4))])
    within = losses(answers, [Truth(boxes, kinds, torch.tensor([[0.0, 0, 64, 64]]))])
    torch.testing.assert_close(alone.boxes, within.boxes)
    torch.testing.assert_close(alone.kinds, within.kinds)
    assert within.objects < alone.objects


def test_complete_iou_is_1_for_equal_boxes_and_falls_with_distance():
    boxes = torch.tensor(random_objects(0, 5))
    torch.testing.assert_close(complete_iou(boxes, boxes), torch.ones(5))
    moved = complete_iou(boxes, boxes + 3)
    assert (complete_iou(boxes, boxes + 200) < 0).all()
    assert (moved < 1).all()
    # The same by the definition: IoU - distance^2 / diagonal^2, as the aspects are equal.
    overlap = iou(boxes, boxes + 3).diagonal()
    diagonal = ((boxes[:, 2:] - boxes[:, :2] + 3) ** 2).sum(-1)
    torch.testing.assert_close(moved, overlap - 18 / diagonal)
