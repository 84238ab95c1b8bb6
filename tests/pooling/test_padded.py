import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from sppnet.pooling import SpatialPyramidPooling
from sppnet.pooling.padded import SizeBucketSampler, collate_padded, pad_batch

SIDES = [(70, 97), (96, 64), (33, 90)]


def images_of(sides=SIDES, dtype=torch.float64, channels=3):
    return [torch.randn(channels, *side, dtype=dtype) for side in sides]


@pytest.mark.parametrize("mode", ["max", "average"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_pooling_of_a_padded_batch_is_that_of_each_map_to_the_last_bit(mode, dtype):
    pool, maps = SpatialPyramidPooling((6, 3, 2, 1), mode), images_of([(13, 9), (1, 5), (7, 16)], dtype, 70)
    alone = torch.stack([pool(m) for m in maps])
    batch, sizes = pad_batch(maps, multiple=4, value=9)
    assert torch.equal(pool(batch, sizes), alone)


def test_padding_is_below_and_on_the_right_up_to_the_multiple():
    images = [torch.ones(2, 3, 5, dtype=torch.uint8), torch.ones(2, 4, 1, dtype=torch.uint8)]
    batch, sizes = pad_batch(images, multiple=4, value=9)
    assert batch.shape == (2, 2, 4, 8)
    assert batch.dtype == torch.uint8
    assert sizes.dtype == torch.int64
    assert sizes.tolist() == [[3, 5], [4, 1]]
    for page, (height, width) in zip(batch, sizes.tolist(), strict=True):
        assert (page[:, :height, :width] == 1).all()
        assert page.sum() == 2 * (height * width + 9 * (32 - height * width))
    assert pad_batch(images)[0].shape == (2, 2, 4, 5)


@pytest.mark.parametrize(
    ("images", "multiple", "message"),
    [
        ([], 1, "found 0 and 1"),
        ([torch.zeros(3, 2, 2)], 0, "found 1 and 0"),
        (
            [torch.zeros(3, 2, 2), torch.zeros(3, 2)],
            1,
            r"image 1 must be a tensor \(C, H, W\) .* found .*\(3, 2\)",
        ),
        ([torch.zeros(3, 0, 2)], 1, "no side of 0"),
        ([np.zeros((3, 2, 2))], 1, "must be a tensor .* found float64 of shape"),
        ([torch.zeros(3, 2, 2), torch.zeros(1, 2, 2)], 1, "found 1 channels .* image 1, 3 channels"),
        ([torch.zeros(3, 2, 2), torch.zeros(3, 2, 2).half()], 1, "float16 on cpu for image 1"),
    ],
)
def test_images_that_make_no_batch_are_refused(images, multiple, message):
    with pytest.raises(ValueError, match=message):
        pad_batch(images, multiple)


SIZES = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=80)


@settings(deadline=None)
@given(SIZES, st.integers(1, 9), st.booleans(), st.booleans(), st.floats(0, 0.9), st.integers(0, 3))
def test_batches_hold_every_image_once_and_little_padding(sizes, batch_size, shuffle, drop, waste, epoch):
    sampler = SizeBucketSampler(sizes, batch_size, shuffle=shuffle, drop_last=drop, max_waste=waste)
    sampler.set_epoch(epoch)
    batches, sides = list(sampler), np.array(sizes)
    assert batches == list(sampler)
    assert len(batches) == len(sampler)
    indices = sorted(i for batch in batches for i in batch)
    if drop:
        assert len(set(indices)) == len(indices)
        assert all(len(batch) == batch_size for batch in batches)
    else:
        assert indices == list(range(len(sizes)))
        assert all(0 < len(batch) <= batch_size for batch in batches)
    for batch in batches:
        area = sides[batch].max(axis=0).prod()
        assert (sides[batch].prod(axis=1) >= (1 - waste) * area).all()


def test_no_waste_means_equal_sizes():
    sizes = [(375, 500)] * 20 + [(500, 375)] * 5 + [(374, 500)] * 3
    batches = list(SizeBucketSampler(sizes, 8, max_waste=0))
    assert all(len({sizes[i] for i in batch}) == 1 for batch in batches)
    assert sorted(map(len, batches)) == [3, 5, 6, 7, 7]


@settings(deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(1, 5), st.booleans(), st.booleans())
def test_ranks_share_the_batches_evenly(sizes, batch_size, replicas, shuffle, drop):
    options = {"shuffle": shuffle, "drop_last": drop, "seed": 3}
    whole = list(SizeBucketSampler(sizes, batch_size, **options))
    shards = [
        list(SizeBucketSampler(sizes, batch_size, **options, num_replicas=replicas, rank=rank))
        for rank in range(replicas)
    ]
    assert {len(shard) for shard in shards} == {
        len(whole) // replicas if drop else -(-len(whole) // replicas)
    }
    dealt = [shard[i] for i in range(len(shards[0])) for shard in shards]
    assert dealt == [whole[i % len(whole)] for i in range(len(dealt))]
    assert dealt[: len(whole)] == whole[: len(dealt)]


def test_every_epoch_and_seed_draws_other_batches():
    sizes = np.random.default_rng(0).integers(90, 110, (300, 2))
    sampler, other = SizeBucketSampler(sizes, 16), SizeBucketSampler(sizes, 16, seed=1)
    first, foreign = list(sampler), list(other)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first
    for one, two in ((first, second), (first, foreign), (second, foreign)):
        assert {frozenset(b) for b in one}.isdisjoint({frozenset(b) for b in two})
    still = SizeBucketSampler(sizes, 16, shuffle=False)
    before = list(still)
    still.set_epoch(1)
    assert list(still) == before


@pytest.mark.parametrize(
    "arguments",
    [
        {"sizes": []},
        {"sizes": 3},
        {"sizes": [[3, 3, 3]]},
        {"sizes": [[3.0, 3.0]]},
        {"sizes": [[3, 0]]},
        {"batch_size": 0},
        {"max_waste": 1},
        {"max_waste": -0.1},
        {"rank": 1},
        {"rank": -1},
        {"num_replicas": 0},
    ],
)
def test_a_sampler_that_cannot_be_is_refused(arguments):
    with pytest.raises(ValueError, match=r"\(n, 2\) integers|need batch_size"):
        SizeBucketSampler(**({"sizes": [[3, 4]], "batch_size": 2} | arguments))


def test_a_loader_brings_padded_batches():
    images = images_of([(8, 9), (20, 21), (9, 8), (21, 20)], torch.float32)
    sampler = SizeBucketSampler([image.shape[1:] for image in images], 2, shuffle=False)
    loader = DataLoader(
        list(zip(images, range(4), strict=True)), batch_sampler=sampler, collate_fn=collate_padded
    )
    assert len(loader) == 2
    for (batch, sizes), labels in loader:
        assert labels.tolist() in ([0, 2], [1, 3])
        assert sizes.tolist() == [[*images[i].shape[1:]] for i in labels]
        assert [*batch.shape[2:]] == sizes.amax(dim=0).tolist()
