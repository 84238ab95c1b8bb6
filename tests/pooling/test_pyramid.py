"""Whole maps become vectors, arrays as tensors: one map, batches and lists."""

import math

import numpy as np
import pytest
import torch

from loops import LEVELS, SIDES, oracle, whole
from sppnet import spatial_pyramid
from sppnet.errors import SppnetError
from sppnet.pooling import SpatialPyramidPooling

DTYPES = [np.float32, np.float16, np.float64]


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("height_width", SIDES)
def test_a_map_equals_the_loops(rng, levels, dtype, height_width):
    for channels in (1, 3, 65):
        maps = (rng.standard_normal((channels, *height_width)) - 3).astype(dtype)
        pooled = spatial_pyramid(maps, levels)
        assert isinstance(pooled, np.ndarray)
        assert pooled.dtype == dtype
        np.testing.assert_array_equal(pooled, oracle(maps, whole(maps)[0], levels))
        pooled, expected = (
            spatial_pyramid(maps, levels, mode="average"),
            oracle(maps, whole(maps)[0], levels, "average"),
        )
        np.testing.assert_allclose(pooled, expected, rtol=64 * np.finfo(dtype).eps)


@pytest.mark.parametrize("mode", ["max", "average"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_and_tensors_give_the_same_bits(rng, mode, dtype):
    batch = rng.standard_normal((4, 70, 9, 11)).astype(dtype)
    batch[0, 0, 0, 0], batch[1, 1] = math.nan, -math.inf
    layer = SpatialPyramidPooling(mode=mode)
    for maps in (batch, batch[0], batch[:0], list(batch), [batch[0], batch[1, :, :1, :1], batch[2, :, 1:]]):
        tensors = [torch.from_numpy(m) for m in maps] if isinstance(maps, list) else torch.from_numpy(maps)
        expected = spatial_pyramid(tensors, mode=mode)
        assert isinstance(expected, torch.Tensor)
        np.testing.assert_array_equal(layer(tensors).numpy(), expected.numpy())
        np.testing.assert_array_equal(spatial_pyramid(maps, mode=mode), expected.numpy())


def test_channels_last_arrays_in_threads(rng, threads):
    maps = rng.standard_normal((3, 60, 50, 128)).astype(np.float32).transpose(0, 3, 1, 2)
    threads(1)
    expected = spatial_pyramid(np.ascontiguousarray(maps))
    for count in (1, 2, 3):
        threads(count)
        np.testing.assert_array_equal(spatial_pyramid(maps), expected)


def test_tensors_have_gradients():
    maps = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: spatial_pyramid(m, (2, 1)), maps)


@pytest.mark.parametrize("shape", [(3, 3), (0, 3, 3), (2, 0, 3), (1, 1, 0, 2), (1, 1, 1, 1, 1)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(SppnetError, match="maps must be floats of shape"):
        spatial_pyramid(np.zeros(shape))


def test_the_layer_refuses_arrays():
    for maps in (np.zeros((1, 2, 2)), [np.zeros((1, 2, 2))]):
        with pytest.raises(SppnetError, match="the layer takes tensors, found arrays"):
            SpatialPyramidPooling()(maps)


def test_other_levels_and_modes_are_refused():
    with pytest.raises(SppnetError, match="levels must be"):
        spatial_pyramid(np.zeros((1, 2, 2)), (0,))
    with pytest.raises(SppnetError, match="mode must be one of"):
        spatial_pyramid(np.zeros((1, 2, 2)), mode="min")
