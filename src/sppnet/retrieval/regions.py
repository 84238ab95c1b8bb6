"""What is indexed of a folder of images: which images, and which regions of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from sppnet.arrays import Boxes, Pixels
from sppnet.errors import SppnetError
from sppnet.images import find_images, read_image
from sppnet.parallel import Runner, Staged, Threads
from sppnet.progress import Track
from sppnet.proposals.choosing import parse
from sppnet.proposals.method import Proposer
from sppnet.remote import stamp_of
from sppnet.retrieval.embedder import SAMPLE, Embedder, Vectors, named

# Images that are read, and their windows proposed, while the network is busy with another.
AHEAD = Threads(2)
_Prepared = tuple[Pixels, Boxes] | SppnetError | OSError
_Described = tuple[Boxes, Vectors] | SppnetError | OSError
# Regions of an image that teach a projection, where there are many images.
_TAUGHT = 8


@dataclass(frozen=True)
class Regions:
    """Which regions of an image are indexed: the whole, which comes first, and the best windows.

    Attributes
    ----------
    proposals : str
        Method that proposes windows, see `sppnet.proposals.parse`; ``"none"`` leaves the whole image alone.
    windows : int
        Most regions of an image.
    """

    proposals: str = "edge-boxes"
    windows: int = 60

    @cached_property
    def method(self) -> Proposer | None:
        """What proposes the windows, if anything does."""
        return None if self.proposals == "none" else parse(self.proposals)

    def __str__(self) -> str:
        return f"{self.proposals}, at most {self.windows}"

    def __call__(self, image: Pixels) -> Boxes:
        """Return the (R, 4) float32 regions of an (H, W, 3) uint8 RGB image, in its pixels."""
        if self.method is None:
            return np.array([[0, 0, image.shape[1], image.shape[0]]], np.float32)
        return self.method(image).boxes[: self.windows]


def image_stamps(folder: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the names of the images in a folder, at any depth, each with a text that changes when it does.

    What is left out is told by the notes that come with them.

    Raises
    ------
    SppnetError
        If there is no such folder, or no image in it.
    """
    if folder.is_file():
        raise SppnetError(f"{folder}: found a file, expected a folder of images")
    stamps = {}
    paths, notes = find_images([folder])
    for path in paths:
        stamps[str(path.relative_to(folder))] = stamp_of(path)
    return stamps, notes


def changes(
    known: Mapping[str, str], found: Mapping[str, str]
) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    """Compare images of an index with those of a folder, by name and stamp.

    Returns
    -------
    (list of str, list of str, list of str)
        Names of the new, the changed and the gone, in order.
    """
    new = [name for name in found if name not in known]
    changed = [name for name in found if name in known and known[name] != found[name]]
    return new, changed, [name for name in known if name not in found]


@dataclass(frozen=True)
class Describing:
    """The work of an index on an image: its regions and their vectors, or the error that it gave.

    Attributes
    ----------
    embedder : Embedder
        Makes the vectors.
    regions : Regions
        Chooses the regions.
    most : int, optional
        About so many of the regions, evenly from the best to the last; by default all.
    """

    embedder: Embedder
    regions: Regions
    most: int | None = None

    def open(self) -> Staged[Path, _Prepared, _Described]:
        """Return what reads an image and chooses its regions, and then embeds them."""
        return Staged(self._prepare, self._embed)

    def _prepare(self, path: Path) -> _Prepared:
        try:
            pixels = read_image(path)
            boxes = self.regions(pixels)
        except (SppnetError, OSError) as error:
            return named(error, path)
        step = 1 if self.most is None else max(1, len(boxes) // self.most)
        return pixels, boxes[::step]

    def _embed(self, prepared: _Prepared) -> _Described:
        if isinstance(prepared, Exception):
            return prepared
        pixels, boxes = prepared
        return boxes, self.embedder(pixels, boxes)


def fitted_on_regions(
    embedder: Embedder, paths: Sequence[Path], regions: Regions, track: Track, runner: Runner = AHEAD
) -> Embedder:
    """Return an embedder of the same settings whose projection is learned from regions of some of the images.

    One that has nothing to learn, or has learned, is returned as it is.

    Raises
    ------
    SppnetError, OSError
        If none of the images can be read: what the first gave. If there are fewer regions than components.
    """
    if embedder.__sklearn_is_fitted__():
        return embedder
    order = np.random.default_rng(embedder.seed).permutation(len(paths))[: SAMPLE // _TAUGHT]
    chosen = [paths[i] for i in order.tolist()]
    work = Describing(embedder.unprojected(), regions, -(-SAMPLE // len(chosen)))
    rows: list[Vectors] = []
    failures: list[SppnetError | OSError] = []
    for _, found in zip(track(chosen, "Sampling"), runner.stream(work, chosen), strict=True):
        if isinstance(found, Exception):
            failures.append(found)
        else:
            rows.append(found[1])
    if not rows:
        raise failures[0]
    return Embedder(**embedder.get_params()).fit_vectors(rows)
