from dataclasses import replace

import numpy as np
import pytest

from sppnet.boxes import Detections, Target
from sppnet.datasets.records import Sample
from sppnet.detection.augmented import FUSED_IOU, Augmented, fused, turned, views
from sppnet.detection.detector import Detector
from sppnet.errors import SppnetError
from sppnet.images import pixels_of
from sppnet.photos import demo_photo


def overlap(a, b):
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return shared / (sum(areas) - shared) if sum(areas) > shared else 0.0


@pytest.fixture(scope="module")
def animals():
    return Detector.load("animals")


@pytest.fixture(scope="module")
def photo():
    return pixels_of(demo_photo())[:, :400]


def naive(looks, count):
    """Fuse detections of one class by plain loops: (box, probability) after falling probability."""
    left = [(box, 1 / (1 + np.exp(-2 * score)), i) for i, f in enumerate(looks) for box, score, _ in f]
    left.sort(key=lambda item: -item[1])
    found = []
    while left:
        first, group = left.pop(0), []
        for i in range(count):
            near = [x for x in left if x[2] == i != first[2] and overlap(x[0], first[0]) > FUSED_IOU]
            if near:
                group.append(max(near, key=lambda x: overlap(x[0], first[0]) * x[1]))
        left = [x for x in left if not any(x is y for y in group)]
        group.append(first)
        total = sum(chance for _, chance, _ in group)
        place = sum(np.array(box) * chance for box, chance, _ in group) / total
        found.append((place, total / count))
    return sorted(found, key=lambda item: -item[1])


@pytest.mark.parametrize("seed", range(4))
def test_looks_are_fused_as_by_plain_loops(seed):
    rng, looks = np.random.default_rng(seed), []
    for count in (12, 0, 7, 9):
        corner = rng.uniform(0, 60, (count, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(25, 40, (count, 2))], axis=1).astype(np.float32)
        looks.append(Detections(boxes, rng.normal(size=count).astype(np.float32), ("cow",) * count))
    found, expected = fused(looks, 100), naive(looks, 4)
    assert len(found) == len(expected) < 28
    for (box, score, _), (place, chance) in zip(found, expected, strict=True):
        np.testing.assert_allclose(box, place, rtol=1e-4)
        np.testing.assert_allclose(1 / (1 + np.exp(-2 * score)), chance, rtol=1e-4)


def test_classes_are_fused_apart_and_limited():
    boxes = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], np.float32)
    one = Detections(boxes, np.array([3.0, 2, 1], np.float32), ("cow", "cow", "cow"))
    other = Detections(boxes[:1], np.array([2.5], np.float32), ("dog",))
    found = fused([one, other], 2)
    assert found.labels == ("cow", "dog", "cow")
    np.testing.assert_array_equal(found.boxes, boxes[[0, 0, 1]])


def test_nothing_found_is_nothing_fused():
    none = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), ())
    assert len(fused([none] * 4, 100)) == 0


def test_what_is_found_in_a_flipped_view_lies_where_it_is(animals, photo):
    found = animals.predict(np.ascontiguousarray(photo[:, ::-1]))
    back = turned(found, photo.shape[1])
    for (x1, y1, x2, y2), (a1, b1, a2, b2) in zip(found.boxes, back.boxes, strict=True):
        assert (a1, b1, a2, b2) == (400 - x2, y1, 400 - x1, y2)
    assert [(view.shape, side, flipped) for view, side, flipped in views(photo, 256)] == [
        (photo.shape, 256, False),
        (photo.shape, 256, True),
        (photo.shape, 320, False),
        (photo.shape, 320, True),
    ]


def test_augmented_detections_are_the_fused_looks(animals, photo):
    looks = []
    for view, side, flipped in views(photo, animals.fitted_.side):
        encoded = animals.fitted_.backbone.encode(view, (side,))
        found = animals.predict(encoded, threshold=0.0, scores="svm")
        looks.append(turned(found, 400) if flipped else found)
    expected, found = fused(looks, 100), Augmented(animals).predict(photo, threshold=0.0, scores="svm")
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    assert found.labels == expected.labels


def test_looking_again_finds_what_a_single_look_finds(animals, photo):
    once = animals.predict(photo)
    again = Augmented(animals).predict(photo)
    for box, _, label in once:
        assert any(overlap(box, other) > 0.6 and label == name for other, _, name in again)
    height, width = photo.shape[:2]
    assert (again.boxes >= 0).all()
    assert (again.boxes <= [width, height, width, height]).all()


def test_only_the_networks_own_windows_are_looked_at_again(animals, photo):
    again = Augmented(animals)
    with pytest.raises(SppnetError, match="found windows, expected none"):
        again.predict(photo, np.zeros((1, 4), np.float32))
    with pytest.raises(SppnetError, match="found the proposals 'dense'"):
        again.predict(photo, proposals="dense")
    with pytest.raises(SppnetError, match="found the proposals 'dense'"):
        again.stream([photo], proposals="dense")
    other = Detector()
    other.fitted_ = replace(animals.fitted_, side=None)
    with pytest.raises(SppnetError, match="found a detector with windows of another source"):
        Augmented(other)


def test_many_images_and_the_measure_are_those_of_single_ones(animals, photo):
    again = Augmented(animals)
    one = again.predict(photo, threshold=0.3)
    ((_, streamed),) = again.stream([photo], threshold=0.3)
    np.testing.assert_array_equal(streamed.boxes, one.boxes)
    sample = Sample("a", photo, Target.of(one.boxes, one.labels))
    assert again.evaluate([sample]).mean_ap > 0.99
    assert again.seen([sample]) == 0
