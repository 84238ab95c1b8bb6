import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.utils.estimator_checks import (
    check_estimator_cloneable,
    check_estimator_repr,
    check_get_params_invariance,
    check_no_attributes_set_in_init,
    check_parameters_default_constructible,
    check_set_params,
)
from torchvision.ops import roi_align

from sppnet.boxes import Target, area, iou
from sppnet.errors import NotFittedError, SppnetError
from sppnet.evaluation.detection import proposal_recall
from sppnet.features.encoded import EncodedImage, FeatureMaps
from sppnet.features.geometry import Geometry
from sppnet.features.projection import choose_scale
from sppnet.proposals import Combined, DenseWindows
from sppnet.proposals.maps import Objectness
from sppnet.regression import decode_deltas, encode_deltas

GEOMETRY = Geometry(8, 3.5)
SHAPE = (96, 128)
CHANNELS = 6


def blank(factor=1.0, channels=CHANNELS, shape=SHAPE):
    h, w = (GEOMETRY.cells(round(side * factor)) for side in shape)
    return FeatureMaps(
        (np.zeros((channels, h, w), np.float32),), (GEOMETRY,), (factor, factor), round(min(shape) * factor)
    )


def empty(channels=CHANNELS, factors=(1.0, 0.5), shape=SHAPE):
    return EncodedImage(shape, tuple(blank(factor, channels, shape) for factor in factors))


def scene(seed, factors=(1.0, 0.5)):
    """Return an image encoded at two scales; cells in its one or two objects tell how far the sides are."""
    rng = np.random.default_rng(seed)
    boxes = []
    for half in range(1 + seed % 2):
        w, h = rng.uniform(24, 60, 2)
        x, y = half * 64 + rng.uniform(0, 64 - w), rng.uniform(0, 96 - h)
        boxes.append([x, y, x + w, y + h])
    maps = []
    for factor in factors:
        m = blank(factor)
        stage = rng.normal(0, 0.05, m.stages[0].shape).astype(np.float32)
        for v in range(stage.shape[1]):
            for u in range(stage.shape[2]):
                x, y = ((8 * c + 4) / factor for c in (u, v))
                for x1, y1, x2, y2 in boxes:
                    if x1 < x < x2 and y1 < y < y2:
                        stage[:, v, u] += [1, 1, *(np.array([x - x1, y - y1, x2 - x, y2 - y]) / 30)]
        maps.append(replace(m, stages=(stage,)))
    return EncodedImage(SHAPE, tuple(maps)), Target.of(boxes, ["thing"] * len(boxes))


def small(**changed):
    settings = {"sizes": (0.5, 1.0), "reference": 40, "width": 16, "kernel": 3, "steps": 48, "lr": 0.01}
    return Objectness(**settings | {"limit": 50, "ridge": 1.0} | changed)


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def scenes():
    return [scene(seed) for seed in range(16)]


@pytest.fixture(scope="module")
def fitted(scenes):
    return small().fit(lambda i: scenes[i][0], [t for _, t in scenes])


@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.5, 0.53)])
def test_anchors_stand_about_the_centres_of_the_cells(factors):
    objectness = Objectness(sizes=(0.5, 2.0), aspects=(0.5, 1.0, 2.0), reference=32)
    maps = FeatureMaps(
        (np.zeros((4, 3, 5)), np.zeros((2, 2, 3))), (Geometry(8, 3.5), Geometry(16, 7)), factors, 32
    )
    expected = []
    for v in range(2):
        for u in range(3):
            for size in (0.5, 2.0):
                for aspect in (0.5, 1.0, 2.0):
                    x, y = (16 * u + 7.5) / factors[0], (16 * v + 7.5) / factors[1]
                    w = 32 * size * math.sqrt(aspect) / factors[0]
                    h = 32 * size / math.sqrt(aspect) / factors[1]
                    expected.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    anchors = objectness.anchors(maps)
    assert anchors.dtype == np.float32
    np.testing.assert_allclose(anchors, expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(
        area(anchors) * factors[0] * factors[1], np.tile(np.repeat([16**2, 64**2], 3), 6), rtol=1e-4
    )


def test_deltas_of_an_anchor_lead_back_to_the_object():
    anchors = small().anchors(blank())
    objects = np.tile(np.float32([[10, 20, 55, 43]]), (len(anchors), 1))
    back = decode_deltas(anchors, encode_deltas(anchors, objects))
    np.testing.assert_allclose(back, objects, atol=1e-3)


def test_it_finds_what_it_has_not_seen(fitted):
    unseen = [scene(seed) for seed in range(100, 116)]
    windows = [fitted.propose(encoded) for encoded, _ in unseen]
    recall = proposal_recall([boxes[:10] for boxes, _ in windows], [t for _, t in unseen])
    assert recall.recall[0] > 0.9
    # Anchors alone, unmoved and in their own order, are far worse.
    still = proposal_recall([fitted.anchors(blank())[:10] for _ in unseen], [t for _, t in unseen])
    assert still.recall[0] < 0.1


def test_windows_come_best_first_inside_the_image_and_apart(fitted, scenes):
    for encoded, _ in scenes[:4]:
        boxes, scores = fitted.propose(encoded)
        assert boxes.dtype == scores.dtype == np.float32
        assert boxes.shape == (len(scores), 4)
        assert 0 < len(boxes) <= fitted.limit
        assert (np.diff(scores) <= 0).all()
        assert (boxes >= 0).all()
        assert (boxes <= np.float32([128, 96, 128, 96])).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 4).all()
        overlap = iou(boxes, boxes)
        np.fill_diagonal(overlap, 0)
        assert overlap.max() <= fitted.nms_iou + 1e-6


def test_equal_seeds_give_equal_windows_and_leave_other_draws_alone(scenes):
    def fit(seed):
        return small(steps=4, seed=seed).fit(lambda i: scenes[i][0], [t for _, t in scenes])

    torch.manual_seed(5)
    first = fit(0)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    again, other = fit(0), fit(1)
    assert equal(first.state(), again.state())
    assert not np.array_equal(first.weights_, other.weights_)


def test_state_and_settings_give_the_same_windows(fitted, scenes):
    again = Objectness.from_state(fitted.state(), fitted.get_params())
    assert again.get_params() == fitted.get_params()
    assert again.signature == fitted.signature
    for encoded, _ in scenes[:3]:
        for a, b in zip(fitted.propose(encoded), again.propose(encoded), strict=True):
            assert np.array_equal(a, b)


def test_called_it_is_a_method_like_any_other(fitted, scenes):
    encoded, image = scenes[1][0], np.zeros((*SHAPE, 3), np.uint8)
    alone, whole = fitted.propose(encoded), [0, 0, 128, 96]
    windows = fitted(image, encoded)
    assert windows.boxes.tolist() == [whole, *(box for box in alone.boxes.tolist() if box != whole)]
    assert windows.scores[0] == 1
    assert (np.diff(windows.scores) < 0).all()
    together = Combined((DenseWindows(), fitted))(image, encoded)
    parts = (*DenseWindows()(image).boxes, *windows.boxes)
    assert {tuple(b) for b in together.boxes} == {tuple(b) for b in parts}
    with pytest.raises(SppnetError, match="found an image without its maps"):
        fitted(image)
    with pytest.raises(SppnetError, match="found an image without its maps"):
        Combined((DenseWindows(), fitted))(image)


@pytest.mark.parametrize(
    "check",
    [
        check_parameters_default_constructible,
        check_no_attributes_set_in_init,
        check_get_params_invariance,
        check_set_params,
        check_estimator_repr,
        check_estimator_cloneable,
    ],
)
def test_it_is_an_estimator(check):
    check("Objectness", small(steps=3))


def test_a_clone_has_the_settings_and_not_what_was_fitted(fitted, scenes):
    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params()
    assert repr(copy) == repr(fitted)
    assert "steps=48" in repr(copy)
    with pytest.raises(NotFittedError):
        copy.propose(scenes[0][0])


def test_a_second_fit_starts_from_the_same_place(scenes):
    read, targets = (lambda i: scenes[i][0]), [t for _, t in scenes]
    objectness = small(steps=3)
    settings = objectness.get_params()
    first = {name: array.copy() for name, array in objectness.fit(read, targets).state().items()}
    objectness.fit(lambda i: scenes[i + 4][0], targets[4:])
    assert not np.array_equal(objectness.weights_, first["weights"])
    assert objectness.fit(read, targets) is objectness
    assert objectness.get_params() == settings
    again = objectness.state()
    assert equal(again, first)


def test_a_fit_that_fails_leaves_what_was_fitted(fitted, scenes):
    objectness = Objectness.from_state(fitted.state(), fitted.get_params())

    def read(i):
        if objectness_is_trained:
            raise OSError("gone")
        return scenes[1][0]

    def track(items, description):
        nonlocal objectness_is_trained
        yield from items
        objectness_is_trained = True

    objectness_is_trained = False
    with pytest.raises(OSError, match="gone"):
        objectness.set_params(steps=2).fit(read, [scenes[1][1]], track=track)
    assert equal(objectness.state(), fitted.state())


def test_signatures_tell_what_was_fitted(fitted):
    state = fitted.state()
    other = Objectness.from_state(state | {"weights": state["weights"] * 2}, fitted.get_params())
    assert fitted.signature != other.signature
    assert fitted.signature != Objectness.from_state(state, fitted.get_params() | {"limit": 51}).signature


def test_a_state_that_does_not_fit_is_refused(fitted):
    state = fitted.state()
    with pytest.raises(SppnetError, match=r"weights is missing, expected one of shape \(5, 400\)"):
        Objectness.from_state({k: v for k, v in state.items() if k != "weights"}, fitted.get_params())
    with pytest.raises(SppnetError, match=r"network\.answer\.weight is of shape \(30, 16\)"):
        Objectness.from_state(state, fitted.get_params() | {"sizes": (1.0,)})
    with pytest.raises(SppnetError, match=r"network\.reduce\.weight is missing"):
        Objectness.from_state({}, fitted.get_params())


def test_a_map_may_be_a_single_cell(fitted):
    tiny = empty(factors=(1.0,), shape=(5, 7))
    assert tiny.scales[0].stages[0].shape == (CHANNELS, 1, 1)
    boxes, scores = fitted.propose(tiny)
    assert len(boxes) == len(scores)
    assert (boxes[:, 2:] <= np.float32([7, 5])).all()


def test_an_image_without_objects_teaches_background(scenes):
    encoded = [scenes[0][0], empty(), scenes[1][0]]
    targets = [scenes[0][1], Target.of([], []), scenes[1][1]]
    fitted = small(steps=20).fit(encoded.__getitem__, targets)
    _, on_nothing = fitted.propose(empty())
    _, on_something = fitted.propose(scenes[1][0])
    assert on_something[0] > on_nothing.max(initial=-np.inf)


def test_no_objects_at_all_are_an_error(scenes):
    target = scenes[1][1]
    nothing = Target.of([], [])
    hard = Target.of(target.boxes, target.labels, difficult=[True] * len(target.boxes))
    for targets, classes, said in [
        ([nothing, nothing], None, "no object of any class in 2 images"),
        ([hard], None, "no object of any class in 1 images"),
        ([target], ["cat", "dog"], "no object of cat, dog in 1 images"),
        ([], None, "no object of any class in 0 images"),
    ]:
        with pytest.raises(SppnetError, match=said):
            small().fit(lambda i: scenes[1][0], targets, classes)


def test_maps_of_another_backbone_are_an_error(fitted, scenes):
    with pytest.raises(SppnetError, match="found maps of 3 channels, expected 6"):
        fitted.propose(empty(channels=3))
    mixed = [scenes[1][0], empty(channels=3)]
    with pytest.raises(SppnetError, match="found maps of 3 channels, expected 6"):
        small().fit(mixed.__getitem__, [scenes[1][1]] * 2)


def test_a_loss_that_is_not_finite_is_an_error(scenes):
    encoded = scenes[1][0]
    scales = tuple(replace(m, stages=(m.stages[0] * np.float32(np.nan),)) for m in encoded.scales)
    with pytest.raises(SppnetError, match="found the loss nan at image 0 and the learning rate"):
        small().fit(lambda i: replace(encoded, scales=scales), [scenes[1][1]])


def test_it_must_be_fitted_first(scenes):
    encoded = scenes[0][0]
    for use in (lambda o: o.propose(encoded), lambda o: o(None, encoded), lambda o: o.state()):
        with pytest.raises(NotFittedError, match="this Objectness is not fitted yet"):
            use(small())


def on(device, encoded):
    """Return an encoded image with tensors for maps."""
    scales = (
        replace(m, stages=tuple(torch.from_numpy(s).to(device) for s in m.stages)) for m in encoded.scales
    )
    return replace(encoded, scales=tuple(scales))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_maps_may_be_tensors(fitted, scenes, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    encoded, _ = scenes[1]
    boxes, scores = fitted.propose(on(device, encoded))
    expected, by = fitted.propose(encoded)
    np.testing.assert_allclose(scores[:5], by[:5], atol=1e-3)
    np.testing.assert_allclose(boxes[:5], expected[:5], atol=0.1)
    settings = small(steps=4)
    states = [
        settings.fit(lambda i, e=encode: e(scenes[i][0]), [t for _, t in scenes]).state()
        for encode in (lambda encoded: on(device, encoded), lambda encoded: encoded)
    ]
    for name, value in states[0].items():
        np.testing.assert_allclose(value, states[1][name], atol=1e-3 if device == "cuda" else 1e-6)


def drawn_scene(rng):
    """Return an image encoded at two scales whose maps are noise, and windows in and about it."""
    encoded = empty(factors=(1.0, 0.5))
    scales = tuple(
        replace(m, stages=(rng.normal(size=m.stages[0].shape).astype(np.float32),)) for m in encoded.scales
    )
    corners = rng.uniform(-20, 110, (200, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(4, 90, (200, 2))], axis=1).astype(np.float32)
    return replace(encoded, scales=scales), boxes


def test_windows_are_pooled_as_torchvision_aligns_them(fitted):
    encoded, boxes = drawn_scene(np.random.default_rng(0))
    _, hidden = fitted._first(fitted.network_, encoded)
    pooled = fitted._pool(hidden, encoded, boxes)
    which = choose_scale(boxes, 96, encoded.sides, fitted.reference, "released")
    assert set(which) == {0, 1}
    for box, s, found in zip(boxes.astype(np.float64), which, pooled, strict=True):
        middle, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) * 0.6
        # In pixels of the resized image; of RoIAlign's cells the first has its centre at half a cell.
        corners = np.concatenate([middle - half, middle + half]) * encoded.scales[s].factors[0]
        cells = torch.from_numpy((corners - 3.5 - 0.5) / 8 + 0.5).float()
        maps = torch.from_numpy(hidden[s]).permute(2, 0, 1)[None]
        expected = roi_align(maps, [cells[None]], 5, sampling_ratio=1, aligned=True)
        np.testing.assert_allclose(found, expected.flatten().numpy(), rtol=1e-4, atol=1e-4)


def test_the_second_step_is_linear_in_the_pooled_windows(fitted):
    encoded, boxes = drawn_scene(np.random.default_rng(1))
    _, hidden = fitted._first(fitted.network_, encoded)
    expected = fitted._pool(hidden, encoded, boxes) @ fitted.weights_.T + fitted.offsets_
    found = fitted._second(hidden, encoded, boxes)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert fitted._second(hidden, encoded, boxes[:0]).shape == (0, 5)


def test_training_without_pytorch_says_what_to_install(scenes, monkeypatch):
    monkeypatch.setattr("sppnet.errors.find_spec", lambda name: None)
    with pytest.raises(
        SppnetError,
        match=r'learning to propose windows from maps needs PyTorch: pip install "sppnet\[torch\]"',
    ):
        small().fit(lambda i: scenes[i][0], [t for _, t in scenes])
