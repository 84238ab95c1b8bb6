import copy
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from sklearn.utils import estimator_checks

import trees
from sppnet.arrays import to_numpy
from sppnet.boxes import Detections, Target, area, intersection, iou
from sppnet.detection import fit as fitting
from sppnet.detection.detector import Detector
from sppnet.detection.ensemble import Ensemble
from sppnet.detection.file import read_facts
from sppnet.detection.network import HeadNetwork
from sppnet.detection.postprocess import postprocess
from sppnet.detection.sampling import Examples, SamplingRules, plan_images
from sppnet.detection.svm import MiningSettings
from sppnet.detection.tuning import Tuning
from sppnet.errors import NotFittedError, SppnetError
from sppnet.evaluation.detection import mean_average_precision, voc_detection
from sppnet.features.backbone import Backbone
from sppnet.features.cache import MapCache
from sppnet.features.windows import WindowPooling
from sppnet.progress import StageTimer
from sppnet.proposals import parse
from sppnet.proposals.maps import Objectness
from sppnet.regression import decode_deltas
from trees import drawn, grid

SCALES = (160, 320)
SETTINGS = {"levels": (2, 1), "scales": SCALES, "reference": 160}


def fields(detector):
    fitted = detector.fitted_
    return fitted.regression.weights, fitted.regression.offsets, fitted.svms.weights, fitted.svms.biases


def fit(detector, data, **options):
    """Fit a detector to images, windows and targets."""
    images, windows, targets = data
    return detector.fit(trees.samples(images, targets), windows=windows, **options)


def same(a, b):
    assert a.classes_ == b.classes_
    assert a.fitted_.feature_scale == b.fitted_.feature_scale
    return all(np.array_equal(p, q) for p, q in zip(fields(a), fields(b), strict=True))


@pytest.fixture(scope="module")
def backbone(lite0):
    return lite0


@pytest.fixture(scope="module")
def training():
    return drawn(range(1, 17))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The maps of all images here, computed once for all tests that do not count."""
    return tmp_path_factory.mktemp("maps")


@pytest.fixture(scope="module")
def detector(backbone, training, cache):
    return fit(Detector(**SETTINGS), training, cache=cache)


@pytest.fixture(scope="module")
def few():
    """Three images with all three shapes, for quick fits."""
    numbers = [n for n in range(1, 60) if len(trees.scene(n).labels) == 2]
    chosen = next(
        (a, b, c)
        for a, b, c in zip(numbers, numbers[1:], numbers[2:], strict=False)
        if {*trees.scene(a).labels, *trees.scene(b).labels, *trees.scene(c).labels} == set(trees.SHAPES)
    )
    return drawn(chosen)


@pytest.fixture
def calls(monkeypatch):
    """Count how often a backbone is run."""
    made = []
    plain = Backbone.__call__

    def counted(self, image, side):
        made.append(side)
        return plain(self, image, side)

    monkeypatch.setattr(Backbone, "__call__", counted)
    return made


def test_shapes_are_found_in_pictures_not_seen_before(detector):
    images, windows, targets = drawn(range(101, 111))

    def precision(found):
        return mean_average_precision(voc_detection(found, targets, detector.classes_))

    rng = np.random.default_rng(0)
    guessed = [
        Detections(boxes, np.linspace(1, 0, len(boxes)), tuple(rng.choice(trees.SHAPES, len(boxes))))
        for boxes in map(rng.permutation, windows)
    ]
    assert precision(guessed) < 0.15, "the windows alone find nothing"
    plain, moved = (
        [detector.predict(i, w, regress=regress, threshold=0) for i, w in zip(images, windows, strict=True)]
        for regress in (False, True)
    )
    assert precision(plain) > 0.7
    assert precision(moved) > 0.8
    assert detector.classes_ == ("disc", "square", "triangle")


def test_regression_moves_windows_nearer_to_the_truth(detector, training):
    before, after = [], []
    for image, windows, target in zip(*training, strict=True):
        # Sorted by class and score, which regression leaves alone: the same rows are the same windows.
        plain, moved = (everything(detector, image, windows, regress) for regress in (False, True))
        for truth, name in zip(target.boxes, target.labels, strict=True):
            overlaps = [
                iou(np.array([r[2:] for r in rows if r[0] == name]), truth[None])[:, 0]
                for rows in (plain, moved)
            ]
            near = overlaps[0] > 0.5
            before.extend(overlaps[0][near])
            after.extend(overlaps[1][near])
    assert len(before) > 50
    assert np.mean(after) > np.mean(before) + 0.03


def test_mean_feature_norm_of_the_first_windows_is_20(detector, backbone, training, cache):
    images, windows, targets = training
    plans = plan_images(Examples(images, windows, targets, detector.classes_), SamplingRules(), seed=0)
    store, norms = MapCache(cache, backbone, SCALES), []
    for image, plan in zip(images, plans, strict=True):
        # As the fit keeps them: in half precision.
        vectors = detector.pooling(store(image, StageTimer()), plan.boxes[plan.start]).astype(np.float16)
        norms.append(np.linalg.norm(vectors.astype(np.float32) * detector.fitted_.feature_scale, axis=1))
    assert float(np.concatenate(norms).mean()) == pytest.approx(20, rel=1e-5)


def test_fits_are_equal_by_seed(backbone, few, cache):
    one, twin = (fit(Detector(**SETTINGS, seed=3), few, cache=cache) for _ in range(2))
    assert same(one, twin)
    other = fit(Detector(**SETTINGS, seed=4), few, cache=cache)
    assert not np.array_equal(one.fitted_.svms.weights, other.fitted_.svms.weights)


def test_files_and_pixels_with_and_without_a_cache_give_the_same_detector(backbone, few, cache, tmp_path):
    images, windows, targets = few
    paths = [tmp_path / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        trees.save(path, image)
    from_files = fit(Detector(**SETTINGS), (paths, windows, targets))
    from_pixels = fit(Detector(**SETTINGS), few, cache=cache)
    assert same(from_files, from_pixels)
    found = [from_files.predict(source, windows[0]) for source in (paths[0], images[0])]
    np.testing.assert_array_equal(found[0].boxes, found[1].boxes)
    np.testing.assert_array_equal(found[0].scores, found[1].scores)


def test_a_fit_goes_on_with_the_maps_on_the_disk(backbone, few, tmp_path, calls):
    images = few[0]
    first = fit(Detector(**SETTINGS), few, cache=tmp_path)
    assert sorted(calls) == sorted(SCALES * len(images)), "each image once per side, in both passes"
    calls.clear()
    second = fit(Detector(**SETTINGS), few, cache=tmp_path)
    assert calls == []
    assert same(first, second)
    # A fit that broke off, with a damaged entry, a missing one and a sound one.
    entries = sorted(tmp_path.iterdir())
    entries[0].write_bytes(entries[0].read_bytes()[:1000])
    entries[1].unlink()
    third = fit(Detector(**SETTINGS), few, cache=tmp_path)
    assert sorted(calls) == sorted(SCALES * 2)
    assert same(first, third)


def test_a_fit_of_chosen_classes_tracked_and_timed(backbone, few, cache):
    seen, timer, start = [], StageTimer(), time.perf_counter()

    def track(items, description):
        for item in items:
            seen.append(description)
            yield item

    names = ["triangle", "disc", "triangle"]
    fitted = fit(Detector(**SETTINGS), few, classes=names, cache=cache, track=track, timer=timer)
    assert fitted.classes_ == ("triangle", "disc")
    assert set(fitted.predict(few[0][0], grid(), threshold=0).labels) == {"triangle", "disc"}
    assert seen.count("Computing feature maps") == seen.count("Mining hard negatives") == 3  # images
    assert seen.count("Fitting box regression") == 2  # classes
    assert {"maps from cache", "pooling", "SVMs", "box regression"} <= set(timer.seconds)
    # Stages do not count twice, however they are nested.
    assert min(timer.seconds.values()) > 0
    assert sum(timer.seconds.values()) < time.perf_counter() - start
    timer = StageTimer()
    fitted.predict(few[0][0], grid(), timer=timer)
    assert list(timer.seconds) == ["backbone", "pooling", "scoring"]


def test_one_image_is_enough(backbone):
    images, windows, targets = drawn([1])
    fitted = fit(Detector(**SETTINGS), (images, windows, targets))
    assert fitted.classes_ == tuple(sorted(targets[0].labels))
    for name, truth in zip(targets[0].labels, targets[0].boxes, strict=True):
        far = windows[0][iou(windows[0], truth[None])[:, 0] < 0.3]
        rows = everything(fitted, images[0], np.concatenate([far, truth[None]]), regress=False)
        scores = [r[1] for r in rows if r[0] == name]
        (own,) = (r[1] for r in rows if r[0] == name and r[2:] == tuple(truth.tolist()))
        assert own == max(scores), "the example scores above all its negatives"


def test_images_without_objects_or_windows_take_part(backbone, few, cache):
    images, windows, targets = few
    none = np.zeros((0, 4), np.float32)
    data = (
        [*images, images[0][:, ::-1].copy(), images[1][::-1].copy()],
        [*windows, grid(), none],
        [*targets, Target.of([], []), Target.of([], [])],
    )
    more = fit(Detector(**SETTINGS), data, cache=cache)
    assert more.classes_ == tuple(sorted(trees.SHAPES))


@pytest.mark.parametrize("flag", ["difficult", "crowd"])
def test_difficult_and_crowd_boxes_are_neither_positive_nor_negative(backbone, few, cache, monkeypatch, flag):
    images, windows, targets = few
    given = []
    plain = fitting.mine_hard_negatives

    def spied(positives, start, candidates, settings):
        def kept():
            for part in candidates:
                given.append((part.features.copy(), part.classes))
                yield part

        given.append((positives.features, positives.classes.argmax(axis=1)))
        return plain(positives, start, kept(), settings)

    monkeypatch.setattr(fitting, "mine_hard_negatives", spied)
    plans = []
    plan = fitting.plan_images
    monkeypatch.setattr(fitting, "plan_images", lambda *a: plans.extend(plan(*a)) or plans)
    name = targets[0].labels[0]
    hard = Target.of(targets[0].boxes, targets[0].labels, **{flag: [True, False]})
    # The first image comes again, without flags, so that the class has an example.
    images, windows = [*images, images[0]], [*windows, windows[0]]
    others = [Target.of(t.boxes, t.labels) for t in (*targets[1:], targets[0])]
    names = sorted({*hard.labels[1:], *(n for t in others for n in t.labels), name})
    fit(Detector(**SETTINGS), (images, windows, [hard, *others]), classes=names, cache=cache)
    (_, labels), (features, negative), *_ = given
    total = sum(len(t.labels) for t in (hard, *others))
    assert len(labels) == total - 1
    assert np.bincount(labels, minlength=len(names))[names.index(name)] == sum(
        n == name for t in (hard, *others) for n, d in zip(t.labels, t.ignored, strict=True) if not d
    )
    # The image's candidates are its one good box, then the windows.
    assert len(features) == len(negative) == 1 + len(windows[0])
    overlap = iou(windows[0], hard.boxes)
    if flag == "crowd":
        overlap[:, :1] = intersection(windows[0], hard.boxes[:1]) / area(windows[0])[:, None]
    near = overlap[:, [n == name for n in hard.labels]].max(axis=1) >= 0.3
    assert near.any()
    expected = np.append(plans[0].negative[0, names.index(name)], ~near)
    # The windows that the first SVMs started with are not offered again, or a hard one would count twice.
    assert expected[plans[0].start].any()
    expected[plans[0].start] = False
    np.testing.assert_array_equal(negative[:, names.index(name)], expected)


def test_a_class_without_example_is_an_error_before_any_work(backbone, few, calls):
    images, windows, targets = few
    with pytest.raises(SppnetError, match="no object of 'unicorn' in 3 images, expected disc"):
        fit(Detector(**SETTINGS), few, classes=["disc", "unicorn"])
    with pytest.raises(SppnetError, match="found no object in 3 images, expected annotated objects"):
        fit(Detector(**SETTINGS), (images, windows, [Target.of([], [])] * 3))
    hard = [Target.of(t.boxes, t.labels, difficult=[True] * len(t.labels)) for t in targets]
    with pytest.raises(SppnetError, match="all examples of disc, square, triangle in 3 images are difficult"):
        fit(Detector(**SETTINGS), (images, windows, hard), classes=sorted(trees.SHAPES))
    with pytest.raises(SppnetError, match="one length of at least 1, got 3, 2 and 3"):
        Detector(**SETTINGS).fit(trees.samples(images, targets), windows=windows[:2])
    with pytest.raises(SppnetError, match="found no object in 0 images, expected annotated objects"):
        Detector(**SETTINGS).fit([])
    assert calls == []


def test_what_is_no_data_set_is_an_error_that_says_what_helps(few):
    images, _, targets = few
    for wrong in ("my-data", Path("my-data")):
        with pytest.raises(SppnetError, match=r"found the path 'my-data', .* read_dataset\('my-data'\)"):
            Detector().fit(wrong)
    for wrong in (images, "a", 3, zip(images, targets, strict=True)):
        with pytest.raises(SppnetError, match="expected a data set"):
            Detector().fit(wrong)


def offered(monkeypatch, backbone, training, cache, rule):
    """Return the plans of a fit, and the first and the later negatives that its SVMs are offered."""
    given, plans = [], []
    plan = fitting.plan_images

    class Enough(Exception):
        pass

    def spied(positives, start, candidates, settings):
        given.extend([start.classes, [part.classes for part in candidates]])
        raise Enough

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "mine_hard_negatives", spied)
        patch.setattr(fitting, "plan_images", lambda *a: plans.extend(plan(*a)) or plans)
        with pytest.raises(Enough):
            fit(Detector(**SETTINGS, negatives=rule), training, cache=cache)
    return plans, *given


def test_negatives_are_those_of_the_rule(backbone, few, cache, monkeypatch):
    images, windows, targets = few
    windows = [np.concatenate([w, w + np.float32(0.1)]) for w in windows]  # most cover the same cells
    found = {
        rule: offered(monkeypatch, backbone, (images, windows, targets), cache, rule)
        for rule in ("all", "released", "paper")
    }
    for plans, start, later in found.values():
        np.testing.assert_array_equal(start, np.concatenate([p.negative[p.start] for p in plans]))
        for plan, negative in zip(plans, later, strict=True):
            expected = plan.negative.copy()
            expected[plan.start] = False
            np.testing.assert_array_equal(negative, expected)
    for image, every, once, apart in zip(images, *(found[rule][0] for rule in found), strict=True):
        first = Detector(**SETTINGS).pooling.distinct(backbone.encode(image, SCALES), every.boxes)
        expected = np.zeros_like(every.negative)
        expected[first] = every.negative[first]
        np.testing.assert_array_equal(once.negative, expected)
        np.testing.assert_array_equal(once.start, every.start)
        for k in range(every.negative.shape[1]):
            assert 0 < once.negative[:, k].sum() < 0.8 * every.negative[:, k].sum()
            left = every.boxes[apart.negative[:, k]]
            assert np.triu(iou(left, left), 1).max() <= 0.7
            assert 0 < len(left) < 0.6 * every.negative[:, k].sum()


@pytest.mark.parametrize(
    ("projection", "scale_rule"), [("paper", "released"), ("released", "paper"), ("paper", "paper")]
)
def test_windows_are_pooled_by_the_rules_of_the_detector(projection, scale_rule):
    rules = {"projection": projection, "scale_rule": scale_rule, "reference": 100}
    assert Detector(levels=(2, 1), scales=(160, 240), **rules).pooling == WindowPooling(
        (160, 240), (2, 1), "max", **rules
    )


def test_unknown_rules_are_errors(few):
    for name, kind, known in (
        ("projection", "projection", "released, paper"),
        ("scale_rule", "scale rule", "released, paper"),
        ("negatives", "rule for negatives", "all, released, paper"),
    ):
        with pytest.raises(ValueError, match=f"found the {kind} 'best', expected one of {known}"):
            fit(Detector(**{name: "best"}), few)


def test_the_side_that_windows_should_have_is_that_of_the_rule():
    assert Detector().pooling.reference == Detector(scale_rule="paper").pooling.reference == 224
    assert Detector(scale_rule="released").pooling.reference == 208
    assert Detector(scale_rule="released", reference=100).pooling.reference == 100


def test_an_unfitted_detector_says_so(backbone, few, tmp_path):
    unfitted = Detector(**SETTINGS)
    data = trees.samples(few[0], few[2])
    for ask in (
        lambda: unfitted.predict(few[0][0], grid()),
        lambda: unfitted.encode(few[0][0]),
        lambda: next(unfitted.stream(few[0])),
        lambda: unfitted.evaluate(data),
        lambda: unfitted.save(tmp_path / "a.safetensors"),
        lambda: unfitted.add_class("disc", data),
        lambda: unfitted.compressed((1, 1)),
        lambda: unfitted.classes_,
    ):
        with pytest.raises(NotFittedError, match=r"Detector is not fitted yet; call fit, or Detector\.load"):
            ask()
    assert list(tmp_path.iterdir()) == []


def test_predictions_keep_their_promises(detector):
    image, boxes = trees.scene(7).image, grid()
    found = detector.predict(image, boxes, threshold=0)
    assert (np.diff(found.scores) <= 0).all()
    assert found.scores.min() >= 0
    assert found.scores.max() <= 1
    assert detector.predict(image, boxes, threshold=0, scores="svm").scores.min() >= -1.5
    assert found.boxes.dtype == found.scores.dtype == np.float32
    assert len(found.boxes) == len(found.scores) == len(found.labels) > 3
    x1, y1, x2, y2 = found.boxes.T
    assert (x1 >= 0).all()
    assert (y1 >= 0).all()
    assert (x2 <= 128).all()
    assert (y2 <= 96).all()
    for name in detector.classes_:
        mine = found.boxes[[label == name for label in found.labels]]
        assert np.triu(iou(mine, mine), 1).max(initial=0) <= 0.3 + 1e-6
    limited = copy.copy(detector)
    limited.limit = 2
    few = limited.predict(image, boxes, threshold=0)
    for name in detector.classes_:
        every = [s for s, label in zip(found.scores, found.labels, strict=True) if label == name]
        assert [s for s, label in zip(few.scores, few.labels, strict=True) if label == name] == every[:2]
    high = detector.predict(image, boxes, threshold=0.3)
    np.testing.assert_array_equal(high.scores, found.above(0.3).scores)
    assert 0 < len(high) < len(found)
    assert high.labels == found.above(0.3).labels
    plain = detector.predict(image, boxes, regress=False)
    assert {tuple(b) for b in plain.boxes.tolist()} <= {tuple(b) for b in boxes.tolist()}


def test_no_windows_no_detections(detector):
    image = trees.scene(7).image
    for windows in (np.zeros((0, 4), np.float32), np.zeros(0, np.float32), []):
        for regress in (False, True):
            found = detector.predict(image, windows, regress=regress)
            assert found.boxes.shape == (0, 4)
            assert found.scores.shape == (0,)
            assert found.labels == ()


@pytest.mark.parametrize("height_width", [(1, 1), (1, 200), (40, 33)])
def test_images_of_any_size(detector, height_width):
    height, width = height_width
    image = np.full((height, width, 3), 200, np.uint8)
    whole = np.array([[0, 0, width, height]], np.float32)
    found = detector.predict(image, np.concatenate([whole, whole + 5, whole * 3]), threshold=0)
    assert len(found.boxes) > 0
    assert np.isfinite(found.scores).all()
    assert found.boxes[:, 2].max() <= width


def everything(detector, image, windows, regress):
    """Return the boxes and scores of every window, unsuppressed, by class."""
    boxes, scores = detector.score(detector.encode(image), windows, regress=regress)
    boxes = np.clip(boxes, 0, np.array([*image.shape[1::-1]] * 2))
    rows = [
        (name, float(scores[r, k]), *boxes[r, k].tolist())
        for r in range(len(windows))
        for k, name in enumerate(detector.classes_)
    ]
    return sorted(rows)


@pytest.mark.parametrize("regress", [False, True])
def test_many_windows_are_taken_block_by_block(detector, regress):
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 90, (5000, 2))
    windows = np.concatenate([corners, corners + rng.uniform(4, 40, (5000, 2))], axis=1).astype(np.float32)
    windows[:, 2:] = np.minimum(windows[:, 2:], [128, 96])
    windows = windows[(windows[:, 3] - windows[:, 1] > 1)]
    image = trees.scene(7).image
    at_once = everything(detector, image, windows, regress)
    parts = [everything(detector, image, windows[i : i + 700], regress) for i in range(0, len(windows), 700)]
    apart = sorted(row for part in parts for row in part)
    assert len(at_once) == len(apart) > 14000
    for name in detector.classes_:
        numbers = [np.array([r[1:] for r in rows if r[0] == name]) for rows in (at_once, apart)]
        np.testing.assert_allclose(numbers[0][:, 0], numbers[1][:, 0], atol=1e-4)  # scores, rising
        np.testing.assert_allclose(np.sort(numbers[0], axis=0), np.sort(numbers[1], axis=0), atol=1e-2)


def test_maps_can_be_queried_again_and_again(detector, backbone):
    image = trees.scene(7).image
    encoded = backbone.encode(image, SCALES)
    for windows in (grid(), grid()[::3]):
        direct, queried = detector.predict(image, windows), detector.predict(encoded, windows)
        np.testing.assert_array_equal(direct.scores, queried.scores)
        np.testing.assert_array_equal(direct.boxes, queried.boxes)
        assert direct.labels == queried.labels


def test_scores_of_all_windows_come_before_suppression(detector, backbone):
    image, windows = trees.scene(7).image, grid()
    encoded = backbone.encode(image, SCALES)
    unmoved, scores = detector.score(encoded, windows, regress=False)
    assert scores.shape == (len(windows), 3)
    assert unmoved.shape == (len(windows), 3, 4)
    assert unmoved.dtype == scores.dtype == np.float32
    assert (unmoved == windows[:, None]).all()
    moved, same_scores = detector.score(encoded, windows)
    np.testing.assert_array_equal(same_scores, scores)
    assert moved[..., 3].max() > 96, "boxes are not clipped yet"
    selected = postprocess(moved, scores, detector.classes_, (96, 128), 0.3, -1.5, 100)
    queried = detector.predict(encoded, windows, threshold=0, scores="svm")
    assert len(selected) == len(queried) > 3
    for name in detector.classes_:
        for ours, theirs in zip(by_class(selected, name), by_class(queried, name), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def by_class(found, name):
    mine = [label == name for label in found.labels]
    return found.boxes[mine], found.scores[mine]


def test_adding_a_class_leaves_the_others_exactly_as_they_are(backbone, training, cache, detector):
    two = fit(Detector(**SETTINGS), training, classes=["disc", "square"], cache=cache)
    # The photos of the further class are remembered, too.
    few_photos = two.fitted_.photos[::2]
    two.fitted_ = replace(two.fitted_, photos=few_photos)
    image = trees.scene(104).image
    before = two.predict(image, grid(), threshold=0)
    kept = [f.copy() for f in fields(two)]
    data = trees.samples(training[0], training[2])
    three = two.add_class("triangle", data, windows=training[1], cache=cache)
    assert three is two
    assert three.classes_ == ("disc", "square", "triangle")
    for old, new in zip(kept, fields(three), strict=True):
        np.testing.assert_array_equal(old, new[:2])
    after = three.predict(image, grid(), threshold=0)
    for name in ("disc", "square"):
        (old_boxes, old_scores), (boxes, scores) = by_class(before, name), by_class(after, name)
        # The weights are equal, bit by bit; a wider matrix product rounds otherwise.
        np.testing.assert_allclose(old_scores, scores, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(old_boxes, boxes, rtol=1e-5, atol=1e-5)
    # The new class is the one that a fit of all three would have learned, but for the other random start.
    together, added = detector.fitted_.svms.weights[2], three.fitted_.svms.weights[2]
    assert together @ added / np.linalg.norm(together) / np.linalg.norm(added) > 0.98
    assert three.seen(data) == len(data)
    with pytest.raises(ValueError, match="'disc' is already there; the detector has disc, square, triangle"):
        three.add_class("disc", data)


@pytest.fixture(scope="module")
def saved(detector, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "shapes.safetensors"
    detector.save(path)
    return path


def test_a_saved_detector_predicts_as_before(detector, saved):
    loaded = Detector.load(saved)
    assert loaded.fitted_.backbone.signature == detector.fitted_.backbone.signature
    assert loaded.classes_ == detector.classes_
    assert loaded.fitted_.feature_scale == detector.fitted_.feature_scale
    assert loaded.get_params() == detector.get_params()
    assert repr(loaded) == repr(detector)
    for number in (7, 104):
        image = trees.scene(number).image
        for regress in (False, True):
            a, b = (everything(d, image, grid(), regress) for d in (detector, loaded))
            assert [r[0] for r in a] == [r[0] for r in b]
            # Half precision: three digits of each weight.
            np.testing.assert_allclose([r[1] for r in a], [r[1] for r in b], atol=5e-3)
            boxes = [np.sort(np.array([r[2:] for r in rows]), axis=0) for rows in (a, b)]
            np.testing.assert_allclose(*boxes, atol=0.1)
    # A second generation loses nothing more.
    again = saved.with_name("again.safetensors")
    loaded.save(again)
    twice = Detector.load(again)
    for p, q in zip(fields(loaded), fields(twice), strict=True):
        np.testing.assert_allclose(p, q, atol=2e-3 * np.abs(p).max())


def test_the_settings_are_kept_in_the_file(detector, tmp_path):
    ruled = copy.copy(detector)
    ruled.set_params(
        projection="paper", scale_rule="released", negatives="paper", reference=208, proposals="dense"
    )
    ruled.set_params(mining=MiningSettings(C=0.5), regression_windows=7)
    ruled.save(tmp_path / "ruled.safetensors")
    loaded = Detector.load(tmp_path / "ruled.safetensors")
    assert loaded.get_params() == ruled.get_params()
    assert loaded.mining.C == 0.5


def test_equal_detectors_are_equal_files(detector, tmp_path, saved):
    detector.save(tmp_path / "twin.safetensors")
    assert (tmp_path / "twin.safetensors").read_bytes() == saved.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["twin.safetensors"]


def test_a_file_describes_itself(saved):
    facts = read_facts(saved)
    assert facts["classes"] == ["disc", "square", "triangle"]
    assert facts["settings"]["proposals"] == "selective-search+edge-boxes"
    assert facts["backbone"]["name"] == "efficientnet-lite0"
    assert facts["settings"]["scales"] == list(SCALES)
    assert "device" not in facts["settings"], "a detector is not of the machine that it was fitted on"


def test_a_loaded_detector_learns_another_class(saved, training, cache, backbone):
    loaded = Detector.load(saved)
    images, windows, targets = training
    blobs = [Target.of(t.boxes, ["blob"] * len(t.labels)) for t in targets]
    loaded.add_class("blob", trees.samples(images[:6], blobs[:6]), windows=windows[:6], cache=cache)
    assert loaded.classes_[3] == "blob"
    found = loaded.predict(trees.scene(104).image, grid())
    assert "blob" in found.labels


def rewritten(saved, path, tensors=None, **changes):
    """Write a copy of a model file with other metadata or tensors."""
    with safe_open(saved, "pt") as file:
        metadata = file.metadata() | changes
    save_file(
        load_file(saved) if tensors is None else tensors, path, {k: v for k, v in metadata.items() if v}
    )
    return path


def refused(path, match, error=ValueError, **options):
    with pytest.raises(error, match=match) as caught:
        Detector.load(path, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_detectors(saved, tmp_path):
    refused(tmp_path / "missing.safetensors", "found no such file", FileNotFoundError)
    content = saved.read_bytes()
    bad = tmp_path / "bad.safetensors"
    for text in (
        b"",
        b"x",
        content[:7],
        content[:100],
        content[: len(content) // 2],
        content[:-1],
        b"no model" * 9,
    ):
        bad.write_bytes(text)
        refused(bad, "found no safetensors file")
    trees.save(tmp_path / "picture.png", trees.scene(1).image)
    refused(tmp_path / "picture.png", "found no safetensors file")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    refused(
        tmp_path / "plain.safetensors",
        "found a safetensors file without a format mark, expected sppnet-detector 6",
    )
    refused(rewritten(saved, bad, format="pt"), "found pt 6, expected sppnet-detector 6")
    refused(rewritten(saved, bad, version="1"), "found sppnet-detector 1, expected sppnet-detector 6")
    refused(rewritten(saved, bad, version=""), "found sppnet-detector, expected sppnet-detector 6")
    for text in ("", "{", "[]", "{}", json.dumps(read_facts(saved) | {"classes": 0})[:40]):
        refused(rewritten(saved, bad, detector=text), "damaged")
    whole = load_file(saved)
    for name in whole:
        rest = {n: tensor for n, tensor in whole.items() if n != name}
        refused(rewritten(saved, bad, tensors=rest), f"damaged, found no {name}, expected a detector")
    for name, match in (
        ("svms", r"found SVMs of shape \(2, 6400\), expected \(3, 6400\): for 3 classes"),
        ("regression", r"found regressions of shape \(2, 4, 6400\), expected \(3, 4, 6400\)"),
    ):
        fewer = {n: tensor[:2].clone() if n.startswith(name) else tensor for n, tensor in whole.items()}
        refused(rewritten(saved, bad, tensors=fewer), match)


def test_other_backbone_weights_are_refused(saved, tmp_path):
    facts = read_facts(saved)
    facts["backbone"]["digest"] = "0" * 64
    path = rewritten(saved, tmp_path / "digest.safetensors", detector=json.dumps(facts))
    refused(path, "found the backbone efficientnet-lite0 with weights .*, expected 0000000000000000")
    del facts["backbone"]["stages"]
    path = rewritten(saved, tmp_path / "stages.safetensors", detector=json.dumps(facts))
    refused(path, "damaged, found no 'stages' of the backbone")


def test_a_file_holds_its_backbone_unless_that_comes_with_sppnet(saved, backbone_file, few, tmp_path):
    assert "graph" not in load_file(saved)
    path = tmp_path / "own.onnx"
    path.write_bytes(backbone_file("test_efficientnet").read_bytes())
    own = fit(Detector(str(path), **SETTINGS), few)
    own.save(tmp_path / "own.safetensors")
    path.unlink()
    loaded = Detector.load(tmp_path / "own.safetensors")
    image = trees.scene(104).image
    a, b = (everything(d, image, grid(), True) for d in (own, loaded))
    assert [r[0] for r in a] == [r[0] for r in b]
    np.testing.assert_allclose([r[1] for r in a], [r[1] for r in b], atol=2e-2)


def test_classes_get_other_names_and_nothing_else_changes(detector, few):
    old, *others = detector.classes_
    renamed = detector.renamed({old: "thing"})
    assert renamed.classes_ == ("thing", *others)
    assert detector.classes_ == (old, *others)
    before, after = detector.predict(few[0][0]), renamed.predict(few[0][0])
    assert np.array_equal(before.boxes, after.boxes)
    assert np.array_equal(before.labels, after.labels)
    with pytest.raises(SppnetError, match="found the class 'nobody', expected one of"):
        detector.renamed({"nobody": "thing"})
    with pytest.raises(SppnetError, match=f"found two classes of the name '{others[0]}'"):
        detector.renamed({old: others[0]})


def test_a_failed_save_leaves_the_old_file(detector, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_text("the old model")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        detector.save(path)
    assert path.read_text() == "the old model"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="nowhere"):
        detector.save(tmp_path / "nowhere" / "model.safetensors")


def shapes_found(detector, numbers=range(101, 111)):
    """Return the mean average precision in pictures not seen before."""
    images, windows, targets = drawn(numbers)
    found = [detector.predict(i, w, threshold=0) for i, w in zip(images, windows, strict=True)]
    return mean_average_precision(voc_detection(found, targets, detector.classes_))


@pytest.fixture(scope="module")
def headed(backbone, training, cache):
    """A detector whose SVMs stand on fc7, above the features of the frozen backbone."""
    tuning = Tuning(batches=300, batch=64, width=48, windows=32, lr=3e-3, dropout=0.2)
    return fit(Detector(**SETTINGS, layer="fc7", tuning=tuning), training, cache=cache)


@pytest.fixture(scope="module")
def tuned(backbone, few, tmp_path_factory):
    """A detector whose SVMs stand on fc6, above a backbone whose last stage was tuned."""
    tuning = Tuning("4", 20, 32, width=16, windows=16, epochs=2, images=2, backbone_lr=1e-3)
    folder = tmp_path_factory.mktemp("tuned")
    return fit(Detector(**SETTINGS, layer="fc6", tuning=tuning), few, cache=folder)


def test_shapes_are_found_by_svms_on_a_layer(headed):
    assert shapes_found(headed) > 0.8
    assert headed.fitted_.svms.weights.shape == (3, 48)
    assert headed.fitted_.regression.weights.shape == (3, 4, 6400)
    assert headed.fitted_.head.count == 3


@pytest.mark.parametrize("which", ["headed", "tuned"])
def test_svms_take_the_layer_and_regressions_the_pooled_features(which, request):
    detector = request.getfixturevalue(which)
    image, windows = trees.scene(104).image, grid()[::5]
    encoded = detector.fitted_.backbone.encode(image, SCALES)
    pooled = WindowPooling(SCALES, (2, 1), reference=160)(encoded, windows)
    pooled *= detector.fitted_.feature_scale
    x = to_numpy(pooled).astype(np.float64)
    for (layer,) in (detector.fitted_.head.fc6, detector.fitted_.head.fc7)[: 1 if which == "tuned" else 2]:
        x = np.maximum(x @ layer.weights.T + layer.offsets, 0)
    boxes, scores = detector.score(encoded, windows)
    np.testing.assert_allclose(
        scores, x @ detector.fitted_.svms.weights.T + detector.fitted_.svms.biases, atol=1e-4
    )
    weights, offsets = detector.fitted_.regression.weights, detector.fitted_.regression.offsets
    for k in range(3):
        moved = decode_deltas(windows, to_numpy(pooled) @ weights[k].T + offsets[k])
        np.testing.assert_allclose(boxes[:, k], moved, rtol=0, atol=1e-2)


def test_a_head_and_a_tuned_backbone_are_saved_and_loaded(headed, tuned, backbone, tmp_path):
    assert backbone.tuned == {}
    assert headed.fitted_.backbone.signature == backbone.signature != tuned.fitted_.backbone.signature
    for detector, layer in ((headed, "fc7"), (tuned, "fc6")):
        detector.save(tmp_path / "model.safetensors")
        loaded = Detector.load(tmp_path / "model.safetensors")
        assert loaded.layer == layer
        assert loaded.tuning == detector.tuning
        assert loaded.fitted_.backbone.signature == detector.fitted_.backbone.signature
        own, theirs = (d.fitted_.backbone.parameters for d in (loaded, detector))
        assert all(np.array_equal(value, theirs[name]) for name, value in own.items())
        # The head was rounded before the SVMs were fitted: it loses nothing.
        own, theirs = (d.fitted_.head.state() for d in (loaded, detector))
        assert own.keys() == theirs.keys()
        assert all(np.array_equal(value, theirs[name]) for name, value in own.items())
        for regress in (False, True):
            a, b = (everything(d, trees.scene(104).image, grid(), regress) for d in (detector, loaded))
            assert [r[0] for r in a] == [r[0] for r in b]
            np.testing.assert_allclose([r[1] for r in a], [r[1] for r in b], atol=2e-2)
        again = tmp_path / "again.safetensors"
        loaded.save(again)
        assert read_facts(again) == read_facts(tmp_path / "model.safetensors")


def test_heads_and_backbones_that_do_not_go_together_are_refused(headed, tuned, tmp_path):
    path, bad = tmp_path / "headed.safetensors", tmp_path / "bad.safetensors"
    headed.save(path)
    tensors = load_file(path)

    def with_head(head):
        rest = {n: t for n, t in tensors.items() if not n.startswith("head.")}
        return rest | {f"head.{n}": t for n, t in head.items()}

    # One that was made for a backbone or a pyramid of other lengths, one of another width, none, a part.
    refused(
        rewritten(path, bad, with_head(HeadNetwork(100, 3, 48).state_dict())),
        r"found fully connected layers of shape \(100,\), expected \(6400,\): for 3 classes on this backbone",
    )
    refused(
        rewritten(path, bad, with_head(HeadNetwork(6400, 3, 40).state_dict())),
        r"found SVMs of shape \(3, 48\), expected \(3, 40\)",
    )
    refused(rewritten(path, bad, with_head({})), "damaged, found no fully connected layers")
    whole = {name: torch.from_numpy(value) for name, value in headed.fitted_.head.state().items()}
    for name in whole:
        rest = {n: t for n, t in whole.items() if n != name}
        refused(rewritten(path, bad, with_head(rest)), "damaged, found no fully connected layers")
    facts = read_facts(path)
    facts["settings"]["levels"] = [3, 1]
    refused(
        rewritten(path, bad, detector=json.dumps(facts)), r"found regressions .* expected \(3, 4, 12800\)"
    )

    path = tmp_path / "tuned.safetensors"
    tuned.save(path)
    tensors = load_file(path)
    name = next(n for n in tensors if n.startswith("backbone."))
    for wrong in (
        tensors | {name: torch.zeros(2)},
        {n: t for n, t in tensors.items() if n != name} | {"backbone.body.weight": tensors[name]},
    ):
        refused(rewritten(path, bad, wrong), "found weights that efficientnet-lite0 does not have")


def test_layers_need_tuning_and_a_name(few):
    for layer in ("fc6", "fc7"):
        with pytest.raises(SppnetError, match=f"found the layer {layer} without tuning, expected tuning"):
            fit(Detector(layer=layer), few)
    with pytest.raises(SppnetError, match="found the layer 'fc8', expected one of pool, fc6, fc7"):
        fit(Detector(layer="fc8", tuning=Tuning()), few)
    with pytest.raises(SppnetError, match="found the stage '9', expected one from 1 to 4"):
        fit(Detector(tuning=Tuning(stage="9")), few)


def test_a_fit_goes_on_after_its_tuning(backbone, few, tmp_path, monkeypatch):
    tuning = Tuning(batches=2, width=8, windows=8)
    whole = Detector(**SETTINGS, layer="fc7", tuning=tuning)
    seen = []

    def track(items, description):
        seen.append(description)
        yield from items

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "mine_hard_negatives", None)
        with pytest.raises(TypeError):
            fit(whole, few, cache=tmp_path, track=track)
    assert sum(d.startswith("Training layers") for d in seen) == 2
    seen.clear()
    again = fit(Detector(**SETTINGS, layer="fc7", tuning=tuning), few, cache=tmp_path, track=track)
    assert sum(d.startswith("Training layers") for d in seen) == 2, "those without the photos held out"
    seen.clear()
    fit(Detector(**SETTINGS, layer="fc7", tuning=tuning), few, cache=tmp_path, track=track)
    assert not any(d.startswith("Training layers") for d in seen)
    at_once = fit(Detector(**SETTINGS, layer="fc7", tuning=tuning), few)
    assert same(again, at_once)
    states = [d.fitted_.head.state() for d in (again, at_once)]
    assert all(np.array_equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_tuning_without_a_layer_leaves_the_svms_on_pooled_features(backbone, few, tmp_path):
    tuning = Tuning(batches=1, width=8, windows=8)
    fitted = fit(Detector(**SETTINGS, tuning=tuning), few, cache=tmp_path)
    assert fitted.fitted_.svms.weights.shape == (3, 6400)
    assert fitted.fitted_.head is None
    fitted.save(tmp_path / "pool.safetensors")
    assert Detector.load(tmp_path / "pool.safetensors").tuning == tuning


def test_adding_a_class_leaves_the_head_and_the_others_as_they_are(headed, training, cache):
    one = copy.copy(headed)
    kept = [f.copy() for f in fields(one)]
    images, windows, targets = (part[:6] for part in training)
    blobs = [Target.of(t.boxes, ["blob"] * len(t.labels)) for t in targets]
    one.add_class("blob", trees.samples(images, blobs), windows=windows, cache=cache)
    assert one.classes_ == (*headed.classes_, "blob")
    for old, new in zip(kept, fields(one), strict=True):
        np.testing.assert_array_equal(old, new[:3])
    for name, value in headed.fitted_.head.state().items():
        np.testing.assert_array_equal(one.fitted_.head.state()[name], value)
    assert one.fitted_.feature_scale == headed.fitted_.feature_scale
    image, windows = trees.scene(101).image, grid()
    found = one.predict(image, windows, threshold=0)
    before = headed.predict(image, windows, threshold=0)
    for name in headed.classes_:
        for ours, theirs in zip(by_class(found, name), by_class(before, name), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert "blob" in one.predict(image, windows).labels


def test_a_compressed_detector_has_thin_layers_and_all_else_the_same(headed, tmp_path):
    image, windows = trees.scene(104).image, grid()
    encoded = headed.fitted_.backbone.encode(image, SCALES)
    boxes, scores = headed.score(encoded, windows)
    state = {name: value.copy() for name, value in headed.fitted_.head.state().items()}
    whole = headed.compressed((48, 48))
    for ours, theirs in zip(whole.score(encoded, windows), (boxes, scores), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    thin = headed.compressed((12, 0))
    assert thin.fitted_.head.ranks == (12, 0)
    moved, changed = thin.score(encoded, windows)
    assert np.array_equal(moved, boxes), "boxes are moved by the pooled features"
    assert 1e-3 < np.abs(changed - scores).max() < 2
    assert headed.fitted_.head.ranks == (0, 0)
    assert all(np.array_equal(value, state[name]) for name, value in headed.fitted_.head.state().items())
    thin.save(tmp_path / "thin.safetensors")
    headed.save(tmp_path / "whole.safetensors")
    assert (tmp_path / "thin.safetensors").stat().st_size < (tmp_path / "whole.safetensors").stat().st_size
    loaded = Detector.load(tmp_path / "thin.safetensors")
    assert loaded.fitted_.head.ranks == (12, 0)
    np.testing.assert_allclose(loaded.score(encoded, windows)[1], changed, rtol=0, atol=2e-2)


def test_what_cannot_be_compressed(detector, headed):
    with pytest.raises(ValueError, match="found a detector without fully connected layers, expected one on"):
        detector.compressed((4, 4))
    with pytest.raises(
        ValueError, match=r"found the ranks \[4, 49\], expected two, of fc6 to 48, of fc7 to 48"
    ):
        headed.compressed((4, 49))


def small_objectness(steps=240):
    return Objectness(
        sizes=(0.5, 1.0), aspects=(1.0,), reference=100, width=32, kernel=3, limit=60, steps=steps, lr=5e-3
    )


@pytest.fixture(scope="module")
def proposing(backbone, training, cache):
    settings = {**SETTINGS, "proposals": "maps", "objectness": small_objectness()}
    return fit(Detector(**settings), training, cache=cache)


def test_a_detector_learns_to_propose_after_its_fit(detector, training, cache, saved):
    late, image = Detector.load(saved), trees.scene(104).image
    with pytest.raises(SppnetError, match="found the proposals 'maps' for a detector without objectness"):
        late.predict(image, proposals="maps")
    images, _, targets = training
    late.learn_objectness(trees.samples(images, targets), small_objectness(), cache=cache)
    # Its own windows are the same as before, and so is what it finds in them.
    assert late.proposals == detector.proposals
    np.testing.assert_allclose(late.predict(image).scores, detector.predict(image).scores, atol=2e-2)
    windows = late.fitted_.objectness.propose(late.encode(image)).boxes
    found, expected = late.predict(image, proposals="maps"), late.predict(image, windows)
    assert found.labels == expected.labels != ()
    ((_, streamed),) = late.stream([image], proposals="maps")
    for other in (found, streamed):
        np.testing.assert_array_equal(other.boxes, expected.boxes)
    np.testing.assert_array_equal(Ensemble([late]).predict(image, proposals="maps").boxes, expected.boxes)


def test_maps_as_proposals_need_no_more_settings(monkeypatch):
    assert Detector(proposals="maps").settings.objectness.get_params() == Objectness().get_params()
    assert Detector().settings.objectness is None


def test_a_detector_finds_shapes_in_windows_of_its_own(proposing, backbone):
    images, _, targets = drawn(range(101, 107))
    found = [proposing.predict(image) for image in images]
    assert mean_average_precision(voc_detection(found, targets, proposing.classes_)) > 0.6
    encoded = backbone.encode(images[0], SCALES)
    windows = proposing.propose(None, encoded)
    np.testing.assert_array_equal(windows, proposing.fitted_.objectness.propose(encoded).boxes)
    assert 0 < len(windows) <= 60
    timer = StageTimer()
    for others in (
        proposing.predict(images[0], windows),
        proposing.predict(encoded, timer=timer),
    ):
        np.testing.assert_array_equal(found[0].boxes, others.boxes)
        np.testing.assert_array_equal(found[0].scores, others.scores)
        assert found[0].labels == others.labels != ()
    assert list(timer.seconds) == ["proposals", "pooling", "scoring"]


def test_windows_of_the_maps_join_those_that_are_given(proposing, backbone, training, cache, monkeypatch):
    class Enough(Exception):
        pass

    given = []

    def spied(examples, *arguments):
        given.append(examples.windows)
        if len(given) == 2:
            raise Enough
        return plan_images(examples, *arguments)

    monkeypatch.setattr(fitting, "plan_images", spied)
    with pytest.raises(Enough):
        fit(Detector(**SETTINGS, objectness=small_objectness()), training, cache=cache)
    for image, own, joined in zip(training[0], *given, strict=True):
        np.testing.assert_array_equal(joined[: len(own)], own)
        # Here the maps come in full precision, in the fit from the disk.
        proposed = proposing.propose(None, backbone.encode(image, SCALES))
        assert abs(len(joined) - len(own) - len(proposed)) <= 6
        near = iou(joined[len(own) :], proposed).max(axis=0) > 0.9
        assert near.mean() > 0.9


def test_objectness_is_saved_and_loaded(proposing, backbone, tmp_path):
    path = tmp_path / "model.safetensors"
    proposing.save(path)
    loaded = Detector.load(path)
    assert loaded.objectness.get_params() == proposing.objectness.get_params()
    encoded = backbone.encode(trees.scene(104).image, SCALES)
    for scene_windows in (loaded.propose(None, encoded), loaded.fitted_.objectness.propose(encoded).boxes):
        np.testing.assert_array_equal(scene_windows, proposing.propose(None, encoded))
    tensors = {n: t for n, t in load_file(path).items() if n != "objectness.weights"}
    with pytest.raises(ValueError, match="found no objectness of these settings: weights is missing"):
        Detector.load(rewritten(path, tmp_path / "bad.safetensors", tensors))


def test_windows_are_the_detectors_own_affair_unless_given(detector, proposing):
    image = trees.scene(7).image
    own = parse(detector.proposals)(image).boxes
    for asked, given in ((detector.predict(image), detector.predict(image, own)),):
        np.testing.assert_array_equal(asked.boxes, given.boxes)
        np.testing.assert_array_equal(asked.scores, given.scores)
    encoded = detector.encode(image)
    np.testing.assert_array_equal(proposing.predict(encoded).boxes, proposing.predict(image).boxes)
    with pytest.raises(SppnetError, match="found an encoded image without windows, expected some"):
        detector.predict(encoded)


def test_every_way_to_give_an_image_gives_the_same(detector, tmp_path):
    image = trees.scene(7).image
    path = tmp_path / "a photo (1).png"
    trees.save(path, image)
    expected = detector.predict(image, grid())
    for same_image in (path, str(path), PIL.Image.fromarray(image), detector.encode(image)):
        found = detector.predict(same_image, grid())
        np.testing.assert_array_equal(found.boxes, expected.boxes)
        np.testing.assert_array_equal(found.scores, expected.scores)
    with pytest.raises(FileNotFoundError, match=r"missing\.jpg: found no such file, expected a JPEG"):
        detector.predict("missing.jpg")
    with pytest.raises(SppnetError, match="found list, expected one image"):
        detector.predict([path])
    with pytest.raises(SppnetError, match=r"found an array \(96, 128\) of uint8, expected an image"):
        detector.predict(image[..., 0])


@pytest.mark.parametrize("count", [1, 3])
def test_a_stream_reads_ahead_and_names_what_fails(detector, tmp_path, threads, count):
    threads(count)
    image = trees.scene(7).image
    trees.save(tmp_path / "good.png", image)
    (tmp_path / "bad.png").write_bytes(b"no image")
    paths = [tmp_path / name for name in ("good.png", "bad.png", "missing.png", "good.png")]
    first, bad, missing, last = detector.stream(paths, proposals="dense", threshold=0)
    expected = detector.predict(image, parse("dense")(image).boxes, threshold=0)
    for pixels, found in (first, last):
        np.testing.assert_array_equal(pixels, image)
        np.testing.assert_array_equal(found.boxes, expected.boxes)
    assert isinstance(bad, SppnetError)
    assert str(paths[1]) in str(bad)
    assert isinstance(missing, FileNotFoundError)
    assert list(detector.stream([])) == []
    whole = detector.stream((path for path in paths[:1] * 9), proposals="dense", threshold=0)
    assert all(np.array_equal(found.boxes, expected.boxes) for _, found in whole)


def test_an_evaluation_measures_and_tells_what_was_learned_from(detector, training):
    images, _, targets = drawn(range(101, 106))
    data = trees.samples(images, targets)
    report = detector.evaluate(data, proposals="dense")
    found = [detector.predict(image, parse("dense")(image).boxes, threshold=0) for image in images]
    assert report.mean_ap == mean_average_precision(voc_detection(found, targets, detector.classes_)) > 0.3
    assert report.seen == detector.seen(data) == 0
    known = trees.samples([*images, *training[0][:2]], [*targets, *training[2][:2]])
    assert detector.seen(known) == 2
    assert detector.evaluate(known[-2:], proposals="dense").seen == 2
    plain = detector.evaluate(data, proposals="dense", regress=False)
    assert plain.mean_ap != report.mean_ap
    with pytest.raises(SppnetError, match="expected a data set"):
        detector.evaluate(images)


def test_the_photos_of_a_fit_are_kept_in_the_file(detector, saved, training):
    assert len(detector.fitted_.photos) == len(training[0])
    np.testing.assert_array_equal(Detector.load(saved).fitted_.photos, detector.fitted_.photos)


def test_a_fit_changes_none_of_its_arguments(backbone, few, cache):
    tuning, objectness = Tuning("4", 2, 8, width=8, windows=8, epochs=1), small_objectness(8)
    made = Detector(**SETTINGS, tuning=tuning, objectness=objectness)
    settings, before = made.get_params(), backbone.digest
    _, windows, targets = few
    kept = copy.deepcopy((windows, targets))
    first = fit(made, few, cache=cache).fitted_
    assert made.get_params() == settings
    assert not objectness.__sklearn_is_fitted__()
    assert backbone.tuned == {} != first.backbone.tuned
    assert backbone.digest == before
    for a, b in zip(kept[0], windows, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [t.labels for t in kept[1]] == [t.labels for t in targets]
    # A second fit starts from the same place as the first.
    second = fit(made, few, cache=cache).fitted_
    assert second is not first
    np.testing.assert_array_equal(first.svms.weights, second.svms.weights)
    np.testing.assert_array_equal(first.regression.weights, second.regression.weights)
    assert first.backbone.signature == second.backbone.signature


@pytest.mark.parametrize(
    "check",
    [
        "check_parameters_default_constructible",
        "check_no_attributes_set_in_init",
        "check_get_params_invariance",
        "check_set_params",
        "check_estimator_repr",
        "check_estimator_cloneable",
    ],
)
def test_scikit_learn_takes_it_for_an_estimator(check):
    getattr(estimator_checks, check)("Detector", Detector(scales=(480,), objectness=small_objectness()))


def test_a_clone_has_the_settings_and_nothing_that_was_learned(detector):
    twin = clone(detector)
    assert twin.get_params() == detector.get_params()
    with pytest.raises(NotFittedError):
        twin.predict(trees.scene(1).image)
    with pytest.raises(SppnetError, match="found the setting 'sides' of Detector, expected one of backbone"):
        twin.set_params(sides=(1,))
    assert repr(Detector(scales=(480,), seed=3)) == "Detector(scales=(480,), seed=3)"


def test_names_of_shipped_detectors():
    with pytest.raises(SppnetError, match=r"found no model 'animal', .* animals.*did you mean animals\?"):
        Detector.load("animal")
    with pytest.raises(FileNotFoundError, match="found no such file, expected a model file"):
        Detector.load("animal.safetensors")


def test_no_windows_no_detections_on_a_layer(headed, proposing):
    image, none = trees.scene(7).image, np.zeros((0, 4), np.float32)
    for one in (headed, proposing):
        boxes, scores = one.score(one.fitted_.backbone.encode(image, SCALES), none)
        assert boxes.shape == (0, 3, 4)
        assert scores.shape == (0, 3)
        assert one.predict(image, none).labels == ()


@pytest.mark.parametrize("most", [1999, 700, 31])
def test_out_of_memory_fewer_windows_are_scored_at_a_time(headed, monkeypatch, most):
    windows = np.tile(grid(), (6, 1))[:2100]
    encoded = headed.fitted_.backbone.encode(trees.scene(7).image, SCALES)
    expected = headed.score(encoded, windows)
    plain, sizes = Detector._score_block, []

    def scarce(self, maps, part, *arguments):
        sizes.append(len(part))
        if len(part) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, maps, part, *arguments)

    monkeypatch.setattr(Detector, "_score_block", scarce)
    with pytest.warns(UserWarning, match="out of memory on cpu: going on with") as told:
        found = headed.score(encoded, windows)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    tried, largest = [], 2000
    while largest > most:
        tried.append(largest)
        largest //= 2
    assert sizes[: len(tried)] == tried
    assert sizes[len(tried) :] == [min(largest, 2100 - i) for i in range(0, 2100, largest)]
    assert [str(w.message).split("with ")[1] for w in told] == [f"{n // 2} windows at a time" for n in tried]


def test_out_of_memory_with_very_few_windows_is_an_error(headed, monkeypatch):
    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    encoded = headed.fitted_.backbone.encode(trees.scene(7).image, SCALES)
    monkeypatch.setattr(Detector, "_score_block", never)
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(torch.OutOfMemoryError):
        headed.score(encoded, grid())


def selected(boxes, scores, classes, shape, nms_iou, threshold, limit):
    """Suppress in plain loops: walk down a class's scores, keep what overlaps nothing kept by too much."""
    found = []
    for k, name in enumerate(classes):
        rows = []
        for r in range(len(boxes)):
            x1, y1, x2, y2 = boxes[r, k].tolist()
            x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, shape[1]), min(y2, shape[0])
            if float(scores[r, k]) >= threshold and x1 < x2 and y1 < y2:
                rows.append((name, float(scores[r, k]), (x1, y1, x2, y2), k))
        kept = []
        for row in sorted(rows, key=lambda row: -row[1]):
            overlaps = (iou(np.array([row[2]]), np.array([other[2]]))[0, 0] for other in kept)
            if all(overlap <= nms_iou for overlap in overlaps):
                kept.append(row)
        found += kept[:limit]
    return sorted(found, key=lambda row: (-row[1], row[3]))


@pytest.mark.parametrize(
    ("nms_iou", "threshold", "limit"), [(0.3, -1, 100), (0.5, 0, 3), (0.0, -9, 1), (1.0, 0, 9)]
)
def test_selection_equals_the_loops(nms_iou, threshold, limit):
    rng = np.random.default_rng(0)
    for count in (0, 1, 80):
        # Whole numbers: overlaps of just the threshold, ties, boxes without area and beyond the image.
        corners = rng.integers(-8, 40, (count, 3, 2))
        moved = np.concatenate([corners, corners + rng.integers(0, 16, (count, 3, 2))], axis=2)
        boxes = moved.astype(np.float32)
        scores = rng.integers(-3, 4, (count, 3)).astype(np.float32)
        kept = boxes.copy()
        found = postprocess(boxes, scores, ("a", "b", "c"), (24, 32), nms_iou, threshold, limit)
        expected = selected(boxes, scores, ("a", "b", "c"), (24, 32), nms_iou, threshold, limit)
        np.testing.assert_array_equal(boxes, kept)
        assert list(found.labels) == [row[0] for row in expected]
        assert found.scores.tolist() == [row[1] for row in expected]
        np.testing.assert_array_equal(found.boxes, np.reshape([row[2] for row in expected], (-1, 4)))
        assert found.boxes.dtype == found.scores.dtype == np.float32
        assert count < 80 or len(found.labels) >= limit * (3 if limit < 100 else 0)
