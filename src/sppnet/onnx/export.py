"""Networks and detectors as ONNX files, for any runtime and for images of any size.

PyTorch's exporter refuses adaptive pooling unless all sizes divide. Here the bins' bounds are integer
arithmetic on sizes within the graph, so that one file is exact at every size: a map is cut into rows of bins
and these into columns; a window of a map is cut into its bins, each a rectangle for ONNX's ``MaxRoiPool`` or,
for means, four corners in a table of sums.

Detectors, and backbones with a pyramid, take the pixels of an image as they are: resizing as OpenCV does it,
standardising and padding are in the graph.

Outside the promise are maps with NaN or infinity, on whose maximum runtimes disagree, and windows that are no
part of their map, which nobody checks in a graph.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from sppnet.arrays import FloatArray
from sppnet.classification.network import SPPNet
from sppnet.classification.views import WHOLE, side_of
from sppnet.errors import SppnetError
from sppnet.features.backbone import Backbone
from sppnet.features.geometry import Geometry
from sppnet.features.projection import choose_scale, project_onto
from sppnet.images import MAX_ASPECT
from sppnet.pooling.bins import LEVELS, valid_levels
from sppnet.regression import decode_deltas
from sppnet.storage import atomic_path, check_writable

if TYPE_CHECKING:
    from sppnet.detection.detector import Detector

OPSET = 20

Names = Sequence[str] | None


def export_network(
    network: nn.Module,
    example: tuple[Any, ...],
    path: str | Path,
    *,
    input_names: Names = None,
    output_names: Names = None,
    dynamic_shapes: Any = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a network that has `SpatialPyramidPooling` or `pool_regions` in it to an ONNX file.

    Parameters
    ----------
    network : nn.Module
        Left as it is; exported in evaluation mode.
    example : tuple
        Arguments of the network: tensors on the CPU and lists of them. Values do not matter; a size that is
        to be free must be at least 2.
    path : path
        Replaced if it exists; the file appears whole or not at all.
    input_names, output_names : sequence of str, optional
        Names of the tensors in the file; a list counts as so many tensors.
    dynamic_shapes : optional
        As in `torch.onnx.export`. By default all sizes are free but the channels of (N, C, H, W) and
        (C, H, W) tensors; of others only the first.
    metadata : dict, optional
        Texts to keep in the file.

    Raises
    ------
    SppnetError
        If onnx and onnxscript are not installed, or PyTorch cannot export the network.

    Examples
    --------
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), SpatialPyramidPooling(), nn.Linear(400, 10))
    >>> export_network(network, (torch.zeros(2, 3, 64, 64),), "network.onnx")  # doctest: +SKIP
    """
    check_writable(path)
    free = tuple(_free_sizes(value, f"_{i}" if i else "") for i, value in enumerate(example))
    model = _to_onnx(network, example, dynamic_shapes or free, input_names, output_names)
    _write(model, path, metadata or {})


def export_features(
    backbone: Backbone, path: str | Path, *, side: int, levels: Sequence[int] = LEVELS
) -> None:
    """Write a backbone with a pyramid over its maps to an ONNX file: an image becomes a vector.

    The file takes ``image``, (H, W, 3) uint8 RGB, and returns ``features``, (D,) float32: the maps of
    ``backbone(image, side)``, pooled by `SpatialPyramidPooling` stage by stage. Its metadata are the arguments.

    Parameters
    ----------
    backbone : Backbone
    path : path
    side : int
        Shorter side in pixels to which the graph resizes the image.
    levels : sequence of int
        Sides of the pyramid's levels.

    Raises
    ------
    SppnetError
        As in `export_network`.
    """
    network = _Features(backbone, valid_levels(levels))
    facts = {"backbone": backbone.signature, "scales": [side], "levels": network.levels}
    _export_image(_of_backbone(backbone), (side,), network, ["features"], path, facts)


def export_detector(detector: Detector, path: str | Path) -> None:
    """Write a detector, up to suppression, to an ONNX file: image and candidate windows become scored boxes.

    Fully connected layers under the SVMs are part of it, what proposes windows from the maps is not.

    The file takes ``image``, (H, W, 3) uint8 RGB, and ``windows``, (R, 4) float32 in pixels of that image. It
    returns ``scores``, (R, K) float32, and ``boxes``, (R, K, 4) float32: the windows as each class's
    regression moves them, cut off at the borders. `Detector.predict` goes on, class by class, by dropping low
    scores and empty boxes and suppressing overlaps of more than ``nms_iou``.

    The metadata are JSON: ``classes``, the K names, ``nms_iou``, ``backbone``, and the fields of
    `sppnet.features.windows.WindowPooling`.

    Parameters
    ----------
    detector : Detector
    path : path

    Raises
    ------
    NotFittedError
        If the detector is not fitted.
    SppnetError
        As in `export_network`.
    """
    facts = {"classes": detector.classes_, "nms_iou": detector.nms_iou, **asdict(detector.pooling)}
    backbone = detector.fitted_.backbone
    facts["backbone"] = backbone.signature
    _export_image(
        _of_backbone(backbone), detector.scales, _Scoring(detector), ["scores", "boxes"], path, facts
    )


def export_classifier(network: SPPNet, path: str | Path, *, classes: Sequence[str]) -> None:
    """Write a network with a pyramid to an ONNX file: an image becomes class probabilities.

    The file takes ``image``, (H, W, 3) uint8 RGB, and returns ``probabilities``, (K,) float32, of the whole
    image: those of `sppnet.classification.views.probabilities` with the views ``"full"``. Its metadata are ``classes``,
    the K names, and ``side``, to which the shorter side is resized.

    Parameters
    ----------
    network : SPPNet
    path : path
    classes : sequence of str

    Raises
    ------
    SppnetError
        If the network has no pyramid; or as in `export_network`.
    """
    if not network.takes_any_size:
        raise SppnetError("the network has no pyramid and takes one size only, expected one with a pyramid")
    side = side_of(network, WHOLE)
    pixels = _Pixels(network.mean.flatten().cpu(), network.std.flatten().cpu(), multiple=1)
    scores = _Probabilities(network)
    _export_image(pixels, (side,), scores, ["probabilities"], path, {"classes": [*classes], "side": side})


class _Pixels(NamedTuple):
    """How a network takes pixels: standardised by these, padded to a multiple."""

    mean: Tensor
    std: Tensor
    multiple: int


def _of_backbone(backbone: Backbone) -> _Pixels:
    mean, std = (torch.tensor(v) * 255 for v in (backbone.network.mean, backbone.network.std))
    return _Pixels(mean, std, backbone.multiple)


def _export_image(
    pixels: _Pixels,
    sides: Sequence[int],
    network: nn.Module,
    outputs: list[str],
    path: str | Path,
    facts: dict[str, Any],
) -> None:
    """Write a network for prepared images (and windows, if it scores any) behind what prepares them.

    The two are exported one by one: PyTorch follows free sizes through any backbone, but not sizes computed
    from others, as those of resized images are.
    """
    compose = _import_onnx().compose
    check_writable(path)
    windows = [torch.zeros(5, 4)] if "boxes" in outputs else []
    between = [*(f"prepared_{s}" for s in range(len(sides))), "sizes", "size"]
    image = torch.zeros(60, 80, 3, dtype=torch.uint8)
    free: tuple[Any, ...] = ({0: "height", 1: "width"},)
    before = _to_onnx(_Preparation(pixels, sides), (image,), free, ["image"], between)

    unit = max(pixels.multiple, 64)
    prepared = [torch.zeros(1, 3, *(unit * (s + k) for k in (2, 3))) for s in range(len(sides))]
    example = (prepared, torch.ones(len(sides), 2, dtype=torch.int64), torch.tensor([60, 80]), *windows)
    free = ([{2: f"height_{s}", 3: f"width_{s}"} for s in range(len(sides))], {}, {})
    free += tuple({0: "windows"} for _ in windows)
    after = _to_onnx(network, example, free, [*between, *("windows" for _ in windows)], outputs)

    before = compose.add_prefix(before, "prepare/", rename_inputs=False, rename_outputs=False)
    model = compose.merge_models(before, after, [(name, name) for name in between])
    _write(model, path, {name: json.dumps(value) for name, value in facts.items()})


class _Preparation(nn.Module):
    """What is done to the pixels of an image before a network sees them, for several sides.

    Returns the (1, 3, H', W') inputs, the (S, 2) heights and widths before padding, and those of the image.
    Lengths are tensors and not integers because the exporter divides integers in single precision.
    """

    def __init__(self, pixels: _Pixels, sides: Sequence[int]) -> None:
        super().__init__()
        self.sides, self.multiple = tuple(sides), pixels.multiple
        self.mean, self.std = nn.Buffer(pixels.mean), nn.Buffer(pixels.std)

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        size = torch.stack([torch.scalar_tensor(n, dtype=torch.int64) for n in image.shape[:2]])
        # Whole numbers, exact in float32 for 65,000 rows.
        sums = image.float().cumsum(0)
        sizes = [self._target(size, side) for side in self.sides]
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


def _cells(geometry: Geometry, sizes: Tensor) -> Tensor:
    """Return how many cells are centred inside lengths in pixels; see `Geometry.cells`."""
    return (torch.floor((sizes.double() - 0.5 - geometry.offset) / geometry.stride) + 1).clamp(min=1)


class _Features(nn.Module):
    """A backbone's network and the pyramid, from a prepared image to one vector."""

    def __init__(self, backbone: Backbone, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.geometry, self.levels = backbone.network, backbone.geometry, levels

    def forward(self, prepared: list[Tensor], sizes: Tensor, size: Tensor) -> Tensor:
        maps, vectors = self.network(prepared[0]), []
        for stage, geometry in zip(maps, self.geometry, strict=True):
            end = _cells(geometry, sizes).flip(1).long()
            window = torch.cat([torch.zeros_like(end), end], dim=1)
            vectors.append(torch.ops.sppnet.pool([stage], window, None, self.levels, "max"))
        return torch.cat(vectors, dim=1)[0]


class _Probabilities(nn.Module):
    """A network from a prepared image to class probabilities."""

    def __init__(self, network: SPPNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, prepared: list[Tensor], sizes: Tensor, size: Tensor) -> Tensor:
        network = self.network
        return network.head(network.pool(network.backbone(prepared[0]))).softmax(dim=1)[0]  # type: ignore[no-any-return]


class _Scoring(nn.Module):
    """A detector from prepared images and windows to scores and boxes; see `Detector.predict_maps`."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        fitted = detector.fitted_
        self.network, self.geometry = fitted.backbone.network, fitted.backbone.geometry
        self.pooling, self.classes = detector.pooling, len(fitted.classes)
        self.head, self.layer, self.scale = fitted.head, detector.layer, fitted.feature_scale
        weights, offsets = fitted.regression.weights, fitted.regression.offsets
        self.svms = _linear(fitted.svms.weights, fitted.svms.biases)
        self.regression = _linear(weights.reshape(-1, weights.shape[-1]), offsets.ravel())

    def forward(
        self, prepared: list[Tensor], sizes: Tensor, size: Tensor, windows: Tensor
    ) -> tuple[Tensor, Tensor]:
        pooling, maps = self.pooling, [self.network(image) for image in prepared]
        assert pooling.reference is not None
        scale = choose_scale(
            windows, size.min().double(), pooling.scales, pooling.reference, pooling.scale_rule
        )
        factors, vectors = (sizes.double() / size.double()).flip(1)[scale], []
        for t, geometry in enumerate(self.geometry):
            limits = _cells(geometry, sizes).flip(1)[scale] - 1
            cells = project_onto(windows, factors, limits, geometry, pooling.projection)
            vectors.append(torch.ops.sppnet.pool([m[t] for m in maps], cells, scale, pooling.levels, "max"))
        pooled = torch.cat(vectors, dim=1) * self.scale
        scores = self.svms(pooled if self.head is None else self.head.activations(pooled, self.layer))
        deltas = self.regression(pooled).view(-1, self.classes, 4)
        limits = size.flip(0).repeat(2).float()
        return scores, decode_deltas(windows[:, None], deltas).clamp(min=0).minimum(limits)


def _linear(weights: FloatArray, offsets: FloatArray) -> nn.Linear:
    layer = nn.Linear(weights.shape[1], weights.shape[0])
    layer.load_state_dict({"weight": torch.from_numpy(weights), "bias": torch.from_numpy(offsets)})
    return layer


def _import_onnx() -> Any:
    try:
        import onnx.compose
        import onnxscript  # noqa: F401  (PyTorch's exporter works with it)

        import onnx
    except ImportError as error:
        raise SppnetError(f'found no {error.name}, which exports need: pip install "sppnet[onnx]"') from None
    return onnx


def _free_sizes(value: Any, suffix: str) -> Any:
    """Return which sizes of an argument are free, by the names that they get in the file."""
    if isinstance(value, list | tuple):
        return [_free_sizes(v, f"{suffix}_{i}") for i, v in enumerate(value)]
    if not isinstance(value, Tensor):
        return None
    maps = {4: {0: "batch", 2: "height", 3: "width"}, 3: {1: "height", 2: "width"}}
    names = maps.get(value.ndim, {0: "length"} if value.ndim else {})
    return {i: name + suffix for i, name in names.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence a logger that says at length what it cannot solve about sizes that pooling rounds up."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _to_onnx(network: nn.Module, example: tuple[Any, ...], free: Any, inputs: Names, outputs: Names) -> Any:
    """Return a network as an ONNX model."""
    _import_onnx()
    try:
        with warnings.catch_warnings(), _quiet(), torch.no_grad():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                copy.deepcopy(network).cpu().eval(),
                example,
                dynamo=True,
                dynamic_shapes=free,
                input_names=inputs,
                output_names=outputs,
                opset_version=OPSET,
                custom_translation_table={torch.ops.sppnet.pool.default: _translate},
                verbose=False,
            )
    except Exception as error:  # PyTorch wraps the reason several times, in pages of advice.
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
        raise SppnetError(" ".join(["the network cannot be exported:", *lines[:2]])) from error
    model = program.model_proto
    # The exporter's notes on where each node comes from are larger than the graph.
    del model.graph.value_info[:]
    for node in model.graph.node:
        del node.metadata_props[:]
    return model


def _write(model: Any, path: str | Path, metadata: dict[str, str]) -> None:
    onnx = _import_onnx()
    from sppnet import __version__

    onnx.helper.set_model_props(model, {"sppnet": __version__, **metadata})
    onnx.checker.check_model(model)
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


# What follows runs while PyTorch exports: each call of `op` adds a node to the graph.


def _translate(maps: Any, windows: Any, index: Any, levels: Any, mode: Any, dtype: Any = None) -> Any:
    """Write a call of `sppnet.pooling.operator.pool` as nodes."""
    from onnxscript import opset20

    from onnx import TensorProto

    op: Any = opset20
    kind, channels = maps[0].dtype, maps[0].shape[1]
    if kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
        # Runtimes pool float32 only. The maximum is the same there, the mean is rounded once.
        maps = [op.Cast(m, to=TensorProto.FLOAT) for m in maps]
    if windows is None:
        grids = (partial(_map_grid, op, m, mode) for m in maps)
        pooled = op.Concat(*(_pyramid(op, grid, levels, mode, channels) for grid in grids), axis=0)
    elif mode == "max" and kind == TensorProto.DOUBLE:
        raise SppnetError("found float64 maps, expected float32, float16 or bfloat16 for maxima of windows")
    else:
        if index is None:
            index = op.Mul(op.Gather(windows, 0, axis=1), 0)
        parts, rows, first = [], [], op.Constant(value_int=0)
        for m in maps:
            past = op.Add(first, op.Squeeze(op.Shape(m, start=0, end=1)))
            inside = op.And(op.GreaterOrEqual(index, first), op.Less(index, past))
            rows.append(op.Squeeze(op.NonZero(inside), [0]))
            image = op.Sub(op.Gather(index, rows[-1]), first)
            grid = partial(_window_grid, op, m, op.Gather(windows, rows[-1]), image, mode, channels)
            parts.append(_pyramid(op, grid, levels, mode, channels))
            first = past
        # Row i of all parts in a line belongs to window order[i].
        order = op.Concat(*rows, axis=0)
        back = op.ScatterElements(order, order, op.Range(0, op.Squeeze(op.Shape(order)), 1), axis=0)
        pooled = op.Gather(op.Concat(*parts, axis=0), back)
    return op.Cast(pooled, to=int(kind if dtype is None else dtype))


def _pyramid(op: Any, grid: Callable[[int], Any], levels: Any, mode: str, channels: int) -> Any:
    """Return the (R, C * M) vectors of a pyramid, where ``grid(n)`` gives a level as (R, C, n, n)."""
    grids: dict[int, Any] = {}
    for n in sorted(set(levels), reverse=True):
        # A bin is the union of the finer level's bins in it, whose maximum is cheaper.
        finer = next((m for m in grids if mode == "max" and m % n == 0), None)
        if finer is None:
            grids[n] = grid(n)
        else:
            blocks = op.Reshape(grids[finer], [0, channels, n, finer // n, n, finer // n])
            grids[n] = op.ReduceMax(blocks, [3, 5], keepdims=0)
    return op.Concat(*(op.Flatten(grids[n], axis=1) for n in levels), axis=1)


def _map_grid(op: Any, m: Any, mode: str, n: int) -> Any:
    """Return the (N, C, n, n) bins of maps: rows of bins first, then the columns of these."""
    reduce = op.ReduceMax if mode == "max" else op.ReduceMean
    for axis in (2, 3):
        size = op.Shape(m, start=axis, end=axis + 1)
        bounds = [_bounds(op, 0, size, i, n) for i in range(n)]
        bins = [reduce(op.Slice(m, start, end, [axis]), [axis], keepdims=1) for start, end in bounds]
        m = op.Concat(*bins, axis=axis)
    return m


def _window_grid(op: Any, m: Any, windows: Any, image: Any, mode: str, channels: int, n: int) -> Any:
    """Return the (R, C, n, n) bins of windows, each of the image of maps (N, C, H, W) that it says."""
    from onnx import TensorProto

    x1, y1, x2, y2 = (op.Gather(windows, [i], axis=1) for i in range(4))
    steps = op.Constant(value_ints=list(range(n)))
    left, right = (op.Unsqueeze(v, [1]) for v in _bounds(op, x1, op.Sub(x2, x1), steps, n))
    top, bottom = (op.Unsqueeze(v, [2]) for v in _bounds(op, y1, op.Sub(y2, y1), steps, n))
    image = op.Unsqueeze(image, [1, 2])
    if mode == "max":
        shape = op.Concat(op.Shape(windows, start=0, end=1), op.Constant(value_ints=[n, n, 1]), axis=0)
        # Its corners are inclusive. They are whole numbers, exact in float32 below 2 ** 24.
        corners = (image, left, top, op.Sub(right, 1), op.Sub(bottom, 1))
        rois = op.Concat(*(op.Expand(op.Unsqueeze(v, [3]), shape) for v in corners), axis=3)
        rois = op.Cast(op.Reshape(rois, [-1, 5]), to=TensorProto.FLOAT)
        bins = op.Reshape(op.MaxRoiPool(m, rois, pooled_shape=[1, 1]), [-1, n, n, channels])
    else:
        sums = op.CumSum(op.CumSum(op.Cast(m, to=TensorProto.DOUBLE), 2), 3)
        sums = op.Transpose(op.Pad(sums, [0, 0, 1, 1, 0, 0, 0, 0]), perm=[0, 2, 3, 1])
        height, width = (op.Shape(sums, start=i, end=i + 1) for i in (1, 2))
        table = op.Reshape(sums, [-1, channels])

        def corner(y: Any, x: Any) -> Any:
            return op.Gather(table, op.Add(op.Mul(op.Add(op.Mul(image, height), y), width), x))

        right_part, left_part = (op.Sub(corner(bottom, x), corner(top, x)) for x in (right, left))
        cells = op.Unsqueeze(op.Mul(op.Sub(right, left), op.Sub(bottom, top)), [3])
        bins = op.Div(op.Sub(right_part, left_part), op.Cast(cells, to=TensorProto.DOUBLE))
    return op.Transpose(bins, perm=[0, 3, 1, 2])


def _bounds(op: Any, first: Any, size: Any, i: Any, n: int) -> tuple[Any, Any]:
    """Return where bin i of n starts and ends along `size` cells from `first`; see `bin_bounds`."""
    start, end = op.Mul(size, i), op.Add(op.Mul(size, op.Add(i, 1)), n - 1)
    return op.Add(first, op.Div(start, n)), op.Add(first, op.Div(end, n))
