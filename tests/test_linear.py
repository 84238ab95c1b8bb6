import numpy as np
import torch

from sppnet.arrays import like, to_numpy
from sppnet.linear import Linear


def test_arrays_and_tensors_give_the_same():
    rng = np.random.default_rng(0)
    weights, offsets = rng.normal(size=(3, 5)).astype(np.float32), np.ones(3, np.float32)
    vectors = rng.normal(size=(7, 5)).astype(np.float32)
    by_hand = [[sum(w * v for w, v in zip(row, x, strict=True)) for row in weights] for x in vectors]
    for extra, layer in ((1, Linear(weights, offsets)), (0, Linear(weights))):
        found = layer(vectors)
        assert found.dtype == np.float32
        assert np.allclose(found, np.array(by_hand) + extra, atol=1e-5)
        other = layer(torch.from_numpy(vectors))
        assert np.allclose(to_numpy(other), found, atol=1e-5)


def test_no_vectors_give_no_rows():
    assert Linear(np.zeros((3, 5), np.float32))(np.zeros((0, 5), np.float32)).shape == (0, 3)


def test_a_tensor_with_a_gradient_becomes_an_array_and_an_array_a_tensor():
    assert isinstance(to_numpy(torch.ones(2, requires_grad=True)), np.ndarray)
    assert isinstance(like(np.ones(2), torch.ones(1)), torch.Tensor)
    given = np.ones(2)
    assert like(given, given) is given
    assert to_numpy(given) is given
