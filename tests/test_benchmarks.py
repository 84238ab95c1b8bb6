"""Every benchmark starts, and the pages call it with options that it has."""

import re
import subprocess
import sys
from functools import cache

import pytest

from documents import PAGES, ROOT

SCRIPTS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if path.name != "common.py")


@cache
def options(script):
    """Return the options that a script's help names."""
    call = [sys.executable, ROOT / "benchmarks" / script, "--help"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    usage = done.stdout.split("options:", 1)[1]
    return set(re.findall(r"--[a-z0-9-]+", usage))


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
def test_a_benchmark_starts_and_has_the_options_that_pages_give_it(script):
    known = options(script)
    for page in (*PAGES, ROOT / "benchmarks" / script):
        for line in re.findall(
            rf"benchmarks/{script}\b((?:[^`#\n]|\\\n)*)", page.read_text(encoding="utf-8")
        ):
            assert set(re.findall(r"(?<!\S)--[a-z0-9-]+", line)) <= known, (page.name, line)
