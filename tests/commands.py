"""Commands run in this process, and what they leave behind."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from sppnet.cli import main

PROGRESS = (
    "Proposing windows",
    "Computing feature maps",
    "Fitting box regression",
    "Mining hard negatives",
    "Detecting",
    "Training",
    "Classifying",
    "Embedding",
    "Sampling",
    "Indexing",
    "Fitting SVMs",
)


class Outcome(NamedTuple):
    """How a command ended: its exit status and what it wrote."""

    status: int
    out: str
    err: str

    @property
    def said(self):
        """The lines on stderr, but for the progress bars and the notes on a dataset."""
        return [line for line in self.err.splitlines() if line and not line.startswith((*PROGRESS, "note: "))]


def sppnet(*arguments):
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["sppnet", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main()
    return Outcome(end.value.code, out.getvalue(), err.getvalue())


def succeeds(*arguments):
    outcome = sppnet(*arguments)
    assert outcome.status == 0, outcome.err
    assert not outcome.said
    return outcome


def fails(*arguments, says, status=1):
    """Run a command that must fail, say one line that holds each of `says`, and change no file."""
    before = content()
    outcome = sppnet(*arguments)
    assert outcome.status == status
    assert len(outcome.said) == 1, outcome.err
    line = outcome.said[0]
    assert line.startswith("sppnet: ")
    for text in says:
        assert str(text) in line
    assert content() == before


def content(folder="."):
    """Return what lies in a folder, the current one by default: bytes of files, None for folders."""
    return {
        str(path): path.read_bytes() if path.is_file() else None for path in sorted(Path(folder).rglob("*"))
    }


def same(*paths):
    """Return whether files are equal byte by byte."""
    return len({Path(path).read_bytes() for path in paths}) == 1


def read_json(path):
    """Read JSON as its standard has it, without NaN."""

    def refuse(name):
        raise AssertionError(f"{path} holds {name}")

    return json.loads(Path(path).read_text(), parse_constant=refuse)
