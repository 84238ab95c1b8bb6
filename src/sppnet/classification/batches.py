"""Batches for training: single size, alternating sizes, a random size, or whole images of their own sizes.

Every source has the same form: ``source.epoch(number)`` iterates over the batches of an epoch, always the
same ones for the same number, so that training can go on from any batch (paper sections 2.3 and 3.1).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sppnet.arrays import IntArray, Pixels
from sppnet.classification.augment import (
    MARGIN,
    Components,
    central_crop,
    colour_components,
    random_crop,
    random_whole,
)
from sppnet.errors import SppnetError
from sppnet.images import image_size, read_image, shorter_side_size
from sppnet.pooling.padded import SizeBucketSampler, pad_batch

Images = Sequence[tuple[Path, int]]
Reader = Callable[[Path], Pixels]

_SAMPLE = 500


class Batch(NamedTuple):
    """Labelled images that go through a network together.

    Attributes
    ----------
    images : (N, 3, H, W) uint8 tensor
        RGB, channels last in memory.
    labels : (N,) int64 tensor
    sizes : (N, 2) int64 tensor or None
        True heights and widths where the images are padded below and on the right.
    names : list of Path
        The files.
    unreadable : list of str
        A line for each file that should be here and could not be read.
    """

    images: Tensor
    labels: Tensor
    sizes: Tensor | None
    names: list[Path]
    unreadable: list[str]


class Source(Protocol):
    """Batches by epoch."""

    @property
    def batch_size(self) -> int:
        """Most images of a batch over all processes."""

    def __len__(self) -> int:
        """Return the number of batches of an epoch in this process."""

    def size_of(self, number: int) -> int:
        """Return the size of the images of an epoch: their side, or their shorter side."""

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
        return Batch(nothing, torch.zeros(0, dtype=torch.int64), None, [], unreadable)
    pictures = [torch.from_numpy(pixels).permute(2, 0, 1) for pixels, _, _ in read]
    labels, names = torch.tensor([label for _, label, _ in read]), [path for _, _, path in read]
    if len({picture.shape for picture in pictures}) == 1:
        together = torch.from_numpy(np.stack([pixels for pixels, _, _ in read]))
        return Batch(together.permute(0, 3, 1, 2), labels, None, names, unreadable)
    padded, sizes = pad_batch(pictures)
    return Batch(padded.contiguous(memory_format=torch.channels_last), labels, sizes, names, unreadable)


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


class _Batches:
    """What both sources share: their arguments, the size of an epoch, reading from any batch on."""

    def __init__(
        self,
        images: Images,
        batch_size: int,
        sizes: Sequence[int] = (224,),
        *,
        uniform: bool = False,
        components: Components | None = None,
        seed: int = 0,
        workers: int = 0,
        read: Reader = read_image,
        world: int = 1,
        rank: int = 0,
    ) -> None:
        if not sizes or min(sizes) < 1:
            raise SppnetError(f"expected sizes from 1 up, found {sizes}")
        if batch_size < world or batch_size % world:
            raise SppnetError(f"found batches of {batch_size}, expected a multiple of the {world} processes")
        if len(images) < batch_size:
            raise SppnetError(f"found {len(images)} images, expected at least a batch of {batch_size}")
        self.images, self.batch_size, self.sizes, self.uniform = images, batch_size, tuple(sizes), uniform
        self.components, self.seed, self.workers, self.read = components, seed, workers, read
        self.world, self.rank = world, rank

    def size_of(self, number: int) -> int:
        """Return the size of an epoch, one of `sizes` or, if `uniform`, anything between them."""
        if not self.uniform:
            return self.sizes[number % len(self.sizes)]
        rng = np.random.default_rng((self.seed, number, len(self.images)))
        return int(rng.integers(min(self.sizes), max(self.sizes) + 1))

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of an epoch from batch `start` on."""
        # Not a lambda: worker processes that do not fork get it by pickle.
        alter = partial(self._alter, number, self.size_of(number))
        examples = _Examples(self.images, self.read, alter)
        return _load(examples, self._plan(number)[start:], self.workers)

    def _plan(self, number: int) -> list[list[int]]:
        """Return which images form the batches of an epoch in this process."""
        raise NotImplementedError

    def _alter(self, number: int, size: int, pixels: Pixels, index: int) -> Pixels:
        """Return what an epoch makes of the pixels of an image, given its size and the image's index."""
        raise NotImplementedError


class CropBatches(_Batches):
    """Square crops of one size in an epoch: always the same, alternating, or drawn anew (paper section 2.3).

    Parameters
    ----------
    images : sequence of (path, label)
    batch_size : int
        Images of a batch over all processes. The last images of an epoch that fill no batch are left out.
    sizes : sequence of int
        The epochs take turns among these; the largest is that of the crop, which is resized to the others.
    uniform : bool
        Draw the size of each epoch from the least to the largest of `sizes` instead.
    components : (3, 3) array, optional
        Colour components, from `sample_components`; without them colours stay.
    seed : int
        Of order, crops, flips, light and sizes.
    workers : int
        Processes that read; 0 reads in this one. A script that uses some must guard what it does by
        ``if __name__ == "__main__":``, as for all processes that are not copies.
    read : callable
        Path to pixels.
    world, rank : int
        How many processes train together, and which one this is.
    """

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def _plan(self, number: int) -> list[list[int]]:
        order = np.random.default_rng((self.seed, number)).permutation(len(self.images))
        batches = order[: len(self) * self.batch_size].reshape(len(self), self.batch_size)
        plan: list[list[int]] = batches[:, self.rank :: self.world].tolist()
        return plan

    def _alter(self, number: int, size: int, pixels: Pixels, index: int) -> Pixels:
        rng = np.random.default_rng((self.seed, number, index))
        return random_crop(pixels, max(self.sizes), size, self.components, rng)


class WholeBatches(_Batches):
    """Whole images in their own aspect ratios, padded to the largest of their batch (beyond the paper).

    Parameters
    ----------
    sizes : sequence of int
        Of crops that show as much: shorter sides are 256 / 224 of these. The epochs take turns.
    images, batch_size, uniform, components, seed, workers, read, world, rank
        As for `CropBatches`; images of similar size form a batch, so some are smaller.
    """

    def __len__(self) -> int:
        return len(self._sampler)

    def _plan(self, number: int) -> list[list[int]]:
        self._sampler.set_epoch(number)
        return list(self._sampler)

    def _alter(self, number: int, size: int, pixels: Pixels, index: int) -> Pixels:
        rng = np.random.default_rng((self.seed, number, index))
        return random_whole(pixels, round(size * MARGIN), self.components, rng)

    @cached_property
    def _shapes(self) -> IntArray:
        """Heights and widths of the files, from their headers; 1 x 1 where there is none to read."""

        def shape(index: int) -> tuple[int, int]:
            try:
                return image_size(self.images[index][0])
            except (SppnetError, OSError):
                return 1, 1  # The epoch that meets it will name it.

        with ThreadPoolExecutor() as pool:
            return np.array(list(pool.map(shape, range(len(self.images)))))

    @cached_property
    def _sampler(self) -> SizeBucketSampler:
        # The number of batches must not depend on the epoch's size: buckets are those of the largest.
        side = round(max(self.sizes) * MARGIN)
        shapes = [shorter_side_size(height, width, side) for height, width in self._shapes.tolist()]
        share = self.batch_size // self.world
        return SizeBucketSampler(shapes, share, seed=self.seed, num_replicas=self.world, rank=self.rank)


class CentralCrops:
    """Every image once, in order, in its central view: what a validation sees (paper section 3.1).

    Parameters
    ----------
    images : sequence of (path, label)
    batch_size : int
        Images of a batch in each process.
    size : int
        Side of the view; the shorter side of the image is 256 / 224 of it.
    workers, read, world, rank
        As for `CropBatches`.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        size: int = 224,
        *,
        workers: int = 0,
        read: Reader = read_image,
        world: int = 1,
        rank: int = 0,
    ) -> None:
        self.images, self.batch_size, self.size = images, batch_size, size
        self.workers, self.read, self.world, self.rank = workers, read, world, rank

    def __iter__(self) -> Iterator[Batch]:
        examples = _Examples(self.images, self.read, self._crop)
        share = range(self.rank, len(self.images), self.world)
        batches = [[*share[i : i + self.batch_size]] for i in range(0, len(share), self.batch_size)]
        return _load(examples, batches, self.workers)

    def _crop(self, pixels: Pixels, _: int) -> Pixels:
        return central_crop(pixels, self.size)
