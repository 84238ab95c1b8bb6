"""The file of a detector: what it says of itself, and how what was fitted is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from sppnet.arrays import FloatArray
from sppnet.errors import SppnetError
from sppnet.storage import read_metadata, write_tensors

Arrays = dict[str, npt.NDArray[Any]]

FORMAT, VERSION = "sppnet-detector", "6"
_FITTED = [
    *(f"{name}.{part}" for name in ("svms", "regression") for part in ("weights", "largest", "offsets")),
    *("photos", "objects", "thresholds", "history"),
    *(f"calibration.{part}" for part in ("knots", "levels", "slopes")),
    *(f"quality.{part}" for part in ("average_precision", "curve", "objects", "photos", "folds")),
]
_FACTS = {"backbone", "classes", "feature_scale", "settings", "side", "sppnet"}


def write_detector(path: str | Path, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write a detector's arrays, and the facts that `read_facts` returns, atomically."""
    write_tensors(path, tensors, {"format": FORMAT, "version": VERSION, "detector": json.dumps(facts)})


def read_facts(path: str | Path) -> dict[str, Any]:
    """Return what a detector file says of itself, without loading what was fitted.

    Returns
    -------
    dict
        ``backbone``, of which `sppnet.features.stored.backbone_of` makes one, ``classes``, ``feature_scale``,
        the ``settings``, the ``side`` of photos for a network that proposes windows, and ``sppnet``, the
        version that fitted it.

    Raises
    ------
    FileNotFoundError, SppnetError
        If there is no such file, or it is damaged, not a detector or of another version.
    """
    text = read_metadata(path, FORMAT, VERSION).get("detector", "")
    try:
        facts: dict[str, Any] = json.loads(text)
    except ValueError:
        facts = {}
    if not isinstance(facts, dict) or not facts.keys() >= _FACTS:
        raise SppnetError(f"{path}: damaged, found no {', '.join(sorted(_FACTS))}, expected a detector")
    return facts


def read_tensors(path: Path) -> Arrays:
    """Return the arrays of a file that `read_facts` took for a detector's.

    Raises
    ------
    SppnetError
        If some of what was fitted are missing.
    """
    tensors = load_file(path)
    missing = [name for name in _FITTED if name not in tensors]
    if missing:
        raise SppnetError(f"{path}: damaged, found no {', '.join(missing)}, expected a detector")
    return tensors


def quantise(name: str, weights: FloatArray, offsets: FloatArray) -> Arrays:
    """Return weights and offsets as arrays to save, the weights in half precision."""
    # That keeps three digits of each weight relative to the largest of its row.
    largest = np.maximum(np.abs(weights).max(axis=-1, keepdims=True), 1e-30)
    return {
        f"{name}.weights": (weights / largest).astype(np.float16),
        f"{name}.largest": largest,
        f"{name}.offsets": offsets,
    }


def dequantise(name: str, tensors: Arrays) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the float32 weights and offsets that `quantise` was given, the weights rounded."""
    weights, largest, offsets = (tensors[f"{name}.{part}"] for part in ("weights", "largest", "offsets"))
    return weights.astype(np.float32) * largest, offsets


def with_prefix(prefix: str, tensors: Arrays) -> Arrays:
    """Return the arrays whose names begin with a prefix and a dot, without these."""
    start = f"{prefix}."
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
