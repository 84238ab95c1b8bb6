"""The operator behind both doors, registered with PyTorch as ``torch.ops.sppnet.pool``.

It takes maps and windows as the doors `SpatialPyramidPooling` and `pool_regions` have checked them, and is
opaque to PyTorch's compiler and exporter: they see shapes, gradients and devices, not how it works. On the
CPU it lends the tensors' memory to the kernels for arrays, and copies there what lies on a device without a
kernel of its own.

Gradients of the maximum go to the cell that holds it, to the first one in row order where several do, as in
PyTorch. NaN counts as larger than every number.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from sppnet.arrays import FloatArray, IntArray, to_numpy
from sppnet.errors import SppnetError
from sppnet.pooling.bins import pyramid_length
from sppnet.pooling.checks import check_inside
from sppnet.pooling.cpu import scheduling
from sppnet.pooling.memory import empty

ARGUMENTS = "Tensor[] maps, Tensor? windows, Tensor? index, int[] levels"

# Defined in two steps: `torch.library.custom_op` does it in one, but imports PyTorch's compiler at the first
# call, a second for every process.
torch.library.define("sppnet::pool", f"({ARGUMENTS}, str mode, ScalarType? dtype=None) -> Tensor")
torch.library.define("sppnet::pool_backward", f"(Tensor grad, {ARGUMENTS}, str mode) -> Tensor[]")


def _kernels(device: torch.device) -> Any:
    """Return the module with the kernels for a device, None for one on which the CPU computes."""
    if device.type == "cuda" and find_spec("triton") is not None:
        from sppnet.pooling import gpu

        return gpu
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


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised CPU tensor; NumPy has no bfloat16, but integers of its size."""
    return torch.from_numpy(empty(tuple(shape), np.dtype(f"i{dtype.itemsize}"))).view(dtype)


def _wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors in the precision that the CPU computes in, converted by PyTorch where they are not."""
    kind = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return [t.to("cpu", kind) for t in tensors]


def _optional(numbers: Tensor | None) -> IntArray | None:
    return None if numbers is None else to_numpy(numbers)


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
    if places is not None and which is not None and windows is not None:
        # On the CPU NumPy's small steps are quicker than PyTorch's, which wait for its threads.
        check_inside(maps, *((to_numpy(n) if n.is_cpu else n) for n in (places, which)))
    if len(out) == 0:
        return
    kernels = _kernels(maps[0].device)
    if kernels is not None:
        kernels.pool(maps, places, which, levels, mode, out)
        return
    result = out if out.is_cpu else _empty(out.shape, out.dtype)
    sources = _wide(maps)
    # Of lower precision than the kernels compute in, it is filled part by part.
    target: FloatArray | Tensor = result.numpy() if result.dtype == sources[0].dtype else result
    arrays = [to_numpy(m) for m in sources]
    scheduling.pool(arrays, _optional(places), _optional(which), tuple(levels), mode, target)
    if result is not out:
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
    out = _empty(shape, dtype) if maps[0].is_cpu else maps[0].new_empty(shape, dtype=dtype)
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
    sources = [
        m if m.is_contiguous() else m.contiguous(memory_format=torch.channels_last) for m in _wide(maps)
    ]
    (upstream,) = (t.to(sources[0].dtype).contiguous() for t in _wide([grad]))
    totals = [torch.empty_like(m) for m in sources]
    scheduling.pool_backward(
        to_numpy(upstream),
        [to_numpy(m) for m in sources],
        _optional(places),
        _optional(which),
        tuple(levels),
        mode,
        [t.numpy() for t in totals],
    )
    return [t.to(m.device, m.dtype) for t, m in zip(totals, maps, strict=True)]


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


class _Gradient(torch.autograd.Function):
    """The gradient of the operator where it may be differentiated in its turn, which is refused.

    Without this node gradients through it would be missing in silence. That of PyTorch for the purpose,
    `once_differentiable`, is not found by those who ask `torch.autograd.grad` for some gradients only.
    """

    @staticmethod
    def forward(
        _: Any,
        grad: Tensor,
        windows: Tensor | None,
        index: Tensor | None,
        levels: Sequence[int],
        mode: str,
        *maps: Tensor,
    ) -> tuple[Tensor, ...]:
        return tuple(torch.ops.sppnet.pool_backward(grad, maps, windows, index, levels, mode))

    @staticmethod
    def backward(_: Any, *__: Tensor) -> NoReturn:
        raise SppnetError("found gradients of gradients asked for, expected first gradients of the pooling")


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
        given = windows, index, ctx.levels, ctx.mode
        # Which cell holds the maximum is constant almost everywhere: the maps have no part in what follows.
        still = [m.detach() for m in maps]
        if torch.is_grad_enabled() and grad.requires_grad:
            grads = _Gradient.apply(grad, *given, *still)
        else:
            grads = torch.ops.sppnet.pool_backward(grad, still, *given)
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


def pooled(
    maps: Sequence[Tensor],
    windows: Tensor | None,
    index: Tensor | None,
    levels: Sequence[int],
    mode: str,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Call the operator: `pool`, with its gradient, or `pool_into` where `out` is given."""
    if out is not None:
        torch.ops.sppnet.pool_into(maps, windows, index, levels, mode, out)
        return out
    result: Tensor = torch.ops.sppnet.pool(maps, windows, index, levels, mode, dtype)
    return result
