from dataclasses import replace

import numpy as np
import pytest

from sppnet.boxes import Target, iou
from sppnet.detection.sampling import Examples, SamplingRules, plan_images, plan_tuning

RULES = SamplingRules(negative_iou=0.3, regression_iou=0.5, regression_windows=1000)
BOX = [10, 10, 30, 30]


def boxes(*rows):
    return np.array(rows, np.float32).reshape(-1, 4)


def plan_many(windows, targets, names, rules=RULES, seed=0):
    return plan_images(Examples([None] * len(windows), windows, targets, tuple(names)), rules, seed)


def plan(windows, target, names=("cat", "dog"), rules=RULES):
    """Plan one image, beside another that gives every class a positive and a negative."""
    other = Target.of([BOX] * len(names), names)
    plans = plan_many([windows, boxes([50, 50, 60, 60])], [target, other], names, rules)
    return plans[0]


def test_ground_truth_comes_first_then_the_windows():
    windows = boxes([0, 0, 5, 5], [1, 1, 9, 9])
    target = Target.of([BOX, [0, 0, 8, 8]], ["dog", "cat"])
    planned = plan(windows, target)
    np.testing.assert_array_equal(planned.boxes, np.concatenate([target.boxes, windows]))
    assert planned.labels.tolist() == [1, 0]


def test_negatives_overlap_a_class_by_less_than_the_limit():
    # IoU with the box of 20 x 20: 0.3 exactly (6 of 20 rows), below (5 of 20), none, and all of it.
    windows = boxes([10, 10, 30, 16], [10, 10, 30, 15], [60, 60, 70, 70], BOX)
    planned = plan(windows, Target.of([BOX], ["cat"]))
    assert planned.negative[:, 0].tolist() == [False, False, True, True, False]
    assert planned.negative[:, 1].all(), "there is no dog in the image"


@pytest.mark.parametrize("flag", ["difficult", "crowd"])
def test_difficult_and_crowd_boxes_are_neither_positives_nor_negatives(flag):
    target = Target.of([BOX, [60, 60, 90, 90]], ["cat", "cat"], **{flag: [True, False]})
    windows = boxes(BOX, [11, 10, 30, 30], [60, 60, 90, 89], [100, 100, 120, 120])
    planned = plan(windows, target)
    np.testing.assert_array_equal(planned.boxes[: len(planned.labels)], boxes([60, 60, 90, 90]))
    assert planned.labels.tolist() == [0]
    # The good box, the two windows on the ignored one, the window on the good one, one apart.
    assert planned.negative[:, 0].tolist() == [False, False, False, False, True]
    assert planned.negative[:, 1].tolist() == [True] * 5, "for dogs they are background"
    # Nor do they teach box regression.
    assert planned.fitted.tolist() == [0, -1, -1, 0, -1]


def test_windows_inside_a_crowd_are_no_negatives_however_small():
    windows = boxes([40, 40, 50, 50], [95, 40, 105, 50], [97, 40, 107, 50], [98, 40, 108, 50])
    target = Target.of([[0, 0, 100, 100]], ["cat"], crowd=[True])
    # Covered by 100, 50, 30 and 20 %.
    assert plan(windows, target).negative[:, 0].tolist() == [False, False, False, True]
    plain = Target.of([[0, 0, 100, 100]], ["cat"], difficult=[True])
    assert plan(windows, plain).negative[:, 0].all()


def test_boxes_of_other_classes_are_background():
    planned = plan(boxes(BOX), Target.of([BOX], ["bird"]))
    assert len(planned.labels) == 0
    assert planned.negative.all()
    assert planned.fitted.tolist() == [-1]


def test_regression_learns_from_what_overlaps_by_more_than_the_limit():
    cat, dog = BOX, [12, 10, 32, 30]
    # Half of the cat exactly; just above half; nearer the dog; nothing.
    windows = boxes([10, 10, 30, 20], [10, 10, 30, 21], [13, 10, 33, 30], [70, 70, 80, 80])
    planned = plan(windows, Target.of([cat, dog], ["cat", "dog"]))
    assert planned.fitted.tolist() == [0, 1, -1, 0, 1, -1]
    np.testing.assert_array_equal(planned.truth[[0, 1, 3, 4]], boxes(cat, dog, cat, dog))


def test_regression_examples_are_thinned_over_all_images():
    windows = boxes(*[[10, 10, 30, 30 + i % 3] for i in range(50)])
    rules = SamplingRules(0.3, 0.5, regression_windows=40)
    targets = [Target.of([BOX, [50, 50, 70, 70]], ["cat", "dog"])] * 4

    def fitted(seed):
        return np.stack([p.fitted for p in plan_many([windows] * 4, targets, ["cat", "dog"], rules, seed)])

    drawn = fitted(0)
    assert (drawn == 0).sum() == 40  # of 4 * 51
    assert (drawn == 1).sum() == 4
    assert ((drawn == 0).sum(axis=1) > 2).all(), "from all images"
    np.testing.assert_array_equal(drawn, fitted(0))
    assert (drawn != fitted(1)).any()


@pytest.mark.parametrize(("images", "each"), [(1, 200), (5, 200), (20, 100), (500, 4), (1500, 2)])
def test_about_2000_windows_start(images, each):
    windows = boxes(*[[i, 0, i + 5, 5] for i in range(250)])
    targets = [Target.of([[300, 0, 310, 10]], ["cat"])] * images
    for planned in plan_many([windows] * images, targets, ["cat"], RULES):
        assert len(planned.start) == len(set(planned.start)) == each
        assert planned.start.max() < 251


def test_images_without_objects_or_windows():
    names = ["cat"]
    targets = [Target.of([], []), Target.of([], []), Target.of([BOX], names)]
    windows = [boxes(), boxes([0, 0, 9, 9]), boxes()]
    empty, background, object_only = plan_many(windows, targets, names, RULES)
    assert empty.boxes.shape == (0, 4)
    assert len(empty.start) == len(empty.labels) == len(empty.fitted) == 0
    assert background.negative.tolist() == [[True]]
    assert background.fitted.tolist() == [-1]
    assert object_only.negative.tolist() == [[False]]
    assert object_only.fitted.tolist() == [0]


def test_a_class_without_an_example_is_an_error():
    windows = [boxes([0, 0, 9, 9])]
    cat = Target.of([BOX, BOX], ["cat", "dog"], difficult=[False, True])
    with pytest.raises(
        ValueError, match="no example of dog, bird in 1 images; difficult and crowd boxes do not"
    ):
        plan_many(windows, [cat], ["cat", "dog", "bird"], RULES)
    with pytest.raises(ValueError, match="no example of any class"):
        plan_many(windows, [cat], [], RULES)


def test_a_class_without_background_is_an_error():
    with pytest.raises(
        ValueError, match=r"no background for cat in 1 images, .* overlap it by less than 0.3"
    ):
        plan_many([boxes(BOX)], [Target.of([BOX], ["cat"])], ["cat"])


def greedily_apart(windows, negative):
    """Return which negatives overlap no earlier one that is left by more than 70 %, one by one."""
    left = []
    for i in np.flatnonzero(negative):
        if all(iou(windows[i : i + 1], windows[j : j + 1])[0, 0] <= 0.7 for j in left):
            left.append(i)
    return left


def test_negatives_that_overlap_by_more_than_70_percent_are_removed_class_by_class():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 40, (300, 2))
    windows = np.concatenate([corners, corners + rng.uniform(15, 40, (300, 2))], axis=1).astype(np.float32)
    names = ("bird", "cat", "cow", "dog")
    target = Target.of([BOX, [20, 15, 50, 60], [30, 30, 60, 55]], ["cat", "dog", "dog"])
    every = plan(windows, target, names)
    apart = plan(windows, target, names, SamplingRules(0.3, 0.5, 1000, "paper"))
    np.testing.assert_array_equal(apart.boxes, every.boxes)
    np.testing.assert_array_equal(apart.start, every.start)
    np.testing.assert_array_equal(apart.fitted, every.fitted)
    for k in range(len(names)):
        expected = greedily_apart(every.boxes, every.negative[:, k])
        assert np.flatnonzero(apart.negative[:, k]).tolist() == expected
        assert 30 < len(expected) < every.negative[:, k].sum() - 30
    np.testing.assert_array_equal(apart.negative[:, 0], apart.negative[:, 2])
    assert (apart.negative[:, 1] != apart.negative[:, 3]).any()


def test_negatives_that_overlap_by_70_percent_stay():
    # Each against the first: 7 of 10 rows exactly, 8 of 10, the same; and 7 of 8 against the one removed.
    windows = boxes([50, 50, 60, 60], [50, 50, 60, 57], [50, 50, 60, 58], [50, 50, 60, 60])
    planned = plan(windows, Target.of([BOX], ["cat"]), rules=SamplingRules(0.3, 0.5, 1000, "paper"))
    assert planned.negative[1:, 0].tolist() == [True, True, False, False]


def test_images_without_windows_have_no_negatives_to_remove():
    windows, targets = [boxes(), boxes([50, 50, 60, 60])], [Target.of([], []), Target.of([BOX], ["cat"])]
    empty, other = plan_many(windows, targets, ["cat"], SamplingRules(0.3, 0.5, 1000, "paper"))
    assert empty.negative.shape == (0, 1)
    assert other.negative.tolist() == [[False], [True]]


def test_the_rule_of_the_released_code_waits_for_the_maps():
    windows = boxes(*[[50, 50, 60, 60 + i / 100] for i in range(20)])
    target = Target.of([BOX], ["cat"])
    planned = plan(windows, target, rules=SamplingRules(0.3, 0.5, 1000, "released"))
    np.testing.assert_array_equal(planned.negative, plan(windows, target).negative)


def test_an_unknown_rule_for_negatives_is_an_error():
    with pytest.raises(
        ValueError, match="found the rule for negatives '70', expected one of all, released, paper"
    ):
        SamplingRules(0.3, 0.5, 1000, "70")


def pixels(box):
    """Return the places that a box with integer corners covers, one by one."""
    x1, y1, x2, y2 = (int(v) for v in box)
    return {(x, y) for x in range(x1, x2) for y in range(y1, y2)}


def told_apart(windows, target, names):
    """Return class (-1: background, -2: far, None: none of all) and nearest object of each box, in loops."""
    flags = list(zip(target.boxes, target.labels, target.difficult, target.crowd, strict=True))
    objects = [
        (pixels(b), name) for b, name, hard, crowd in flags if name in names and not hard and not crowd
    ]
    unsure = [(pixels(b), bool(crowd)) for b, _, hard, crowd in flags if hard or crowd]
    told = []
    for box in map(pixels, [*(b for b, n, h, c in flags if n in names and not h and not c), *windows]):
        shares = [len(box & b) / len(box | b) for b, _ in objects]
        best = max(range(len(shares)), key=shares.__getitem__) if shares else None
        doubtful = any(
            len(box & b) / len(box | b) >= 0.5 or (crowd and len(box & b) / len(box) >= 0.5)
            for b, crowd in unsure
        )
        if shares and shares[best] >= 0.5:
            told.append((names.index(objects[best][1]), best))
        elif doubtful:
            told.append((None, best))
        else:
            told.append((-1 if shares and shares[best] >= 0.1 else -2, best))
    return told


def some_windows(rng, count, extent=24):
    ends = np.sort(rng.integers(0, extent, (count, 2, 2)), axis=1)
    return np.concatenate([ends[:, 0], ends[:, 1] + 1], axis=1).astype(np.float32)


def test_tuning_tells_windows_apart_as_the_loops_do():
    rng, names, seen = np.random.default_rng(0), ("cat", "dog"), set()
    for number in range(40):
        count = number % 6
        target = Target.of(
            some_windows(rng, count),
            [str(name) for name in rng.choice(["bird", "cat", "dog"], count)],
            rng.random(count) < 0.25,
            rng.random(count) < 0.25,
        )
        # Many windows on and about what is annotated.
        about = np.repeat(target.boxes, 6, axis=0)
        about[:, 2:] += rng.integers(0, 4, (len(about), 2))
        windows = np.concatenate([some_windows(rng, 30), about])
        planned = plan_tuning(windows, target, names)
        told = told_apart(windows, target, names)
        own = [n in names and not ignored for n, ignored in zip(target.labels, target.ignored, strict=True)]
        np.testing.assert_array_equal(planned.boxes, np.concatenate([target.boxes[own], windows]))
        assert planned.positive.tolist() == [i for i, (k, _) in enumerate(told) if k in (0, 1)]
        assert planned.background.tolist() == [i for i, (k, _) in enumerate(told) if k == -1]
        assert planned.far.tolist() == [i for i, (k, _) in enumerate(told) if k == -2]
        assert planned.labels.tolist() == [k if k in (0, 1) else 2 for k, _ in told]
        for row, (k, nearest) in enumerate(told):
            seen.add((k, any(own)))
            if k in (0, 1):
                np.testing.assert_array_equal(planned.truth[row], target.boxes[own][nearest])
    assert {(None, True), (-1, True), (-2, True), (0, True), (1, True), (None, False), (-2, False)} <= seen


def test_tuning_by_hand():
    # IoU with the box of 20 x 20: 1/2, just less, 1/10, just less, none; then two in between.
    windows = boxes(
        [10, 10, 30, 20], [10, 10, 30, 19], [10, 10, 30, 12], [10, 10, 29, 12], [60, 60, 70, 70],
        [10, 10, 30, 18], [12, 10, 32, 18],
    )  # fmt: skip
    names, rest = ("cat",), [[60, 60, 62, 62], [12, 8, 40, 18]]
    plain = plan_tuning(windows, Target.of([BOX], names), names)
    assert plain.positive.tolist() == [0, 1]
    assert plain.background.tolist() == [2, 3, 6, 7]
    assert plain.far.tolist() == [4, 5]
    assert plain.labels.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    hard = Target.of([BOX, *rest], ["cat"] * 3, [False, True, False], [False, False, True])
    # All but the window apart, which is on no object either, lie in the crowd by half or more.
    assert plan_tuning(windows, hard, names).positive.tolist() == [0, 1], "the cat claims its own"
    assert plan_tuning(windows, hard, names).background.tolist() == []
    beside = Target.of([BOX, [12, 8, 21, 18]], ["cat", "cat"], crowd=[False, True])
    # This crowd covers 9 of their 20 columns.
    assert plan_tuning(windows, beside, names).background.tolist() == [2, 3, 6, 7]


def test_of_an_image_without_objects_all_windows_are_far():
    windows = boxes([0, 0, 5, 5], [3, 3, 9, 9])
    for target in (Target.of([], []), Target.of([[0, 0, 5, 5]], ["bird"])):
        planned = plan_tuning(windows, target, ("cat", "dog"))
        np.testing.assert_array_equal(planned.boxes, windows)
        assert planned.labels.tolist() == [2, 2]
        assert planned.positive.tolist() == []
        assert planned.background.tolist() == []
        assert planned.far.tolist() == [0, 1]
    hard = plan_tuning(windows, Target.of([[0, 0, 5, 5]], ["cat"], [True]), ("cat", "dog"))
    assert hard.far.tolist() == [1]
    none = plan_tuning(boxes(), Target.of([], []), ("cat",))
    assert none.boxes.shape == (0, 4)
    assert none.draw(8, 0.25, 0.25, np.random.default_rng(0)).tolist() == []


@pytest.mark.parametrize(
    ("there", "count", "shares", "drawn"),
    [
        ((100, 200, 50), 64, (0.25, 0.0), (16, 48, 0)),
        ((100, 200, 50), 64, (0.25, 0.25), (16, 32, 16)),
        ((5, 200, 50), 64, (0.25, 0.25), (5, 43, 16)),  # the background fills up
        ((100, 200, 3), 64, (0.25, 0.25), (16, 45, 3)),
        ((100, 10, 50), 64, (0.25, 0.25), (16, 10, 16)),  # the others do not
        ((0, 30, 0), 64, (0.25, 0.0), (0, 30, 0)),
        ((9, 0, 9), 64, (0.25, 0.0), (9, 0, 0)),
        ((0, 0, 0), 64, (0.25, 0.25), (0, 0, 0)),
        ((100, 100, 100), 10, (1.0, 0.0), (10, 0, 0)),
        ((100, 100, 100), 1, (0.25, 0.25), (0, 1, 0)),
    ],
)
def test_windows_are_drawn_without_repetition(there, count, shares, drawn):
    first, second, third = np.split(np.arange(3, 3 + sum(there)), np.cumsum(there)[:2])
    planned = replace(
        plan_tuning(boxes(), Target.of([], []), ("cat",)), positive=first, background=second, far=third
    )
    rng, draws = np.random.default_rng(0), []
    for _ in range(60):
        chosen = planned.draw(count, *shares, rng)
        assert chosen.dtype == np.int64
        assert len(chosen) == len(set(chosen.tolist())) == sum(drawn)
        assert tuple(np.isin(chosen, kind).sum() for kind in (first, second, third)) == drawn
        draws.append(chosen)
    if 0 < drawn[0] < there[0] <= 20 * drawn[0]:
        assert set(first) <= set(np.concatenate(draws)), "each has its turn"
    again = np.random.default_rng(0)
    for chosen in draws:
        np.testing.assert_array_equal(chosen, planned.draw(count, *shares, again))
