"""Python code in a process of its own, such as one in which PyTorch is not installed."""

import subprocess
import sys

BARRED = ("torch", "torchvision", "timm", "lightning_fabric")


def without_pytorch(code, *arguments):
    """Run code where PyTorch and what builds on it cannot be imported; return what it printed."""
    barred = f"import sys\nfor name in {BARRED}: sys.modules[name] = None\n"
    command = [sys.executable, "-c", barred + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout
