"""What every test file may ask for; and how processes that run tests side by side share the cores."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("SPPNET_DATA", Path(__file__).parents[2] / "shared" / "data"))

# Folders whose files, each done by one process, wait for other processes most of the time.
_LONGEST = ("cluster", "serve")

if "PYTEST_XDIST_WORKER" in os.environ:
    # One core for each process. The processes that tests start inherit the variables.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    import torch

    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest; leave out, visibly, the long tests, unless they are asked for.

    So no process waits for the last of these files, and the checks of a change stay within minutes.
    """
    items.sort(key=lambda item: item.path.parent.name not in _LONGEST)
    skip = pytest.mark.skip(reason="starts many processes: make test-long runs it")
    for item in items:
        if item.get_closest_marker("long") and not os.environ.get("SPPNET_TEST_LONG"):
            item.add_marker(skip)


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


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory):
    """Keep out of the user's caches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        yield


@pytest.fixture(scope="session")
def shepherd():
    """The path of a photo whose class every ImageNet network knows: a German shepherd, 300 x 400."""
    return Path(__file__).parent / "photos" / "shepherd.jpg"


@pytest.fixture(scope="session")
def lite0():
    """The backbone that all detectors of default settings share, compiled once in each process."""
    from sppnet.features.backbone import Backbone

    return Backbone.shared("efficientnet-lite0", ("head",), 16)


@pytest.fixture(scope="session")
def backbone_file(tmp_path_factory):
    """Return a function from the name of a timm network to the file of a backbone, made once."""
    from sppnet.features.making import make_backbone

    folder, made = tmp_path_factory.mktemp("backbones"), {}

    def find(name, weights="random"):
        if (name, weights) not in made:
            path = folder / f"{name}-{len(made)}.onnx"
            make_backbone(name, weights).save(path)
            made[name, weights] = path
        return made[name, weights]

    return find
