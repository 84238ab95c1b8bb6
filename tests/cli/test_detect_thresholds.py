"""``sppnet detect thresholds`` and ``add-class``."""

import numpy as np
import pytest

from commands import QUICK, fails, succeeds
from sppnet.detection.detector import Detector
from trees import voc_tree


class TestThresholds:
    def test_shows(self, model):
        outcome = succeeds("detect", "thresholds", model)
        assert "On photos not learned from" in outcome.out
        assert all(f"{name}: " in outcome.out for name in ("disc", "square", "triangle"))

    def test_sets(self, model):
        outcome = succeeds(
            "detect", "thresholds", model, "--set", "disc=40, square=7.5", "--out", "m.safetensors"
        )
        assert "disc from 40 %" in outcome.out
        before, after = Detector.load(model), Detector.load("m.safetensors")
        np.testing.assert_allclose(after.thresholds_, [0.4, 0.075, before.thresholds_[2]])
        assert (after.fitted_.svms.weights == before.fitted_.svms.weights).all()
        assert (after.fitted_.quality.curve == before.fitted_.quality.curve).all()

    def test_of_a_precision(self, model):
        outcome = succeeds("detect", "thresholds", model, "--precision", "80", "--out", "m.safetensors")
        before, after = Detector.load(model), Detector.load("m.safetensors")
        for k, name in enumerate(before.classes_):
            expected = before.fitted_.quality.threshold_of(k, 0.8)
            if expected is None:
                assert f"{name}: no threshold is known" in outcome.err
                assert after.thresholds_[k] == before.thresholds_[k]
            else:
                assert after.thresholds_[k] == pytest.approx(expected)

    def test_learned_from_other_photos(self, model, data):
        succeeds("detect", "thresholds", model, data, "--split", "val", "--out", "m.safetensors")
        quality = Detector.load("m.safetensors").fitted_.quality
        assert 4 in quality.photos, "the photos of val"
        fails(
            *("detect", "thresholds", model, data, "--split", "train", "--out", "n.safetensors"),
            says=["fitted on 6 of these 6 photos", "expected others"],
        )

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (["--set", "disc=40"], ["without --out"]),
            (["--set", "disc", "--out", "m.safetensors"], ["--set disc", "such as cow=40"]),
            (["--set", "disc=many", "--out", "m.safetensors"], ["'disc=many'"]),
            (["--set", "cat=40", "--out", "m.safetensors"], ["'cat'", "disc, square, triangle"]),
            (["--set", "disc=140", "--out", "m.safetensors"], ["'disc=140'", "percents from 0 to 100"]),
        ],
    )
    def test_bad_options(self, model, options, says):
        fails("detect", "thresholds", model, *options, says=says)

    def test_less_than_a_percent_is_told(self, model):
        outcome = succeeds("detect", "thresholds", model, "--set", "disc=0.5", "--out", "m.safetensors")
        assert "note: --set is in percent: 0.5 is less than one in a hundred" in outcome.err

    def test_the_detector_itself_is_not_replaced(self, model, data):
        options = ("--classes", "cat", "--split", "train", "--out", model)
        says = [str(model), "found a file that is to be read"]
        fails("detect", "thresholds", model, "--set", "disc=40", "--out", model, says=says)
        fails("detect", "add-class", model, data, *options, says=says)


class TestAddClass:
    def test_others_stay(self, data):
        options = ("--split", "train", *QUICK)
        succeeds("detect", "train", data, "--classes", "disc,square", "--out", "two.safetensors", *options)
        outcome = succeeds(
            *("detect", "add-class", "two.safetensors", data, "--split", "train"),
            *("--classes", "triangle", "--out", "three.safetensors"),
        )
        assert "triangle: " in outcome.out
        assert "disc: " not in outcome.out, "only what is new is told"
        before, after = Detector.load("two.safetensors").fitted_, Detector.load("three.safetensors").fitted_
        assert after.classes == ("disc", "square", "triangle")
        assert (after.svms.weights[:2] == before.svms.weights).all()
        assert (after.thresholds[:2] == before.thresholds).all()
        assert (after.calibration.levels[:2] == before.calibration.levels).all()
        assert (after.quality.curve[:2] == before.quality.curve).all()
        assert after.objects[2] > 0
        assert after.quality.photos[2] > 0

    def test_class_that_is_there(self, model, data):
        fails(
            *("detect", "add-class", model, data, "--split", "train"),
            *("--classes", "disc", "--out", "m.safetensors"),
            says=["'disc' is already there"],
        )


class TestBadPhotos:
    def test_some_are_left_out(self, tmp_path):
        voc_tree(tmp_path / "voc", {"train": 6, "val": 2})
        victim = sorted((tmp_path / "voc" / "JPEGImages").iterdir())[0]
        whole = victim.read_bytes()
        victim.write_bytes(whole[: len(whole) // 3])
        options = ("--split", "train", *QUICK, "--out", "m.safetensors")
        outcome = succeeds("detect", "train", "voc", *options, "--max-bad", "20")
        assert "1 of 6 photos left out, unreadable" in outcome.err
        assert victim.name in outcome.err
        assert len(Detector.load("m.safetensors").fitted_.photos) == 5
        fails("detect", "train", "voc", *options, says=["1 of 6 photos that cannot be read", victim.name])
