"""What every test file may ask for; and how processes that run tests side by side share the cores."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("SPPNET_DATA", Path(__file__).parents[2] / "shared" / "data"))

if "PYTEST_XDIST_WORKER" in os.environ:
    # One core for each process. The processes that tests start inherit the variables.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def threads():
    """One thread for PyTorch and the kernels, as small maps do best; call the value for another number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_data():
    """Return a function from a name to its folder of real data beside the repository; skip without."""

    def find(name):
        if not (DATA / name).exists():
            pytest.skip(f"no {name} in {DATA}")
        return DATA / name

    return find


@pytest.fixture(scope="session")
def lite0():
    """The backbone that all detectors of default settings share, compiled once in each process."""
    from sppnet.features.backbone import Backbone

    return Backbone.shared("tf_efficientnet_lite0", ("head",), 16, None, "cpu")
