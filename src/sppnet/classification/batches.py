"""Batches for training: one size, alternating sizes, or a random size.

Every source has the same form: ``source.epoch(number)`` iterates over the batches of an epoch, always the
same ones for the same number, so that training can go on from any batch (paper sections 2.3 and 3.1).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sppnet.arrays import Pixels
from sppnet.classification.augment import Components, central_crop, colour_components, random_crop
from sppnet.errors import SppnetError
from sppnet.images import read_image

Images = Sequence[tuple[Path, int]]
Reader = Callable[[Path], Pixels]

_SAMPLE = 500


class Batch(NamedTuple):
    """Labelled images that go through a network together.

    Attributes
    ----------
    images : (N, 3, H, W) uint8 tensor
        Pixels in RGB, channels last in memory.
    labels : (N,) int64 tensor
        Place of each image's class in the list of classes.
    names : list of Path
        The files.
    unreadable : list of str
        A line for each file that should be here and could not be read.
    """

    images: Tensor
    labels: Tensor
    names: list[Path]
    unreadable: list[str]


@dataclass(frozen=True)
class Reading:
    """How files become pixels, and which process reads which of them.

    Attributes
    ----------
    workers : int
        Processes that read; 0 reads in this one. A script that uses some must guard what it does by
        ``if __name__ == "__main__":``, as for all processes that are not copies.
    read : callable
        Takes a path and returns pixels.
    world, rank : int
        How many processes train together, and which one this is.
    """

    workers: int = 0
    read: Reader = read_image
    world: int = 1
    rank: int = 0


ALONE = Reading()
"""One process that reads its files itself."""


class Source(Protocol):
    """Batches by epoch."""

    @property
    def batch_size(self) -> int:
        """Most images of a batch over all processes."""

    def __len__(self) -> int:
        """Return the number of batches of an epoch in this process."""

    def side_of(self, number: int) -> int:
        """Return the side of the images of an epoch in pixels."""

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of an epoch from batch `start` on."""


class _Examples(Dataset[tuple[Pixels | str, int, Path]]):
    """Images of one epoch, each altered as the seed, the epoch and its place in the list determine."""

    def __init__(self, images: Images, read: Reader, alter: Callable[[Pixels, int], Pixels]) -> None:
        self.images, self.read, self.alter = images, read, alter

    def __getitem__(self, index: int) -> tuple[Pixels | str, int, Path]:
        path, label = self.images[index]
        try:
            return self.alter(self.read(path), index), label, path
        except (SppnetError, OSError) as error:
            return str(error), label, path


def _collate(examples: Sequence[tuple[Pixels | str, int, Path]]) -> Batch:
    unreadable = [content for content, _, _ in examples if isinstance(content, str)]
    read = [(content, label, path) for content, label, path in examples if not isinstance(content, str)]
    if not read:
        nothing = torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
        return Batch(nothing, torch.zeros(0, dtype=torch.int64), [], unreadable)
    pixels, labels, names = zip(*read, strict=True)
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return Batch(images, torch.tensor(labels), list(names), unreadable)


def _one_thread(_: int) -> None:
    cv2.setNumThreads(1)


@cache
def _processes() -> multiprocessing.context.BaseContext:
    """Return how worker processes begin: from a clean server, not from a copy of this process.

    A copy has the thread pools of OpenCV and OpenMP without their threads, and waits for them forever.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _load(examples: _Examples, batches: list[list[int]], workers: int) -> Iterator[Batch]:
    # A fixed, empty generator: a loader would draw its seed from the one that dropout draws from.
    yield from DataLoader(
        examples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_one_thread,
        generator=torch.Generator(),
        multiprocessing_context=_processes() if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def sample_components(images: Images, read: Reader = read_image, seed: int = 0) -> Components:
    """Return the colour components of up to 500 random images; unreadable ones are left out."""
    chosen = np.random.default_rng(seed).permutation(len(images))[:_SAMPLE]

    def attempt(index: int) -> Pixels | None:
        try:
            return read(images[index][0])
        except (SppnetError, OSError):
            return None  # The epoch that meets it will name it.

    with ThreadPoolExecutor() as pool:
        pictures = [p for p in pool.map(attempt, chosen.tolist()) if p is not None]
    if not pictures:
        raise SppnetError(f"could not read any of {len(chosen)} images, first {images[int(chosen[0])][0]}")
    return colour_components(pictures)


class CropBatches:
    """Square crops of one side in an epoch: always the same, alternating, or drawn anew (paper section 2.3).

    Parameters
    ----------
    images : sequence of (path, label)
        What to learn from.
    batch_size : int
        Images of a batch over all processes. The last images of an epoch that fill no batch are left out.
    scales : sequence of int
        Sides in pixels. The epochs take turns among them; the largest is that of the crop, which is resized
        to the others.
    uniform : bool
        Whether the side of each epoch is drawn from the least to the largest of `scales` instead.
    components : (3, 3) array, optional
        Colour components, from `sample_components`; without them colours stay.
    seed : int
        Seed of the order, crops, flips, light and sides.
    reading : Reading
        How files are read, and by how many processes.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        scales: Sequence[int] = (224,),
        *,
        uniform: bool = False,
        components: Components | None = None,
        seed: int = 0,
        reading: Reading = ALONE,
    ) -> None:
        if not scales or min(scales) < 1:
            raise SppnetError(f"expected scales from 1 up, found {scales}")
        if batch_size < reading.world or batch_size % reading.world:
            raise SppnetError(
                f"found batches of {batch_size}, expected a multiple of the {reading.world} processes"
            )
        if len(images) < batch_size:
            raise SppnetError(f"found {len(images)} images, expected at least a batch of {batch_size}")
        self.images, self.batch_size, self.scales, self.uniform = images, batch_size, tuple(scales), uniform
        self.components, self.seed, self.reading = components, seed, reading

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def side_of(self, number: int) -> int:
        """Return the side of an epoch, one of `scales` or, if `uniform`, anything between them."""
        if not self.uniform:
            return self.scales[number % len(self.scales)]
        rng = np.random.default_rng((self.seed, number, len(self.images)))
        return int(rng.integers(min(self.scales), max(self.scales) + 1))

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of an epoch from batch `start` on."""
        # Not a lambda: worker processes that do not fork get it by pickle.
        alter = partial(self._alter, number, self.side_of(number))
        examples = _Examples(self.images, self.reading.read, alter)
        return _load(examples, self._plan(number)[start:], self.reading.workers)

    def _plan(self, number: int) -> list[list[int]]:
        """Return which images form the batches of an epoch in this process."""
        order = np.random.default_rng((self.seed, number)).permutation(len(self.images))
        batches = order[: len(self) * self.batch_size].reshape(len(self), self.batch_size)
        plan: list[list[int]] = batches[:, self.reading.rank :: self.reading.world].tolist()
        return plan

    def _alter(self, number: int, side: int, pixels: Pixels, index: int) -> Pixels:
        """Return what an epoch makes of the pixels of an image, given its side and the image's index."""
        rng = np.random.default_rng((self.seed, number, index))
        return random_crop(pixels, max(self.scales), side, self.components, rng)


class CentralCrops:
    """Every image once, in order, in its central view: what a validation sees (paper section 3.1).

    Parameters
    ----------
    images : sequence of (path, label)
        What to measure on.
    batch_size : int
        Images of a batch in each process.
    size : int
        Side of the view in pixels; the shorter side of the image is 256 / 224 of it.
    reading : Reading
        How files are read, and by how many processes.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        size: int = 224,
        reading: Reading = ALONE,
    ) -> None:
        self.images, self.batch_size, self.size, self.reading = images, batch_size, size, reading

    def __iter__(self) -> Iterator[Batch]:
        examples = _Examples(self.images, self.reading.read, self._crop)
        share = range(self.reading.rank, len(self.images), self.reading.world)
        batches = [[*share[i : i + self.batch_size]] for i in range(0, len(share), self.batch_size)]
        return _load(examples, batches, self.reading.workers)

    def _crop(self, pixels: Pixels, _: int) -> Pixels:
        return central_crop(pixels, self.size)
