"""A fit in rounds over shards: against today's fit, against slow oracles, and whoever does the shards."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

import trees
from sppnet.detection import rounds
from sppnet.detection.detector import Detector
from sppnet.detection.fit import FitSettings, Work
from sppnet.detection.rounds import Bounds, Sharding, Source, bounds_of, cut, fit_in_rounds
from sppnet.detection.sampling import Examples, SamplingRules, plan_images
from sppnet.detection.shards import Held, Mine, Reader, Recipe
from sppnet.detection.svm import LinearSVMs, MiningSettings, TrainingSet
from sppnet.detection.tuning import Tuning
from sppnet.errors import SppnetError
from sppnet.evaluation.detection import mean_average_precision, voc_detection
from sppnet.features.backbone import Backbone
from sppnet.features.cache import MapCache
from sppnet.features.windows import WindowPooling
from sppnet.parallel import TOGETHER, Staged, Threads
from sppnet.progress import StageTimer
from sppnet.regression import encode_deltas
from trees import drawn

SCALES = (160, 320)
SETTINGS = {"levels": (1,), "scales": SCALES, "reference": 160}
POOLING = WindowPooling(SCALES, (1,), reference=160)


@pytest.fixture(scope="module")
def training():
    return drawn(range(1, 17))


@pytest.fixture(scope="module")
def cache(tmp_path_factory, lite0, training):
    """The maps of all images here, computed once for all tests that do not count."""
    folder = tmp_path_factory.mktemp("maps")
    store = MapCache(folder, lite0, SCALES)
    for image in training[0]:
        store(image, StageTimer())
    return folder


@pytest.fixture(scope="module")
def detector(training, cache):
    return fit(training, cache, shards=1)


def fit(data, cache, settings=SETTINGS, **options):
    images, windows, targets = data
    return Detector(**settings).fit(trees.samples(images, targets), windows=windows, cache=cache, **options)


def same(a, b):
    """Tell whether two detectors are equal to the last bit, in all that was learned."""
    one, other = a.fitted_, b.fitted_
    pairs = [
        (getattr(one, name), getattr(other, name))
        for name in ("photos", "objects", "thresholds", "classes", "side", "feature_scale")
    ]
    for part in ("svms", "regression", "calibration", "quality"):
        mine, theirs = vars(getattr(one, part)), vars(getattr(other, part))
        pairs += [(mine[name], theirs[name]) for name in mine if isinstance(mine[name], np.ndarray)]
    return all(np.array_equal(p, q, equal_nan=np.asarray(p).dtype.kind == "f") for p, q in pairs)


class Elsewhere:
    """A runner that does the last item first, in what could be other processes: all goes through pickles."""

    def stream(self, work, items, together=TOGETHER):
        functions = [pickle.loads(pickle.dumps(work)).open() for _ in range(2)]
        results = [
            pickle.dumps(functions[i % 2](pickle.loads(pickle.dumps(item))))
            for i, item in reversed(list(enumerate(items)))
        ]
        return map(pickle.loads, reversed(results))


class Stopped(Exception):
    """A fit was interrupted."""


@pytest.mark.parametrize("shards", [3, 40])
def test_the_number_of_shards_changes_nothing(detector, training, cache, shards):
    """Forty are more than there are photos: most are empty."""
    assert same(fit(training, cache, shards=shards), detector)


def test_it_does_not_matter_who_does_the_shards_and_when(detector, training, cache):
    assert same(fit(training, cache, shards=5, cluster=Elsewhere()), detector)


def test_finds_what_the_plain_fit_finds(training, cache):
    images, windows, targets = drawn(range(101, 111))
    finer = SETTINGS | {"levels": (2, 1)}
    plain, detector = fit(training, cache, finer), fit(training, cache, finer, shards=3)

    def precision(model):
        found = [model.predict(i, w, threshold=0) for i, w in zip(images, windows, strict=True)]
        return mean_average_precision(voc_detection(found, targets, model.classes_))

    assert precision(detector) > 0.75
    assert abs(precision(detector) - precision(plain)) < 0.03
    assert abs(detector.fitted_.quality.mean_ap - plain.fitted_.quality.mean_ap) < 0.05
    np.testing.assert_array_equal(detector.fitted_.photos, plain.fitted_.photos)
    np.testing.assert_array_equal(detector.fitted_.objects, plain.fitted_.objects)


def pooled(training, cache, lite0, scale):
    """Return plan and scaled vectors of all windows of each photo."""
    images, windows, targets = training
    plans = plan_images(Examples(images, windows, targets, trees.SHAPES), SamplingRules(), 0)
    store = MapCache(cache, lite0, SCALES)
    for image, plan in zip(images, plans, strict=True):
        vectors = POOLING(store(image, StageTimer()), plan.boxes).astype(np.float16).astype(np.float64)
        yield plan, vectors * scale


@pytest.mark.parametrize("summed", [False, True])
def test_ridges_are_those_of_all_examples(detector, training, cache, lite0, summed, monkeypatch):
    """Solved here with all vectors of a class in one place, in double precision."""
    monkeypatch.setattr(rounds, "sums_are_less", lambda counts, length: np.full(len(counts), summed))
    fitted = (fit(training, cache, shards=3) if summed else detector).fitted_
    parts = list(pooled(training, cache, lite0, fitted.feature_scale))
    for k in range(len(trees.SHAPES)):
        vectors = np.concatenate([v[plan.fitted == k] for plan, v in parts])
        x = np.concatenate([vectors, np.ones((len(vectors), 1))], axis=1)
        y = np.concatenate(
            [encode_deltas(p.boxes[p.fitted == k], p.truth[p.fitted == k]) for p, _ in parts]
        ).astype(float)
        centred = y - y.mean(axis=0)
        values, turn = np.linalg.eigh(centred.T @ centred / len(y))
        root = np.sqrt(values + 1e-3)
        goal = centred @ turn / root @ turn.T
        solved = np.linalg.solve(x.T @ x + 1000 * np.eye(x.shape[1]), x.T @ goal)
        weights = solved @ (turn * root) @ turn.T
        np.testing.assert_allclose(fitted.regression.weights[k], weights[:-1].T, atol=1e-6, rtol=1e-4)
        np.testing.assert_allclose(fitted.regression.offsets[k], weights[-1] + y.mean(axis=0), atol=1e-5)


def objective(svms, k, vectors, signs, settings):
    """Return the objective of the SVM of class k on some examples."""
    w, b = svms.weights[k].astype(float), float(svms.biases[k])
    costs = np.where(signs > 0, settings.positive_weight, 1) * (signs != 0)
    return (w @ w + (b / 10) ** 2) / 2 + settings.C * (
        costs * np.maximum(1 - signs * (vectors @ w + b), 0)
    ).sum()


def test_svms_are_those_of_all_windows_at_once(training, cache, lite0):
    """Rounds until no window is hard any more give what a training on all windows gives."""
    mining = MiningSettings(tolerance=1e-3, epochs=2000)
    fitted = fit(training, cache, SETTINGS | {"mining": mining}, shards=4, rounds=20).fitted_
    parts, flags = [], []
    for plan, v in pooled(training, cache, lite0, fitted.feature_scale):
        count = len(plan.labels)
        parts += [v[:count], v]
        flags += [np.eye(3, dtype=np.int8)[plan.labels], -plan.negative.astype(np.int8)]
    vectors, signs = np.concatenate(parts), np.concatenate(flags)
    all_at_once = TrainingSet(vectors.astype(np.float32), signs, mining).fit()
    for k in range(3):
        goal = objective(all_at_once, k, vectors, signs[:, k], mining)
        assert objective(fitted.svms, k, vectors, signs[:, k], mining) < 1.002 * goal


def test_more_rounds_than_are_needed_change_nothing(training, cache):
    told = []

    def track(items, description):
        told.append(description)
        return items

    many = fit(training, cache, shards=2, rounds=12, track=track)
    needed = sum("round" in text for text in told)
    assert needed < 12
    assert same(fit(training, cache, shards=2, rounds=needed), many)


def recipe(cache, lite0, folder=None):
    settings = FitSettings(POOLING)
    return Recipe(trees.SHAPES, settings, lite0, folder or cache, None, 16, 50)


def test_a_shard_returns_the_hardest_windows_of_each_class_in_turn(training, cache, lite0):
    images, windows, targets = training
    (shard,) = cut(Examples(images, windows, targets, trees.SHAPES), 1, True)
    shard = replace(shard, keys=np.arange(len(images)).astype(np.uint64))
    weights = np.random.default_rng(0).normal(0, 0.05, (3, POOLING.length(lite0.channels)))
    svms = LinearSVMs(weights.astype(np.float32), np.full(3, -0.5, np.float32))
    reader = Reader(recipe(cache, lite0))
    held = Held(shard, np.zeros(0, np.int64), np.zeros((0, 3), bool))
    everything, some = (Mine(svms, 0.3, limit)(reader, held) for limit in (None, 90))
    assert len(everything.places) > 300
    assert everything.left == 0
    assert everything.fresh.all()
    assert len(some.places) == 90
    assert some.left == len(everything.places) - 90
    scores = np.where(everything.negative, svms(everything.features.astype(np.float32)), -np.inf)
    # Of each class so many of the best are there that all together are as many as may be.
    ranks = np.argsort(np.argsort(-scores, axis=0), axis=0)
    turn = np.sort(ranks.min(axis=1))[89]
    must, may = ((ranks < turn).any(axis=1), (ranks <= turn + 1).any(axis=1))
    kept = np.isin(everything.places, some.places)
    assert kept[must].all()
    assert may[kept].all()


def test_what_is_held_is_not_returned_again(training, cache, lite0):
    images, windows, targets = training
    (shard,) = cut(Examples(images, windows, targets, trees.SHAPES), 1, True)
    weights = np.random.default_rng(0).normal(0, 0.05, (3, POOLING.length(lite0.channels)))
    step = Mine(LinearSVMs(weights.astype(np.float32), np.full(3, -0.5, np.float32)), 0.3, None)
    reader = Reader(recipe(cache, lite0))
    first = step(reader, Held(shard, np.zeros(0, np.int64), np.zeros((0, 3), bool)))
    assert not len(step(reader, Held(shard, first.places, first.negative)).places)
    # A window that is held for one class only comes back for another, without its vector.
    both = first.negative[:, :2].all(axis=1)
    assert both.any()
    known = first.negative.copy()
    known[:, 1] = False
    again = step(reader, Held(shard, first.places, known))
    np.testing.assert_array_equal(again.places, first.places[first.negative[:, 1]])
    assert not again.fresh.any()
    assert len(again.features) == 0
    np.testing.assert_array_equal(again.negative[:, 0], False)


def test_goes_on_from_the_maps_of_shards_that_were_done(detector, training, tmp_path, monkeypatch):
    made, plain = [], Backbone.__call__

    def counted(self, image, side):
        made.append(side)
        return plain(self, image, side)

    def stopped(items, description):
        for i in items:
            if description == "Computing feature maps" and i == 2:
                raise Stopped
            yield i

    monkeypatch.setattr(Backbone, "__call__", counted)
    with pytest.raises(Stopped):
        fit(training, tmp_path, shards=4, track=stopped)
    done = len(made)
    assert 0 < done < 16 * len(SCALES)
    # What was damaged since is done anew, from its maps.
    (tmp_path / "first-1.safetensors").write_bytes(b"damaged")
    assert same(fit(training, tmp_path, shards=4), detector)
    assert len(made) == 16 * len(SCALES)


@pytest.fixture
def files(training, tmp_path):
    """Eight photos as files, of which one is none: that of the seventh of eight shards."""
    images, _, targets = (part[:8] for part in training)
    paths = []
    for i, image in enumerate(images):
        paths.append(tmp_path / f"{i}.png")
        trees.save(paths[-1], image)
    paths[6].write_bytes(b"no image")
    return trees.samples(paths, targets)


def test_a_photo_that_cannot_be_read_is_left_out_and_named(files, tmp_path):
    model = Detector(**SETTINGS, proposals="dense")
    with pytest.warns(UserWarning, match=r"1 of 8 photos left out, unreadable: .*6\.png"):
        model.fit(files, cache=tmp_path / "maps", shards=8, max_bad=0.2)
    assert len(model.fitted_.photos) == 7
    with pytest.raises(SppnetError, match=r"found 1 of 8 photos that cannot be read, .*6\.png"):
        Detector(**SETTINGS, proposals="dense").fit(files, cache=tmp_path / "maps", shards=8)


def test_a_network_that_proposes_windows_is_fitted_in_shards_too(training, tmp_path):
    images, _, targets = (part[:6] for part in training)
    data = trees.samples(images, targets)
    model = Detector("pyramid-lite0", scales=(160,), levels=(1,)).fit(data, cache=tmp_path, shards=2)
    plain = Detector("pyramid-lite0", scales=(160,), levels=(1,)).fit(data, cache=tmp_path)
    assert model.fitted_.side == plain.fitted_.side == 160
    found = model.predict(images[0], threshold=0)
    assert len(found) == len(plain.predict(images[0], threshold=0))
    model.save(tmp_path / "m.safetensors")
    assert Detector.load(tmp_path / "m.safetensors").fitted_.side == 160


def test_what_trains_a_network_is_no_fit_in_shards(training):
    data = trees.samples(training[0], training[2])
    for options, asked in (
        ({"tuning": Tuning()}, {}),
        ({"proposals": "maps"}, {}),
        ({}, {"minutes": 1.0}),
    ):
        with pytest.raises(SppnetError, match="beside shards, a memory or a cluster, expected SVMs"):
            Detector(**options).fit(data, shards=2, **asked)


@pytest.mark.parametrize(("name", "value"), [("shards", 0), ("memory", -1.0), ("rounds", 0)])
def test_numbers_of_nothing_are_errors(training, name, value):
    with pytest.raises(SppnetError, match=f"as {name}, expected more than 0"):
        Detector().fit(trees.samples(training[0], training[2]), **{name: value})


def test_a_memory_that_is_too_little_is_an_error_before_any_work(training, tmp_path, monkeypatch):
    monkeypatch.setattr(Backbone, "__call__", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(SppnetError, match=r"found a memory of 0\.1 GB, expected at least \d"):
        fit(training, tmp_path, memory=0.1)


def test_memory_bounds_what_is_held_and_what_a_shard_is():
    small, large = (bounds_of(memory, 17920, 6, 4000) for memory in (1e9, 4e9))
    for name in ("photos", "block", "hard", "held"):
        assert 0 < getattr(small, name) <= getattr(large, name)
    assert small.held * 2 * 17920 < 0.6e9
    assert bounds_of(None, 17920, 6, 4000).held is None


def test_a_bounded_training_set_takes_no_more_than_there_is_room_for(training, cache, lite0, monkeypatch):
    most, add = [], TrainingSet.add

    def noted(self, *args):
        add(self, *args)
        most.append(len(self))

    monkeypatch.setattr(TrainingSet, "add", noted)
    monkeypatch.setattr(rounds, "bounds_of", lambda *_: Bounds(4, 50, 3, 2100))
    images, windows, targets = training
    examples = Examples(images, windows, targets, trees.SHAPES)
    settings = FitSettings(POOLING, folds=0)
    with pytest.warns(UserWarning, match=r"\d hard windows of the last round found no room in the memory"):
        fitted = fit_in_rounds(
            examples, settings, lite0, Work(cache), Source(given=True), Sharding(memory=1e9, rounds=1)
        )
    assert max(most) <= 2100
    assert np.isfinite(fitted.svms.weights).all()
    monkeypatch.setattr(rounds, "bounds_of", lambda *_: Bounds(4, 50, 20, 2000))
    with pytest.raises(SppnetError, match="objects and windows to start with, expected 2000 at most"):
        fit_in_rounds(examples, settings, lite0, Work(cache), Source(given=True), Sharding(memory=1e9))


def test_this_process_does_one_shard_at_a_time_and_none_ahead():
    class Noting:
        def open(self):
            return Staged(int, events.append)

    events: list[int] = []
    results = Threads(1).stream(Noting(), range(5))
    next(iter(results))
    assert events == [0]
