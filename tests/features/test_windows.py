from dataclasses import asdict, replace

import numpy as np
import pytest

from sppnet.boxes import flip
from sppnet.errors import SppnetError
from sppnet.features.encoded import EncodedImage, FeatureMaps
from sppnet.features.geometry import Geometry
from sppnet.features.projection import choose_scale, project, responses
from sppnet.features.windows import WindowPooling
from sppnet.pooling.regions import pool_regions

SIZE = (96, 128)


def some_maps(rng, scale, side=None, channels=(3, 5)):
    """Return maps of two stages of an image of 96 x 128 at a scale, of a given side if it is another."""
    geometry = (Geometry(8, 3.5), Geometry(16, 15))
    height, width = round(96 * scale), round(128 * scale)
    stages = tuple(
        rng.normal(size=(c, g.cells(height), g.cells(width))).astype(np.float32)
        for c, g in zip(channels, geometry, strict=True)
    )
    return FeatureMaps(stages, geometry, (scale, scale), side or round(96 * scale))


def some_boxes():
    """Return squares of four sizes all over an image of 96 x 128."""
    sides = (24, 32, 42, 54)
    places = [(x, y, s) for s in sides for y in range(0, 97 - s, 8) for x in range(0, 129 - s, 8)]
    return np.array([(x, y, x + s, y + s) for x, y, s in places], np.float32)


def encoded(*maps):
    return EncodedImage(SIZE, maps)


def test_stages_are_pooled_one_by_one_and_joined():
    rng = np.random.default_rng(0)
    maps, boxes = [some_maps(rng, 1.0), some_maps(rng, 2.0)], some_boxes()
    pooling = WindowPooling((96, 192), (3, 1), reference=64)
    joined = pooling(encoded(*maps), boxes)
    assert joined.shape == (len(boxes), pooling.length((3, 5))) == (len(boxes), (3 + 5) * 10)
    for t, part in enumerate(np.split(joined, [30], axis=1)):
        single = [replace(m, stages=m.stages[t : t + 1], geometry=m.geometry[t : t + 1]) for m in maps]
        assert np.array_equal(part, pooling(encoded(*single), boxes))


@pytest.mark.parametrize("projection", ["released", "paper"])
@pytest.mark.parametrize("scale_rule", ["released", "paper"])
@pytest.mark.parametrize("mode", ["max", "average"])
def test_each_window_is_pooled_at_its_own_scale_by_the_rules(projection, scale_rule, mode):
    rng = np.random.default_rng(0)
    maps, boxes = [some_maps(rng, s) for s in (2.0, 0.5, 1.0)], some_boxes()
    boxes += rng.uniform(0, 1, boxes.shape).astype(np.float32)
    pooling = WindowPooling((192, 48, 96), (2, 1), mode, projection, scale_rule, 40)
    pooled = pooling(encoded(*maps), boxes)
    scales = choose_scale(boxes, 96, (192, 48, 96), 40, scale_rule)
    assert set(scales) == {0, 1, 2}
    for i, (box, s) in enumerate(zip(boxes, scales, strict=True)):
        cells = [project(box[None], maps[s], t, projection) for t in (0, 1)]
        alone = [pool_regions(maps[s].stages[t], cells[t], (2, 1), mode=mode)[0] for t in (0, 1)]
        assert np.array_equal(pooled[i], np.concatenate(alone))
    assert pooling(encoded(*maps), boxes[:0]).shape == (0, 8 * 5)


def test_the_rules_make_a_difference():
    rng = np.random.default_rng(0)
    # Of windows of 32 pixels the two scale rules choose other ones of these.
    maps, boxes = [some_maps(rng, 4.0, side=700), some_maps(rng, 2.0, side=600)], some_boxes()
    boxes += rng.uniform(0, 1, boxes.shape).astype(np.float32)
    plain = WindowPooling((700, 600), (2, 1), scale_rule="released")
    for other in (replace(plain, projection="paper"), replace(plain, scale_rule="paper", reference=None)):
        assert not np.array_equal(plain(encoded(*maps), boxes), other(encoded(*maps), boxes))


def test_the_true_side_of_a_strip_decides_its_scale():
    rng = np.random.default_rng(0)
    boxes = some_boxes()
    pooling = WindowPooling((96, 192), (1,), reference=50)
    nominal = encoded(some_maps(rng, 1.0), some_maps(rng, 2.0))
    shrunk = EncodedImage(SIZE, (nominal.scales[0], replace(nominal.scales[1], side=100)))
    assert pooling.choose(nominal, boxes).tolist() != pooling.choose(shrunk, boxes).tolist()
    np.testing.assert_array_equal(
        pooling.choose(shrunk, boxes), choose_scale(boxes, 96, (96, 100), 50, "paper")
    )


def test_a_flipped_image_takes_its_part():
    rng = np.random.default_rng(0)
    boxes, pooling = some_boxes(), WindowPooling((96, 192), (3, 2, 1), reference=50)
    one, other = (encoded(some_maps(rng, 1.0), some_maps(rng, 2.0)) for _ in range(2))
    both = replace(one, flipped=other)
    turned = pooling.flipped(pooling(other, flip(boxes, 128)), (3, 5))
    np.testing.assert_array_equal(pooling(both, boxes), (pooling(one, boxes) + turned) / 2)
    # Bin by bin: rows stay, columns change places.
    first = pooling(other, flip(boxes, 128))[:, : 3 * 9].reshape(-1, 3, 3, 3)
    assert np.array_equal(turned[:, : 3 * 9].reshape(-1, 3, 3, 3), first[..., [2, 1, 0]])
    alone = both.at(1)
    assert alone.sides == alone.flipped.sides == (192,)
    assert both.channels == (3, 5)


def test_tensors_go_the_same_way_as_arrays():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    boxes, pooling = some_boxes(), WindowPooling((96, 192), (3, 2, 1), reference=50)
    one, other = (encoded(some_maps(rng, 1.0), some_maps(rng, 2.0)) for _ in range(2))

    def tensors(image):
        scales = (replace(m, stages=tuple(map(torch.from_numpy, m.stages))) for m in image.scales)
        return replace(image, scales=tuple(scales))

    found = pooling(replace(tensors(one), flipped=tensors(other)), boxes)
    assert isinstance(found, torch.Tensor)
    np.testing.assert_array_equal(found.numpy(), pooling(replace(one, flipped=other), boxes))


@pytest.mark.parametrize("projection", ["released", "paper"])
@pytest.mark.parametrize("scale_rule", ["released", "paper"])
def test_the_first_of_equal_responses_by_a_look_at_each(projection, scale_rule):
    rng = np.random.default_rng(0)
    maps = [some_maps(rng, s) for s in (2.0, 1.0)]
    corners = rng.uniform(-10, 70, (100, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(40, 90, (100, 2))], axis=1)
    boxes = (np.tile(boxes, (4, 1)) + rng.uniform(0, 0.3, (400, 4))).astype(np.float32)
    pooling = WindowPooling((192, 96), (2, 1), "max", projection, scale_rule, 90)
    scale = choose_scale(boxes, 96, (192, 96), 90, scale_rule)
    seen, expected = set(), []
    for i, s in enumerate(scale):
        response = (s, *responses(boxes[i : i + 1], maps[s], projection)[0])
        if response not in seen:
            expected.append(i)
        seen.add(response)
    first = pooling.distinct(encoded(*maps), boxes)
    assert first.dtype == np.int64
    assert first.tolist() == expected
    assert 100 < len(first) < 300
    assert len({scale[i] for i in first}) == 2
    # All others have the vector of an earlier one.
    pooled = pooling(encoded(*maps), boxes)
    kept = {row.tobytes() for row in pooled[first]}
    assert all(row.tobytes() in kept for row in pooled)
    assert pooling.distinct(encoded(*maps), boxes[:0]).shape == (0,)


def test_settings_are_checked_and_equal_ones_are_equal_records():
    for wrong, message in (
        ({"projection": "roi"}, "found the projection 'roi', expected one of released, paper"),
        ({"scale_rule": "best"}, "found the scale rule 'best', expected one of released, paper"),
        ({"scales": ()}, r"found the scales \(\), expected shorter sides from 1 pixel up"),
        ({"scales": (0, 3)}, r"found the scales \(0, 3\)"),
        ({"levels": ()}, "levels"),
        ({"mode": "sum"}, "mode"),
    ):
        with pytest.raises(SppnetError, match=message):
            WindowPooling(**wrong)
    assert WindowPooling(scale_rule="paper") == WindowPooling(reference=224)
    assert WindowPooling(scale_rule="released").reference == 208
    pooling = WindowPooling((96,), (2, 1), "average")
    facts = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(pooling).items()}
    assert WindowPooling(**facts) == pooling
    assert hash(WindowPooling(**facts)) == hash(pooling)
