import numpy as np
import pytest

from sppnet.boxes import Detections, Target
from sppnet.detection.calibration import Calibration
from sppnet.detection.quality import Learned, Quality, best_thresholds, curve, learn_scores, unmeasured


def drawn(photos, seed=0, names=("a", "b")):
    """Return detections with SVM scores, right ones the higher, and an object in each photo."""
    rng = np.random.default_rng(seed)
    found, targets = [], []
    for _ in range(photos):
        name = names[rng.integers(len(names))]
        targets.append(Target.of([[0, 0, 10, 10]], [name]))
        rows = [([0, 0, 10, 10], rng.normal(0.3, 0.5), name)] if rng.random() < 0.9 else []
        rows += [([50, 50, 60, 60], rng.normal(-1.2, 0.3), str(rng.choice(names))) for _ in range(3)]
        rows = sorted((row for row in rows if row[1] >= -1.5), key=lambda row: -row[1])
        boxes = np.array([row[0] for row in rows], np.float32).reshape(-1, 4)
        scores = np.array([row[1] for row in rows], np.float32)
        found.append(Detections(boxes, scores, tuple(row[2] for row in rows)))
    return found, targets


def counted(found, targets, name, calibration, k, threshold):
    """Count detections, hits and objects of a class in plain loops."""
    shown = hits = objects = 0
    for detections, target in zip(found, targets, strict=True):
        objects += target.labels.count(name)
        for box, score, label in zip(detections.boxes, detections.scores, detections.labels, strict=True):
            chance = calibration(np.array([score]), np.array([k]))[0]
            if label == name and chance >= threshold:
                shown += 1
                hits += name in target.labels and box[0] == 0
    return hits, shown, objects


def test_what_is_learned_is_what_loops_count():
    found, targets = drawn(60)
    learned = learn_scores(found, targets, ("a", "b"), np.ones((60, 2), bool), 4)
    quality = learned.quality
    assert quality.photos.tolist() == [60, 60]
    assert quality.folds.tolist() == [4, 4]
    for k, name in enumerate("ab"):
        for threshold in (0, 0.03, 0.25, 0.5, 0.9, 1):
            expected = counted(found, targets, name, learned.calibration, k, threshold)
            assert tuple(quality.at(k, threshold)) == expected
        assert 0.7 < quality.average_precision[k] < 1
        best = max(quality.at(k, percent / 100).f1 for percent in range(1, 100))
        assert quality.at(k, float(learned.thresholds[k])).f1 > best - 0.03


def test_a_class_is_measured_only_where_it_could_be_learned():
    found, targets = drawn(40)
    measured = np.ones((40, 2), bool)
    measured[:25, 1] = False
    quality = learn_scores(found, targets, ("a", "b"), measured, 3).quality
    assert quality.photos.tolist() == [40, 15]
    assert quality.objects[1] == sum(target.labels == ("b",) for target in targets[25:])
    measured[:, 1] = False
    learned = learn_scores(found, targets, ("a", "b"), measured, 3)
    assert learned.quality.photos[1] == learned.quality.folds[1] == learned.quality.objects[1] == 0
    assert np.isnan(learned.quality.average_precision[1])
    assert learned.thresholds[1] == learned.thresholds[0], "that of the others together"
    assert learned.quality.sentence(1, 0.5) == "not measured"


def test_nothing_measured():
    learned = unmeasured(2)
    np.testing.assert_allclose(learned.thresholds, 0.5)
    assert learned.quality.curve.shape == (2, 101, 2)
    assert not learned.quality.curve.any()


def test_curves_count_from_each_per_cent_on():
    chances = np.float32([0.005, 0.01, 0.25, 0.5, 0.5, 1])
    found = curve(chances, np.array([1, 0, 1, 1, 0, 1], bool))
    for percent in range(101):
        enough = chances >= np.float32(percent / 100)
        assert found[percent].tolist() == [enough.sum(), (enough & [1, 0, 1, 1, 0, 1]).sum()]


def quality_of(rows, objects, photos=24):
    """Return the quality of one class with so many (found, hits) at 0, 1 ... 100 %."""
    curves = np.array(rows, np.int32)[None]
    numbers = (np.array([n], np.int64) for n in (objects, photos, 4))
    return Quality(np.float32([0.5]), curves, *numbers)


@pytest.mark.parametrize(
    ("found", "hits", "objects", "expected"),
    [
        (10, 8, 10, "finds 8 of 10, one false alarm in 12 photos"),
        (8, 8, 10, "finds 8 of 10, no false alarm"),
        (68, 8, 10, "finds 8 of 10, 2.5 false alarms in a photo"),
        (32, 8, 8, "finds 8 of 8, one false alarm in each photo"),
        (3, 0, 0, "not measured: too few photos show it"),
    ],
)
def test_quality_in_words(found, hits, objects, expected):
    assert quality_of([(found, hits)] * 101, objects).sentence(0, 0.4) == expected


def test_the_least_threshold_of_a_precision():
    quality = quality_of([(100 - i, min(50, 100 - i)) for i in range(101)], 60)
    assert quality.threshold_of(0, 0.5) == 0
    assert quality.threshold_of(0, 0.9) == pytest.approx(0.45)  # 50 of 55
    assert quality.threshold_of(0, 1) == 0.5
    assert quality_of([(10, 5)] * 101, 10).threshold_of(0, 0.6) is None


def test_thresholds_of_a_plateau_lie_in_its_middle():
    rows = [(100, 10)] * 30 + [(10, 10)] * 21 + [(0, 0)] * 50
    quality = quality_of(rows, 10**6)
    (threshold,) = best_thresholds(quality, quality.curve.astype(float))
    assert threshold == pytest.approx(0.4)


def test_joined_and_mixed():
    def learned(slope, threshold, found, objects):
        rule = Calibration(*np.float32([[0], [2]]), np.float32([[slope, 1]]))
        return Learned(rule, np.float32([threshold]), quality_of([(found, 1)] * 101, objects))

    one, other = learned(1, 0.3, 1, 5), learned(3, 0.6, 2, 7)
    both = one.quality.joined(other.quality)
    assert both.objects.tolist() == [5, 7]
    assert both.curve.shape == (2, 101, 2)
    for chosen, expected in ((True, one), (False, other)):
        mixed = one.where(np.array([chosen]), other)
        assert mixed.thresholds == expected.thresholds
        assert (mixed.calibration.slopes == expected.calibration.slopes).all()
        assert (mixed.quality.curve == expected.quality.curve).all()
