import math

import numpy as np
import pytest

from sppnet.boxes import Detections, Target
from sppnet.errors import SppnetError
from sppnet.evaluation.confusion import detection_confusion

HALF = {"a": 0.5, "b": 0.5, "c": 0.25}


def detections(boxes, scores, labels):
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), tuple(labels))


def overlap(one, other):
    """IoU of two boxes, the share of `one` inside `other`."""
    width = max(0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    return width * height / (sum(areas) - width * height), width * height / areas[0]


def slow(found, targets, classes, thresholds):
    """The rules one by one, with plain loops over plain numbers."""
    names = [*classes, None]
    counts = dict.fromkeys(((t, f) for t in names for f in names), 0)
    for d, target in zip(found, targets, strict=True):
        objects = [
            (box, label, hard, crowd)
            for box, label, hard, crowd in zip(
                target.boxes.tolist(), target.labels, target.difficult, target.crowd, strict=True
            )
            if label in classes
        ]
        real = [o for o in objects if not o[2] and not o[3]]
        taken = set()
        rows = sorted(zip(d.scores.tolist(), d.labels, d.boxes.tolist(), strict=True), key=lambda r: -r[0])
        for score, label, box in rows:
            if label not in classes or score < thresholds[label]:
                continue
            best, chosen = (0.5, False), None
            for j, (place, name, _, _) in enumerate(real):
                rank = (overlap(box, place)[0], name == label)
                if j not in taken and (rank > best or (chosen is None and rank >= (0.5, False))):
                    best, chosen = rank, j
            if chosen is not None:
                taken.add(chosen)
                counts[real[chosen][1], label] += 1
            elif not any(
                (crowd and overlap(box, place)[1] >= 0.5)
                or (hard and not crowd and overlap(box, place)[0] >= 0.5)
                for place, _, hard, crowd in objects
            ):
                counts[None, label] += 1
        for j, (_, name, _, _) in enumerate(real):
            if j not in taken:
                counts[name, None] += 1
    return [[counts[t, f] for f in names] for t in names]


@pytest.mark.parametrize("seed", range(12))
def test_agrees_with_plain_loops(seed):
    rng = np.random.default_rng(seed)

    def boxes(count):
        corner = rng.integers(0, 8, (count, 2))
        return np.concatenate([corner, corner + rng.integers(3, 9, (count, 2))], axis=1)

    found, targets = [], []
    for _ in range(25):
        there, guessed = rng.integers(0, 6), rng.integers(0, 10)
        labels = rng.choice(["a", "b", "c", "other"], there)
        targets.append(Target.of(boxes(there), labels, rng.random(there) < 0.2, rng.random(there) < 0.15))
        scores = rng.integers(0, 9, guessed) / 8  # many ties
        found.append(detections(boxes(guessed), scores, rng.choice(["a", "b", "c", "other"], guessed)))
    matrix = detection_confusion(found, targets, "abc", HALF)
    assert matrix.dtype == np.int64
    assert matrix.tolist() == slow(found, targets, "abc", HALF)
    assert matrix[:, :3].sum() > 20


def test_by_hand():
    target = Target.of([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], ["a", "b", "c"])
    found = detections(
        [[0, 0, 10, 9], [0, 0, 10, 10], [20, 0, 30, 9], [60, 0, 70, 10], [40, 0, 50, 10], [40, 0, 50, 10]],
        [0.9, 0.8, 0.7, 0.6, 0.4, 0.3],
        ["b", "a", "b", "c", "a", "c"],
    )
    # The surer "b" takes the a, whose own detection comes too late; the sure "a" on c is below its threshold.
    assert detection_confusion([found], [target], "abc", HALF).tolist() == [
        [0, 1, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 1, 0],
        [1, 0, 1, 0],
    ]


def test_every_object_has_one_place_in_its_row():
    target = Target.of([[0, 0, 10, 10], [0, 0, 10, 10]], ["a", "b"])
    matrix = detection_confusion([detections([], [], [])], [target], "ab", HALF)
    assert matrix.tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
    # Of equals the detection takes the one of its own class.
    found = detections([[0, 0, 10, 10]], [1], ["b"])
    assert detection_confusion([found], [target], "ab", HALF).tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 0]]


def test_what_lies_on_difficult_objects_does_not_count():
    target = Target.of([[0, 0, 10, 10], [50, 0, 90, 40]], ["a", "a"], [True, False], [False, True])
    found = detections([[0, 0, 10, 10], [0, 0, 10, 9], [60, 0, 66, 6]], [0.9, 0.8, 0.7], ["a", "b", "a"])
    assert detection_confusion([found], [target], "ab", HALF).sum() == 0


def test_nothing_and_bad_input():
    assert detection_confusion([], [], "ab", HALF).tolist() == [[0] * 3] * 3
    nothing = detections([], [], [])
    assert detection_confusion([nothing], [Target.of([], [])], (), {}).tolist() == [[0]]
    never = detections([[0, 0, 10, 10]], [1], ["a"])
    assert detection_confusion([never], [Target.of([], [])], "a", {"a": math.nan}).sum() == 0
    with pytest.raises(SppnetError, match="one length, got 1 and 0"):
        detection_confusion([nothing], [], "ab", HALF)
