"""A workplace for commands, and what many of them are given: data, models and photos, made once."""

from pathlib import Path

import pytest

from commands import QUICK, SPLITS, succeeds
from sppnet.features.backbone import Backbone
from trees import save, scene, voc_tree


@pytest.fixture(scope="session", autouse=True)
def surroundings(tmp_path_factory):
    """Keep out of the user's cache, and fold no table."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("windows")
        patch.setattr("sppnet.detection.detector.cache_folder", lambda: folder)
        patch.setenv("COLUMNS", "200")
        yield


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    """A folder of its own for each test; backbones stay compiled from one to the next."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Backbone, "release", lambda backbone: None)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A VOC folder, not to be changed."""
    root = tmp_path_factory.mktemp("data") / "voc"
    voc_tree(root, SPLITS)
    return root


@pytest.fixture(scope="session")
def model(surroundings, data, tmp_path_factory):
    """A detector trained on the split train of `data`, not to be changed."""
    path = tmp_path_factory.mktemp("model") / "shapes.safetensors"
    succeeds("detect", "train", data, "--out", path, *QUICK)
    return path


@pytest.fixture(scope="session")
def second(surroundings, data, tmp_path_factory):
    """A detector of the same classes on another backbone, with other windows; not to be changed."""
    path = tmp_path_factory.mktemp("second") / "second.safetensors"
    options = ("--scales", "96", "--levels", "2,1", "--proposals", "edge-boxes", "--stages", "4")
    succeeds("detect", "train", data, "--out", path, *options)
    return path


@pytest.fixture
def photos(_workplace):
    """A folder ``photos`` of three pictures."""
    for i in (1, 2, 3):
        save(Path(f"photos/{i}.png"), scene(i).image)
    return Path("photos")
