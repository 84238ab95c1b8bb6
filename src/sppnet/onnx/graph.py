"""From a network to a graph of ONNX, and from a graph to a file."""

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

from sppnet.errors import SppnetError
from sppnet.onnx.translation import translate
from sppnet.storage import atomic_path

OPSET = 20

Names = Sequence[str] | None


def import_onnx() -> Any:
    """Return the package onnx; a `SppnetError` says how to install what is missing."""
    try:
        import onnx.compose
        import onnxscript  # noqa: F401  (PyTorch's exporter works with it)

        import onnx
    except ImportError as error:
        raise SppnetError(f'found no {error.name}, which exports need: pip install "sppnet[onnx]"') from None
    return onnx


def free_sizes(value: Any, suffix: str) -> Any:
    """Return which sizes of an argument are free, by the names that they get in the file."""
    if isinstance(value, list | tuple):
        return [free_sizes(v, f"{suffix}_{i}") for i, v in enumerate(value)]
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


def to_onnx(network: nn.Module, example: tuple[Any, ...], free: Any, inputs: Names, outputs: Names) -> Any:
    """Return a network as an ONNX model.

    Parameters
    ----------
    network : nn.Module
        Left as it is; a copy on the CPU, in evaluation mode, is exported.
    example : tuple
        Arguments of the network.
    free
        Which of their sizes are free, as ``dynamic_shapes`` of `torch.onnx.export`.
    inputs, outputs : sequence of str, optional
        Names of the tensors that go in and come out.

    Raises
    ------
    SppnetError
        If onnx and onnxscript are not installed, or PyTorch cannot export the network; gives the reason.
    """
    import_onnx()
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
                custom_translation_table={torch.ops.sppnet.pool.default: translate},
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


def write_graph(model: Any, path: str | Path, metadata: dict[str, str]) -> None:
    """Write an ONNX model with texts about it; the file appears whole or not at all."""
    onnx = import_onnx()
    from sppnet import __version__

    onnx.helper.set_model_props(model, {"sppnet": __version__, **metadata})
    onnx.checker.check_model(model)
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
