"""Compiled functions are kept on disk, but never longer than what they were compiled from."""

import importlib.util
import subprocess
import sys

KERNEL = """
import step
from sppnet.compiling import compiled

@compiled("i8()", inlined=(step.__file__,))
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


RECORD = """
from typing import NamedTuple
from numba import types
from sppnet.compiling import compiled, record

class NAME(NamedTuple):
    value: int

@compiled(types.int64(record(NAME, types.int64)))
def number(given):
    return given.value + 1
"""


def test_a_record_that_gets_another_name_is_noticed(tmp_path):
    # Each in a process of its own. Python itself tells files of one second by their size.
    for name, hits in (("Before", 0), ("After", 0), ("After", 1)):
        (tmp_path / "records.py").write_text(RECORD.replace("NAME", name))
        ask = f"import records as r; print(r.number(r.{name}(4)), sum(r.number.stats.cache_hits.values()))"
        found = subprocess.run([sys.executable, "-c", ask], cwd=tmp_path, capture_output=True, text=True)
        assert found.stdout.split() == ["5", str(hits)], found.stderr


ANNOUNCED = """
from sppnet import compiling
told = []
compiling.announce = told.append

@compiling.compiled()
def twice(number):
    return 2 * number

@compiling.compiled()
def thrice(number):
    return 3 * number

print(twice(1), twice(1.5), thrice(1), *told)
"""


def test_compiling_is_told_once_and_loading_is_not(tmp_path):
    (tmp_path / "announced.py").write_text(ANNOUNCED)
    for text in (" compiling kernels for this processor, once: it takes some seconds", ""):
        ask = [sys.executable, "announced.py"]
        found = subprocess.run(ask, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert found.stdout == f"2 3.0 3{text}\n", found.stderr


WITHOUT_SCIPY = """
import sys
import numpy as np
from sppnet.pooling import spatial_pyramid
spatial_pyramid(np.ones((1, 2, 2), np.float32))
before = "scipy.linalg" in sys.modules
import numba
dot = numba.njit(lambda a: np.dot(a, a))
print(before, dot(np.ones(3)), numba.njit(lambda a: np.cov(a))(np.eye(2)).shape)
"""


def test_kernels_need_no_scipy_but_others_may():
    found = subprocess.run([sys.executable, "-c", WITHOUT_SCIPY], capture_output=True, text=True, check=False)
    assert found.stdout == "False 3.0 (2, 2)\n", found.stderr
