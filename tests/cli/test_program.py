"""The program itself: its help, its version, its errors."""

import subprocess
import sys

import pytest

from commands import environment, sppnet, succeeds


class TestProgram:
    def test_help_is_light(self):
        heavy = ("torch", "numba", "cv2", "timm", "matplotlib", "openvino", "sklearn")
        code = (
            "import sys, sppnet\nfrom sppnet.cli import main\nsys.argv = ['sppnet', '--help']\n"
            f"try:\n    main()\nfinally:\n    print([m for m in {heavy} if m in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0
        assert done.stdout.splitlines()[-1] == "[]"
        assert all(command in done.stdout for command in ("demo", "propose", "detect"))

    @pytest.mark.parametrize("command", ["train", "run", "evaluate", "score"])
    def test_help_of_commands(self, command):
        assert "--json" in succeeds("detect", command, "--help").out or command == "train"

    def test_usage_error(self):
        outcome = sppnet("detect", "train", "data")
        assert outcome.status == 2
        assert "--out" in outcome.err
        assert "Traceback" not in outcome.err
