import math

import numpy as np
import pytest

from sppnet.boxes import Detections, Target
from sppnet.errors import SppnetError
from sppnet.evaluation.detection import voc_detection
from sppnet.evaluation.mistakes import find_mistakes, recall_by_size

HALF = {"cat": 0.5, "dog": 0.5}


def detections(*rows):
    """Make detections of ``(x1, y1, x2, y2, score, label)``, by falling score."""
    return Detections(
        np.array([r[:4] for r in rows], np.float32).reshape(-1, 4),
        np.array([r[4] for r in rows], np.float32),
        tuple(r[5] for r in rows),
    )


def one(found, target, classes=("cat", "dog"), thresholds=HALF):
    return find_mistakes([found], [target], classes, thresholds)


def test_each_false_alarm_has_its_reason():
    target = Target.of([[0, 0, 10, 10], [20, 0, 30, 10]], ["cat", "dog"])
    found = detections(
        (0, 0, 10, 10, 0.9, "cat"),
        (0, 0, 10, 9, 0.8, "cat"),
        (20, 0, 30, 10, 0.75, "cat"),
        (0, 0, 10, 3, 0.7, "cat"),
        (60, 0, 70, 10, 0.6, "cat"),
        (80, 0, 90, 10, 0.4, "cat"),
    )
    alarms = one(found, target).false_alarms
    assert [(a.score, a.reason) for a in alarms] == [
        (pytest.approx(0.8), "second box"),
        (pytest.approx(0.75), "really dog"),
        (pytest.approx(0.7), "loose box"),
        (pytest.approx(0.6), "nothing there"),
    ]
    assert alarms[2].box.tolist() == [0, 0, 10, 3]
    assert {a.label for a in alarms} == {"cat"}


@pytest.mark.parametrize(
    ("rows", "reason", "score"),
    [
        ((), "not seen", math.nan),
        (((0, 0, 10, 10, 0.3, "cat"),), "scores too little", 0.3),
        (((0, 0, 10, 10, 0.9, "dog"),), "taken for dog", math.nan),
        (((0, 0, 10, 3, 0.9, "cat"),), "loose box", math.nan),
        (((0, 0, 10, 3, 0.4, "cat"),), "not seen", math.nan),
        (((90, 0, 99, 10, 0.9, "cat"),), "not seen", math.nan),
    ],
)
def test_each_miss_has_its_reason(rows, reason, score):
    (miss,) = one(detections(*rows), Target.of([[0, 0, 10, 10]], ["cat"])).misses
    assert (miss.image, miss.label, miss.reason, miss.box.tolist()) == (0, "cat", reason, [0, 0, 10, 10])
    assert miss.score == pytest.approx(score, nan_ok=True)


def test_one_box_for_two():
    target = Target.of([[0, 0, 10, 10], [0, 0, 10, 9]], ["cat", "cat"])
    (miss,) = one(detections((0, 0, 10, 10, 0.9, "cat")), target).misses
    assert (miss.reason, miss.box.tolist()) == ("one box for two", [0, 0, 10, 9])


def test_order():
    target = Target.of([[0, 0, 10, 10], [20, 0, 50, 30], [60, 0, 70, 10], [80, 0, 90, 10]], ["cat"] * 4)
    found = [
        detections((60, 0, 70, 10, 0.4, "cat"), (80, 0, 90, 10, 0.2, "cat")),
        detections((0, 0, 5, 5, 0.7, "dog"), (0, 0, 5, 5, 0.6, "cat")),
        detections((0, 0, 5, 5, 0.8, "cat")),
    ]
    none = Target.of([], [])
    mistakes = find_mistakes(found, [target, none, none], ["cat", "dog"], HALF)
    assert [m.box[0] for m in mistakes.misses] == [20, 0, 80, 60], (
        "the largest of those without a score first"
    )
    assert [(a.image, a.label) for a in mistakes.false_alarms] == [(2, "cat"), (1, "dog"), (1, "cat")]


def test_no_mistakes():
    target = Target.of([[0, 0, 10, 10], [0, 0, 99, 99], [20, 0, 30, 10]], ["cat", "cat", "bird"])
    target.crowd[1] = True
    perfect = detections(
        (0, 0, 10, 10, 0.9, "cat"), (20, 20, 30, 30, 0.8, "cat"), (0, 50, 9, 60, 0.7, "bird")
    )
    assert one(perfect, target) == ((), ())
    assert find_mistakes([], [], ["cat"], HALF) == ((), ())
    with pytest.raises(SppnetError, match="one length, got 0 and 1"):
        find_mistakes([], [target], ["cat"], HALF)


@pytest.mark.parametrize("seed", range(8))
def test_are_as_many_as_the_report_counts(seed):
    rng = np.random.default_rng(seed)

    def boxes(count):
        corner = rng.integers(0, 12, (count, 2))
        return np.concatenate([corner, corner + rng.integers(3, 12, (count, 2))], axis=1)

    found, targets = [], []
    for _ in range(15):
        there, guessed = rng.integers(0, 6), rng.integers(0, 15)
        labels = rng.choice(["cat", "dog"], there)
        targets.append(Target.of(boxes(there), labels, rng.random(there) < 0.3, rng.random(there) < 0.1))
        rows = zip(
            boxes(guessed), rng.integers(0, 8, guessed) / 8, rng.choice(["cat", "dog"], guessed), strict=True
        )
        found.append(detections(*((*b, s, n) for b, s, n in rows)))
    results = voc_detection(found, targets, ["cat", "dog"])
    mistakes = find_mistakes(found, targets, ["cat", "dog"], HALF)
    for name, result in results.items():
        counts = result.at(0.5)
        assert sum(a.label == name for a in mistakes.false_alarms) == counts.false_alarms > 0
        assert sum(m.label == name for m in mistakes.misses) == counts.misses > 0
    sizes = recall_by_size(targets, ["cat", "dog"], mistakes.misses)
    assert sizes["small"] == (
        sum(r.at(0.5).hits for r in results.values()),
        sum(r.positives for r in results.values()),
    )
    assert sizes["medium"] == sizes["large"] == (0, 0)


def test_recall_by_size():
    sides = [31, 32, 95, 96, 300]
    target = Target.of([[0, 0, side, side] for side in sides], ["cat", "cat", "cat", "cat", "bird"])
    missed = one(detections((0, 0, 32, 32, 1, "cat")), target, ("cat",)).misses
    assert recall_by_size([target], ["cat"], missed) == {"small": (0, 1), "medium": (1, 2), "large": (0, 1)}
