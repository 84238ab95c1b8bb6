"""Networks of PyTorch's that pool, one's own among them, as ONNX files."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onnx import TensorProto
from sppnet.errors import SppnetError, check_extra
from sppnet.onnx.file import write_graph
from sppnet.onnx.pooling import pool_maps, pool_windows
from sppnet.storage import check_writable

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

    Outside the promise are maps with NaN or infinity, on whose maximum runtimes disagree, and windows that
    are no part of their map, which nobody checks in a graph.

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
        If the extra ``sppnet[torch]`` is not installed whole, or PyTorch cannot export the network.

    Examples
    --------
    >>> from sppnet.pooling.layer import SpatialPyramidPooling
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), SpatialPyramidPooling(), nn.Linear(400, 10))
    >>> export_network(network, (torch.zeros(2, 3, 64, 64),), "network.onnx")  # doctest: +SKIP
    """
    check_extra("torch", "exporting a network")
    check_writable(path)
    free = tuple(_free_sizes(value, f"_{i}" if i else "") for i, value in enumerate(example))
    try:
        with warnings.catch_warnings(), _quiet(), torch.no_grad():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                copy.deepcopy(network).cpu().eval(),
                example,
                dynamo=True,
                dynamic_shapes=dynamic_shapes or free,
                input_names=input_names,
                output_names=output_names,
                opset_version=OPSET,
                custom_translation_table={torch.ops.sppnet.pool.default: _translate},
                verbose=False,
            )
    except Exception as error:  # PyTorch wraps the reason several times, in pages of advice.
        raise SppnetError(f"the network cannot be exported: {_reason(error)}") from error
    model = program.model_proto
    # The exporter's notes on where each node comes from are larger than the graph.
    del model.graph.value_info[:]
    for node in model.graph.node:
        del node.metadata_props[:]
    write_graph(model, path, metadata or {})


def _reason(error: BaseException) -> str:
    """Return the first lines of the first cause of an error, as one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2])


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


def _translate(maps: Any, windows: Any, index: Any, levels: Any, mode: Any, dtype: Any = None) -> Any:
    """Write a call of `sppnet.pooling.operator.pool` as nodes: each call of `op` while PyTorch exports."""
    from onnxscript import opset20

    op: Any = opset20
    kind, channels = maps[0].dtype, maps[0].shape[1]
    if kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
        # Runtimes pool float32 only. The maximum is the same there, the mean is rounded once.
        maps = [op.Cast(m, to=TensorProto.FLOAT) for m in maps]
    if windows is None:
        pooled = op.Concat(*(pool_maps(op, m, levels, mode, channels) for m in maps), axis=0)
    elif mode == "max" and kind == TensorProto.DOUBLE:
        raise SppnetError("found float64 maps, expected float32, float16 or bfloat16 for maxima of windows")
    else:
        if index is None:
            index = op.Mul(op.Gather(windows, 0, axis=1), 0)
        pooled = pool_windows(op, maps, windows, index, levels, mode, channels)
    return op.Cast(pooled, to=int(kind if dtype is None else dtype))
