import numpy as np
import pytest

from sppnet.boxes import Target
from sppnet.rpn.pictures import SIDES, Photo, Pictures, canvas, kept_photo, on_disk, side_for, standardised
from sppnet.rpn.settings import Joint


def photo(height=90, width=140, box=(30, 20, 80, 60), colour=(250, 10, 10), kind=0):
    """A grey photo with a coloured box."""
    pixels = np.full((height, width, 3), 100, np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = colour
    return Photo(pixels, np.array([box], np.float32), np.array([kind]))


def coloured(pixels):
    """The smallest box about what is red."""
    red = pixels[..., 0].astype(int) - pixels[..., 1] > 60
    y, x = np.nonzero(red)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) if len(x) else None


@pytest.mark.parametrize("seed", range(40))
def test_boxes_stay_about_what_they_were_drawn_about(seed):
    pictures = Pictures([photo()], 96, Joint(jitter=(0.4, 2.0)))
    drawn = pictures.draw(np.random.default_rng(seed), mosaics=False)
    assert drawn.pixels.shape == (canvas(96), canvas(96), 3)
    seen = coloured(drawn.pixels)
    if len(drawn.boxes):
        np.testing.assert_allclose(drawn.boxes[0], seen, rtol=0, atol=2)
    elif seen is not None:
        # Too little of it is seen to count.
        assert (seen[2:] - seen[:2]).prod() < 0.45 * 50 * 40 * 4


@pytest.mark.parametrize("seed", range(20))
def test_a_mosaic_has_four_photos_and_all_their_boxes_inside(seed):
    pictures = Pictures([photo(), photo(kind=-1)], 96, Joint(mosaic=1))
    drawn = pictures.draw(np.random.default_rng(seed), mosaics=True)
    size = canvas(96)
    assert (drawn.boxes >= 0).all()
    assert (drawn.boxes <= size).all()
    assert len(drawn.boxes) == len(drawn.kinds) <= 4
    for box in drawn.boxes.round().astype(int):
        inside = drawn.pixels[box[1] + 3 : box[3] - 3, box[0] + 3 : box[2] - 3].astype(int)
        if inside.size:
            assert (inside[..., 0] - inside[..., 1] > 40).mean() > 0.9


def test_pictures_are_those_of_the_seed():
    pictures = Pictures([photo(), photo(60, 60, (5, 5, 20, 20))], 64, Joint())
    one, other = (pictures.draw(np.random.default_rng(5), True) for _ in range(2))
    np.testing.assert_array_equal(one.pixels, other.pixels)
    np.testing.assert_array_equal(one.boxes, other.boxes)


def test_photos_of_one_pixel_and_strips_can_be_drawn():
    empty = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    odd = [Photo(np.zeros(shape, np.uint8), *empty) for shape in ((1, 1, 3), (3, 900, 3), (700, 2, 3))]
    pictures = Pictures(odd, 64, Joint())
    for seed in range(30):
        assert pictures.draw(np.random.default_rng(seed), True).boxes.shape == (0, 4)


def test_difficult_objects_and_other_classes_are_ignored_not_background():
    target = Target.of(
        [[0, 0, 4, 4], [4, 4, 8, 8], [8, 8, 12, 12]], ["cat", "cat", "cup"], difficult=[False, True, False]
    )
    kept = kept_photo(np.zeros((20, 20, 3), np.uint8), target, ("dog", "cat"))
    assert kept.kinds.tolist() == [1, -1, -1]
    np.testing.assert_array_equal(kept.boxes, target.boxes)


def test_large_photos_are_kept_smaller_with_their_boxes():
    target = Target.of([[100, 200, 900, 1000]], ["cat"])
    kept = kept_photo(np.zeros((2000, 3000, 3), np.uint8), target, ("cat",))
    assert kept.pixels.shape == (SIDES[-1], SIDES[-1] * 3 // 2, 3)
    np.testing.assert_allclose(kept.boxes, target.boxes * SIDES[-1] / 2000, rtol=1e-5)


@pytest.mark.parametrize(("share", "side"), [(0.5, 256), (0.08, 320), (0.05, 512), (0.01, 640)])
def test_small_objects_ask_for_larger_pictures(share, side):
    box = [[0, 0, share * 1000, share * 1000]]
    targets = [Target.of(box * 5, ["a"] * 5)]
    assert side_for([(1000, 1400)], targets) == side


def test_photos_without_objects_take_the_smallest_side():
    assert side_for([(10, 10)], [Target.of([], [])]) == SIDES[0]


def test_standardised_pixels_are_what_the_network_takes():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3)).astype(np.uint8)
    values = standardised(list(pixels), (1.0, 2.0, 3.0), (2.0, 4.0, 8.0))
    np.testing.assert_allclose(values[1, 2], (pixels[1, ..., 2] - 3.0) / 8)


def test_photos_on_disk_are_the_same_ones_and_outlive_their_file(tmp_path):
    rng = np.random.default_rng(0)
    photos = [
        photo()._replace(pixels=rng.integers(0, 256, (h, w, 3)).astype(np.uint8))
        for h, w in ((5, 7), (1, 1), (30, 2))
    ]
    with (tmp_path / "photos").open("w+b") as file:
        kept = on_disk(iter(photos), file)
    for one, other in zip(kept, photos, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)
        np.testing.assert_array_equal(one.boxes, other.boxes)
        assert one.pixels.base is not None  # a part of what is mapped


def test_no_photos_are_none_on_disk(tmp_path):
    with (tmp_path / "photos").open("w+b") as file:
        assert on_disk([], file) == []
