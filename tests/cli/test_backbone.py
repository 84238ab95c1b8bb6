import sys
from pathlib import Path

import numpy as np
import pytest

from commands import fails, succeeds
from sppnet.features.backbone import Backbone

SMALL = "test_efficientnet"


def test_a_backbone_is_made_and_says_what_it_is():
    outcome = succeeds("backbone", "make", SMALL, "--weights", "random", "--out", "a.onnx")
    assert "a.onnx: test_efficientnet, stages 1 of 16 channels, 2 of 24" in outcome.out
    assert "output strides 32, 16, 8" in outcome.out
    assert "weights: random" in outcome.out
    (maps,) = Backbone("a.onnx").encode(np.zeros((40, 60, 3), np.uint8), (64,)).scales
    assert maps.stages[0].shape == (256, 4, 6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--out", "a.bin"), ("a.bin: found the suffix '.bin', expected .onnx",)),
        (("--out", "none/a.onnx"), ("none/a.onnx: cannot write",)),
        (("--out", "a.onnx", "--pretrained", "--weights", "b.pth"), ("--pretrained and --weights b.pth",)),
        (("--out", "a.onnx", "--weights", "b.pth"), ("b.pth: weights file not found",)),
        (("--out", "a.onnx"), ("no weights are installed for 'test_efficientnet'",)),
    ],
)
def test_what_makes_no_backbone(arguments, says):
    fails("backbone", "make", SMALL, *arguments, says=says)


def test_a_name_that_no_network_has():
    fails("backbone", "make", "resnet5000", "--out", "a.onnx", says=("unknown backbone 'resnet5000'",))


def test_without_pytorch_one_line_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    fails("backbone", "make", SMALL, "--out", "a.onnx", says=("making a backbone needs", "sppnet[torch]"))
    assert not Path("a.onnx").exists()
