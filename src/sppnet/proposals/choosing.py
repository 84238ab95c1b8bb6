"""Methods by name, and several of them as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from sppnet.arrays import Pixels
from sppnet.boxes import Windows
from sppnet.errors import SppnetError
from sppnet.features.encoded import EncodedImage
from sppnet.proposals.dense import DenseWindows
from sppnet.proposals.edge_boxes import EdgeBoxes
from sppnet.proposals.file import read_windows
from sppnet.proposals.method import Proposer, ranked
from sppnet.proposals.selective_search import SelectiveSearch


@dataclass(frozen=True)
class Combined(Proposer):
    """The windows of several methods, merged by rank, in proportion to their numbers.

    Attributes
    ----------
    methods : tuple of Proposer
        The methods, at least one.
    """

    methods: tuple[Proposer, ...]

    def __call__(self, image: Pixels, encoded: EncodedImage | None = None) -> Windows:
        """Propose windows for one image, each method as `sppnet.proposals.method.Proposer` says."""
        boxes, scores = zip(*(method(image, encoded) for method in self.methods), strict=True)
        order = np.argsort(-np.concatenate(scores), kind="stable")
        return ranked(np.concatenate(boxes)[order], image.shape[:2])


METHODS: Mapping[str, Proposer] = {
    "selective-search": SelectiveSearch(),
    "selective-search-quality": SelectiveSearch(side=200, k=(100, 250), min_segment=50),
    "edge-boxes": EdgeBoxes(),
    "dense": DenseWindows(),
}
"""The methods that `parse` knows by name."""


def parse(text: str) -> Proposer:
    """Return the method that a text names.

    Parameters
    ----------
    text : str
        A name in `METHODS`, several joined by ``+``, or the path of a file that `write_windows` wrote, which
        ends in ``.npz``.

    Raises
    ------
    SppnetError
        If it is none of these, or the file is not what it should be.
    FileNotFoundError
        If there is no such file.
    """
    if text.endswith(".npz"):
        path = Path(text)
        if not path.is_file():
            raise FileNotFoundError(f"{text}: found no such file, expected windows that sppnet propose wrote")
        return _from_file(text, path.stat().st_mtime_ns)
    names = text.split("+")
    if not set(names) <= METHODS.keys():
        raise SppnetError(
            f"found the proposal method {text!r}, "
            f"expected {', '.join(METHODS)}, several joined by +, or a .npz file of windows"
        )
    methods = tuple(METHODS[name] for name in names)
    return methods[0] if len(methods) == 1 else Combined(methods)


@lru_cache(maxsize=4)
def _from_file(path: str, _: int) -> Proposer:
    """Return the windows of a file, read once until it changes."""
    return read_windows(path)
