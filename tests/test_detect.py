import copy
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import trees
from sppnet import detect
from sppnet.boxes import Detections, Target, area, intersection, iou
from sppnet.clock import Clock
from sppnet.detect import Detector, describe, select
from sppnet.maps import encode, first_responses, pool_windows
from sppnet.metrics import mean_average_precision, voc_detection
from sppnet.trunks import Trunk
from trees import drawn, grid

SIDES = (160, 320)
SETTINGS = {"levels": (2, 1), "sides": SIDES, "reference": 160}


def fields(detector):
    return (*detector.regressors_, detector.svms_.weights, detector.svms_.biases)


def same(a, b):
    assert a.classes_ == b.classes_
    assert a.feature_scale_ == b.feature_scale_
    return all(np.array_equal(p, q) for p, q in zip(fields(a), fields(b), strict=True))


@pytest.fixture(scope="module")
def trunk():
    return Trunk()


@pytest.fixture(scope="module")
def training():
    return drawn(range(1, 17))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The maps of all images here, computed once for all tests that do not count."""
    return tmp_path_factory.mktemp("maps")


@pytest.fixture(scope="module")
def detector(trunk, training, cache):
    return Detector(trunk, **SETTINGS).fit(*training, cache=cache)


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
    """Count how often a trunk is run."""
    made = []
    plain = Trunk.__call__

    def counted(self, image, side):
        made.append(side)
        return plain(self, image, side)

    monkeypatch.setattr(Trunk, "__call__", counted)
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
        [detector.predict(i, w, regress=regress) for i, w in zip(images, windows, strict=True)]
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


def test_mean_feature_norm_is_20(detector, trunk, training):
    images, windows, _ = training
    norms = []
    for image, boxes in zip(images, windows, strict=True):
        maps = [trunk(image, side) for side in SIDES]
        features = pool_windows(maps, boxes, image.shape[:2], SIDES, (2, 1), 96)
        norms.append(torch.linalg.vector_norm(features * detector.feature_scale_, dim=1))
    assert float(torch.cat(norms).mean()) == pytest.approx(20, rel=0.05)  # measured on a sample


def test_fits_are_equal_by_seed(trunk, few, cache):
    one, twin = (Detector(trunk, **SETTINGS, seed=3).fit(*few, cache=cache) for _ in range(2))
    assert same(one, twin)
    other = Detector(trunk, **SETTINGS, seed=4).fit(*few, cache=cache)
    assert not np.array_equal(one.svms_.weights, other.svms_.weights)


def test_files_and_pixels_with_and_without_a_cache_give_the_same_detector(trunk, few, cache, tmp_path):
    images, windows, targets = few
    paths = [tmp_path / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        trees.save(path, image)
    from_files = Detector(trunk, **SETTINGS).fit(paths, windows, targets)
    from_pixels = Detector(trunk, **SETTINGS).fit(*few, cache=cache)
    assert same(from_files, from_pixels)
    found = [from_files.predict(source, windows[0]) for source in (paths[0], images[0])]
    np.testing.assert_array_equal(found[0].boxes, found[1].boxes)
    np.testing.assert_array_equal(found[0].scores, found[1].scores)


def test_a_fit_goes_on_with_the_maps_on_the_disk(trunk, few, tmp_path, calls):
    images = few[0]
    first = Detector(trunk, **SETTINGS).fit(*few, cache=tmp_path)
    assert sorted(calls) == sorted(SIDES * len(images)), "each image once per side, in both passes"
    calls.clear()
    second = Detector(trunk, **SETTINGS).fit(*few, cache=tmp_path)
    assert calls == []
    assert same(first, second)
    # A fit that broke off, with a damaged entry, a missing one and a sound one.
    entries = sorted(tmp_path.iterdir())
    entries[0].write_bytes(entries[0].read_bytes()[:1000])
    entries[1].unlink()
    third = Detector(trunk, **SETTINGS).fit(*few, cache=tmp_path)
    assert sorted(calls) == sorted(SIDES * 2)
    assert same(first, third)


def test_a_fit_of_chosen_classes_tracked_and_timed(trunk, few, cache):
    seen, clock = [], Clock()

    def track(items, description):
        for item in items:
            seen.append(description)
            yield item

    names = ["triangle", "disc", "triangle"]
    fitted = Detector(trunk, **SETTINGS).fit(*few, names, cache=cache, track=track, clock=clock)
    assert fitted.classes_ == ("triangle", "disc")
    assert set(fitted.predict(few[0][0], grid(), threshold=-9).labels) == {"triangle", "disc"}
    assert seen.count("Computing feature maps") == seen.count("Mining hard negatives") == 3  # images
    assert seen.count("Fitting box regression") == 2  # classes
    assert {"maps from cache", "pooling", "SVMs", "box regression"} <= set(clock.seconds)
    assert all(seconds >= 0 for seconds in clock.seconds.values())
    clock = Clock()
    fitted.predict(few[0][0], grid(), clock=clock)
    assert list(clock.seconds) == ["trunk", "pooling", "scoring"]


def test_one_image_is_enough(trunk):
    images, windows, targets = drawn([1])
    fitted = Detector(trunk, **SETTINGS).fit(images, windows, targets)
    assert fitted.classes_ == tuple(sorted(targets[0].labels))
    for name, truth in zip(targets[0].labels, targets[0].boxes, strict=True):
        far = windows[0][iou(windows[0], truth[None])[:, 0] < 0.3]
        rows = everything(fitted, images[0], np.concatenate([far, truth[None]]), regress=False)
        scores = [r[1] for r in rows if r[0] == name]
        (own,) = (r[1] for r in rows if r[0] == name and r[2:] == tuple(truth.tolist()))
        assert own == max(scores), "the example scores above all its negatives"


def test_images_without_objects_or_windows_take_part(trunk, few, cache):
    images, windows, targets = few
    none = np.zeros((0, 4), np.float32)
    more = Detector(trunk, **SETTINGS).fit(
        [*images, images[0][:, ::-1].copy(), images[1][::-1].copy()],
        [*windows, grid(), none],
        [*targets, Target.of([], []), Target.of([], [])],
        cache=cache,
    )
    assert more.classes_ == tuple(sorted(trees.SHAPES))


@pytest.mark.parametrize("flag", ["difficult", "crowd"])
def test_difficult_and_crowd_boxes_are_neither_positive_nor_negative(trunk, few, cache, monkeypatch, flag):
    images, windows, targets = few
    given = []
    plain = detect.mine_hard_negatives

    def spied(positives, labels, start, start_negative, candidates, settings):
        def kept():
            for features, negative in candidates:
                given.append((features.clone(), negative))
                yield features, negative

        given.append((positives, labels))
        return plain(positives, labels, start, start_negative, kept(), settings)

    monkeypatch.setattr(detect, "mine_hard_negatives", spied)
    plans = []
    plan = detect.plan_images
    monkeypatch.setattr(detect, "plan_images", lambda *a: plans.extend(plan(*a)) or plans)
    name = targets[0].labels[0]
    hard = Target.of(targets[0].boxes, targets[0].labels, **{flag: [True, False]})
    # The first image comes again, without flags, so that the class has an example.
    images, windows = [*images, images[0]], [*windows, windows[0]]
    others = [Target.of(t.boxes, t.labels) for t in (*targets[1:], targets[0])]
    names = sorted({*hard.labels[1:], *(n for t in others for n in t.labels), name})
    Detector(trunk, **SETTINGS).fit(images, windows, [hard, *others], names, cache=cache)
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


def test_a_class_without_example_is_an_error_before_any_work(trunk, few, calls):
    images, windows, targets = few
    with pytest.raises(ValueError, match="no example of unicorn in 3 images"):
        Detector(trunk, **SETTINGS).fit(images, windows, targets, ["disc", "unicorn"])
    with pytest.raises(ValueError, match="no example of any class"):
        Detector(trunk, **SETTINGS).fit(images, windows, [Target.of([], [])] * 3)
    hard = [Target.of(t.boxes, t.labels, difficult=[True] * len(t.labels)) for t in targets]
    with pytest.raises(ValueError, match="no example of disc, square, triangle"):
        Detector(trunk, **SETTINGS).fit(images, windows, hard)
    with pytest.raises(ValueError, match="one length of at least 1, got 3, 2 and 3"):
        Detector(trunk, **SETTINGS).fit(images, windows[:2], targets)
    with pytest.raises(ValueError, match="one length of at least 1, got 0, 0 and 0"):
        Detector(trunk, **SETTINGS).fit([], [], [])
    assert calls == []


def offered(monkeypatch, trunk, training, cache, rule):
    """Return the plans of a fit, and the first and the later negatives that its SVMs are offered."""
    given, plans = [], []
    plan = detect.plan_images

    class Enough(Exception):
        pass

    def spied(positives, labels, start, start_negative, candidates, settings):
        given.extend([start_negative, [negative for _, negative in candidates]])
        raise Enough

    with monkeypatch.context() as patch:
        patch.setattr(detect, "mine_hard_negatives", spied)
        patch.setattr(detect, "plan_images", lambda *a: plans.extend(plan(*a)) or plans)
        with pytest.raises(Enough):
            Detector(trunk, **SETTINGS, negatives=rule).fit(*training, cache=cache)
    return plans, *given


def test_negatives_are_those_of_the_rule(trunk, few, cache, monkeypatch):
    images, windows, targets = few
    windows = [np.concatenate([w, w + np.float32(0.1)]) for w in windows]  # most cover the same cells
    found = {
        rule: offered(monkeypatch, trunk, (images, windows, targets), cache, rule)
        for rule in ("all", "released", "paper")
    }
    for plans, start, later in found.values():
        np.testing.assert_array_equal(start, np.concatenate([p.negative[p.start] for p in plans]))
        for plan, negative in zip(plans, later, strict=True):
            expected = plan.negative.copy()
            expected[plan.start] = False
            np.testing.assert_array_equal(negative, expected)
    for image, every, once, apart in zip(images, *(found[rule][0] for rule in found), strict=True):
        first = first_responses(encode(trunk, image, SIDES), every.boxes, image.shape[:2], SIDES, 160)
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
    "rules",
    [{"projection": "paper"}, {"scale_rule": "paper"}, {"projection": "paper", "scale_rule": "paper"}],
)
def test_windows_are_pooled_by_the_rules_of_the_detector(trunk, rules):
    boxes, sides = grid(), (600, 700)  # for those of 32 pixels the rules choose other scales
    maps = encode(trunk, trees.scene(7).image, (160, 240))
    pooled = Detector(trunk, levels=(2, 1), sides=sides, **rules)._pool(maps, boxes, (96, 128))
    assert torch.equal(pooled, pool_windows(maps, boxes, (96, 128), sides, (2, 1), **rules))
    assert not torch.equal(pooled, pool_windows(maps, boxes, (96, 128), sides, (2, 1)))


def test_unknown_rules_are_errors(trunk):
    for name, kind, known in (
        ("projection", "projection", "released, paper"),
        ("scale_rule", "scale rule", "released, paper"),
        ("negatives", "rule for negatives", "all, released, paper"),
    ):
        with pytest.raises(ValueError, match=f"found the {kind} 'best', expected one of {known}"):
            Detector(trunk, **{name: "best"})


def test_the_side_that_windows_should_have_is_that_of_the_rule(trunk):
    assert Detector(trunk).reference == 208
    assert Detector(trunk, scale_rule="paper").reference == 224
    assert Detector(trunk, scale_rule="paper", reference=100).reference == 100


def test_an_unfitted_detector_says_so(trunk, few, tmp_path):
    unfitted = Detector(trunk, **SETTINGS)
    with pytest.raises(ValueError, match="not fitted yet"):
        unfitted.predict(few[0][0], grid())
    with pytest.raises(ValueError, match="not fitted yet"):
        unfitted.save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="not fitted yet"):
        unfitted.add_class("disc", *few)
    assert list(tmp_path.iterdir()) == []


def test_predictions_keep_their_promises(detector):
    image, boxes = trees.scene(7).image, grid()
    found = detector.predict(image, boxes, threshold=-1.5)
    assert (np.diff(found.scores) <= 0).all()
    assert found.scores.min() >= -1.5
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
    few = detector.predict(image, boxes, threshold=-1.5, limit=2)
    for name in detector.classes_:
        every = [s for s, label in zip(found.scores, found.labels, strict=True) if label == name]
        assert [s for s, label in zip(few.scores, few.labels, strict=True) if label == name] == every[:2]
    high = detector.predict(image, boxes, threshold=0)
    np.testing.assert_array_equal(high.scores, found.above(0).scores)
    assert high.labels == found.above(0).labels
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
    found = detector.predict(image, np.concatenate([whole, whole + 5, whole * 3]), threshold=-99)
    assert len(found.boxes) > 0
    assert np.isfinite(found.scores).all()
    assert found.boxes[:, 2].max() <= width


def everything(detector, image, windows, regress):
    """Return the boxes and scores of every window, unsuppressed, by class."""
    open_minded = copy.copy(detector)
    open_minded.nms_iou = 1.0
    found = open_minded.predict(image, windows, regress=regress, threshold=-1e9, limit=10**6)
    rows = [
        (label, score, *box)
        for label, score, box in zip(found.labels, found.scores.tolist(), found.boxes.tolist(), strict=True)
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


def test_maps_can_be_queried_again_and_again(detector, trunk):
    image = trees.scene(7).image
    maps = detect.encode(trunk, image, SIDES)
    for windows in (grid(), grid()[::3]):
        direct, queried = detector.predict(image, windows), detector.predict_maps(maps, (96, 128), windows)
        np.testing.assert_array_equal(direct.scores, queried.scores)
        np.testing.assert_array_equal(direct.boxes, queried.boxes)
        assert direct.labels == queried.labels


def test_scores_of_all_windows_come_before_suppression(detector, trunk):
    image, windows = trees.scene(7).image, grid()
    maps = detect.encode(trunk, image, SIDES)
    unmoved, scores = detector.score_maps(maps, (96, 128), windows, regress=False)
    assert scores.shape == (len(windows), 3)
    assert unmoved.shape == (len(windows), 3, 4)
    assert unmoved.dtype == scores.dtype == torch.float32
    assert (unmoved.numpy() == windows[:, None]).all()
    moved, same_scores = detector.score_maps(maps, (96, 128), windows)
    assert torch.equal(same_scores, scores)
    assert moved[..., 3].max() > 96, "boxes are not clipped yet"
    selected = select(moved, scores, detector.classes_, (96, 128), 0.3, -1.0, 5)
    queried = detector.predict_maps(maps, (96, 128), windows, threshold=-1.0, limit=5)
    np.testing.assert_array_equal(selected.boxes, queried.boxes)
    np.testing.assert_array_equal(selected.scores, queried.scores)
    assert selected.labels == queried.labels != ()


def by_class(found, name):
    mine = [label == name for label in found.labels]
    return found.boxes[mine], found.scores[mine]


def test_adding_a_class_leaves_the_others_exactly_as_they_are(trunk, training, cache, detector):
    two = Detector(trunk, **SETTINGS).fit(*training, ["disc", "square"], cache=cache)
    image = trees.scene(104).image
    before = two.predict(image, grid(), threshold=-9)
    kept = [f.copy() for f in fields(two)]
    three = two.add_class("triangle", *training, cache=cache)
    assert three is two
    assert three.classes_ == ("disc", "square", "triangle")
    for old, new in zip(kept, fields(three), strict=True):
        np.testing.assert_array_equal(old, new[:2])
    after = three.predict(image, grid(), threshold=-9)
    for name in ("disc", "square"):
        (old_boxes, old_scores), (boxes, scores) = by_class(before, name), by_class(after, name)
        # The weights are equal, bit by bit; a wider matrix product rounds otherwise.
        np.testing.assert_allclose(old_scores, scores, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(old_boxes, boxes, rtol=1e-5, atol=1e-5)
    # The new class is the one that a fit of all three would have learned, but for the other random start.
    together, added = detector.svms_.weights[2], three.svms_.weights[2]
    assert together @ added / np.linalg.norm(together) / np.linalg.norm(added) > 0.98
    with pytest.raises(ValueError, match="'disc' is already there; the detector has disc, square, triangle"):
        three.add_class("disc", *training)


@pytest.fixture(scope="module")
def saved(detector, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "shapes.safetensors"
    detector.save(path, {"proposals": "grid"})
    return path


def test_a_saved_detector_predicts_as_before(detector, saved):
    loaded = Detector.load(saved)
    assert loaded.trunk.signature == detector.trunk.signature
    loaded.trunk = detector.trunk  # the same, and compiled already
    assert loaded.classes_ == detector.classes_
    assert loaded.feature_scale_ == detector.feature_scale_
    for name in ("levels", "sides", "reference", "mining", "negative_iou", "regression_iou", "ridge", "seed"):
        assert getattr(loaded, name) == getattr(detector, name)
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


def test_the_rules_are_kept_in_the_file(detector, saved, tmp_path):
    ruled = copy.copy(detector)
    ruled.projection, ruled.scale_rule, ruled.negatives, ruled.reference = "paper", "paper", "released", 224
    ruled.save(tmp_path / "ruled.safetensors")
    loaded = Detector.load(tmp_path / "ruled.safetensors")
    found = (loaded.projection, loaded.scale_rule, loaded.negatives, loaded.reference)
    assert found == ("paper", "paper", "released", 224)
    facts = describe(saved)
    for name in ("projection", "scale_rule", "negatives"):
        del facts["settings"][name]
    older = Detector.load(rewritten(saved, tmp_path / "older.safetensors", detector=json.dumps(facts)))
    assert (older.projection, older.scale_rule, older.negatives) == ("released", "released", "all")


def test_equal_detectors_are_equal_files(detector, tmp_path, saved):
    detector.save(tmp_path / "twin.safetensors", {"proposals": "grid"})
    assert (tmp_path / "twin.safetensors").read_bytes() == saved.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["twin.safetensors"]


def test_a_file_describes_itself(saved):
    facts = describe(saved)
    assert facts["classes"] == ["disc", "square", "triangle"]
    assert facts["about"] == {"proposals": "grid"}
    assert facts["trunk"]["name"] == "tf_efficientnet_lite0"
    assert facts["settings"]["sides"] == list(SIDES)


def test_a_loaded_detector_learns_another_class(saved, training, cache, trunk):
    loaded = Detector.load(saved)
    loaded.trunk = trunk  # the same, and compiled already
    images, windows, targets = training
    blobs = [Target.of(t.boxes, ["blob"] * len(t.labels)) for t in targets]
    loaded.add_class("blob", images[:6], windows[:6], blobs[:6], cache=cache)
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
    refused(tmp_path / "missing.safetensors", "model file not found", FileNotFoundError)
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
        refused(bad, "damaged or not a model file")
    trees.save(tmp_path / "picture.png", trees.scene(1).image)
    refused(tmp_path / "picture.png", "damaged or not a model file")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    refused(tmp_path / "plain.safetensors", "not an sppnet detector, found 'no format mark'")
    refused(rewritten(saved, bad, format="pt"), "not an sppnet detector, found 'pt'")
    refused(rewritten(saved, bad, version="1"), "detector format '1' found, this sppnet reads '2'")
    refused(rewritten(saved, bad, version=""), "detector format None found, this sppnet reads '2'")
    for text in ("", "{", "[]", "{}", json.dumps(describe(saved) | {"classes": 0})[:40]):
        refused(rewritten(saved, bad, detector=text), "damaged")
    whole = load_file(saved)
    for name in whole:
        rest = {n: tensor for n, tensor in whole.items() if n != name}
        refused(rewritten(saved, bad, tensors=rest), f"damaged, found no {name}, expected a detector")
    for name, match in (
        ("svms", r"found SVMs of shape \(2, 6400\), expected \(3, 6400\): for 3 classes"),
        ("regressors", r"found regressions of shape \(2, 4, 6400\), expected \(3, 4, 6400\)"),
    ):
        fewer = {n: tensor[:2].clone() if n.startswith(name) else tensor for n, tensor in whole.items()}
        refused(rewritten(saved, bad, tensors=fewer), match)


def test_other_trunk_weights_are_refused(saved, tmp_path):
    state = {k: v + 0.01 if v.is_floating_point() else v for k, v in timm_state().items()}
    save_file(state, tmp_path / "other.safetensors")
    refused(saved, "fitted on trunk weights .*, found ", weights=str(tmp_path / "other.safetensors"))
    refused(saved, "fitted on trunk weights", weights="random")
    facts = describe(saved)
    facts["trunk"]["digest"] = "0" * 64
    path = rewritten(saved, tmp_path / "digest.safetensors", detector=json.dumps(facts))
    refused(path, "fitted on trunk weights 0000000000000000, found ")


def timm_state():
    import timm

    return timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()


def test_a_failed_save_leaves_the_old_file(detector, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_text("the old model")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        detector.save(path)
    assert path.read_text() == "the old model"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="nowhere"):
        detector.save(tmp_path / "nowhere" / "model.safetensors")
