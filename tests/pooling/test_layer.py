"""Whole maps become vectors: one map, batches, lists and padded batches."""

import math

import pytest
import torch

from loops import LEVELS, SIDES, oracle, whole
from sppnet.pooling import (
    SpatialPyramidPooling,
    pyramid_length,
)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("height_width", SIDES)
def test_the_layer_equals_the_loops(height_width, levels):
    feature = torch.randn(3, *height_width)
    assert torch.equal(SpatialPyramidPooling(levels)(feature), oracle(feature, whole(feature)[0], levels))


@pytest.mark.parametrize("mode", ["max", "average"])
def test_maps_below_zero_and_smaller_than_the_bins(mode):
    # Where other layers pad with zeros, leave bins empty or refuse.
    layer = SpatialPyramidPooling((6, 3, 2, 1), mode)
    for height in range(1, 7):
        for width in range(1, 7):
            feature = (-1 - torch.rand(3, height, width)).requires_grad_()
            pooled = layer(feature)
            torch.testing.assert_close(
                pooled, oracle(feature.detach(), whole(feature)[0], layer.levels, mode)
            )
            pooled.sum().backward()
            torch.testing.assert_close(feature.grad.sum(), torch.tensor(150.0))


@pytest.mark.parametrize("mode", ["max", "average"])
def test_gradients_of_the_layer(mode):
    layer = SpatialPyramidPooling((3, 2, 1), mode=mode)
    maps = torch.randperm(2 * 2 * 4 * 5).double().reshape(2, 2, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(layer, maps)


def test_the_layer_on_batches_and_single_maps():
    layer = SpatialPyramidPooling()
    maps = torch.randn(3, 5, 10, 17)
    assert layer(maps).shape == (3, pyramid_length(5))
    assert torch.equal(layer(maps)[1], layer(maps[1]))
    assert layer(maps[:0]).shape == (0, 250)
    assert layer(maps.bfloat16()).dtype == torch.bfloat16
    assert repr(layer) == "SpatialPyramidPooling(levels=(6, 3, 2, 1), mode='max')"


def test_a_list_and_a_padded_batch_give_what_each_map_gives_alone(rng):
    for mode, dtype in [("max", torch.float32), ("average", torch.float32), ("max", torch.bfloat16)]:
        layer = SpatialPyramidPooling(mode=mode)
        sides = [(1, 1), (9, 4), (7, 30), (20, 2), (20, 30)]
        maps = [torch.randn(65, *s).to(dtype) for s in sides]
        expected = torch.stack([layer(m) for m in maps])
        assert torch.equal(layer(maps), expected)
        padded = torch.full((5, 65, 20, 30), math.nan, dtype=dtype)
        for i, m in enumerate(maps):
            padded[i, :, : m.shape[1], : m.shape[2]] = m
        for batch in (padded, padded.to(memory_format=torch.channels_last)):
            for kind in (torch.int64, torch.int32, torch.uint8):
                assert torch.equal(layer(batch, torch.tensor(sides, dtype=kind)), expected)


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3), (2, 2, 3, 0), (3, 3), (1, 1, 1, 1, 1)])
def test_bad_maps_for_the_layer(shape):
    with pytest.raises(ValueError, match="maps must be floats of shape"):
        SpatialPyramidPooling()(torch.zeros(shape))


def test_integer_maps_for_the_layer():
    with pytest.raises(ValueError, match=r"found torch.int64 of shape \(1, 2, 2\)"):
        SpatialPyramidPooling()(torch.zeros(1, 2, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([[3, 4], [3, 5]], r"windows\[1\] must be .* x2 <= 4 and .* found \[0, 0, 5, 3\]"),
        ([[3, 4], [0, 4]], r"windows\[1\] must be"),
        ([[3, 4]], r"of shape \(2, 2\), height and width .* found torch.int64 of shape \(1, 2\)"),
        ([[3.0, 4.0], [3.0, 4.0]], r"integer tensor of shape \(2, 2\)"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        SpatialPyramidPooling()(torch.zeros(2, 1, 3, 4), torch.tensor(sizes))


def test_sizes_without_a_padded_batch():
    with pytest.raises(ValueError, match=r"sizes belong to a padded batch .* found a list"):
        SpatialPyramidPooling()([torch.zeros(1, 3, 4)], torch.tensor([[3, 4]]))
    with pytest.raises(ValueError, match=r"sizes belong to a padded batch .* found a single map"):
        SpatialPyramidPooling()(torch.zeros(1, 3, 4), torch.tensor([[3, 4]]))
