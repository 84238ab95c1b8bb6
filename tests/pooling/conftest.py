"""What the tests of pooling share: random numbers that are the same in every run, and one thread."""

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seed(threads):
    torch.manual_seed(0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
