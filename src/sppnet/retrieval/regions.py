"""What is indexed of a folder of images: which images, and which regions of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from sppnet.arrays import Boxes, Pixels
from sppnet.errors import SppnetError
from sppnet.images import find_images, read_image
from sppnet.parallel import in_order
from sppnet.progress import Track
from sppnet.proposals.choosing import parse
from sppnet.proposals.method import Proposer
from sppnet.retrieval.embedder import SAMPLE, Embedder, Vectors, named

# Images that are read, and their windows proposed, while the network is busy with another.
_AHEAD = 2
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
        facts = path.stat()
        stamps[str(path.relative_to(folder))] = f"{facts.st_size} {facts.st_mtime_ns}"
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


def prepared(
    paths: Sequence[Path], regions: Regions
) -> Iterator[tuple[Pixels, Boxes] | SppnetError | OSError]:
    """Yield each image with its regions, or the error that it gave; the next ones are prepared meanwhile."""

    def prepare(path: Path) -> tuple[Pixels, Boxes] | SppnetError | OSError:
        try:
            pixels = read_image(path)
            return pixels, regions(pixels)
        except (SppnetError, OSError) as error:
            return named(error, path)

    return in_order(prepare, paths, _AHEAD)


def fitted_on_regions(embedder: Embedder, paths: Sequence[Path], regions: Regions, track: Track) -> Embedder:
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
    chosen, raw = [paths[i] for i in order.tolist()], embedder.unprojected()
    each = -(-SAMPLE // len(chosen))
    rows: list[Vectors] = []
    failures: list[SppnetError | OSError] = []
    for _, found in zip(track(chosen, "Sampling"), prepared(chosen, regions), strict=True):
        if isinstance(found, Exception):
            failures.append(found)
        else:
            pixels, boxes = found
            rows.append(raw(pixels, boxes[:: max(1, len(boxes) // each)]))
    if not rows:
        raise failures[0]
    return Embedder(**embedder.get_params()).fit_vectors(rows)
