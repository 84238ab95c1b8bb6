import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sppnet.errors import SppnetError
from sppnet.features.encoded import FeatureMaps
from sppnet.features.geometry import Geometry
from sppnet.linear import Linear
from sppnet.proposals.anchors import AnchorNetwork, last_stage


def drawn_network(rng, channels=5, width=4, kernel=3, anchors=2):
    def some(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return AnchorNetwork(
        Linear(some(width, channels), some(width)),
        some(width, kernel, kernel),
        some(width),
        Linear(some(5 * anchors, width), some(5 * anchors)),
    )


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (6, 1), (7, 9)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_answers_are_those_of_convolutions(kernel, shape, channels_last):
    rng = np.random.default_rng(0)
    network = drawn_network(rng, kernel=kernel)
    stage = rng.normal(size=(5, *shape)).astype(np.float32)
    if channels_last:
        stage = np.ascontiguousarray(stage.transpose(1, 2, 0)).transpose(2, 0, 1)
    before = stage.copy()
    weights = {name: torch.from_numpy(value).double() for name, value in network.state().items()}
    x = torch.from_numpy(stage).double()[None]
    x = reduced = F.relu(F.conv2d(x, weights["reduce.weight"][..., None, None], weights["reduce.bias"]))
    x = F.conv2d(x, weights["spread.weight"], weights["spread.bias"], padding=kernel // 2, groups=4)
    x = F.conv2d(F.relu(x), weights["answer.weight"][..., None, None], weights["answer.bias"])
    answers, hidden = network(stage)
    assert answers.dtype == hidden.dtype == np.float32
    np.testing.assert_allclose(hidden, reduced[0].permute(1, 2, 0), rtol=1e-5, atol=1e-5)
    # Cell by cell, of each one anchor after the other.
    np.testing.assert_allclose(answers, x[0].permute(1, 2, 0).reshape(-1, 5), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(stage, before)


def test_the_state_is_all_of_a_network():
    network = drawn_network(np.random.default_rng(0))
    state = network.state()
    names = ["reduce.weight", "reduce.bias", "spread.weight", "spread.bias", "answer.weight", "answer.bias"]
    assert list(state) == names
    again = AnchorNetwork.from_state({name: value.astype(np.float64) for name, value in state.items()})
    for name, value in again.state().items():
        np.testing.assert_array_equal(value, state[name], strict=True)


def test_the_last_stage_has_the_channels_that_are_expected():
    first, last = np.zeros((4, 3, 5)), np.zeros((2, 2, 3))
    maps = FeatureMaps((first, last), (Geometry(8, 3.5), Geometry(16, 7)), (1.0, 1.0), 32)
    assert last_stage(maps, 2) is last
    with pytest.raises(SppnetError, match="found maps of 2 channels, expected 4"):
        last_stage(maps, 4)
