import numpy as np
import pytest

import trees
from sppnet.features.cache import MapCache
from sppnet.features.encoded import EncodedImage, FeatureMaps
from sppnet.features.geometry import Geometry
from sppnet.images import pixels_of
from sppnet.progress import StageTimer


class Squares:
    """A backbone of arithmetic: two maps, the mean colour of squares of 8 and of 16 pixels."""

    geometry = (Geometry(8, 3.5), Geometry(16, 7.5))

    def __init__(self, signature="squares"):
        self.signature, self.calls, self.device = signature, 0, "cpu"

    def __call__(self, image, side):
        self.calls += 1
        maps = []
        for size in (8, 16):
            h, w = image.shape[0] // size, image.shape[1] // size
            tiles = image[: h * size, : w * size].reshape(h, size, w, size, 3)
            maps.append(tiles.mean(axis=(1, 3), dtype=np.float64).astype(np.float32).transpose(2, 0, 1) / 7)
        return FeatureMaps(tuple(maps), self.geometry, (side / 96, side / 97), side)

    def encode(self, image, scales):
        pixels = pixels_of(image)
        return EncodedImage(pixels.shape[:2], tuple(self(pixels, side) for side in scales))


@pytest.fixture
def image():
    return trees.scene(1).image


def same(a, b):
    assert a.size == b.size == (96, 128)
    for p, q in zip(a.scales, b.scales, strict=True):
        assert (p.geometry, p.factors, p.side) == (q.geometry, q.factors, q.side)
        assert len(p.stages) == len(q.stages)
        for s, t in zip(p.stages, q.stages, strict=True):
            assert s.dtype == t.dtype == np.float32
            assert np.array_equal(s, t)
    return True


def test_maps_come_back_from_the_disk_as_they_were_given(tmp_path, image):
    backbone, timer = Squares(), StageTimer()
    cache = MapCache(tmp_path / "deep" / "cache", backbone, (96, 192))
    given = cache(image, timer)
    assert backbone.calls == 2
    again = MapCache(tmp_path / "deep" / "cache", backbone, (96, 192))(image, timer)
    assert backbone.calls == 2
    assert same(given, again)
    assert set(timer.seconds) == {"backbone", "maps to cache", "maps from cache"}
    # Half precision keeps three digits, and the layout that pooling is fast on.
    for a, b in zip(again.scales, backbone.encode(image, (96, 192)).scales, strict=True):
        for s, t in zip(a.stages, b.stages, strict=True):
            np.testing.assert_allclose(s, t, rtol=1e-3)
            assert s.strides[0] == 4


def test_a_file_and_its_pixels_give_the_same_maps(tmp_path, image):
    trees.save(tmp_path / "a.png", image)
    cache = MapCache(tmp_path / "cache", Squares(), (96,))
    from_file = cache(tmp_path / "a.png", StageTimer())
    from_pixels = cache(image, StageTimer())
    assert same(from_file, from_pixels)


def test_the_same_file_elsewhere_is_the_same_entry(tmp_path, image):
    backbone = Squares()
    cache = MapCache(tmp_path / "cache", backbone, (96,))
    for name in ("a.png", "b.png"):
        trees.save(tmp_path / name, image)
        cache(tmp_path / name, StageTimer())
    assert backbone.calls == 1
    trees.save(tmp_path / "a.png", trees.scene(2).image)  # new content under an old name
    cache(tmp_path / "a.png", StageTimer())
    assert backbone.calls == 2


def test_entries_differ_by_image_backbone_and_scales(tmp_path, image):
    other = image.copy()
    other[0, 0, 0] += 1
    turned = image.reshape(128, 96, 3)  # the same bytes
    backbones = Squares(), Squares("circles")
    count = 0
    for pixels in (image, other, turned):
        for backbone in backbones:
            for scales in [(96,), (128,), (96, 128), (128, 96)]:
                MapCache(tmp_path, backbone, scales)(pixels, StageTimer())
                count += 1
                assert len(list(tmp_path.iterdir())) == count


@pytest.mark.parametrize("damage", ["half", "empty", "text", "other"])
def test_a_damaged_entry_is_computed_again(tmp_path, image, damage):
    backbone = Squares()
    cache = MapCache(tmp_path, backbone, (96, 192))
    given = cache(image, StageTimer())
    (entry,) = tmp_path.iterdir()
    content = entry.read_bytes()
    if damage == "other":
        # A sound file, but of one scale and stage too few.
        class One(Squares):
            geometry = Squares.geometry[:1]

            def __call__(self, image, side):
                maps = super().__call__(image, side)
                return FeatureMaps(maps.stages[:1], self.geometry, maps.factors, side)

        MapCache(tmp_path / "one", One(), (96,))(image, StageTimer())
        (wrong,) = (tmp_path / "one").iterdir()
        content = wrong.read_bytes()
    else:
        content = {"half": content[: len(content) // 2], "empty": b"", "text": b"no maps here"}[damage]
    entry.write_bytes(content)
    again = cache(image, StageTimer())
    assert backbone.calls == 4
    assert same(given, again)
    cache(image, StageTimer())
    assert backbone.calls == 4, "the entry is sound again"


def test_a_failed_encoding_leaves_no_entry(tmp_path, image):
    class Failing(Squares):
        def __call__(self, image, side):
            raise ValueError("no maps")

    with pytest.raises(ValueError, match="no maps"):
        MapCache(tmp_path, Failing(), (96,))(image, StageTimer())
    assert list(tmp_path.iterdir()) == []


def test_no_more_entries_are_kept_than_the_limit(tmp_path):
    backbone, images = Squares(), [trees.scene(i).image for i in range(3)]
    cache = MapCache(tmp_path, backbone, (96,), limit=2)
    given = [cache(image, StageTimer()) for image in images]
    assert len(list(tmp_path.iterdir())) == 2
    assert same(cache(images[2], StageTimer()), given[2])
    assert backbone.calls == 4
    cache.remove([cache.name(images[0]), "none of that name"])
    cache(images[2], StageTimer())
    assert {path.stem for path in tmp_path.iterdir()} == {cache.name(image) for image in images[1:]}
