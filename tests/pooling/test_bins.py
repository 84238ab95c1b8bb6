"""The one binning rule, and which levels and modes there are."""

import numpy as np
import pytest
import torch

from loops import whole
from sppnet.pooling import SpatialPyramidPooling, bin_bounds, pool_regions, pyramid_length, valid_levels


@pytest.mark.parametrize(("side", "n"), [(57, 7), (114, 7), (121, 7), (29, 11)])
def test_bins_are_exact_where_those_of_single_precision_may_not_be(side, n):
    # Along a slope, a bin of one cell more or less has another maximum.
    slope = torch.arange(1.0 * side * side).reshape(side, side)
    feature = torch.stack([slope, -slope])
    expected = torch.nn.functional.adaptive_max_pool2d(feature, n).flatten()
    assert torch.equal(SpatialPyramidPooling((n,))(feature), expected)


def test_coarse_bins_are_unions_of_fine_ones():
    for coarse, fine in [(1, 2), (1, 6), (2, 6), (3, 6), (2, 4), (3, 9)]:
        k = fine // coarse
        for size in range(1, 200):
            starts, ends = bin_bounds(size, fine)
            assert np.array_equal(bin_bounds(size, coarse), [starts[::k], ends[k - 1 :: k]])
            assert (starts[1:] <= ends[:-1]).all()


def test_bin_bounds_cover_every_cell_and_take_arrays():
    for n in range(1, 9):
        starts, ends = bin_bounds(np.arange(1, 70), n)
        assert starts.shape == ends.shape == (69, n)
        assert (starts < ends).all()
        assert (starts[:, 0] == 0).all()
        assert (ends[:, -1] == np.arange(1, 70)).all()


def test_length():
    assert pyramid_length(256) == 12_800
    assert pyramid_length(1280, (1, 2, 3)) == 17_920
    assert valid_levels([np.int64(3), 1]) == (3, 1)


@pytest.mark.parametrize("levels", [(), (0,), (3, -1), (2.0,), ("2",), (True, 2), 3, None, "321"])
def test_bad_levels(levels):
    for call in (
        lambda: SpatialPyramidPooling(levels),
        lambda: pyramid_length(3, levels),
        lambda: pool_regions(torch.zeros(1, 2, 2), whole(torch.zeros(2, 2)), levels),
    ):
        with pytest.raises(ValueError, match="levels must be one or more positive integers"):
            call()


def test_bad_mode():
    for call in (
        SpatialPyramidPooling,
        lambda mode: pool_regions(torch.zeros(1, 1, 1), [[0, 0, 1, 1]], mode=mode),
    ):
        with pytest.raises(ValueError, match=r"mode must be one of .* found 'min'"):
            call(mode="min")
