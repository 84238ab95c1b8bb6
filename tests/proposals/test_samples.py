import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

from sppnet.proposals.samples import sample_bins


@pytest.mark.parametrize("bins", [1, 5])
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (9, 7)])
def test_samples_are_those_of_torchvision(bins, shape):
    rng = np.random.default_rng(0)
    height, width = shape
    values = rng.normal(size=(height * width, 3)).astype(np.float32)
    # Windows of all kinds, also far beyond the map.
    corners = rng.uniform(-6, 12, (300, 2))
    windows = np.concatenate([corners, corners + rng.uniform(0, 9, (300, 2))], axis=1)
    samples = sample_bins(windows, shape, bins)
    assert samples.cells.shape == samples.weights.shape == (300, bins**2, 4)
    assert samples.cells.min() >= 0
    assert samples.cells.max() < height * width
    found = (samples.weights[..., None] * values[samples.cells]).sum(axis=2)
    maps = torch.from_numpy(values).double().T.reshape(1, 3, height, width)
    expected = roi_align(maps, [torch.from_numpy(windows + 0.5)], bins, sampling_ratio=1, aligned=True)
    np.testing.assert_allclose(found, expected.flatten(2).permute(0, 2, 1), rtol=1e-5, atol=1e-5)


def test_a_sample_by_hand():
    # The middle of the window is at x = 1.25, y = 0.5.
    cells, weights = sample_bins(np.array([[0.75, 0, 1.75, 1]]), (2, 3), 1)
    assert cells.tolist() == [[[1, 2, 4, 5]]]
    assert weights.tolist() == [[[0.375, 0.125, 0.375, 0.125]]]


def test_no_windows_have_no_samples():
    assert sample_bins(np.zeros((0, 4)), (2, 3), 5).cells.shape == (0, 25, 4)
