"""Every benchmark starts, and the pages call it with options that it has."""

import re
import runpy
import sys

import pytest

from documents import PAGES, ROOT

SCRIPTS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if path.name != "common.py")


@pytest.fixture
def options(monkeypatch, capsys):
    """Return a function from a script to the options that its help names; it runs as a command would."""

    def find(script):
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
        assert not end.value.code
        usage = capsys.readouterr().out.split("options:", 1)[1]
        return set(re.findall(r"--[a-z0-9-]+", usage))

    return find


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
def test_a_benchmark_starts_and_has_the_options_that_pages_give_it(script, options):
    known = options(script)
    for page in (*PAGES, ROOT / "benchmarks" / script):
        for line in re.findall(
            rf"benchmarks/{script}\b((?:[^`#\n]|\\\n)*)", page.read_text(encoding="utf-8")
        ):
            assert set(re.findall(r"(?<!\S)--[a-z0-9-]+", line)) <= known, (page.name, line)
