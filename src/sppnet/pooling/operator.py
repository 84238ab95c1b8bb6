"""The operator behind both doors, registered with PyTorch as ``torch.ops.sppnet.pool``.

It takes maps and windows as the doors `SpatialPyramidPooling` and `pool_regions` have checked them, and is
opaque to PyTorch's compiler and exporter: they see shapes, gradients and devices, not how it works. On a
device without a kernel of its own it computes on the CPU.

Gradients of the maximum go to the cell that holds it, to the first one in row order where several do, as in
PyTorch. NaN counts as larger than every number.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sppnet.errors import SppnetError
from sppnet.pooling.bins import pyramid_length
from sppnet.pooling.memory import empty

ARGUMENTS = "Tensor[] maps, Tensor? windows, Tensor? index, int[] levels"

# Defined in two steps: `torch.library.custom_op` does it in one, but imports PyTorch's compiler at the first
# call, a second for every process.
torch.library.define("sppnet::pool", f"({ARGUMENTS}, str mode, ScalarType? dtype=None) -> Tensor")
torch.library.define("sppnet::pool_backward", f"(Tensor grad, {ARGUMENTS}, str mode) -> Tensor[]")


def _kernels(device: torch.device) -> Any:
    """Return the module with the kernels for a device, None for one that has none."""
    if device.type == "cuda" and find_spec("triton") is not None:
        from sppnet.pooling import gpu

        return gpu
    if device.type == "cpu":
        from sppnet.pooling.cpu import scheduling

        return scheduling
    return None


def _placed(
    maps: Sequence[Tensor], windows: Tensor | None, index: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return (R, 4) windows and the image of each, on the maps' device, as their kernel takes them.

    That of the CPU knows whole images by the absence of windows.
    """
    device = maps[0].device
    if windows is None and device.type != "cuda":
        return None, None
    if windows is None:
        whole = [[0, 0, m.shape[3], m.shape[2]] for m in maps for _ in range(len(m))]
        windows, index = torch.tensor(whole, dtype=torch.int64), torch.arange(len(whole))
    elif index is None:
        index = torch.zeros(len(windows), dtype=torch.int64)
    return windows.to(device, torch.int64), index.to(device, torch.int64)


def _on_cpu(numbers: Tensor | None) -> Tensor | None:
    return None if numbers is None else numbers.cpu()


def _check_inside(maps: Sequence[Tensor], windows: Tensor, index: Tensor) -> None:
    """Raise ValueError for the first window that is no part of its map."""
    sides = [[m.shape[3], m.shape[2]] for m in maps for _ in range(len(m))]
    wrong = (index < 0) | (index >= len(sides))
    if len(index) and bool(wrong.any()):
        r = int(wrong.nonzero()[0])
        raise SppnetError(f"index[{r}] must be from 0 to {len(sides) - 1}, found {int(index[r])}")
    limits = torch.tensor(sides, dtype=torch.int64, device=windows.device).view(-1, 2)[index]
    low, high = windows[:, :2], windows[:, 2:]
    wrong = ((low < 0) | (low >= high) | (high > limits)).any(dim=1)
    if len(index) and bool(wrong.any()):
        r = int(wrong.nonzero()[0])
        width, height = limits[r].tolist()
        raise SppnetError(
            f"windows[{r}] must be x1, y1, x2, y2 with 0 <= x1 < x2 <= {width} and 0 <= y1 < y2 <= {height}, "
            f"found {windows[r].tolist()}"
        )


def _rows(maps: Sequence[Tensor], windows: Tensor | None) -> Any:
    """Return the number of vectors, which may be symbolic."""
    return sum(m.shape[0] for m in maps) if windows is None else windows.shape[0]


def _length(maps: Sequence[Tensor], levels: Sequence[int]) -> Any:
    return maps[0].shape[1] * pyramid_length(1, levels)


def _pool_into(
    maps: Sequence[Tensor],
    windows: Tensor | None,
    index: Tensor | None,
    levels: Sequence[int],
    mode: str,
    out: Tensor,
) -> None:
    places, which = _placed(maps, windows, index)
    if windows is not None and places is not None and which is not None:
        _check_inside(maps, places, which)
    if len(out) == 0:
        return
    kernels = _kernels(maps[0].device)
    if kernels is not None:
        kernels.pool(maps, places, which, levels, mode, out)
        return
    from sppnet.pooling.cpu import scheduling

    result = empty(out.shape, out.dtype)
    scheduling.pool([m.cpu() for m in maps], _on_cpu(places), _on_cpu(which), levels, mode, result)
    out.copy_(result)


@torch.library.impl("sppnet::pool", "default")
def pool(
    maps: Sequence[Tensor],
    windows: Tensor | None,
    index: Tensor | None,
    levels: Sequence[int],
    mode: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Pool windows of maps into vectors.

    Parameters
    ----------
    maps : sequence of (N_i, C, H_i, W_i) float tensors
        Of one dtype, on one device. Their images are numbered through.
    windows : (R, 4) int64 tensor, optional
        ``x1, y1, x2, y2`` in cells; None for each image as a whole.
    index : (R,) int64 tensor, optional
        The image of each window; None for the first.
    levels : sequence of int
    mode : {"max", "average"}
    dtype : torch.dtype, optional
        Of the result; that of the maps by default.

    Returns
    -------
    (R, C * M) tensor

    Raises
    ------
    SppnetError
        If a window is no part of its map; it names the first row.
    """
    shape, dtype = (_rows(maps, windows), _length(maps, levels)), dtype or maps[0].dtype
    out = empty(shape, dtype) if maps[0].is_cpu else maps[0].new_empty(shape, dtype=dtype)
    _pool_into(maps, windows, index, levels, mode, out)
    return out


@torch.library.register_fake("sppnet::pool")  # type: ignore[untyped-decorator]
def _(
    maps: Sequence[Tensor],
    windows: Tensor | None,
    index: Tensor | None,
    levels: Sequence[int],
    mode: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return maps[0].new_empty((_rows(maps, windows), _length(maps, levels)), dtype=dtype or maps[0].dtype)


# PyTorch passes on by name what an operator that writes to an argument is given, to functions with
# a `mode` of their own: here alone the schema has another word for it.
@torch.library.custom_op(
    "sppnet::pool_into", mutates_args=("out",), schema=f"({ARGUMENTS}, str kept, Tensor(a!) out) -> ()"
)
def pool_into(
    maps: Sequence[Tensor],
    windows: Tensor | None,
    index: Tensor | None,
    levels: Sequence[int],
    mode: str,
    out: Tensor,
) -> None:
    """Pool as `pool` does, into contiguous memory of the caller; no gradient is computed."""
    _pool_into(maps, windows, index, levels, mode, out)


@pool_into.register_fake
def _(
    maps: Sequence[Tensor],
    windows: Tensor | None,
    index: Tensor | None,
    levels: Sequence[int],
    mode: str,
    out: Tensor,
) -> None:
    return None


@torch.library.impl("sppnet::pool_backward", "default")
def pool_backward(
    grad: Tensor,
    maps: Sequence[Tensor],
    windows: Tensor | None,
    index: Tensor | None,
    levels: Sequence[int],
    mode: str,
) -> list[Tensor]:
    """Return the gradients of the maps for the gradient (R, C * M) of the result of `pool`."""
    places, which = _placed(maps, windows, index)
    if len(grad) == 0:
        return [torch.zeros_like(m) for m in maps]
    kernels = _kernels(maps[0].device)
    if kernels is not None:
        grads: list[Tensor] = kernels.pool_backward(grad, maps, places, which, levels, mode)
        return grads
    from sppnet.pooling.cpu import scheduling

    places, which, sources = _on_cpu(places), _on_cpu(which), [m.cpu() for m in maps]
    grads = scheduling.pool_backward(grad.cpu(), sources, places, which, levels, mode)
    return [g.to(m.device) for g, m in zip(grads, maps, strict=True)]


@torch.library.register_fake("sppnet::pool_backward")  # type: ignore[untyped-decorator]
def _(
    grad: Tensor,
    maps: Sequence[Tensor],
    windows: Tensor | None,
    index: Tensor | None,
    levels: Sequence[int],
    mode: str,
) -> list[Tensor]:
    return [torch.empty_like(m) for m in maps]


class _Pooling(torch.autograd.Function):
    """The operator with its gradient.

    `torch.library.register_autograd` would do, but takes 0.1 ms longer for lists of tensors, as much as small
    maps take to pool.
    """

    @staticmethod
    def forward(
        ctx: Any,
        windows: Tensor | None,
        index: Tensor | None,
        levels: Sequence[int],
        mode: str,
        dtype: torch.dtype | None,
        *maps: Tensor,
    ) -> Tensor:
        ctx.levels, ctx.mode = levels, mode
        ctx.save_for_backward(windows, index, *maps)
        with torch._C._AutoDispatchBelowAutograd():
            pooled: Tensor = torch.ops.sppnet.pool(maps, windows, index, levels, mode, dtype)
        return pooled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        windows, index, *maps = ctx.saved_tensors
        grads = torch.ops.sppnet.pool_backward(grad, maps, windows, index, ctx.levels, ctx.mode)
        return None, None, None, None, None, *grads


@torch.library.impl("sppnet::pool", "Autograd")
def _(
    maps: Sequence[Tensor],
    windows: Tensor | None,
    index: Tensor | None,
    levels: Sequence[int],
    mode: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    pooled: Tensor = _Pooling.apply(windows, index, levels, mode, dtype, *maps)
    return pooled
