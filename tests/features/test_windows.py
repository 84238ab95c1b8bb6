import numpy as np
import pytest
import torch

import trees
from sppnet.features.geometry import FeatureMaps, Geometry, choose_scale, project, responses
from sppnet.features.windows import MapCache, encode, first_responses, pool_windows
from sppnet.pooling import pool_regions
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
            maps.append(
                torch.from_numpy(tiles.mean(axis=(1, 3), dtype=np.float64)).float().permute(2, 0, 1) / 7
            )
        return FeatureMaps(tuple(maps), self.geometry, (side / 96, side / 97))


@pytest.fixture
def image():
    return trees.scene(1).image


def same(a, b):
    assert len(a) == len(b)
    for p, q in zip(a, b, strict=True):
        assert (p.geometry, p.factors) == (q.geometry, q.factors)
        assert len(p.stages) == len(q.stages)
        for s, t in zip(p.stages, q.stages, strict=True):
            assert s.dtype == t.dtype == torch.float32
            assert torch.equal(s, t)
    return True


def test_encoding_gives_maps_of_every_side(image):
    backbone = Squares()
    maps = encode(backbone, image, (96, 200))
    assert [m.factors for m in maps] == [(1, 96 / 97), (200 / 96, 200 / 97)]
    assert backbone.calls == 2


def test_maps_come_back_from_the_disk_as_they_were_given(tmp_path, image):
    backbone, timer = Squares(), StageTimer()
    cache = MapCache(tmp_path / "deep" / "cache", backbone, (96, 192))
    given, shape = cache(image, timer)
    assert backbone.calls == 2
    again, same_shape = MapCache(tmp_path / "deep" / "cache", backbone, (96, 192))(image, timer)
    assert backbone.calls == 2
    assert shape == same_shape == (96, 128)
    assert same(given, again)
    assert set(timer.seconds) == {"backbone", "maps to cache", "maps from cache"}
    # Half precision keeps three digits, and the layout that pooling is fast on.
    for a, b in zip(again, encode(backbone, image, (96, 192)), strict=True):
        for s, t in zip(a.stages, b.stages, strict=True):
            torch.testing.assert_close(s, t, rtol=1e-3, atol=0)
            assert s.stride(0) == 1


def test_a_file_and_its_pixels_give_the_same_maps(tmp_path, image):
    trees.save(tmp_path / "a.png", image)
    cache = MapCache(tmp_path / "cache", Squares(), (96,))
    from_file, shape = cache(tmp_path / "a.png", StageTimer())
    from_pixels, other = cache(image, StageTimer())
    assert shape == other
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


def test_entries_differ_by_image_backbone_and_sides(tmp_path, image):
    other = image.copy()
    other[0, 0, 0] += 1
    turned = image.reshape(128, 96, 3)  # the same bytes
    backbones = Squares(), Squares("circles")
    count = 0
    for pixels in (image, other, turned):
        for backbone in backbones:
            for sides in [(96,), (128,), (96, 128), (128, 96)]:
                MapCache(tmp_path, backbone, sides)(pixels, StageTimer())
                count += 1
                assert len(list(tmp_path.iterdir())) == count


@pytest.mark.parametrize("damage", ["half", "empty", "text", "other"])
def test_a_damaged_entry_is_computed_again(tmp_path, image, damage):
    backbone = Squares()
    cache = MapCache(tmp_path, backbone, (96, 192))
    given, _ = cache(image, StageTimer())
    (entry,) = tmp_path.iterdir()
    content = entry.read_bytes()
    if damage == "other":
        # A sound file, but of one side and stage too few.
        class One(Squares):
            geometry = Squares.geometry[:1]

            def __call__(self, image, side):
                maps = super().__call__(image, side)
                return FeatureMaps(maps.stages[:1], self.geometry, maps.factors)

        MapCache(tmp_path / "one", One(), (96,))(image, StageTimer())
        (wrong,) = (tmp_path / "one").iterdir()
        content = wrong.read_bytes()
    else:
        content = {"half": content[: len(content) // 2], "empty": b"", "text": b"no maps here"}[damage]
    entry.write_bytes(content)
    again, shape = cache(image, StageTimer())
    assert backbone.calls == 4
    assert shape == (96, 128)
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


def some_maps(rng, scale, channels=(3, 5)):
    """Return maps of two stages of an image of 96 x 128 at a scale."""
    geometry = (Geometry(8, 3.5), Geometry(16, 15))
    height, width = round(96 * scale), round(128 * scale)
    stages = tuple(
        torch.from_numpy(rng.normal(size=(c, g.cells(height), g.cells(width))).astype(np.float32))
        for c, g in zip(channels, geometry, strict=True)
    )
    return FeatureMaps(stages, geometry, (scale, scale))


def some_boxes():
    """Return squares of four sizes all over an image of 96 x 128."""
    sides = (24, 32, 42, 54)
    places = [(x, y, s) for s in sides for y in range(0, 97 - s, 8) for x in range(0, 129 - s, 8)]
    return np.array([(x, y, x + s, y + s) for x, y, s in places], np.float32)


def test_stages_are_pooled_one_by_one_and_joined():
    rng = np.random.default_rng(0)
    maps = [some_maps(rng, 1.0), some_maps(rng, 2.0)]
    sides, levels, boxes = (96, 192), (3, 1), some_boxes()
    joined = pool_windows(maps, boxes, (96, 128), sides, levels, 64)
    assert joined.shape == (len(boxes), (3 + 5) * 10)
    for t, part in enumerate(joined.split([30, 50], dim=1)):
        single = [FeatureMaps(m.stages[t : t + 1], m.geometry[t : t + 1], m.factors) for m in maps]
        assert torch.equal(part, pool_windows(single, boxes, (96, 128), sides, levels, 64))


def test_each_window_is_pooled_at_its_own_scale():
    rng = np.random.default_rng(0)
    maps, sides, boxes = [some_maps(rng, s) for s in (2.0, 0.5, 1.0)], (192, 48, 96), some_boxes()
    pooled = pool_windows(maps, boxes, (96, 128), sides, (2, 1), reference=40)
    scales = choose_scale(boxes, 96, 128, sides, 40)
    assert set(scales) == {0, 1, 2}
    for i, (box, s) in enumerate(zip(boxes, scales, strict=True)):
        alone = [pool_regions(maps[s].stages[t], project(box[None], maps[s], t), (2, 1))[0] for t in (0, 1)]
        assert torch.equal(pooled[i], torch.cat(alone))
    assert pool_windows(maps, boxes[:0], (96, 128), sides, (2, 1)).shape == (0, 8 * 5)


@pytest.mark.parametrize(
    ("projection", "scale_rule"), [("paper", "released"), ("released", "paper"), ("paper", "paper")]
)
def test_windows_are_pooled_by_the_rules_asked_for(projection, scale_rule):
    rng = np.random.default_rng(0)
    maps, sides = [some_maps(rng, s) for s in (4.0, 2.0)], (700, 600)
    boxes = some_boxes()  # of those of 32 pixels the rules choose other scales
    boxes += rng.uniform(0, 1, boxes.shape).astype(np.float32)
    shape, rules = (96, 128), {"projection": projection, "scale_rule": scale_rule}
    pooled = pool_windows(maps, boxes, shape, sides, (2, 1), **rules)
    for i, (box, s) in enumerate(
        zip(boxes, choose_scale(boxes, *shape, sides, None, scale_rule), strict=True)
    ):
        cells = [project(box[None], maps[s], t, projection) for t in (0, 1)]
        alone = [pool_regions(maps[s].stages[t], cells[t], (2, 1))[0] for t in (0, 1)]
        assert torch.equal(pooled[i], torch.cat(alone))
    assert not torch.equal(pooled, pool_windows(maps, boxes, shape, sides, (2, 1)))
    with pytest.raises(ValueError, match=r"found the .* 'other', expected one of released, paper"):
        pool_windows(maps, boxes, shape, sides, (2, 1), **{next(iter(rules)): "other"})


@pytest.mark.parametrize("projection", ["released", "paper"])
@pytest.mark.parametrize("scale_rule", ["released", "paper"])
def test_the_first_of_equal_responses_by_a_look_at_each(projection, scale_rule):
    rng = np.random.default_rng(0)
    maps, sides, shape = [some_maps(rng, s) for s in (2.0, 1.0)], (192, 96), (96, 128)
    corners = rng.uniform(-10, 70, (100, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(40, 90, (100, 2))], axis=1)
    boxes = (np.tile(boxes, (4, 1)) + rng.uniform(0, 0.3, (400, 4))).astype(np.float32)
    rules = (90, projection, scale_rule)
    scale = choose_scale(boxes, *shape, sides, 90, scale_rule)
    seen, expected = set(), []
    for i, s in enumerate(scale):
        response = (s, *responses(boxes[i : i + 1], maps[s], projection)[0])
        if response not in seen:
            expected.append(i)
        seen.add(response)
    first = first_responses(maps, boxes, shape, sides, *rules)
    assert first.dtype == np.int64
    assert first.tolist() == expected
    assert 100 < len(first) < 300
    assert len({scale[i] for i in first}) == 2
    # All others have the vector of an earlier one.
    pooled = pool_windows(maps, boxes, shape, sides, (2, 1), 90, "max", projection, scale_rule)
    kept = {row.numpy().tobytes() for row in pooled[first]}
    assert all(row.numpy().tobytes() in kept for row in pooled)
    assert first_responses(maps, boxes[:0], shape, sides, *rules).shape == (0,)


def test_bins_keep_their_average():
    rng = np.random.default_rng(0)
    maps, boxes = [some_maps(rng, 1.0)], some_boxes()
    pooled = pool_windows(maps, boxes, (96, 128), (96,), (2, 1), mode="average")
    for stage, part in enumerate(pooled.split([15, 25], dim=1)):
        cells = project(boxes, maps[0], stage)
        alone = pool_regions(maps[0].stages[stage], cells, (2, 1), mode="average")
        assert torch.equal(part, alone)
