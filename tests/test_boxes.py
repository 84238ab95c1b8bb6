from fractions import Fraction

import numpy as np
import pytest
import torch
import torchvision

from sppnet.boxes import Detection, Detections, Target, area, batched_nms, clip, flip, intersection, iou, nms
from sppnet.errors import SppnetError


def some_boxes(rng, count, extent=12, empty=True):
    """Return boxes with small integer corners, so that many touch, agree or (if `empty`) have no area."""
    corners = rng.integers(0, extent, (count, 2, 2))
    low, high = corners.min(axis=1), corners.max(axis=1) + (0 if empty else 1)
    return np.concatenate([low, high], axis=1).astype(np.float32)


def shared_pixels(a, b):
    """Count the pixels that two boxes with integer corners both cover, one by one."""
    return sum(
        1
        for y in range(int(max(a[1], b[1])), int(min(a[3], b[3])))
        for x in range(int(max(a[0], b[0])), int(min(a[2], b[2])))
    )


def exact_iou(a, b):
    shared = shared_pixels(a, b)
    union = shared_pixels(a, a) + shared_pixels(b, b) - shared
    return Fraction(shared, union) if union else Fraction(0)


def greedy(boxes, scores, threshold):
    """Suppress in plain loops with exact fractions; `threshold` is a Fraction."""
    order = sorted(range(len(boxes)), key=lambda i: -scores[i])  # sorted() keeps the order of ties
    kept = []
    for i in order:
        if all(exact_iou(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_a_mirrored_box_covers_the_same_pixels(rng, dtype):
    boxes = some_boxes(rng, 30).astype(dtype)
    before, found = boxes.copy(), flip(boxes, 15)
    assert found.dtype == dtype
    assert np.array_equal(boxes, before)
    pixels = rng.random((12, 15))
    for (x1, y1, x2, y2), (u1, v1, u2, v2) in zip(boxes.astype(int), found.astype(int), strict=True):
        assert np.array_equal(pixels[y1:y2, x1:x2], pixels[:, ::-1][v1:v2, u1:u2][:, ::-1])


def test_area_counts_pixels_and_inverted_boxes_as_nothing():
    boxes = np.array([[0, 0, 3, 2], [1, 1, 1, 5], [4, 0, 2, 3], [4, 4, 2, 2]], np.float32)
    np.testing.assert_array_equal(area(boxes), [6, 0, 0, 0])


def test_intersection_and_iou_count_pixels(rng):
    a, b = some_boxes(rng, 40), some_boxes(rng, 30)
    shared = [[shared_pixels(p, q) for q in b] for p in a]
    np.testing.assert_array_equal(intersection(a, b), shared)
    np.testing.assert_allclose(iou(a, b), [[float(exact_iou(p, q)) for q in b] for p in a], rtol=1e-6)


def test_iou_of_boxes_that_only_touch_and_of_empty_and_inverted_ones_is_0():
    box = np.array([[2, 2, 5, 5]], np.float32)
    others = [[5, 2, 8, 5], [2, 5, 5, 8], [5, 5, 6, 6], [3, 3, 3, 3], [4, 4, 3, 3]]
    np.testing.assert_array_equal(iou(box, np.array(others, np.float32)), np.zeros((1, 5)))
    empty = np.array([[3, 3, 3, 3]], np.float32)
    np.testing.assert_array_equal(iou(empty, empty), [[0]])


def test_iou_takes_either_side_without_boxes(rng):
    some, none = some_boxes(rng, 3), np.zeros((0, 4), np.float32)
    assert iou(some, none).shape == (3, 0)
    assert iou(none, some).shape == (0, 3)


def test_clip_limits_each_coordinate_and_leaves_its_argument(rng):
    boxes = rng.normal(20, 40, (50, 4)).astype(np.float32)
    before = boxes.copy()
    expected = [[min(max(v, 0), (30, 45)[i % 2]) for i, v in enumerate(box)] for box in boxes.tolist()]
    clipped = clip(boxes, width=30, height=45)
    assert clipped.dtype == np.float32
    np.testing.assert_allclose(clipped, expected, rtol=1e-6)
    np.testing.assert_array_equal(boxes, before)


@pytest.mark.parametrize("threshold", ["0", "0.2", "0.3", "0.5", "0.6", "0.7", "1"])
def test_suppression_equals_the_greedy_loop(rng, threshold):
    for count in (1, 2, 15, 60):
        for _ in range(5):
            # Small boxes: many pairs overlap by exactly the threshold. Few scores: many ties.
            boxes = some_boxes(rng, count, extent=int(rng.integers(3, 9)))
            scores = rng.integers(-3, 4, count).astype(np.float32)
            kept = nms(boxes, scores, float(threshold))
            assert kept.dtype == np.int64
            assert kept.tolist() == greedy(boxes, scores, Fraction(threshold))


@pytest.mark.parametrize("tenths", range(1, 10))
def test_an_overlap_of_just_the_threshold_is_kept(tenths):
    boxes = np.array([[0, 0, 10, 1], [0, 0, tenths, 1]], np.float32)
    scores = np.array([2, 1], np.float32)
    assert nms(boxes, scores, tenths / 10).tolist() == [0, 1]
    assert nms(boxes, scores, tenths / 10 - 0.001).tolist() == [0]


def test_suppression_of_ties_keeps_their_order():
    boxes = np.tile(np.array([[0, 0, 4, 4]], np.float32), (100, 1))
    apart = boxes + 10 * np.arange(100, dtype=np.float32)[:, None]
    scores = np.zeros(100, np.float32)
    assert nms(boxes, scores).tolist() == [0]
    assert nms(apart, scores).tolist() == list(range(100))


@pytest.mark.parametrize("threshold", ["0", "0.3", "0.7"])
def test_suppression_of_groups_is_that_of_each_alone(rng, threshold):
    for count in (0, 1, 40, 150):
        # Far beyond any image: what keeps groups apart must not change overlaps. Few scores: many ties.
        boxes = some_boxes(rng, count, extent=9).reshape(-1, 4) + np.float32(rng.integers(-5000, 5000))
        scores = rng.integers(-3, 4, count).astype(np.float32)
        groups = rng.choice([0, 1, 4, 30], count)
        kept = batched_nms(boxes, scores, groups, float(threshold))
        assert kept.dtype == np.int64
        alone = [
            rows[i]
            for rows in (np.flatnonzero(groups == g) for g in np.unique(groups))
            for i in greedy(boxes[rows], scores[rows], Fraction(threshold))
        ]
        assert kept.tolist() == sorted(alone, key=lambda i: (-scores[i], i))


def test_groups_do_not_suppress_each_other():
    boxes, scores = np.tile(np.float32([[0, 0, 8, 8]]), (6, 1)), np.float32([1, 3, 2, 1, 3, 2])
    groups = np.array([0, 1, 2, 2, 0, 1])
    assert batched_nms(boxes, scores, groups).tolist() == [1, 4, 2]
    assert batched_nms(boxes, scores, np.zeros(6, np.int64)).tolist() == [1]


@pytest.mark.parametrize("limit", [0, 1, 3, 100])
def test_no_more_than_the_best_few_are_kept(rng, limit):
    boxes = some_boxes(rng, 60, extent=9)
    scores, groups = rng.integers(-3, 4, 60).astype(np.float32), rng.choice([0, 2], 60)
    assert nms(boxes, scores, 0.3, limit).tolist() == nms(boxes, scores, 0.3)[:limit].tolist()
    every = batched_nms(boxes, scores, groups, 0.3)
    first = [i for n, i in enumerate(every) if (groups[every[:n]] == groups[i]).sum() < limit]
    assert batched_nms(boxes, scores, groups, 0.3, limit).tolist() == first


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.8])
def test_suppression_equals_that_of_torchvision(rng, threshold):
    corners, sides = rng.uniform(0, 400, (3000, 2)), rng.uniform(0, 200, (3000, 2))
    boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
    expected = torchvision.ops.nms(
        *map(torch.from_numpy, (boxes.astype(np.float64), -np.arange(3000.0))), threshold
    )
    assert nms(boxes, -np.arange(3000.0), threshold).tolist() == expected.tolist()


def test_suppression_of_nothing_is_nothing():
    boxes, scores = np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
    assert nms(boxes, scores).tolist() == []
    assert batched_nms(boxes, scores, np.zeros(0, np.int64)).tolist() == []


def test_target_of_lists():
    target = Target.of([[1, 2, 3, 4], [5, 6, 7, 8]], ["cat", "dog"], crowd=[False, True])
    assert target.boxes.dtype == np.float32
    assert target.boxes.shape == (2, 4)
    assert target.labels == ("cat", "dog")
    assert target.difficult.tolist() == [False, False]
    assert target.ignored.tolist() == [False, True]
    hard = Target.of([[1, 2, 3, 4]], ["cat"], difficult=[1])
    assert hard.difficult.dtype == bool
    assert hard.ignored.tolist() == [True]


def test_target_without_boxes():
    target = Target.of([], [])
    assert target.boxes.shape == (0, 4)
    assert target.labels == ()
    assert target.ignored.shape == (0,)


@pytest.mark.parametrize(
    ("labels", "difficult", "crowd", "lengths"),
    [
        (["cat"], None, None, "2, 1, 2 and 2"),
        (["cat", "cat"], [True], None, "2, 2, 1 and 2"),
        (["cat", "cat"], None, [True] * 3, "2, 2, 2 and 3"),
    ],
)
def test_target_of_lengths_that_disagree(labels, difficult, crowd, lengths):
    with pytest.raises(ValueError, match=f"must have one length, got {lengths}"):
        Target.of([[0, 0, 1, 1], [0, 0, 2, 2]], labels, difficult, crowd)


def test_target_of_one_name():
    with pytest.raises(SppnetError, match=r"^found the str 'cat' as labels, expected a class name"):
        Target.of([[0, 0, 1, 1]] * 3, "cat")


def test_detections_above_a_threshold_include_it():
    boxes = np.arange(12, dtype=np.float32).reshape(3, 4)
    detections = Detections(boxes, np.array([0.5, 0.25, -1], np.float32), ("a", "b", "a"))
    kept = detections.above(0.25)
    np.testing.assert_array_equal(kept.boxes, boxes[:2])
    assert kept.scores.tolist() == [0.5, 0.25]
    assert kept.labels == ("a", "b")
    none = detections.above(1)
    assert none.boxes.shape == (0, 4)
    assert none.labels == ()


@pytest.fixture
def found():
    boxes = np.array([[10, 20, 50, 60.5], [0, 0, 30, 30], [5, 5, 9, 9]], np.float32)
    return Detections(boxes, np.array([0.9, 0.25, -1.5], np.float32), ("<cow>", "dog", "<cow>"))


class TestDetectionsAsASequence:
    def test_items(self, found):
        assert len(found) == 3
        assert found[1] == Detection((0, 0, 30, 30), 0.25, "dog")
        assert found[-1] == found[2] == list(found)[2]
        assert [type(value) for value in found[0]] == [tuple, float, str]
        box, score, label = found[0]
        assert (box, label) == ((10, 20, 50, 60.5), "<cow>")
        assert score == pytest.approx(0.9)
        with pytest.raises(IndexError):
            found[3]

    @pytest.mark.parametrize(
        "index",
        [
            slice(1, None),
            slice(None, None, -1),
            slice(5, 9),
            [2, 0],
            [-1],
            [],
            np.array([0, 0, 1]),
            np.zeros(0, int),
            np.array([True, False, True]),
            [False, True, False],
            [False] * 3,
        ],
        ids=str,
    )
    def test_parts(self, found, index):
        numbers = (
            range(3)[index] if isinstance(index, slice) else np.asarray(index, None if len(index) else int)
        )
        rows = np.flatnonzero(numbers) if np.asarray(numbers).dtype == bool else numbers
        part = found[index]
        assert isinstance(part, Detections)
        assert list(part) == [list(found)[i] for i in rows]
        assert part.boxes.shape == (len(rows), 4)
        assert (part.boxes.dtype, part.scores.dtype) == (np.float32, np.float32)

    def test_nothing(self):
        none = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), ())
        assert (len(none), list(none), none.facts()) == (0, [], [])
        assert not none
        assert len(none[:1]) == 0
        assert len(none.to_pandas()) == 0
        assert len(none.to_supervision()) == 0
        assert "0 detections" in none._repr_html_()

    def test_a_mask_of_another_length(self, found):
        with pytest.raises(IndexError):
            found[np.array([True, False])]


class TestDetectionsElsewhere:
    def test_pandas(self, found):
        table = found.to_pandas()
        assert list(table.columns) == ["label", "score", "x1", "y1", "x2", "y2"]
        np.testing.assert_array_equal(table[["x1", "y1", "x2", "y2"]].to_numpy(), found.boxes)
        np.testing.assert_array_equal(table["score"].to_numpy(), found.scores)
        assert table["label"].tolist() == list(found.labels)
        assert table.groupby("label").size().to_dict() == {"<cow>": 2, "dog": 1}

    def test_supervision(self, found):
        supervision = pytest.importorskip("supervision")
        theirs = found.to_supervision()
        assert isinstance(theirs, supervision.Detections)
        np.testing.assert_array_equal(theirs.xyxy, found.boxes)
        np.testing.assert_array_equal(theirs.confidence, found.scores)
        assert theirs.class_id.tolist() == [0, 1, 0]
        assert theirs.data["class_name"].tolist() == list(found.labels)
        assert theirs[theirs.class_id == 1].xyxy.tolist() == [[0, 0, 30, 30]]
        assert found.to_supervision(("cat", "dog", "<cow>")).class_id.tolist() == [2, 1, 2]

    def test_a_label_that_is_no_class(self, found):
        pytest.importorskip("supervision")
        with pytest.raises(SppnetError, match=r"^found the label '<cow>', expected one of cat, dog$"):
            found.to_supervision(["cat", "dog"])

    @pytest.mark.parametrize("package", ["pandas", "supervision"])
    def test_what_is_not_installed_is_named(self, found, package, monkeypatch):
        monkeypatch.setattr("sppnet.errors.find_spec", lambda name: None)
        with pytest.raises(SppnetError, match=rf'needs {package}: pip install "sppnet\[{package}\]"$'):
            getattr(found, f"to_{package}")()

    def test_html(self, found):
        page = found._repr_html_()
        assert "<cow>" not in page
        for text in ("3 detections", "&lt;cow&gt;", "0.90", "0.25", "-1.50", "10, 20, 50, 60"):
            assert text in page
        assert page.count("<tr>") == 4
        assert "90 %" in found[:2]._repr_html_()
        many = Detections(np.zeros((60, 4), np.float32), np.zeros(60, np.float32), ("a",) * 60)
        assert "and 10 more" in many._repr_html_()
        assert "1 detection<" in found[:1]._repr_html_()
