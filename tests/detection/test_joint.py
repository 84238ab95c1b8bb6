import time
from dataclasses import replace

import numpy as np
import pytest

import sppnet.detection.joint as joint
from sppnet.boxes import Target
from sppnet.datasets.records import Sample
from sppnet.detection.detector import Detector
from sppnet.errors import SppnetError
from sppnet.features.encoded import OwnWindows
from sppnet.proposals.odds import NONE, told, with_told
from sppnet.rpn.settings import Joint
from trees import scene

QUICK = Joint(side=96, width=16, batch=4, frozen=0)


def shapes(count, start=0, **options):
    """Annotated pictures of coloured shapes."""
    found = []
    for seed in range(start, start + count):
        drawn = scene(seed, **options)
        found.append(Sample(f"scene{seed}", drawn.image, Target.of(drawn.boxes, drawn.labels)))
    return found


@pytest.fixture(scope="module", autouse=True)
def _short():
    """Trainings of a second are enough to test with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint, "_LEAST", 1.0)
        patch.setattr(joint, "_PASSES", 1.0)
        yield


@pytest.fixture(scope="module")
def tiny(backbone_file):
    return str(backbone_file("test_efficientnet"))


@pytest.fixture(scope="module")
def fitted(tiny):
    """A detector that learned to propose windows for some seconds, on twelve pictures."""
    kept = []
    detector = Detector(tiny, joint=QUICK, folds=3)
    detector.fit(shapes(12), minutes=0.1, keep=lambda d: kept.append(d.fitted_))
    return detector, kept


def unknown(scores):
    return np.full(scores.shape, np.nan)


def test_what_the_network_says_leaves_scores_where_it_is_certain():
    scores = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    np.testing.assert_allclose(with_told(scores, np.full(5, 40.0), unknown(scores)), scores, atol=1e-5)


def test_probabilities_of_object_and_class_multiply():
    scores, odds = np.array([[0.5, -2.0]], np.float32), np.array([-1.0])
    mine = 1 / (1 + np.exp(-2 * scores))
    chances = mine / (1 + np.exp(1.0))
    found = with_told(scores, odds, unknown(scores))
    np.testing.assert_allclose(found, np.log(chances / (1 - chances)) / 2, rtol=1e-5)
    # Of the second class the network knows something, too.
    chances[0, 1] = np.sqrt(mine[0, 1] * 0.3) / (1 + np.exp(1.0))
    found = with_told(scores, odds, np.array([[np.nan, np.log(0.3)]]))
    np.testing.assert_allclose(found, np.log(chances / (1 - chances)) / 2, rtol=1e-5)


def test_extreme_scores_stay_numbers_in_their_order():
    scores = np.array([[-500.0, -20, 0, 20, 500]], np.float32)
    found = with_told(scores, np.array([30.0]), unknown(scores))
    assert np.isfinite(found).all()
    assert (np.diff(found[0]) >= 0).all()


def test_a_window_is_told_by_the_own_one_that_it_overlaps_most():
    own = OwnWindows(
        np.array([[0, 0, 10, 10], [20, 20, 40, 40]], np.float32),
        np.array([2.0, 1.0], np.float32),
        np.array([[-1.0, -2], [-3, -4]], np.float32),
    )
    boxes = np.array([[0, 0, 10, 10], [22, 22, 40, 40], [60, 60, 70, 70]], np.float32)
    odds, kinds = told(boxes, own, ("cat", "dog"), ("dog", "cow"))
    assert odds.tolist() == [2.0, 1.0, NONE]
    assert kinds[:2, 0].tolist() == [-2, -4]
    assert np.isnan(kinds[:, 1]).all()
    none = OwnWindows(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros((0, 2), np.float32))
    odds, kinds = told(boxes, none, ("cat", "dog"), ("dog", "cow"))
    assert odds.tolist() == [NONE] * 3
    assert np.isnan(kinds).all()


def test_a_fit_of_some_minutes_ends_in_time_and_tells_how_good_it_was(tiny):
    detector, begun = Detector(tiny, joint=QUICK, folds=3), time.monotonic()
    detector.fit(shapes(12), minutes=0.3)
    assert time.monotonic() - begun < 40
    assert detector.fitted_.side == 96
    assert len(detector.fitted_.history) == 1
    minutes, mean_ap = detector.fitted_.history[0]
    assert 0 < minutes < 0.3
    assert 0 <= mean_ap <= 1


def test_it_is_kept_before_the_end(fitted):
    detector, kept = fitted
    assert len(kept) == 1
    assert kept[0].classes == detector.classes_
    assert kept[0].backbone.digest != detector.fitted_.backbone.digest


def test_the_network_proposes_the_windows(fitted):
    detector, _ = fitted
    encoded = detector.encode(scene(50).image)
    assert encoded.windows is not None
    np.testing.assert_array_equal(detector.propose(None, encoded), encoded.windows.boxes)
    found = detector.predict(encoded, threshold=0.0)
    same = detector.predict(scene(50).image, threshold=0.0)
    np.testing.assert_array_equal(found.boxes, same.boxes)
    given = detector.predict(encoded, encoded.windows.boxes, threshold=0.0)
    np.testing.assert_array_equal(found.scores, given.scores)


def test_so_many_pictures_give_the_same_detector(tiny, threads):
    one, other = (
        Detector(tiny, joint=replace(QUICK, photos=24), folds=3).fit(shapes(9)).fitted_ for _ in range(2)
    )
    assert one.backbone.digest == other.backbone.digest
    np.testing.assert_array_equal(one.svms.weights, other.svms.weights)
    np.testing.assert_array_equal(one.thresholds, other.thresholds)


def test_other_windows_can_be_asked_for(fitted):
    detector, _ = fitted
    boxes = np.array([[0, 0, 50, 50], [10, 10, 90, 90]], np.float32)
    moved, scores = detector.score(detector.encode(scene(50).image), boxes)
    assert moved.shape == (2, len(detector.classes_), 4)
    assert np.isfinite(scores).all()
    detector.predict(scene(50).image, proposals="dense")


def test_a_file_gives_the_same_detections(fitted, tmp_path):
    detector, _ = fitted
    detector.save(tmp_path / "d.safetensors")
    loaded = Detector.load(tmp_path / "d.safetensors")
    assert loaded.joint == QUICK
    assert loaded.fitted_.side == 96
    np.testing.assert_array_equal(loaded.fitted_.history, detector.fitted_.history)
    encoded, same = (d.encode(scene(51).image) for d in (detector, loaded))
    np.testing.assert_array_equal(encoded.windows.boxes, same.windows.boxes)
    one, other = (d.score(encoded, encoded.windows.boxes) for d in (detector, loaded))
    np.testing.assert_allclose(one[0], other[0], atol=0.1)
    np.testing.assert_allclose(one[1], other[1], atol=0.01)


def test_classes_can_be_added_and_leave_the_others_as_they_are(tiny):
    data = shapes(12)
    detector = Detector(tiny, joint=QUICK, folds=3).fit(data, classes=["disc", "square"], minutes=0.1)
    before = detector.predict(scene(52).image, threshold=0.0)
    detector.add_class("triangle", data)
    assert detector.classes_ == ("disc", "square", "triangle")
    after = detector.predict(scene(52).image, threshold=0.0)
    rest = [i for i, label in enumerate(after.labels) if label != "triangle"]
    np.testing.assert_array_equal(after.boxes[rest], before.boxes)
    np.testing.assert_allclose(after.scores[rest], before.scores, atol=1e-6)


def test_a_network_that_proposes_needs_no_training(fitted, tmp_path):
    detector, _ = fitted
    path = tmp_path / "pyramid.onnx"
    detector.fitted_.backbone.graph.save(path)
    frozen = Detector(str(path), folds=3).fit(shapes(9))
    assert frozen.fitted_.side is not None
    assert frozen.fitted_.backbone.digest == detector.fitted_.backbone.digest
    assert frozen.fitted_.quality.folds.tolist() == [3] * len(frozen.classes_)


def test_a_fit_goes_on_from_the_network_of_another_detector(fitted, tmp_path):
    path = tmp_path / "d.safetensors"
    fitted[0].save(path)
    with pytest.warns(UserWarning, match="its network has seen 9 of these 9 photos"):
        same = Detector(str(path), folds=3).fit(shapes(9))
    np.testing.assert_array_equal(same.thresholds_, fitted[0].thresholds_)
    assert same.fitted_.backbone.digest == fitted[0].fitted_.backbone.digest
    with pytest.warns(UserWarning, match="its network has seen 9 of these 9 photos"):
        more = Detector(str(path), joint=replace(QUICK, photos=16), folds=3).fit(shapes(9))
    assert more.fitted_.quality.objects.tolist() == fitted[0].fitted_.quality.objects.tolist()
    assert more.fitted_.backbone.digest != fitted[0].fitted_.backbone.digest
    assert more.fitted_.backbone.graph.facts.kinds == ("disc", "square", "triangle")
    assert np.isfinite(more.fitted_.history).all(), "no photo was held out to tell how good it is"


def test_a_detector_without_a_pyramid_gives_its_backbone_too(tiny, tmp_path):
    path = tmp_path / "d.safetensors"
    plain = Detector(tiny, scales=(96,), levels=(1,), proposals="dense", folds=0)
    plain.fit(shapes(6)).save(path)
    again = Detector(str(path), scales=(96,), levels=(1,), proposals="dense", folds=0).fit(shapes(6))
    assert again.fitted_.backbone.signature == plain.fitted_.backbone.signature


def test_too_few_minutes_say_what_can_be_had(fitted, tmp_path):
    path = tmp_path / "pyramid.onnx"
    fitted[0].fitted_.backbone.graph.save(path)
    with pytest.warns(UserWarning, match=r"found 0.01 minutes, expected \d.\d or more to train the network"):
        detector = Detector(str(path), joint=QUICK, folds=3).fit(shapes(9), minutes=0.01)
    assert len(detector.fitted_.history) == 1


def test_too_many_photos_for_the_time_without_a_limit_say_it_too(fitted, tmp_path, monkeypatch):
    path = tmp_path / "pyramid.onnx"
    fitted[0].fitted_.backbone.graph.save(path)
    monkeypatch.setattr(joint, "MOST", 0.001)
    with pytest.warns(UserWarning, match=r"found 0.001 minutes, expected"):
        Detector(str(path), joint=QUICK, folds=3).fit(shapes(9))


def test_photos_that_cannot_be_read_are_left_out_and_named(tiny, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"nothing")
    data = [*shapes(9), Sample("bad", bad, Target.of([[0, 0, 5, 5]], ["disc"]))]
    with pytest.warns(UserWarning, match=r"1 of 10 photos left out, unreadable: .*bad\.jpg"):
        Detector(tiny, joint=QUICK, folds=3).fit(data, minutes=0.1, max_bad=0.2)


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"minutes": 0}, {}, "found 0 minutes, expected more than 0"),
        ({"minutes": -1}, {}, "found -1 minutes, expected more than 0"),
        ({"minutes": float("nan")}, {}, "found nan minutes, expected more than 0"),
        ({"minutes": 1, "windows": []}, {}, "found windows for a network that is trained to propose its own"),
    ],
)
def test_what_cannot_be_asked_for_is_said_at_once(tiny, options, settings, message):
    with pytest.raises(SppnetError, match=message):
        Detector(tiny, **settings).fit(shapes(4), **options)


@pytest.mark.parametrize(
    ("named", "minutes", "expected"),
    [
        (None, None, "efficientnet-lite0"),
        (None, 1, "pyramid-lite0"),
        ("efficientnet-lite0", 1, "efficientnet-lite0"),
        ("pyramid-lite0", None, "pyramid-lite0"),
    ],
)
def test_the_network_that_is_named_is_taken_and_else_the_one_that_suits(named, minutes, expected):
    detector = Detector(named)
    assert detector._backbone(detector._asked(minutes, None)).name == expected


def test_svms_learn_from_as_many_photos_as_there_is_time_for(tiny, monkeypatch):
    monkeypatch.setattr(joint, "_FEWEST", 5)
    monkeypatch.setattr(joint, "_PASSES", 1e4)
    data = shapes(16)
    detector = Detector(tiny, joint=QUICK, folds=2).fit(data, minutes=0.1)
    assert detector.seen(data) == 16  # by the network
    # About a third teach the SVMs, each class among them.
    assert detector.classes_ == ("disc", "square", "triangle")
    objects = sum(len(sample.target.labels) for sample in data)
    assert 0 < detector.fitted_.objects.sum() < 0.6 * objects
