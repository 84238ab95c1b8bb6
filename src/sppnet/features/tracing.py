"""The geometry of any PyTorch network's maps, derived and not stated: by following its operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sppnet.errors import SppnetError
from sppnet.features.geometry import Geometry

# Height and width of the input on which geometry is derived: multiples of 32 with little in common, so that
# the size of a map tells it from pooled vectors.
_WALK = (7 * 32, 11 * 32)


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follow the geometry of every intermediate tensor through the operators that a network runs."""

    def __init__(self, source: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # By id: the tensor (kept alive, so that no id is used twice), its geometry, its number of cells.
        self._known: dict[int, tuple[Tensor, Geometry, int]] = {}
        self._learn(source, Geometry(1.0, 0.0), source.shape[-2] * source.shape[-1])

    def of(self, tensor: Tensor) -> Geometry | None:
        known = self._known.get(id(tensor))
        return (
            known[1]
            if known and tensor.ndim == 4 and tensor.shape[-2] * tensor.shape[-1] == known[2]
            else None
        )

    def _learn(self, tensor: Tensor, geometry: Geometry, cells: int) -> None:
        self._known[id(tensor)] = (tensor, geometry, cells)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        result = out[0] if isinstance(out, tuple | list) and out else out
        if isinstance(result, Tensor):
            self._follow(getattr(func, "overloadpacket", None), args, result)
        return out

    def _follow(self, operator: Any, args: tuple[Any, ...], result: Tensor) -> None:
        aten = torch.ops.aten
        sources = [self._known[id(t)] for t in _tensors(args) if id(t) in self._known]
        if not sources:
            return
        _, geometry, cells = sources[0]
        moves = operator in (
            aten.convolution,
            aten.max_pool2d_with_indices,
            aten.avg_pool2d,
            aten.constant_pad_nd,
        )
        if moves and self.of(args[0]) is None:
            return  # The cells were regrouped or multiplied on the way (pixel unshuffle, upsampling).
        if operator is aten.convolution:
            _, weight, _, stride, padding, dilation, transposed = args[:7]
            if transposed:
                raise SppnetError(
                    "a backbone with transposed convolutions was found, expected convolution and pooling"
                )
            geometry = geometry.through(weight.shape[-1], stride[-1], padding[-1], dilation[-1])
        elif operator in (aten.max_pool2d_with_indices, aten.avg_pool2d):
            kernel, stride, padding = (*args[1:4], [0])[:3] if len(args) > 2 else (args[1], args[1], [0])
            dilation = args[4] if operator is aten.max_pool2d_with_indices and len(args) > 4 else [1]
            geometry = geometry.through(kernel[-1], (stride or kernel)[-1], padding[-1], dilation[-1])
        elif operator is aten.constant_pad_nd:
            geometry = Geometry(geometry.stride, geometry.offset - args[1][0] * geometry.stride)
        elif result.numel() % cells == 0:
            # Everything else works cell by cell, in whatever layout. Where branches meet, the first argument
            # wins: residual networks list the longer branch first.
            self._learn(result, geometry, cells)
            return
        else:
            return
        self._learn(result, geometry, result.shape[-2] * result.shape[-1])


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among `args`, one level of lists included, in order."""
    flat: list[Tensor] = []
    for value in args:
        flat += [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, Tensor)]
    return flat


def derive_geometry(
    network: Callable[[Tensor], Sequence[Tensor]],
) -> tuple[tuple[Geometry, ...], tuple[int, ...]]:
    """Derive stride, offset and channels of each map that `network` returns, by following its operators.

    Parameters
    ----------
    network : callable
        Takes a (1, 3, H, W) float32 tensor and returns maps of shape (1, C, h, w).

    Raises
    ------
    SppnetError
        If a map does not descend from the input by convolution and pooling alone (vision transformers).
    """
    source = torch.zeros(1, 3, *_WALK)
    tracer = _Tracer(source)
    try:
        with torch.no_grad(), tracer:
            maps = network(source)
    except (AssertionError, RuntimeError) as error:
        raise SppnetError(f"the network does not take a {_WALK[0]} x {_WALK[1]} image: {error}") from error
    found = [tracer.of(m) for m in maps]
    if None in found:
        raise SppnetError("the place of the map's cells cannot be derived; expected a convolutional backbone")
    return tuple(g for g in found if g is not None), tuple(m.shape[1] for m in maps)
