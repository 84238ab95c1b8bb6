import numpy as np
import pytest

from sppnet.classification.augment import (
    central_crop,
    colour_components,
    random_crop,
    resize_shorter,
    shift_colours,
)
from sppnet.images import resize

# Views of 28 x 28 lie in images whose shorter side is 28 * 256 / 224 = 32.
CROP, SIDE = 28, 32


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def views(image, size):
    """Return the centre and the four corners."""
    height, width = image.shape[:2]
    bottom, right = height - size, width - size
    places = [(bottom // 2, right // 2), (0, 0), (0, right), (bottom, 0), (bottom, right)]
    return [image[y : y + size, x : x + size] for y, x in places]


def both_ways(pictures):
    return [way for picture in pictures for way in (picture, picture[:, ::-1])]


def which(image, candidates):
    """Return which of the candidates an image equals."""
    (place,) = [i for i, candidate in enumerate(candidates) if np.array_equal(candidate, image)]
    return place


class TestColourComponents:
    def images(self, rng):
        """Return images of 32 x 32, which need no resizing, whose colours vary most along (3, 2, 1)."""
        strength = rng.normal(size=(2, 32, 32, 1))
        pictures = 120 + strength * np.array([30, 20, 10]) + rng.normal(scale=4, size=(2, 32, 32, 3))
        return np.clip(pictures, 0, 255).astype(np.uint8)

    def test_they_are_eigenvectors_as_long_as_their_deviation(self, rng):
        images = self.images(rng)
        found = colour_components(images)
        pixels = images.reshape(-1, 3).astype(float)
        centred = pixels - pixels.mean(axis=0)
        covariance = centred.T @ centred / (len(pixels) - 1)
        np.testing.assert_allclose(found @ found.T, covariance)
        products = found.T @ found
        np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-9 * products.max())
        for column in found.T:
            np.testing.assert_allclose(covariance @ column, column @ column * column, rtol=1e-6, atol=1e-6)
            assert column[np.abs(column).argmax()] > 0
        main = found[:, np.diag(products).argmax()]
        np.testing.assert_allclose(main / main[2], [3, 2, 1], atol=0.2)

    def test_images_of_all_sizes_count_alike(self, rng):
        images = self.images(rng)
        larger = [np.kron(image, np.ones((1 + i, 1 + i, 1), np.uint8)) for i, image in enumerate(images)]
        found = colour_components(iter(larger))
        expected = colour_components([resize(image, 32, 32) for image in larger])
        np.testing.assert_array_equal(found, expected)

    def test_one_colour(self):
        assert np.abs(colour_components([np.full((5, 9, 3), 77, np.uint8)])).max() == 0


class TestShift:
    @pytest.mark.parametrize("strength", [1, 10, 300])
    def test_it_equals_a_shift_of_floats_that_ends_at_black_and_white(self, strength):
        image = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3)
        components = strength * np.array([[20.0, -3, 1], [15, 5, -40], [0, 70, 2]])
        for seed in range(20):
            found = shift_colours(image, components, np.random.default_rng(seed))
            multiples = np.random.default_rng(seed).normal(size=3) / 10
            shift = (components * multiples).sum(axis=1)
            assert (np.abs(shift % 1 - 0.5) > 1e-3).all()  # Nothing here is rounded by a hair.
            assert found.dtype == np.uint8
            np.testing.assert_array_equal(found, np.clip(np.round(image + shift), 0, 255))
            assert set(np.unique(found)) & {0, 255}

    def test_no_components_mean_no_shift(self, rng):
        assert np.array_equal(shift_colours(noise(4, 5), np.zeros((3, 3)), rng), noise(4, 5))

    def test_multiples_have_a_deviation_of_a_tenth(self, rng):
        image = np.full((1, 1, 3), 128, np.uint8)
        shifts = (
            np.array([shift_colours(image, np.diag([100.0] * 3), rng)[0, 0] for _ in range(2000)]) - 128.0
        )
        assert np.abs(shifts.mean(axis=0)).max() < 1
        np.testing.assert_allclose(shifts.std(axis=0), 10, rtol=0.08)
        assert np.abs(np.corrcoef(shifts.T) - np.eye(3)).max() < 0.1


class TestRandomCrop:
    @pytest.mark.parametrize("shape", [(SIDE, 45), (51, SIDE), (SIDE, SIDE)])
    def test_it_is_one_of_five_views_either_way(self, rng, shape):
        image = noise(*shape)
        candidates = both_ways(views(image, CROP))
        places = [which(random_crop(image, CROP, CROP, None, rng), candidates) for _ in range(400)]
        counts = np.bincount(places, minlength=10)
        assert counts.min() > 15  # 40 expected, deviation 6.
        assert counts.max() < 70

    def test_the_shorter_side_is_resized_first(self, rng):
        image = noise(100, 60)
        candidates = both_ways(views(resize(image, 54, SIDE), CROP))  # 100 * 32 / 60, rounded up.
        assert len({which(random_crop(image, CROP, CROP, None, rng), candidates) for _ in range(30)}) > 5

    def test_another_size_shows_the_same_crop(self):
        image = noise(SIDE, 45)
        small = both_ways([resize(view, 20, 20) for view in views(image, CROP)])
        large = both_ways(views(image, CROP))
        for seed in range(30):
            one = random_crop(image, CROP, 20, None, np.random.default_rng(seed))
            other = random_crop(image, CROP, CROP, None, np.random.default_rng(seed))
            assert one.shape == (20, 20, 3)
            assert which(one, small) == which(other, large)

    def test_colours_change_after_the_crop(self):
        image = noise(SIDE, 45)
        components = np.diag([100.0, 50, 20])
        for seed in range(10):
            rng = np.random.default_rng(seed)
            plain = random_crop(image, CROP, CROP, None, rng)
            expected = shift_colours(plain, components, rng)
            found = random_crop(image, CROP, CROP, components, np.random.default_rng(seed))
            assert np.array_equal(found, expected)
            assert not np.array_equal(found, plain)

    def test_a_seed_determines_every_pixel(self):
        image, components = noise(40, 50), np.diag([100.0, 50, 20])

        def make(seed):
            return random_crop(image, CROP, 20, components, np.random.default_rng(seed))

        pictures = [make(seed) for seed in range(5)]
        for seed, picture in enumerate(pictures):
            assert np.array_equal(make(seed), picture)
        assert len({picture.tobytes() for picture in pictures}) == 5
        assert all(picture.flags.c_contiguous for picture in pictures)

    def test_the_image_stays_as_it_is(self, rng):
        image = noise(SIDE, 45)
        for _ in range(5):
            random_crop(image, CROP, CROP, np.eye(3) * 300, rng)
        assert np.array_equal(image, noise(SIDE, 45))


def test_a_crop_is_flipped_half_the_time(rng):
    image = noise(SIDE, 45)
    candidates = both_ways(views(image, CROP))
    ways = [which(random_crop(image, CROP, CROP, None, rng), candidates) % 2 for _ in range(100)]
    assert 30 < sum(ways) < 70


@pytest.mark.parametrize(
    ("shape", "resized"), [((SIDE, 45), (32, 45)), ((90, 60), (48, 32)), ((20, 20), (32, 32))]
)
def test_central_crop(shape, resized):
    image = noise(*shape)
    assert np.array_equal(central_crop(image, CROP), views(resize(image, *resized), CROP)[0])


def test_resizing_to_the_same_size_keeps_the_pixels():
    image = noise(20, 33)
    assert np.array_equal(resize_shorter(image, 20), image)
    assert resize_shorter(image, 10).shape == (10, 17, 3)
