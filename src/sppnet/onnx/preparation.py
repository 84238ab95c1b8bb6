"""What is done to the pixels of an image before a network sees them, as a part of the graph.

The steps are those of `sppnet.images` and `sppnet.features.backbone`, on tensors of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sppnet.features.backbone import Backbone
from sppnet.images import MAX_ASPECT


class PixelRules(NamedTuple):
    """How a network takes pixels.

    Attributes
    ----------
    mean, std : (3,) float32 tensors
        What the channels are standardised by, for pixels of 0 to 255.
    multiple : int
        Height and width are padded to multiples of this, with what becomes 0.
    """

    mean: Tensor
    std: Tensor
    multiple: int

    @classmethod
    def of(cls, backbone: Backbone) -> PixelRules:
        """Return those of a backbone."""
        mean, std = (torch.tensor(v) * 255 for v in (backbone.network.mean, backbone.network.std))
        return cls(mean, std, backbone.multiple)


class Preparation(nn.Module):
    """Resizes an image to several scales, standardises and pads it.

    Parameters
    ----------
    rules : PixelRules
        How the network behind takes pixels.
    scales : sequence of int
        Shorter sides of the resized image, in pixels.
    """

    def __init__(self, rules: PixelRules, scales: Sequence[int]) -> None:
        super().__init__()
        self.scales, self.multiple = tuple(scales), rules.multiple
        self.mean, self.std = nn.Buffer(rules.mean), nn.Buffer(rules.std)

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Prepare an (H, W, 3) uint8 image.

        Returns
        -------
        list of S (1, 3, H', W') float32 tensors
            What the network takes.
        (S, 2) int64 tensor
            Their heights and widths before padding.
        (2,) int64 tensor
            Height and width of the image.
        """
        # Lengths are tensors and not integers because the exporter divides integers in single precision.
        size = torch.stack([torch.scalar_tensor(n, dtype=torch.int64) for n in image.shape[:2]])
        # Whole numbers, exact in float32 for 65,000 rows.
        sums = image.float().cumsum(0)
        sizes = [self._target(size, side) for side in self.scales]
        prepared = []
        for target in sizes:
            pixels = _resize(image, sums, size, target)
            down, right = (-target % self.multiple).tolist()
            standard = (pixels.float() - self.mean) / self.std
            prepared.append(nn.functional.pad(standard, (0, 0, 0, right, 0, down)).permute(2, 0, 1)[None])
        return prepared, torch.stack(sizes), size

    def _target(self, size: Tensor, side: int) -> Tensor:
        """Return the height and width to resize to; see `sppnet.images.whole_image_size`."""
        shorter = size.min()
        target = (size * side + shorter - 1) // shorter
        shrink = side * torch.sqrt(MAX_ASPECT / target.prod().double())
        shrunk = torch.round(target * shrink).long().clamp(min=1)
        return torch.where(target.max() > MAX_ASPECT * target.min(), shrunk, target)


def _resize(image: Tensor, sums: Tensor, size: Tensor, target: Tensor) -> Tensor:
    """Return what `sppnet.images.resize` does, in float64, given the sums of the image's rows."""
    # One of the two has no pixels, and so costs nothing.
    count = torch.where((size > 2 * target).all(), target, 0)
    by_area = _resize_area(image, sums, size, target, count)
    linear = _resize_linear(image, size, target, target - count)
    height, width = target.tolist()
    return torch.cat([by_area.flatten(0, 1), linear.flatten(0, 1)]).reshape(height, width, 3)


def _resize_linear(image: Tensor, size: Tensor, target: Tensor, count: Tensor) -> Tensor:
    """Resize as OpenCV's INTER_LINEAR does, to the bit: in fixed point, its weights in steps of 1 / 2048."""

    def taps(axis: int) -> list[tuple[Tensor, Tensor]]:
        scale = 1 / (target[axis].double() / size[axis])
        place = torch.arange(count[axis].item(), dtype=torch.float64)
        place = ((place + 0.5) * scale - 0.5).float()
        first = torch.floor(place)
        part = place - first
        weights = (torch.round(w * 2048).double() for w in (1 - part, part))
        cells = (torch.minimum((first.long() + k).clamp(min=0), size[axis] - 1) for k in (0, 1))
        return list(zip(cells, weights, strict=True))

    left, right = (image.index_select(1, cell).double() * weight[:, None] for cell, weight in taps(1))
    rows = torch.floor((left + right) / 16)
    above, below = (
        torch.floor(rows.index_select(0, cell) * weight[:, None, None] / 65536) for cell, weight in taps(0)
    )
    return torch.floor((above + below + 2) / 4)


def _resize_area(image: Tensor, sums: Tensor, size: Tensor, target: Tensor, count: Tensor) -> Tensor:
    """Resize as OpenCV's INTER_AREA does: differences of running sums at the edges of the new pixels."""

    def means(values: Tensor, sums: Tensor, axis: int) -> Tensor:
        scale = size[axis] / target[axis].double()
        edges = torch.arange((count[axis] + 1).item(), dtype=torch.float64) * scale
        cell = torch.minimum(edges.long(), size[axis] - 1)
        beyond = (cell + 1 - edges)[:, None, None] * values.index_select(0, cell)
        until = sums.index_select(0, cell).double() - beyond
        return (until[1:] - until[:-1]) / scale

    rows = means(image, sums, 0).transpose(0, 1)
    return torch.round(means(rows, rows.cumsum(0), 1)).transpose(0, 1)
