import numpy as np
import pytest

from sppnet.boxes import area, intersection
from sppnet.drawing.labels import place_labels

NONE = np.zeros((0, 4))


def boxes(*rows):
    return np.array(rows, np.float32).reshape(-1, 4)


def test_a_label_stands_above_its_box():
    (placed,) = place_labels(boxes((30, 50, 90, 90)), [[(40, 12)]], (200, 150), NONE)
    assert placed.form == 0
    assert placed.box.tolist() == [30, 38, 70, 50]


def test_at_the_upper_border_it_goes_below():
    (placed,) = place_labels(boxes((30, 0, 90, 60)), [[(40, 12)]], (200, 150), NONE)
    assert placed.box.tolist() == [30, 60, 70, 72]


def test_it_avoids_another_object_above():
    found = place_labels(boxes((30, 50, 90, 90), (20, 20, 100, 48)), [[(40, 12)]] * 2, (200, 150), NONE)
    assert found[0].box.tolist() == [30, 90, 70, 102]
    assert found[1].box.tolist() == [20, 8, 60, 20]


def test_on_a_large_object_it_stays_in_its_usual_place():
    found = place_labels(
        boxes((300, 500, 390, 590), (0, 0, 1000, 1000)), [[(40, 12)]] * 2, (1000, 1000), NONE
    )
    assert found[0].box.tolist() == [300, 488, 340, 500]


def test_what_is_taken_stays_free_and_shorter_forms_are_tried():
    box = boxes((0, 0, 50, 30))
    assert place_labels(box, [[(60, 12)]], (50, 30), NONE) == [None], "wider than the picture"
    (placed,) = place_labels(box, [[(60, 12), (20, 12)]], (50, 30), NONE)
    assert placed.form == 1
    assert place_labels(box, [[(20, 12)]], (50, 30), np.array([[0, 0, 50, 30]])) == [None]
    assert place_labels(box, [[]], (50, 30), NONE) == [None]
    assert place_labels(boxes(), [], (50, 30), NONE) == []


@pytest.mark.parametrize("seed", range(5))
def test_labels_lie_inside_and_hide_no_other(seed):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-20, 300, (40, 2))
    some = np.concatenate([corner, corner + rng.uniform(5, 120, (40, 2))], axis=1).astype(np.float32)
    forms = [[(w, 12), (20, 12)] for w in rng.uniform(30, 90, 40)]
    taken = np.array([[0, 200, 80, 240]])
    found = place_labels(some, forms, (320, 240), taken)
    places = np.array([p.box for p in found if p is not None])
    assert len(places) > 15
    assert (places[:, :2] >= 0).all()
    assert (places[:, 2:] <= [320, 240]).all()
    both = np.concatenate([places, taken])
    shared = intersection(both, both) - np.diag(area(both))
    assert shared.max() <= 0.011 * area(places).max()
    for placed, sizes in zip(found, forms, strict=True):
        if placed is not None:
            np.testing.assert_allclose(placed.box[2:] - placed.box[:2], sizes[placed.form])
    # The same again, and the first as if there were no others after it.
    again = place_labels(some, forms, (320, 240), taken)
    assert [p and p.box.tolist() for p in again] == [p and p.box.tolist() for p in found]
