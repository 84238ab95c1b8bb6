"""Maps or images of different sizes in one batch.

Those of similar size are put together (`SizeBucketSampler`) and padded below and on the right (`pad_batch`);
`SpatialPyramidPooling` takes the true sizes and gives each map the vector that it has alone::

    loader = DataLoader(maps, batch_sampler=SizeBucketSampler(sizes, 32), collate_fn=collate_padded)
    for (batch, sizes), labels in loader:
        vectors = pool(batch, sizes)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Sampler, default_collate

from sppnet.arrays import IntArray
from sppnet.errors import SppnetError
from sppnet.pooling.checks import described


def pad_batch(images: Sequence[Tensor], multiple: int = 1, value: float = 0.0) -> tuple[Tensor, Tensor]:
    """Put images of different sizes into one batch, padded below and on the right.

    Parameters
    ----------
    images : sequence of (C, H_i, W_i) tensors
        Of one number of channels, one dtype, on one device.
    multiple : int
        Height and width of the batch are rounded up to multiples of it.
    value : float
        What the padding holds.

    Returns
    -------
    batch : (N, C, H, W) tensor
    sizes : (N, 2) int64 tensor
        True height and width of each image, on the CPU.

    Raises
    ------
    SppnetError
        If there are no images, or they are not as described, or `multiple` is below 1.
    """
    if len(images) == 0 or multiple < 1:
        raise SppnetError(f"expected images and a multiple from 1 up, found {len(images)} and {multiple}")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor) or image.ndim != 3 or 0 in image.shape:
            raise SppnetError(
                f"image {i} must be a tensor (C, H, W) with no side of 0, found {described(image)}"
            )
        kind, first = (f"{m.shape[0]} channels of {m.dtype} on {m.device}" for m in (image, images[0]))
        if kind != first:
            raise SppnetError(f"images must be of one kind, found {kind} for image {i}, {first} for image 0")
    sizes = torch.tensor([image.shape[1:] for image in images])
    height, width = (-(-side // multiple) * multiple for side in sizes.amax(dim=0).tolist())
    batch = images[0].new_full((len(images), len(images[0]), height, width), value)
    for i, image in enumerate(images):
        batch[i, :, : image.shape[1], : image.shape[2]] = image
    return batch, sizes


def collate_padded(
    samples: Sequence[tuple[Tensor, Any]], multiple: int = 1, value: float = 0.0
) -> tuple[tuple[Tensor, Tensor], Any]:
    """Collate samples of a `DataLoader` whose images differ in size.

    Parameters
    ----------
    samples : sequence of (image, label)
        Images are tensors (C, H_i, W_i); labels are whatever `torch.utils.data.default_collate` takes.
    multiple, value
        As in `pad_batch`.

    Returns
    -------
    (batch, sizes), labels
        Batch and sizes from `pad_batch`, and the labels as one value.
    """
    images, labels = zip(*samples, strict=True)
    return pad_batch(images, multiple, value), default_collate(list(labels))


class SizeBucketSampler(Sampler[list[int]]):
    """Batches of images of similar size, for the `batch_sampler` of a `DataLoader`.

    Images are divided in two by height or width, whichever differs more, until the largest height and width
    of a bucket pad no image of it by more than `max_waste`. A batch comes from one bucket; the batches of a
    bucket differ by at most one image. Their number is the same in every epoch and on every rank.

    Parameters
    ----------
    sizes : (n, 2) integers
        Height and width of every image.
    batch_size : int
        Most images of a batch.
    shuffle : bool
        Draw other batches, in another order, in every epoch, as `seed` and the epoch determine.
    seed : int
        Seed of every random draw.
    drop_last : bool
        Leave out images that fill no batch of their bucket, and batches that not every rank gets. Otherwise
        the first batches come again at the end, until every rank has as many.
    max_waste : float
        Largest share of padding in the area that an image takes in its batch. With 0 only images of equal
        size meet, and there is no padding.
    num_replicas, rank : int
        How many processes share the batches, and which of them this is.

    Attributes
    ----------
    buckets : list of int64 arrays
        The numbers of the images of similar size.
    epoch : int
        The epoch whose batches are drawn; see `set_epoch`.

    Raises
    ------
    SppnetError
        If an argument is not as described.
    """

    def __init__(
        self,
        sizes: ArrayLike,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        max_waste: float = 0.2,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        sides = np.asarray(sizes)
        if sides.shape[1:] != (2,) or not sides.size or sides.dtype.kind not in "iu" or sides.min() < 1:
            raise SppnetError(f"sizes must be (n, 2) integers from 1 up, found {sides.dtype} {sides.shape}")
        if batch_size < 1 or not 0 <= max_waste < 1 or not 0 <= rank < num_replicas:
            found = f"{batch_size}, {max_waste}, {rank} and {num_replicas}"
            raise SppnetError(
                f"need batch_size > 0, 0 <= max_waste < 1, 0 <= rank < num_replicas, found {found}"
            )
        self.batch_size, self.shuffle, self.seed, self.drop_last = batch_size, shuffle, seed, drop_last
        self.num_replicas, self.rank, self.epoch = num_replicas, rank, 0
        self.buckets = _similar(sides.astype(np.int64), max_waste)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches the next iteration draws."""
        self.epoch = epoch

    def _cut(self, bucket: IntArray) -> list[IntArray]:
        full, rest = divmod(len(bucket), self.batch_size)
        if not self.drop_last:
            return np.array_split(bucket, full + (rest > 0))
        return np.array_split(bucket[: len(bucket) - rest], full) if full else []

    def __len__(self) -> int:
        count = sum(len(self._cut(bucket)) for bucket in self.buckets)
        return count // self.num_replicas if self.drop_last else -(-count // self.num_replicas)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        buckets = [rng.permutation(b) for b in self.buckets] if self.shuffle else self.buckets
        batches = [batch for bucket in buckets for batch in self._cut(bucket)]
        order = rng.permutation(len(batches)) if self.shuffle else np.arange(len(batches))
        for i in range(len(self)):
            yield batches[order[(i * self.num_replicas + self.rank) % len(order)]].tolist()


def _similar(sizes: IntArray, max_waste: float) -> list[IntArray]:
    """Return the images in buckets whose largest sides pad none of them by more than `max_waste`."""
    buckets, undivided = [], [np.arange(len(sizes))]
    while undivided:
        members = undivided.pop()
        sides = sizes[members]
        low, high = sides.min(axis=0), sides.max(axis=0)
        if (sides.prod(axis=1) >= (1 - max_waste) * high.prod()).all():
            buckets.append(members)
            continue
        axis = int(np.argmax(high / low))
        smaller = sides[:, axis] <= math.sqrt(low[axis] * high[axis])
        undivided += [members[~smaller], members[smaller]]
    return buckets
