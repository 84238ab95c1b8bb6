"""Python code in a process of its own, such as one in which PyTorch is not installed."""

import os
import subprocess
import sys

BARRED = ("torch", "torchvision", "timm", "lightning_fabric")

# Whoever looks for these packages finds none, as if they were not there.
_BAR = f"""
import sys

class Barring:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in {BARRED} else self.finder.find_spec(name, *rest)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Barring, sys.meta_path)
"""


def without_pytorch(code, *arguments, patience=250):
    """Run code where PyTorch and what builds on it cannot be imported; return what it printed.

    It may take `patience` seconds.
    """
    command = [sys.executable, "-c", _BAR + code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
