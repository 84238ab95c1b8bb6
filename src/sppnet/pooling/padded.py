"""Images of different sizes in one batch, each with the result that it has alone.

Images of similar size are put together (`SizeBucketSampler`), padded below and on the right (`pad_batch`),
and run through any convolutional network as if there were no padding (`TrueSizes`)::

    loader = DataLoader(images, batch_sampler=SizeBucketSampler(sizes, 32), collate_fn=collate_padded)
    for (batch, sizes), labels in loader:
        with TrueSizes(batch, sizes):
            scores = network(batch)  # convolutions, SpatialPyramidPooling, linear layers
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves
from torch.utils.data import Sampler, default_collate

from sppnet.arrays import IntArray
from sppnet.errors import SppnetError
from sppnet.pooling import operator  # noqa: F401  (registers the operator)
from sppnet.pooling.checks import checked_sizes, described


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
            raise SppnetError(f"image {i} must be (C, H, W) with no side of 0, found {described(image)}")
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


class TrueSizes(TorchFunctionMode):
    """Run networks on a padded batch so that every image gives what it gives alone.

    In the context, an operator that mixes cells finds beyond the true size of an image what its own padding
    holds: zeros for a convolution or average, minus infinity for a maximum. The true sizes follow its
    formula. Gradients are those of the images alone, too.

    Parameters
    ----------
    batch : (N, C, H, W) tensor
        Padded below and on the right by any finite numbers.
    sizes : (N, 2) integer tensor
        True height and width of each image, as from `pad_batch`.

    Raises
    ------
    SppnetError
        If an argument is not as described. In the context: at an operator that is not supported, for an
        image that is too small, and if two paths lead to one padded size but different true ones.

    Notes
    -----
    Supported are 2-D convolution, max and average pooling with all settings, padding by a constant, global
    average and maximum (so squeeze-and-excitation), batch norm in evaluation mode, joining, cutting and
    softmax of channels, what works cell by cell, and `SpatialPyramidPooling`, which needs no `sizes` here.
    Maps that are padded for no image go through any operator as usual.

    Maps are known by their padded height and width. Not followed are scripted modules, recomputed activations
    and settings that a network derives from the size of a map, as for TensorFlow's SAME padding: `F.pad` of a
    map whose size was read is refused.

    Examples
    --------
    >>> batch, sizes = pad_batch([torch.ones(3, 9, 9), torch.ones(3, 6, 4)])
    >>> with TrueSizes(batch, sizes) as true:
    ...     maps = nn.Conv2d(3, 8, 3, stride=2, padding=1)(batch)
    >>> maps.shape, true.of(maps).tolist()
    (torch.Size([2, 8, 5, 5]), [[5, 5], [3, 2]])
    """

    def __init__(self, batch: Tensor, sizes: Tensor) -> None:
        super().__init__()
        if not isinstance(batch, Tensor) or batch.ndim != 4 or 0 in batch.shape:
            raise SppnetError(f"batch must be (N, C, H, W) with no side of 0, found {described(batch)}")
        if isinstance(batch, nn.Parameter):
            raise SppnetError("batch must be a tensor that is no parameter, found a parameter")
        true: IntArray = checked_sizes(sizes, len(batch)).to("cpu", torch.int64, copy=True).numpy()
        if ((true < 1) | (true > batch.shape[2:])).any():
            found = f"{true.min(axis=0).tolist()} to {true.max(axis=0).tolist()}"
            raise SppnetError(f"sizes must be from 1 to {[*batch.shape[2:]]}, found from {found}")
        self._count = len(batch)
        self._sizes: dict[torch.Size, IntArray] = {batch.shape[2:]: true}
        self._beyond: dict[tuple[torch.Size, torch.device], Tensor] = {}
        self._measured: Callable[[], Tensor | None] = lambda: None

    def of(self, maps: Tensor) -> Tensor:
        """Return the true sizes of maps that were computed in the context.

        Parameters
        ----------
        maps : (N, C, H, W) tensor

        Returns
        -------
        (N, 2) int64 tensor, on the CPU
            Height and width of each image's part of the maps.

        Raises
        ------
        SppnetError
            If no maps of this size were computed.
        """
        if not self._knows(maps):
            known = ", ".join(f"{h} x {w}" for h, w in self._sizes)
            raise SppnetError(f"expected {self._count} maps of the batch, {known}, found {described(maps)}")
        return torch.from_numpy(self._sizes[maps.shape[2:]].copy())

    def _knows(self, value: Tensor) -> bool:
        """Return whether a tensor is maps of the images; a weight may have their shape by chance."""
        fits = value.ndim == 4 and len(value) == self._count and not isinstance(value, nn.Parameter)
        return fits and value.shape[2:] in self._sizes

    def _padded(self, value: Tensor) -> bool:
        return self._knows(value) and bool((self._sizes[value.shape[2:]] < value.shape[2:]).any())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        values = _tensors((args, kwargs))
        rule = _RULES.get(func)
        if rule and values and (self._knows if func in _MOVES else self._padded)(values[0]):
            return rule(self, func, *args, **kwargs)
        if func in _READS:
            self._measured = weakref.ref(values[0])
        result = func(*args, **kwargs)
        # What returns no tensor only tells about one; maps out of nowhere have sizes that nobody knows.
        results = _tensors(result)
        followed = func in _CELLWISE and all(map(self._padded, results))
        if results and not followed and any(map(self._padded, values + results)):
            self._refuse(func)
        return result

    def _refuse(self, func: Any, *_: Any, why: str = "it may mix an image with its padding") -> Any:
        name = resolve_name(func) or getattr(func, "__name__", func)
        raise SppnetError(f"{name} on padded maps is not supported: {why}")

    def _fill(self, maps: Tensor, value: float) -> Tensor:
        """Return maps that hold `value` beyond the true sizes."""
        if not self._padded(maps):
            return maps
        size, device = maps.shape[2:], maps.device
        if (size, device) not in self._beyond:
            self._beyond[size, device] = _beyond(self._sizes[size], size, device)
        return maps.masked_fill(self._beyond[size, device], value)

    def _learn(self, func: Any, maps: Tensor, sizes: IntArray) -> Tensor:
        """Return maps whose true sizes are known from now on."""
        if (sizes < 1).any():
            self._refuse(func, why=f"image {int((sizes < 1).any(axis=1).argmax())} is too small for it")
        if (self._sizes.setdefault(maps.shape[2:], sizes) != sizes).any():
            self._refuse(func, why=f"two paths lead to maps {[*maps.shape[2:]]}, but to different true sizes")
        return maps

    def _slide(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Convolve or pool, and learn the true sizes of the result."""
        given = dict(zip(_SETTINGS[func], args, strict=False)) | kwargs
        kernel = np.array(given["weight"].shape[2:] if "weight" in given else given["kernel_size"])
        stride = np.array(given.get("stride") or (1 if "weight" in given else kernel))
        padding, ceil = given.get("padding", 0), given.get("ceil_mode", False)
        reach = np.array(given.get("dilation", 1)) * (kernel - 1)
        total = {"same": reach, "valid": 0}[padding] if isinstance(padding, str) else 2 * np.array(padding)
        before = self._sizes[input.shape[2:]]
        after = (before + total - reach - 1 + ceil * (stride - 1)) // stride + 1
        if ceil:
            after -= (after - 1) * stride >= before + total // 2
        maximum = func is not F.conv2d and func is not F.avg_pool2d
        if ceil or np.any(total):
            input = self._fill(input, -math.inf if maximum else 0)
            if func is F.avg_pool2d and given.get("divisor_override") is None and self._padded(input):
                return self._learn(func, self._average(input, given, total // 2), after)
        result = self._learn(func, func(input, **given), after)
        # An infinity that stays in the padding would be NaN in the gradient of what follows.
        return self._fill(result, 0) if maximum else result

    def _average(self, input: Tensor, given: dict[str, Any], padding: IntArray) -> Tensor:
        """Return averages over as many cells as each image has under the window, which its end may cut."""
        margin = padding * given.get("count_include_pad", True)
        sizes = self._sizes[input.shape[2:]] + 2 * margin
        inside = ~_beyond(sizes, 2 * margin + input.shape[2:], input.device)
        given = given | {"divisor_override": 1}
        counts = F.avg_pool2d(inside.to(input), **given | ({"padding": 0} if np.any(margin) else {}))
        sums: Tensor = F.avg_pool2d(input, **given)
        return sums / counts[..., : sums.shape[2], : sums.shape[3]].clamp(1)

    def _pad(
        self, func: Any, input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
    ) -> Tensor:
        if self._padded(input) and (mode != "constant" or self._measured() is input):
            self._refuse(func, why="it must be by a constant, and not by a size that the network has read")
        left, right, top, bottom = (*pad, 0, 0)[:4]
        sizes = self._sizes[input.shape[2:]] + np.array([top + bottom, left + right])
        return self._learn(func, func(self._fill(input, value or 0), pad, mode, value), sizes)

    def _check(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        name, place, default, *allowed = _ONLY[func]
        found = args[place] if len(args) > place else kwargs.get(name, default)
        if (tuple(found) if isinstance(found, list) else found) not in allowed:
            self._refuse(func, why=f"{name} must be {allowed[0]}, found {found}")
        return func(*args, **kwargs)

    def _reduce(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Reduce each image to one number per channel."""
        maximum = func not in (F.adaptive_avg_pool2d, torch.mean, Tensor.mean)
        result: Tensor = self._check(func, self._fill(input, -math.inf if maximum else 0), *args, **kwargs)
        if maximum:
            return result
        shares = self._sizes[input.shape[2:]].prod(axis=1) / math.prod(input.shape[2:])
        return result / torch.from_numpy(shares).to(result).view(-1, *[1] * (result.ndim - 1))

    def _pool(self, func: Any, maps: list[Tensor], windows: Any, index: Any, *args: Any) -> Any:
        if windows is None:
            sizes = torch.cat([self.of(m) for m in maps])
            windows = torch.cat([torch.zeros_like(sizes), sizes.flip(1)], dim=1)
            index = torch.arange(len(sizes))
        return func(maps, windows, index, *args)


def _tensors(values: Any) -> list[Tensor]:
    return [v for v in tree_leaves(values) if isinstance(v, Tensor)]


def _beyond(sizes: IntArray, shape: Sequence[int], device: torch.device) -> Tensor:
    """Return which cells of (N, 1, H, W) lie beyond the true sizes."""
    ends = torch.from_numpy(sizes.T[:, :, None]).to(device)
    rows, columns = (torch.arange(n, device=device) >= end for n, end in zip(shape, ends, strict=True))
    beyond: Tensor = rows[:, None, :, None] | columns[:, None, None, :]
    return beyond


# The settings of the operators that slide a window, in the order of their arguments.
_SETTINGS: dict[Any, tuple[str, ...]] = {
    F.conv2d: ("weight", "bias", "stride", "padding", "dilation", "groups"),
    F.max_pool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    torch.max_pool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    F.avg_pool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
}
_ADAPTIVE = (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)
_REDUCING = (torch.mean, Tensor.mean, torch.amax, Tensor.amax)
# What is followed for some values of one argument only: its name, place and default, then the values.
_ONLY: dict[Any, tuple[Any, ...]] = {
    **dict.fromkeys(_ADAPTIVE, ("output_size", 1, None, 1, (1, 1))),
    **dict.fromkeys(_REDUCING, ("dim", 1, None, (2, 3), (-2, -1), (3, 2), (-1, -2))),
    **dict.fromkeys((torch.cat, torch.softmax, Tensor.softmax, F.softmax), ("dim", 1, 0, 1, -3)),
    **dict.fromkeys((torch.chunk, Tensor.chunk, torch.split, Tensor.split), ("dim", 2, 0, 1, -3)),
    F.batch_norm: ("training", 5, False, False),
}
_MOVES: dict[Any, Callable[..., Any]] = {**dict.fromkeys(_SETTINGS, TrueSizes._slide), F.pad: TrueSizes._pad}
# How maps go through an operator. Those of `_MOVES` change the size, so they are for maps of full size, too.
_RULES: dict[Any, Callable[..., Any]] = {
    **_MOVES,
    **dict.fromkeys(_ONLY, TrueSizes._check),
    **dict.fromkeys((*_ADAPTIVE, *_REDUCING), TrueSizes._reduce),
    Tensor.__setitem__: TrueSizes._refuse,
    torch.ops.sppnet.pool: TrueSizes._pool,
}
_READS = {Tensor.size, Tensor.shape.__get__}  # type: ignore[attr-defined]
_NAMES = """
    abs add addcdiv addcmul bfloat16 celu clamp clip clone contiguous copy detach div divide double dropout
    dropout2d elu eq exp expand expand_as float floordiv ge gelu gt half hardshrink hardsigmoid hardswish
    hardtanh le leaky_relu local_response_norm log logsigmoid lt masked_fill maximum minimum mish mul multiply
    ne neg ones_like pow prelu reciprocal relu relu6 rrelu rsqrt selu sigmoid silu softplus softshrink
    softsign sqrt square sub subtract tanh tanhshrink threshold to truediv type_as where zeros_like
"""
_CELLWISE = {
    getattr(home, form.format(name))
    for home in (torch, Tensor, F)
    for name in _NAMES.split()
    for form in ("{}", "{}_", "__{}__", "__r{}__", "__i{}__")
    if hasattr(home, form.format(name))
}
