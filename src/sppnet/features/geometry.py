"""Where the cells of a feature map lie in the image: derived for any network, used for any window.

A window of the image becomes a window of a map in two steps: choose the scale at which the window has the
size that the network knows best, then take the cells whose centres it covers (paper section 4.1, appendix A).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sppnet.arrays import FloatArray, IntArray
from sppnet.errors import SppnetError


@dataclass(frozen=True)
class Geometry:
    """Where the cells of a map lie in the network's input.

    Cell ``u`` is centred at ``stride * u + offset``, with pixel 0 centred at 0; the same in x and y.

    Attributes
    ----------
    stride : float
        Distance of neighbouring cells in input pixels.
    offset : float
        Centre of cell 0 in input pixels: the sum over the layers of ``((k - 1) / 2 - padding)`` times the
        product of the earlier strides.
    """

    stride: float
    offset: float

    def through(self, kernel: int, stride: int, padding: int, dilation: int = 1) -> Geometry:
        """Return the geometry after a convolution or pooling of these settings."""
        shift = (kernel - 1) * dilation / 2 - padding
        return Geometry(self.stride * stride, self.offset + shift * self.stride)

    def cells(self, length: int) -> int:
        """Return how many cells are centred inside an input of `length` pixels, at least 1."""
        return max(1, int(np.floor((length - 0.5 - self.offset) / self.stride)) + 1)


# How a window is projected onto a map: the shrink of `covered_cells`, in strides. The released code has 6.5
# pixels at stride 16. Half a stride leaves no tolerance, which is the paper's rule (appendix A).
PROJECTIONS = {"released": 6.5 / 16, "paper": 0.5}

# How a window's scale is chosen: the side that it should have there, in pixels. See `choose_scale`.
SCALE_RULES = {"released": 208, "paper": 224}

# Height and width of the input on which geometry is derived: multiples of 32 with little in common, so that
# the size of a map tells it from pooled vectors.
_WALK = (7 * 32, 11 * 32)


def check_rule(kind: str, rule: str, rules: Collection[str]) -> None:
    """Raise a ValueError unless `rule` is one of the `rules` of its kind."""
    if rule not in rules:
        raise SppnetError(f"found the {kind} {rule!r}, expected one of {', '.join(rules)}")


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


@dataclass(frozen=True)
class FeatureMaps:
    """The maps of one image at one scale: what every window query needs, and nothing else.

    Attributes
    ----------
    stages : tuple of (C, h, w) tensors
        One map per stage; only cells centred inside the image, never in the padding.
    geometry : tuple of Geometry
        Place of each stage's cells in the resized image.
    factors : (float, float)
        Resized pixels per original pixel, in x and y.
    """

    stages: tuple[Tensor, ...]
    geometry: tuple[Geometry, ...]
    factors: tuple[float, float]


def response_cells(
    first: FloatArray, last: FloatArray, geometry: Geometry, shrink: float
) -> tuple[FloatArray, FloatArray]:
    """Return the first and last cell of a window as the formulas give them; see `covered_cells`.

    ``first cell = floor((first - offset + shrink) / stride + 1/2)``,
    ``last cell = ceil((last - offset - shrink) / stride - 1/2)``. At a shrink of half a stride these are the
    paper's ``floor(x / S) + 1`` and ``ceil(x / S) - 1``, of ``x = first - offset`` and ``last - offset``. The
    last may lie before the first, and both outside the map.
    """
    low = np.floor((first - geometry.offset + shrink) / geometry.stride + 0.5)
    high = np.ceil((last - geometry.offset - shrink) / geometry.stride - 0.5)
    return low, high


def covered_cells(
    first: FloatArray, last: FloatArray, geometry: Geometry, shrink: float
) -> tuple[FloatArray, FloatArray]:
    """Return the first and last cell of a window given by its first and last pixel (specification 5.4).

    `response_cells`: the cells centred inside the window, with a tolerance of ``stride / 2 - shrink`` pixels.
    Where there is none, both become the middle of the two.

    Parameters
    ----------
    first, last : float arrays of one shape
        Pixels of the resized image, 0-based and inclusive.
    geometry : Geometry
    shrink : float
        6.5 at stride 16 in the released code, 8 by the paper's rule.
    """
    low, high = response_cells(first, last, geometry, shrink)
    middle, empty = np.floor((low + high) / 2), low > high
    return np.where(empty, middle, low), np.where(empty, middle, high)


def _scaled(boxes: FloatArray, maps: FeatureMaps) -> tuple[FloatArray, FloatArray]:
    """Return the (R, 2) first and last pixels, x and y, of boxes in the resized image."""
    factors, exact = np.array(maps.factors), np.asarray(boxes, dtype=np.float64)
    # Resizing keeps pixel areas: the centre of pixel p moves to (p + 1/2) * factor - 1/2.
    return (exact[:, :2] + 0.5) * factors - 0.5, (exact[:, 2:] - 0.5) * factors - 0.5


def project(boxes: FloatArray, maps: FeatureMaps, stage: int = 0, projection: str = "released") -> IntArray:
    """Project boxes of the image onto one of its maps.

    The cells are those of `covered_cells`, with the offset derived from the network and the shrink in
    proportion to its stride.

    Parameters
    ----------
    boxes : (R, 4) float array
        Original-image pixels, 0-based half-open.
    maps : FeatureMaps
    stage : int
        Which of the maps.
    projection : {"released", "paper"}
        ``"released"`` takes the cells centred less than 1.5 pixels (at stride 16) outside the centres of the
        window's first and last pixel, as the released code does; ``"paper"`` those centred strictly between
        the two (appendix A).

    Returns
    -------
    (R, 4) int64
        Windows of the map, 0-based half-open cells, at least one cell, inside the map.

    Raises
    ------
    SppnetError
        If the projection has no such name.
    """
    check_rule("projection", projection, PROJECTIONS)
    geometry = maps.geometry[stage]
    low, high = covered_cells(*_scaled(boxes, maps), geometry, PROJECTIONS[projection] * geometry.stride)
    limits = np.array([maps.stages[stage].shape[-1], maps.stages[stage].shape[-2]]) - 1
    return np.concatenate([np.clip(low, 0, limits), np.clip(high, 0, limits) + 1], axis=1).astype(np.int64)


def responses(boxes: FloatArray, maps: FeatureMaps, projection: str = "released") -> IntArray:
    """Return what tells apart the cells that boxes cover on the maps of one scale.

    Boxes of equal rows cover the same cells of every stage. As in the released code, where windows of one
    "response box" are duplicates, these are the cells as the formulas give them (`response_cells`).

    Returns
    -------
    (R, 4 * stages) int64
        Parameters and errors are those of `project`.
    """
    check_rule("projection", projection, PROJECTIONS)
    first, last = _scaled(boxes, maps)
    cells = [response_cells(first, last, g, PROJECTIONS[projection] * g.stride) for g in maps.geometry]
    return np.concatenate([end for ends in cells for end in ends], axis=1).astype(np.int64)


def choose_scale(
    boxes: FloatArray,
    height: int,
    width: int,
    sides: Sequence[int],
    reference: float | None = None,
    scale_rule: str = "released",
) -> IntArray:
    """Choose for each box the scale at which it is nearest to `reference` pixels in side.

    The shorter side that would give the box an area of ``reference ** 2`` is
    ``reference * min(height, width) / sqrt(area)``. The smaller scale wins on ties.

    Parameters
    ----------
    boxes : (R, 4) float array
        Original-image pixels, 0-based half-open.
    height, width : int
        Of the original image.
    sides : sequence of int
        Shorter side of each scale.
    reference : float, optional
        By default the rule's own.
    scale_rule : {"released", "paper"}
        ``"released"``: the scale nearest to that side, rounded; 208 pixels (released code, specification
        5.3). ``"paper"``: the scale at which the number of the box's pixels is nearest to
        ``reference ** 2``; 224 pixels (section 4.1).

    Returns
    -------
    (R,) int64
        Indices into `sides`.

    Raises
    ------
    SppnetError
        If the scale rule has no such name.
    """
    check_rule("scale rule", scale_rule, SCALE_RULES)
    if reference is None:
        reference = SCALE_RULES[scale_rule]
    areas = np.maximum((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), 1.0)
    order = np.argsort(sides, kind="stable")
    rising, wanted = np.asarray(sides)[order], reference * min(height, width)
    if scale_rule == "paper":
        # The numbers of pixels differ by area / min(height, width) ** 2 times this.
        gaps = np.abs(rising**2 - (wanted**2 / areas)[:, None])
    else:
        gaps = np.abs(rising - np.floor(wanted / np.sqrt(areas) + 0.5)[:, None])
    result: IntArray = order[gaps.argmin(axis=1)].astype(np.int64)
    return result
