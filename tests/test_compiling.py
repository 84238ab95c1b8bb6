"""Compiled functions are kept on disk, but never longer than what they were compiled from."""

import importlib.util
import sys

KERNEL = """
import step
from sppnet.compiling import compiled

@compiled("i8()", inlined=step.__file__)
def number():
    return step.NUMBER
"""


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_change_of_what_is_inlined_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "kernel.py").write_text(KERNEL)
    # Kernel and cache stay; numba itself looks at the kernel's file only.
    for value, hits in ((1, 0), (1, 1), (2, 0), (1, 1)):
        (tmp_path / "step.py").write_text(f"NUMBER = {value}\n")
        monkeypatch.setitem(sys.modules, "step", loaded(tmp_path / "step.py"))
        number = loaded(tmp_path / "kernel.py").number
        assert number() == value
        assert sum(number.stats.cache_hits.values()) == hits
