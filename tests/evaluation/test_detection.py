import json
import math
import sys

import numpy as np
import pytest

from sppnet.boxes import Detections, Target
from sppnet.evaluation.detection import (
    COCO_IOUS,
    average_precision,
    coco_detection,
    evaluate_detections,
    image_f1,
    match,
    mean_average_precision,
    proposal_recall,
    voc_detection,
)


def detections(boxes, scores, labels):
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), tuple(labels))


NOTHING_FOUND = detections([], [], [])
NOTHING_THERE = Target.of([], [])


# --- the curve ----------------------------------------------------------------------------------------------

# The worked example of R. Padilla et al., "A Survey on Performance Metrics for Object-Detection Algorithms"
# (2020): 24 detections by falling score, 15 objects; AP 26.84 % at eleven points, 24.56 % by area (a sum
# of numbers cut to four places).
PADILLA = [int(c) for c in "101000000101110000000010"]


def test_published_example():
    hits = np.cumsum(PADILLA)
    recall, precision = hits / 15, hits / np.arange(1, 25)
    assert average_precision(recall, precision) == pytest.approx(0.2684, abs=5e-5)
    assert average_precision(recall, precision, "area") == pytest.approx(0.2456, abs=1e-4)


def test_ten_objects_reach_every_tenth():
    # Ten hits in a row on ten objects: recall 0.1, 0.2 ... 1.0 exactly, precision 1.
    recall, precision = np.arange(1, 11) / 10, np.ones(10)
    assert average_precision(recall, precision) == 1
    assert average_precision(recall, precision, "area") == pytest.approx(1)
    # Three of ten found: recalls 0, 0.1, 0.2 and 0.3 are reached, four of the eleven points.
    assert average_precision(recall[:3], precision[:3]) == pytest.approx(4 / 11)
    assert average_precision(recall[:3], precision[:3], "area") == pytest.approx(0.3)


def test_precision_is_the_best_at_that_recall_or_more():
    # miss, hit, hit with two objects: precision 0, 1/2, 2/3; recall 0, 1/2, 1: 2/3 at every recall.
    recall, precision = np.array([0, 0.5, 1]), np.array([0, 1 / 2, 2 / 3])
    assert average_precision(recall, precision) == pytest.approx(2 / 3)
    assert average_precision(recall, precision, "area") == pytest.approx(2 / 3)


def test_empty_curve_and_unknown_method():
    assert average_precision(np.zeros(0), np.zeros(0)) == 0
    assert average_precision(np.zeros(0), np.zeros(0), "area") == 0
    with pytest.raises(ValueError, match=r"'11point' or 'area', got '12point'"):
        average_precision(np.zeros(0), np.zeros(0), "12point")


# --- matching -----------------------------------------------------------------------------------------------


def test_match_by_hand():
    target = Target.of([[0, 0, 10, 10], [20, 0, 30, 10]], ["cat"] * 2)
    boxes = np.array(
        [
            [0, 0, 10, 5],  # 50 / 100 = 0.5 exactly: a hit
            [0, 0, 10, 10],  # perfect, but the box is taken: a duplicate
            [20, 0, 30, 4.9],  # 49 / 100 < 0.5: a miss
            [20, 1, 30, 11],  # 90 / 110: a hit
            [50, 50, 60, 60],  # nothing there
        ]
    )
    assert match(boxes, target).tolist() == [1, 0, 0, 1, 0]
    assert match(boxes, target, 0.95).tolist() == [0, 1, 0, 0, 0]


def test_second_best_box_is_not_tried():
    # Both detections overlap the first box most (100 / 100, 90 / 110); VOC does not fall back to the second
    # box, although the later detection overlaps it by 70 / 130 > 0.5.
    target = Target.of([[0, 0, 10, 10], [4, 0, 14, 10]], ["cat"] * 2)
    boxes = np.array([[0.0, 0, 10, 10], [1, 0, 11, 10]])
    assert match(boxes, target).tolist() == [1, 0]


def test_difficult_boxes_are_ignored_every_time():
    target = Target.of([[0, 0, 10, 10]], ["cat"], difficult=[True])
    assert match(np.array([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 4]]), target).tolist() == [-1, -1, 0]


def test_crowd_takes_what_lies_inside_it():
    # The crowd covers 80 % of the first detection, 40 % of the second; the third is a hit on a real box even
    # though the crowd covers it; the fourth is its duplicate and falls to the crowd.
    target = Target.of([[0, 0, 100, 100], [50, 50, 60, 60]], ["cat"] * 2, crowd=[True, False])
    boxes = np.array([[92.0, 0, 102, 10], [96, 0, 106, 10], [50, 50, 60, 60], [50, 50, 60, 59]])
    assert match(boxes, target).tolist() == [-1, 0, 1, -1]


# --- VOC ----------------------------------------------------------------------------------------------------


def test_voc_detection_by_hand():
    # Two images, three cats of which one difficult: two positives.
    targets = [
        Target.of([[0, 0, 10, 10], [20, 20, 30, 30]], ["cat", "cat"], difficult=[False, True]),
        Target.of([[0, 0, 10, 10], [0, 0, 10, 10]], ["cat", "dog"]),
    ]
    found = [
        detections([[0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]], [0.9, 0.8, 0.7], ["cat"] * 3),
        detections([[0, 0, 10, 9], [0, 0, 10, 9]], [0.6, 0.5], ["cat", "bird"]),
    ]
    results = voc_detection(found, targets, ["cat", "dog", "bird"])
    cat = results["cat"]
    # 0.9 hit; 0.8 ignored; 0.7 miss; 0.6 hit (IoU 0.9).
    np.testing.assert_allclose(cat.scores, [0.9, 0.7, 0.6])
    np.testing.assert_allclose(cat.precision, [1, 1 / 2, 2 / 3])
    np.testing.assert_allclose(cat.recall, [0.5, 0.5, 1])
    assert cat.positives == 2
    # Recalls 0 to 0.5 at precision 1, the other five at 2/3.
    assert cat.average_precision == pytest.approx((6 + 5 * 2 / 3) / 11)
    # The dog was not found; no bird is there, so it has no AP and is not in the mean.
    assert results["dog"].average_precision == 0
    assert math.isnan(results["bird"].average_precision)
    assert results["bird"].positives == 0
    assert np.isnan(results["bird"].recall).all()
    assert results["bird"].scores.tolist() == [0.5]
    assert mean_average_precision(results) == pytest.approx(cat.average_precision / 2)
    assert cat.area == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert results["dog"].area == 0
    assert math.isnan(results["bird"].area)


def test_equal_scores_keep_the_order_of_the_images():
    target = Target.of([[0, 0, 10, 10]], ["cat"])
    hit, miss = detections([[0, 0, 10, 10]], [0.5], ["cat"]), detections([[50, 50, 60, 60]], [0.5], ["cat"])
    first = voc_detection([hit, miss], [target, NOTHING_THERE], ["cat"])["cat"]
    assert first.precision.tolist() == [1, 0.5]
    second = voc_detection([miss, hit], [NOTHING_THERE, target], ["cat"])["cat"]
    assert second.precision.tolist() == [0, 0.5]


def test_voc_detection_of_nothing():
    assert voc_detection([], [], ["cat"])["cat"].positives == 0
    result = voc_detection([NOTHING_FOUND], [NOTHING_THERE], ["cat"])["cat"]
    assert len(result.scores) == len(result.precision) == len(result.recall) == 0
    assert math.isnan(mean_average_precision({"cat": result}))
    with pytest.raises(ValueError, match="one length, got 1 and 0"):
        voc_detection([NOTHING_FOUND], [], ["cat"])


def vocevaldet(found, targets, name, threshold):
    """VOCdevkit's loop, in its inclusive pixels."""
    rows = [
        (score, image, box)
        for image, d in enumerate(found)
        for box, score, label in zip(d.boxes, d.scores, d.labels, strict=True)
        if label == name
    ]
    rows.sort(key=lambda row: -row[0])
    taken, hits, misses, curve = set(), 0, 0, []
    positives = sum(
        label == name and not hard for t in targets for label, hard in zip(t.labels, t.difficult, strict=True)
    )
    for _, image, (x1, y1, x2, y2) in rows:
        x2, y2 = x2 - 1, y2 - 1
        best, chosen = -math.inf, None
        t = targets[image]
        for j, (gx1, gy1, gx2, gy2) in enumerate(t.boxes):
            gx2, gy2 = gx2 - 1, gy2 - 1
            width = min(x2, gx2) - max(x1, gx1) + 1
            height = min(y2, gy2) - max(y1, gy1) + 1
            if t.labels[j] == name and width > 0 and height > 0:
                union = (x2 - x1 + 1) * (y2 - y1 + 1) + (gx2 - gx1 + 1) * (gy2 - gy1 + 1) - width * height
                if width * height / union > best:
                    best, chosen = width * height / union, j
        if best >= threshold:
            if t.difficult[chosen]:
                continue
            if (image, chosen) in taken:
                misses += 1
            else:
                hits += 1
                taken.add((image, chosen))
        else:
            misses += 1
        curve.append((hits / positives, hits / (hits + misses)))
    ap = 0.0
    for tenth in range(11):
        ap += max((p for r, p in curve if r >= tenth / 10), default=0) / 11
    return curve, ap


@pytest.mark.parametrize("seed", range(8))
def test_voc_detection_agrees_with_the_loop(seed):
    rng = np.random.default_rng(seed)

    def boxes(count):
        corner = rng.integers(0, 12, (count, 2))
        return np.concatenate([corner, corner + rng.integers(3, 12, (count, 2))], axis=1)

    found, targets = [], []
    for _ in range(12):
        there, guessed = rng.integers(0, 6), rng.integers(0, 15)
        targets.append(Target.of(boxes(there), rng.choice(["a", "b"], there), rng.random(there) < 0.3))
        scores = rng.integers(0, 8, guessed) / 8  # many ties
        found.append(detections(boxes(guessed), scores, rng.choice(["a", "b"], guessed)))
    for threshold in (0.3, 0.5):
        results = voc_detection(found, targets, ["a", "b"], threshold)
        for name, result in results.items():
            curve, ap = vocevaldet(found, targets, name, threshold)
            np.testing.assert_allclose(np.stack([result.recall, result.precision], axis=1), curve)
            assert result.average_precision == pytest.approx(ap)


# --- COCO ---------------------------------------------------------------------------------------------------


def scattered(rng, images=20):
    """Objects in cells of their own, so that VOC's and COCO's ways to match agree; noisy detections."""
    found, targets = [], []
    for _ in range(images):
        cells = rng.choice(16, rng.integers(1, 8), replace=False)
        corner = np.stack([cells % 4, cells // 4], axis=1) * 100.0 + rng.uniform(0, 20, (len(cells), 2))
        truth = np.concatenate([corner, corner + rng.uniform(30, 70, (len(cells), 2))], axis=1)
        labels = rng.choice(["a", "b"], len(cells))
        difficult = rng.random(len(cells)) < 0.2
        targets.append(Target.of(truth, labels, difficult=difficult))
        # COCO forgives one detection of a difficult box, VOC all.
        again = np.repeat(np.arange(len(cells)), rng.integers(0, np.where(difficult, 2, 4)))
        guesses = truth[again] + rng.normal(0, 6, (len(again), 4))
        found.append(detections(guesses, rng.permutation(len(again)) + rng.random(), labels[again]))
    return found, targets


@pytest.mark.parametrize("seed", range(3))
def test_coco_agrees_at_half_overlap(seed):
    found, targets = scattered(np.random.default_rng(seed))
    ours = []
    for result in voc_detection(found, targets, ["a", "b"]).values():
        # COCO's summary of the same curve: 101 recalls.
        envelope = np.append(np.maximum.accumulate(result.precision[::-1])[::-1], 0)
        ours.append(envelope[np.searchsorted(result.recall, np.linspace(0, 1, 101))].mean())
    assert coco_detection(found, targets, ["a", "b"])["AP50"] == pytest.approx(np.mean(ours), abs=1e-9)


def test_coco_by_hand(capsys):
    # One small (20 x 20), one large (200 x 200) cat, each found exactly; a difficult one found first of all.
    boxes = [[0, 0, 20, 20], [100, 100, 300, 300], [400, 0, 450, 50]]
    targets = [Target.of(boxes, ["cat"] * 3, difficult=[False, False, True])]
    result = coco_detection([detections(boxes, [0.8, 0.7, 0.9], ["cat"] * 3)], targets, ["cat"])
    for name in ("AP", "AP50", "AP75", "AP_small", "AP_large", "AR_10", "AR_100", "AR_small", "AR_large"):
        assert result[name] == pytest.approx(1), name
    assert result["AR_1"] == 0  # the only detection allowed hits the difficult box
    assert math.isnan(result["AP_medium"])
    assert math.isnan(result["AR_medium"])
    assert len(result) == 12
    assert capsys.readouterr().out == ""


def test_coco_crowd_and_other_classes():
    # The crowd swallows three misses inside it; a bird is not asked for.
    target = Target.of([[0, 0, 10, 10], [100, 100, 200, 200]], ["cat"] * 2, crowd=[False, True])
    boxes = [[110, 110, 120, 120], [130, 110, 140, 120], [150, 110, 160, 120], [0, 0, 10, 10], [0, 0, 10, 10]]
    found = detections(boxes, [0.9, 0.8, 0.7, 0.6, 0.99], ["cat"] * 4 + ["bird"])
    assert coco_detection([found], [target], ["cat"])["AP"] == pytest.approx(1)


def test_coco_of_nothing():
    assert coco_detection([NOTHING_FOUND], [Target.of([[0, 0, 9, 9]], ["cat"])], ["cat"])["AP"] == 0
    assert math.isnan(coco_detection([NOTHING_FOUND], [NOTHING_THERE], ["cat"])["AP"])
    with pytest.raises(ValueError, match="one length, got 0 and 1"):
        coco_detection([], [NOTHING_THERE], ["cat"])


def test_coco_without_pycocotools(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ValueError, match=r'pip install "sppnet\[coco\]"'):
        coco_detection([], [], ["cat"])


# --- the report ---------------------------------------------------------------------------------------------


def test_report_is_what_the_parts_say():
    found, targets = scattered(np.random.default_rng(5))
    report = evaluate_detections(found, targets, ["a", "b", "c"], seen=3)
    results = voc_detection(found, targets, ["a", "b", "c"])
    assert list(report.classes) == ["a", "b", "c"]
    for name, result in results.items():
        np.testing.assert_array_equal(report.classes[name].precision, result.precision)
        np.testing.assert_array_equal(report.classes[name].recall, result.recall)
    assert report.mean_ap == mean_average_precision(results)
    assert report.mean_ap_area == (results["a"].area + results["b"].area) / 2
    assert report.mean_ap != report.mean_ap_area
    assert report.objects == sum(int((~t.difficult).sum()) for t in targets)
    assert report.images == 20
    assert report.detections == tuple(found)
    assert report.coco == pytest.approx(coco_detection(found, targets, ["a", "b", "c"]), nan_ok=True)
    assert report.seen == 3


def test_facts_of_a_report():
    # Of two cats one is found, exactly; no bird is there, and one is said to be.
    target = Target.of([[0, 0, 10, 10], [20, 0, 30, 10]], ["cat"] * 2)
    found = detections([[0, 0, 10, 10], [50, 50, 60, 60]], [0.9, 0.8], ["cat", "bird"])
    facts = evaluate_detections([found], [target], ["cat", "bird"]).facts()
    assert math.isnan(facts["AP"].pop("bird"))
    assert math.isnan(facts["AP_area"].pop("bird"))
    assert set(facts.pop("at_threshold")) == {"cat", "bird"}
    coco = facts.pop("coco")
    assert coco["AP50"] == pytest.approx(51 / 101)
    assert json.loads(json.dumps(facts, allow_nan=False)) == {
        "mAP": 6 / 11,
        "AP": {"cat": 6 / 11},
        "mAP_area": 0.5,
        "AP_area": {"cat": 0.5},
        "objects": {"cat": 2, "bird": 0},
        "thresholds": "best F1 on these images",
        "images": 1,
        "seen": 0,
        "left_out": 0,
    }


def test_report_without_pycocotools(monkeypatch):
    monkeypatch.setattr("sppnet.evaluation.detection.find_spec", lambda name: None)
    report = evaluate_detections([NOTHING_FOUND], [NOTHING_THERE], ["cat"])
    assert report.coco is None
    assert "coco" not in report.facts()


def test_report_of_nothing():
    report = evaluate_detections([], [], ["cat"])
    assert report.images == report.objects == 0
    assert math.isnan(report.mean_ap)
    assert math.isnan(report.mean_ap_area)
    with pytest.raises(ValueError, match="one length, got 1 and 0"):
        evaluate_detections([NOTHING_FOUND], [], ["cat"])


def test_f1_of_an_image_by_hand():
    target = Target.of(
        [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], ["cat", "cat", "dog"], difficult=[0, 1, 0]
    )
    # A hit, its duplicate, one on the difficult cat that does not count, and a dog where none is: of three
    # detections that count one is right, and of two objects one is found.
    found = detections(
        [[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [0, 0, 10, 10]],
        [0.9, 0.8, 0.7, 0.6],
        ["cat"] * 3 + ["dog"],
    )
    assert image_f1(found, target, ["cat", "dog"]) == 2 * 1 / (3 + 2)
    assert image_f1(found, target, ["cat"]) == 2 * 1 / (2 + 1)
    assert image_f1(found, target, ["cat"], threshold=1.01) == 0
    assert image_f1(found, target, ["dog"]) == 0
    assert image_f1(NOTHING_FOUND, NOTHING_THERE, ["cat"]) == 1
    assert image_f1(found, target, ["bird"]) == 1


# --- candidate windows --------------------------------------------------------------------------------------


def test_proposal_recall_by_hand():
    # Image 1: best overlaps 1.0 (cat) and 0.5 (dog); a difficult and a crowd box do not count.
    # Image 2: nothing offered, one cat missed. Image 3: windows, but no object.
    targets = [
        Target.of(
            [[0, 0, 10, 10], [20, 0, 30, 10], [50, 50, 60, 60], [70, 70, 80, 80]],
            ["cat", "dog", "cat", "cat"],
            difficult=[False, False, True, False],
            crowd=[False, False, False, True],
        ),
        Target.of([[0, 0, 10, 10]], ["cat"]),
        NOTHING_THERE,
    ]
    windows = [np.array([[0, 0, 10, 10], [20, 0, 30, 5], [5, 5, 6, 6]]), np.zeros((0, 4)), np.ones((3, 4))]
    result = proposal_recall(windows, targets)
    assert result.positives == 3
    assert result.mean_windows == 2
    np.testing.assert_allclose(result.recall, [2 / 3] + [1 / 3] * 9)
    np.testing.assert_allclose(result.ious, np.arange(0.5, 1, 0.05))
    assert result.average_recall == pytest.approx((2 + 9) / 30)
    assert proposal_recall(windows, targets, classes=["dog"]).recall.tolist() == [1] + [0] * 9
    assert proposal_recall(windows, targets, ious=[0.75], classes=["cat"]).recall.tolist() == [0.5]


def test_proposal_recall_of_nothing():
    empty = proposal_recall([], [])
    assert empty.positives == empty.mean_windows == 0
    assert math.isnan(empty.average_recall)
    with pytest.raises(ValueError, match="one length, got 0 and 1"):
        proposal_recall([], [NOTHING_THERE])


def test_coco_ious_are_exact():
    assert COCO_IOUS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


# --- at a threshold -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_counts_are_those_of_a_detector_that_drops_the_rest(seed):
    rng = np.random.default_rng(seed)
    found, targets = scattered(rng)
    found = [detections(d.boxes, rng.integers(0, 10, len(d.scores)) / 10, d.labels) for d in found]
    for name, result in voc_detection(found, targets, ["a", "b"]).items():
        thresholds, precision, recall, f1 = result.curve()
        assert thresholds.tolist() == sorted(set(result.scores.tolist()), reverse=True)
        for i, threshold in enumerate(thresholds):
            alone = voc_detection([d.above(threshold) for d in found], targets, [name])[name]
            counts = result.at(threshold)
            assert counts.found == len(alone.scores)
            assert counts.objects == alone.positives
            assert counts.hits == round(alone.precision[-1] * len(alone.scores)) == alone.hits.sum()
            assert counts.precision == pytest.approx(alone.precision[-1]) == precision[i]
            assert counts.recall == pytest.approx(alone.recall[-1]) == recall[i]
            mean = 2 * counts.precision * counts.recall / max(counts.precision + counts.recall, 1e-9)
            assert counts.f1 == pytest.approx(mean) == f1[i]
        assert result.at(result.best_threshold).f1 == max(result.at(t).f1 for t in thresholds)


def test_counts_of_nothing():
    results = voc_detection([detections([[0, 0, 9, 9]], [0.5], ["a"])], [NOTHING_THERE], ["a", "b"])
    counts = results["a"].at(0.5)
    assert (counts.hits, counts.false_alarms, counts.misses, counts.precision, counts.f1) == (0, 1, 0, 0, 0)
    assert math.isnan(counts.recall)
    assert results["a"].at(0.6).found == 0
    assert math.isnan(results["a"].best_threshold)
    assert math.isnan(results["b"].at(0).f1)
    assert math.isnan(results["b"].best_threshold)
    assert len(results["b"].curve()[0]) == 0


def test_report_counts_at_stored_thresholds_or_at_the_best():
    target = Target.of([[0, 0, 10, 10], [20, 0, 30, 10]], ["a", "a"])
    found = detections([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], [0.9, 0.6, 0.3], ["a"] * 3)
    best = evaluate_detections([found], [target], ["a", "b"])
    assert best.thresholds["a"] == pytest.approx(0.6)
    assert math.isnan(best.thresholds["b"])
    assert best.total == best.counts["a"] == (2, 2, 2)
    facts = best.facts()
    assert facts["thresholds"] == "best F1 on these images"
    assert facts["at_threshold"]["a"] == {
        "threshold": pytest.approx(0.6),
        "hits": 2,
        "false_alarms": 0,
        "misses": 0,
        "precision": 1,
        "recall": 1,
        "f1": 1,
    }
    stored = evaluate_detections([found], [target], ["a", "b"], stored={"a": 0.7, "b": 0.1, "c": 0})
    assert stored.thresholds == {"a": 0.7, "b": 0.1}
    assert stored.total == (1, 1, 2)
    assert stored.facts()["thresholds"] == "stored"
    assert evaluate_detections([found], [target], []).total == (0, 0, 0)
