"""Graphs on the processor: compiled by OpenVINO once for each machine, then read from a cache."""

from __future__ import annotations

import shutil
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt
from platformdirs import user_cache_path

import onnx
from sppnet.errors import SppnetError
from sppnet.parallel import thread_count

Pixels32 = npt.NDArray[np.float32]
# Free bytes that the cache asks for, and graphs that it keeps at most.
_SPACE, _KEPT = 100_000_000, 32


def graph_cache() -> Path:
    """Return the folder of the user's caches for compiled graphs; it may not exist yet."""
    return user_cache_path("sppnet") / "graphs"


def compile_graph(
    model: onnx.ModelProto, mean: tuple[float, ...], std: tuple[float, ...], streams: int = 1
) -> CompiledGraph:
    """Compile a backbone's graph for this processor, with free batch size, height and width.

    Parameters
    ----------
    model : onnx.ModelProto
        Takes standardised images (N, 3, H, W) and returns maps (N, C, h, w).
    mean, std : (float, float, float)
        What pixels, of 0 to 255, are standardised by.
    streams : int
        How many threads are to run it at once, each on its share of the cores.

    Raises
    ------
    SppnetError
        If the runtime cannot run the graph.
    """
    return CompiledGraph(_compiled(_prepared(model, mean, std), streams))


class CompiledGraph:
    """A backbone's graph, compiled; any number of threads may call it.

    Parameters
    ----------
    compiled : openvino.CompiledModel
        What runs it.
    """

    def __init__(self, compiled: Any) -> None:
        self._compiled, self._requests = compiled, threading.local()

    def __call__(self, pixels: Pixels32) -> tuple[Pixels32, ...]:
        """Return the (N, h, w, C) float32 maps of (N, H, W, 3) float32 pixels, 0 to 255."""
        # A request serves one thread; those of several threads take turns.
        if not hasattr(self._requests, "own"):
            self._requests.own = self._compiled.create_infer_request()
        results = self._requests.own.infer(pixels, share_inputs=True)
        return tuple(results[i] for i in range(len(self._compiled.outputs)))

    def free_buffers(self) -> None:
        """Give back the memory of maps inside the network, unless a thread is computing some."""
        with suppress(RuntimeError):
            self._compiled.release_memory()


def size_rule(model: onnx.ModelProto) -> Callable[[int], tuple[int, ...]]:
    """Return what tells the sizes of a backbone's maps without computing them.

    Parameters
    ----------
    model : onnx.ModelProto
        As for `compile_graph`.

    Returns
    -------
    callable
        Takes the side of a square image and returns the side of each map; 0 for all where the image is too
        small. The compiled graph says nothing of such images and returns numbers without meaning.
    """
    network = _read(model)

    def sides(side: int) -> tuple[int, ...]:
        try:
            network.reshape([1, 3, side, side])
        except RuntimeError:
            return (0,) * len(network.outputs)
        return tuple(int(output.get_shape()[-1]) for output in network.outputs)

    return sides


def _read(model: onnx.ModelProto) -> Any:
    try:
        return _core().read_model(model.SerializeToString())
    except RuntimeError as error:
        raise SppnetError(f"the runtime cannot read the backbone's graph ({_reason(error)})") from None


def _prepared(model: onnx.ModelProto, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """Return the graph behind the standardisation of pixels, with channels last on both sides."""
    from openvino import Layout, Type
    from openvino.preprocess import PrePostProcessor

    network = _read(model)
    steps = PrePostProcessor(network)
    steps.input().tensor().set_element_type(Type.f32).set_layout(Layout("NHWC"))
    steps.input().model().set_layout(Layout("NCHW"))
    steps.input().preprocess().mean(list(mean)).scale(list(std))
    for i in range(len(network.outputs)):
        steps.output(i).model().set_layout(Layout("NCHW"))
        steps.output(i).tensor().set_layout(Layout("NHWC"))
    return steps.build()


def _compiled(network: Any, streams: int) -> Any:
    # float32 everywhere: the same features on every machine, whatever its fast types are.
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": thread_count(),
        "NUM_STREAMS": streams,
        # Else the threads of several processes are all bound to the same first cores.
        "ENABLE_CPU_PINNING": False,
    }
    try:
        folder = str(_cache_folder())
        return _core().compile_model(network, "CPU", {**settings, "CACHE_DIR": folder})
    except OSError as error:
        reason = str(error.strerror or error)
    except RuntimeError as error:
        reason = _reason(error)
    try:
        compiled = _core().compile_model(network, "CPU", settings)
    except RuntimeError as error:
        raise SppnetError(f"the runtime cannot compile the backbone's graph ({_reason(error)})") from None
    _warn_of_cache(reason)
    return compiled


def _cache_folder() -> Path:
    """Return the folder for compiled graphs; an `OSError` says why there can be none."""
    folder = graph_cache()
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder):
        pass
    # The runtime itself goes on without a word where the disk is full.
    if shutil.disk_usage(folder).free < _SPACE:
        raise OSError(f"less than {_SPACE / 1e6:.0f} MB free")
    newest = sorted(folder.glob("*.blob"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest[_KEPT:]:
        path.unlink(missing_ok=True)
    return folder


@cache
def _warn_of_cache(reason: str) -> None:
    """Say once that there is no cache."""
    warnings.warn(
        f"{graph_cache()}: cannot keep compiled graphs there ({reason}); they are compiled anew", stacklevel=2
    )


def _reason(error: Exception) -> str:
    """Return the line of the runtime's report that tells most: what it lacks, or else the last."""
    lines = str(error).strip().splitlines()
    return next((line.lstrip("- ") for line in lines if "No conversion rule" in line), lines[-1])


_starting = threading.Lock()


def _core() -> Any:
    # Two threads that first need the runtime's tables of types at the same moment wait for each other for
    # ever: one makes them and waits for Python's lock, which the other holds while it waits for the tables.
    with _starting:
        return _started()


@cache
def _started() -> Any:
    import openvino

    openvino.Tensor(np.zeros((1, 1), np.float32), shared_memory=True)
    openvino.Type.f32.to_dtype()
    return openvino.Core()
