import copy
from dataclasses import replace

import numpy as np
import pytest

import trees
from sppnet.boxes import Target
from sppnet.detection.calibration import Calibration
from sppnet.detection.detector import Detector
from sppnet.detection.ensemble import Ensemble
from sppnet.detection.svm import LinearSVMs
from sppnet.images import photo_keys
from sppnet.progress import StageTimer
from sppnet.proposals import parse
from sppnet.regression import BoxRegression

SHAPE = (96, 128)


def windows(image):
    return parse("dense")(image)[0]


@pytest.fixture(scope="module")
def detectors():
    """Detectors of the same shapes on two backbones of different stages, strides, scales and pyramids."""
    scenes = [trees.scene(n) for n in (1, 3, 5, 7, 9, 11)]
    targets = [Target.of(s.boxes, s.labels) for s in scenes]
    images = [s.image for s in scenes]
    boxes = [windows(image) for image in images]
    one = Detector(levels=(1,), scales=(160,), reference=80)
    two = Detector(stages=("4",), output_stride=32, levels=(2, 1), scales=(96, 192), reference=80)
    data = trees.samples(images, targets)
    return tuple(d.fit(data, classes=sorted(trees.SHAPES), windows=boxes) for d in (one, two))


@pytest.fixture(scope="module")
def image():
    return trees.scene(13).image


def scored(detector, image, boxes, regress):
    """Return boxes, clipped, log-odds and SVM scores of all windows, of a detector of its own."""
    moved, margins = detector.score(detector.encode(image), boxes, regress=regress)
    clipped = np.clip(moved, 0, np.array([SHAPE[1], SHAPE[0]] * 2))
    calibration = detector.fitted_.calibration
    away = margins - calibration.knots
    slopes = np.where(away < 0, calibration.slopes[:, 0], calibration.slopes[:, 1])
    return clipped, calibration.levels + slopes * away, margins


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def combined(detectors, image, boxes, regress):
    """Return label, probability and box of all windows that an SVM gives -1.5, in plain loops."""
    parts, found = [scored(d, image, boxes, regress) for d in detectors], []
    for r in range(len(boxes)):
        for k, name in enumerate(detectors[0].classes_):
            if max(margins[r, k] for _, _, margins in parts) < -1.5:
                continue
            weights = [sigmoid(odds[r, k]) for _, odds, _ in parts]
            moved = [d.score(d.encode(image), boxes[r : r + 1], regress=regress)[0][0, k] for d in detectors]
            box = sum(w * b for w, b in zip(weights, moved, strict=True)) / sum(weights)
            box = np.clip(box, 0, np.array([SHAPE[1], SHAPE[0]] * 2))
            found.append((name, sigmoid(np.mean([odds[r, k] for _, odds, _ in parts])), tuple(box)))
    return found


def rows(found):
    numbers = zip(found.labels, found.scores.tolist(), found.boxes.tolist(), strict=True)
    return [(label, score, tuple(box)) for label, score, box in numbers]


def overlap(a, b):
    """Return the intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def suppressed(found, threshold, limit):
    """Walk down the scores of each class; keep what overlaps nothing kept by more than 0.3."""
    kept = []
    for name in trees.SHAPES:
        mine = []
        for row in sorted((r for r in found if r[0] == name and r[1] >= threshold), key=lambda r: -r[1]):
            if all(overlap(row[2], other[2]) <= 0.3 for other in mine):
                mine.append(row)
        kept.extend(mine[:limit])
    return sorted(kept, key=lambda r: -r[1])


def assert_equal(found, expected):
    assert [row[0] for row in found] == [row[0] for row in expected]
    np.testing.assert_allclose([r[1] for r in found], [r[1] for r in expected], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose([r[2] for r in found], [r[2] for r in expected], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("regress", "threshold", "limit"), [(True, 0, 100), (False, 0, 100), (True, 0.9, 100), (True, 0, 3)]
)
def test_likelyare_as_likely_as_the_detectors_say_on_the_mean(detectors, image, regress, threshold, limit):
    boxes = windows(image)[::5]
    likely = combined(detectors, image, boxes, regress)
    # A threshold that parts them; as a share of the most likely one.
    threshold *= max(row[1] for row in likely)
    expected = suppressed(likely, threshold, limit)
    limited = copy.copy(detectors[0])
    limited.limit = limit
    found = Ensemble([limited, detectors[1]]).predict(image, boxes, regress=regress, threshold=threshold)
    assert expected
    assert_equal(rows(found), expected)


def test_a_detector_whose_scores_say_nothing_changes_no_order(detectors, image):
    one, two = detectors
    dull = copy.copy(two)
    flat = Calibration(*np.zeros((2, 3), np.float32), np.full((3, 2), 1e-6, np.float32))
    dull.fitted_ = replace(two.fitted_, calibration=flat)
    dull.fitted_.svms.biases[:] = 0  # above -1.5 wherever the windows are
    found = Ensemble([one, dull]).predict(image, windows(image), regress=False, threshold=0)
    alone = one.predict(image, windows(image), regress=False, threshold=0)
    number = len(alone)
    for name in one.classes_:
        mine, theirs = (
            [tuple(b) for label, b in zip(f.labels, f.boxes.tolist(), strict=True) if label == name]
            for f in (found, alone)
        )
        np.testing.assert_allclose(mine[: len(theirs)], theirs, rtol=1e-6)
    assert number > 3


def test_stored_thresholds_are_the_mean_of_the_detectors(detectors, image):
    ensemble = Ensemble(detectors)
    expected = (detectors[0].thresholds_ + detectors[1].thresholds_) / 2
    np.testing.assert_allclose(ensemble.thresholds_, expected)
    found = ensemble.predict(image, windows(image))
    everything = ensemble.predict(image, windows(image), threshold=0)
    least = dict(zip(ensemble.classes_, ensemble.thresholds_, strict=True))
    assert rows(found) == [row for row in rows(everything) if row[1] >= least[row[0]]]


def test_an_ensemble_of_one_is_its_detector(detectors, image):
    for detector in detectors:
        alone = Ensemble([detector])
        assert alone.classes_ == detector.classes_
        assert rows(alone.predict(image, windows(image))) == rows(detector.predict(image, windows(image)))


def reordered(detector, order):
    """Return a detector with its classes in another order."""
    other, fitted = copy.copy(detector), detector.fitted_
    other.fitted_ = replace(
        fitted,
        classes=tuple(fitted.classes[k] for k in order),
        svms=LinearSVMs(fitted.svms.weights[order], fitted.svms.biases[order]),
        regression=BoxRegression(fitted.regression.weights[order], fitted.regression.offsets[order]),
        calibration=Calibration(*(part[order] for part in vars(fitted.calibration).values())),
        thresholds=fitted.thresholds[order],
    )
    return other


def test_the_order_of_detectors_and_classes_does_not_matter(detectors, image):
    one, two = detectors
    expected = rows(Ensemble([one, two]).predict(image, windows(image)))
    assert_equal(rows(Ensemble([two, one]).predict(image, windows(image))), expected)
    turned = reordered(two, [2, 0, 1])
    assert Ensemble([one, turned]).classes_ == one.classes_
    assert Ensemble([turned, one]).classes_ == turned.classes_ != one.classes_
    for pair in ([one, turned], [turned, one]):
        assert_equal(rows(Ensemble(pair).predict(image, windows(image))), expected)


def test_files_and_pixels_timed(detectors, image, tmp_path):
    trees.save(tmp_path / "a.png", image)
    timer, ensemble = StageTimer(), Ensemble(detectors)
    from_file = ensemble.predict(tmp_path / "a.png", windows(image), timer=timer)
    assert rows(from_file) == rows(ensemble.predict(image, windows(image)))
    assert list(timer.seconds) == ["backbone", "pooling", "scoring"]


def test_no_likelyno_detections(detectors, image):
    found = Ensemble(detectors).predict(image, np.zeros((0, 4), np.float32))
    assert found.boxes.shape == (0, 4)
    assert found.labels == ()


def test_detectors_that_do_not_go_together(detectors):
    one, two = detectors
    with pytest.raises(ValueError, match="found no detector to combine, expected at least one"):
        Ensemble([])
    with pytest.raises(ValueError, match="detector 2 is not fitted yet"):
        Ensemble([one, Detector()])
    fewer = reordered(two, [0, 2])
    with pytest.raises(
        ValueError,
        match=r"^detector 2 knows disc, triangle, expected the classes of the first: disc, square, tri",
    ):
        Ensemble([one, fewer])
    strict = copy.copy(two)
    strict.nms_iou = 0.5
    with pytest.raises(ValueError, match=r"detector 3 has nms_iou 0\.5, expected 0\.3 as the first"):
        Ensemble([one, two, strict])
    for twin in (one, copy.copy(one), reordered(one, [0, 1, 2])):
        with pytest.raises(ValueError, match="detectors 1 and 3 are the same, expected different ones"):
            Ensemble([one, two, twin])
    scaled = copy.copy(one)
    scaled.scales = (320,)
    assert len(Ensemble([one, scaled]).detectors) == 2, "one detector at two scales is two"


def test_streams_and_evaluations_are_those_of_what_it_predicts(detectors, image):
    ensemble, scene = Ensemble(detectors), trees.scene(13)
    expected = ensemble.predict(image, parse("dense")(image).boxes)
    ((pixels, found),) = ensemble.stream([image], proposals="dense")
    assert pixels is image
    assert rows(found) == rows(expected)
    data = trees.samples([image, trees.scene(1).image], [Target.of(scene.boxes, scene.labels)] * 2)
    report = ensemble.evaluate(data, proposals="dense")
    assert rows(report.detections[0]) == rows(ensemble.predict(image, windows(image), threshold=0))
    assert report.seen == ensemble.seen(data) == 1, "both were fitted on the second image"
    others = copy.copy(detectors[1])
    others.fitted_ = replace(others.fitted_, photos=photo_keys([image]))
    assert Ensemble([detectors[0], others]).seen(data) == 2, "either was fitted on one of them"
    # Unless others are asked for, the windows are those of the first detector.
    own = ensemble.predict(image, parse(detectors[0].proposals)(image).boxes)
    assert rows(ensemble.predict(image)) == rows(own)
