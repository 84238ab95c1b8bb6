"""``sppnet detect train --minutes``: a network that is trained, too."""

import re
from pathlib import Path

import pytest

import sppnet.detection.joint as joint
from commands import QUICK, fails, sppnet, succeeds
from sppnet.detection.detector import Detector
from trees import save, scene, voc_tree


@pytest.fixture(scope="module", autouse=True)
def _short():
    """Trainings of a second are enough to test with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint, "_LEAST", 1.0)
        patch.setattr(joint, "_PASSES", 1.0)
        patch.setattr("sppnet.rpn.settings.Joint.width", 16)
        yield


@pytest.fixture(scope="module")
def tiny(backbone_file):
    return str(backbone_file("test_efficientnet"))


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A detector of a network that was trained for some seconds, and what the command said."""
    folder = tmp_path_factory.mktemp("trained")
    voc_tree(folder / "shapes", {"train": 12})
    out = folder / "m.safetensors"
    said = succeeds("detect", "train", folder / "shapes", "--minutes", 0.1, "--backbone", tiny, "--out", out)
    return out, said


def test_it_tells_how_good_it_was_after_how_many_minutes(trained):
    out, said = trained
    assert re.search(r"^after 0\.\d minutes: mean AP \d+\.\d on photos not learned from$", said.out, re.M)
    assert "Training at 352 x 352 pixels" in said.err
    assert f"{out}: disc, square, triangle from 12 images" in said.out
    assert {path.name for path in out.parent.iterdir()} == {"shapes", "m.safetensors"}


def test_it_runs_like_any_other(trained):
    save(Path("photo.png"), scene(40).image)
    succeeds("detect", "run", trained[0], "photo.png", "--threshold", 1, "--out", "found")
    assert Path("found/photo.jpg").is_file()
    said = succeeds("info", trained[0]).out
    assert "of the network itself" in said
    assert "test_efficientnet, trained" in said


def test_minutes_of_0_leave_the_network_as_it_is(data):
    succeeds("detect", "train", data, "--minutes", 0, "--out", "m.safetensors", *QUICK)
    assert Detector.load("m.safetensors").fitted_.side is None


def test_without_options_the_better_of_two_networks_as_they_are_is_kept(data):
    said = succeeds("detect", "train", data, "--minutes", 0, "--out", "m.safetensors", "--folds", 2)
    told = re.search(r"learned from: pyramid-lite0 (\S+), efficientnet-lite0 (\S+); (\S+) is kept", said.err)
    pyramid, other = map(float, told.groups()[:2])
    assert told[3] == ("pyramid-lite0" if pyramid >= other else "efficientnet-lite0")
    assert Detector.load("m.safetensors").fitted_.backbone.name == told[3]


def test_options_of_windows_and_scales_go_without_minutes(data):
    says = ["found --scales beside --minutes", "expected one of them"]
    fails("detect", "train", data, "--minutes", 2, "--scales", "64", "--out", "m.safetensors", says=says)
    says = ["found --tune-after beside --minutes"]
    fails("detect", "train", data, "--minutes", 2, "--tune-after", "4", "--out", "m.safetensors", says=says)


def test_what_are_no_minutes_is_said(data):
    assert sppnet("detect", "train", data, "--minutes", "-1", "--out", "m.safetensors").status == 2
    assert sppnet("detect", "train", data, "--minutes", "soon", "--out", "m.safetensors").status == 2


def test_nothing_learned_is_said(tiny, monkeypatch):
    voc_tree(Path("shapes"), {"train": 6})
    monkeypatch.setattr("sppnet.detection.quality.Quality.mean_ap", 0.0)
    arguments = ("shapes", "--minutes", 0.05, "--backbone", tiny, "--out", "m.safetensors")
    said = sppnet("detect", "train", *arguments)
    assert said.status == 0
    assert "hardly anything is found on photos not learned from" in said.err
    assert "sppnet dataset shapes" in said.err
