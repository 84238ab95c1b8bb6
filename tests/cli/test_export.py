"""``sppnet export``."""

from pathlib import Path

import pytest

from commands import fails, succeeds


class TestExport:
    def test_backbone(self):
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        options = ("--levels", "2,1", "--weights", "random", "--scales", "64")
        outcome = succeeds("export", "resnet18", "--out", "a.onnx", *options)
        assert "a.onnx: image -> features of resnet18" in outcome.out
        assert Path("a.onnx").stat().st_size > 10**7

    def test_bad_places(self, model):
        fails("export", model, "--out", "a.bin", says=["a.bin", "'.bin'", ".onnx"])
        fails(
            "export",
            "missing.safetensors",
            "--out",
            "a.onnx",
            says=["missing.safetensors: found no such file"],
        )
        fails("export", "nonsense", "--out", "a.onnx", says=["unknown backbone 'nonsense'"])
