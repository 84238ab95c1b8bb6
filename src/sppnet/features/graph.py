"""A backbone as a file: an ONNX graph with its weights, and in its metadata all else that is needed.

The graph takes standardised images, (N, 3, H, W) float32, and returns the map of every stage, (N, C, h, w).
Weights of layers are stored in half precision, under the names that the network itself gives its parameters.
One file serves several output strides: where they differ, by strides, dilations and paddings of some
convolutions, the metadata say how.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

import onnx
from onnx import numpy_helper
from sppnet.arrays import FloatArray
from sppnet.errors import SppnetError
from sppnet.features.geometry import Geometry
from sppnet.storage import atomic_path

FORMAT, VERSION = "sppnet-backbone", 1
HEAD = "head"
RANDOM = "random"
"""Source of weights that are those of no training."""

STRIDES = (8, 16, 32)
"""Pixels from cell to cell, level by level."""

MAPS, ANSWERS = ("p3", "p4", "p5"), ("w3", "w4", "w5")
"""Stages that a graph with a pyramid returns: the levels' maps; and of each of their cells 5 numbers, the
log-odds that it lies in an object, and the distances of the object's left, upper, right and lower side from
its centre in pixels. Then, for each of the classes that it tells apart, the logarithm of its probability."""

STAGES = MAPS + ANSWERS

INPUT = "image"
"""Name of the graph's input."""

_KEY = "sppnet"
# Larger than any network that runs on a processor, smaller than what protobuf refuses.
_LARGEST = 2**30
_CELLS = "floor((length - 0.5 - offset) / stride) + 1, at least 1"


@dataclass(frozen=True)
class Variant:
    """A backbone at one output stride.

    Attributes
    ----------
    geometry : dict of str to Geometry
        Where the cells of each stage's map lie in the input.
    multiple : int
        Height and width of inputs are padded to multiples of this, so that paddings inside the network are
        the same for all sizes.
    changed : dict of str to dict
        The nodes of the graph that have other attributes than in the file, and these.
    """

    geometry: dict[str, Geometry]
    multiple: int
    changed: dict[str, dict[str, list[int]]]


@dataclass(frozen=True)
class Facts:
    """What a backbone's file says of itself.

    Attributes
    ----------
    name : str
        What the backbone is called.
    network : str
        The timm model, or the paper's network (see `sppnet.features.architectures`), that it was made of;
        empty for any other.
    channels : dict of str to int
        Channels of each stage's map, stages in the order of falling resolution.
    mean, std : (float, float, float)
        What pixels, of 0 to 1, are standardised by.
    strides : dict of int to Variant
        The output strides that it can run at; the first is the one that the graph is stored for.
    digest : str
        SHA-256 of the weights as they are stored, 64 hexadecimal digits.
    licence : str
        Licence of the weights.
    source : str
        Where the weights come from.
    kinds : tuple of str
        The classes that a network with a pyramid tells apart itself.
    """

    name: str
    network: str
    channels: dict[str, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    strides: dict[int, Variant]
    digest: str
    licence: str
    source: str
    kinds: tuple[str, ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Facts:
        """Return the facts that `asdict` and JSON made of some."""
        strides = {
            int(stride): Variant(
                {stage: Geometry(**place) for stage, place in variant["geometry"].items()},
                variant["multiple"],
                variant["changed"],
            )
            for stride, variant in values["strides"].items()
        }
        means = {name: tuple(float(v) for v in values[name]) for name in ("mean", "std")}
        kinds = tuple(values.get("kinds", ()))
        return cls(**{**values, **means, "strides": strides, "kinds": kinds})

    @property
    def proposes(self) -> bool:
        """Whether the network has a feature pyramid, and proposes windows; see `sppnet.features.pyramid`."""
        return set(STAGES) <= self.channels.keys()

    def check_stages(self, stages: Sequence[str]) -> None:
        """Raise an error unless the stages are one or more of the backbone's, each once."""
        if not stages or len(set(stages)) != len(stages) or not self.channels.keys() >= set(stages):
            found, allowed = ",".join(stages) or "(none)", ", ".join(self.channels)
            raise SppnetError(f"stages {found} found, expected distinct ones of {allowed}")

    def check_tunable(self, stage: str) -> None:
        """Raise an error unless there are layers behind a stage, which could learn."""
        numbered = [name for name in self.channels if name != HEAD]
        if stage not in numbered[:-1]:
            raise SppnetError(f"found the stage {stage!r}, expected one from 1 to {len(numbered) - 1}")

    def variant(self, output_stride: int) -> Variant:
        """Return what the backbone is at an output stride; an error if it has no such."""
        if output_stride not in self.strides:
            allowed = ", ".join(map(str, self.strides))
            raise SppnetError(
                f"backbone {self.name!r} was asked for at output stride {output_stride}, expected {allowed}"
            )
        return self.strides[output_stride]


@dataclass(frozen=True)
class Graph:
    """The graph of a backbone.

    Attributes
    ----------
    facts : Facts
        What its file says of it.
    model : onnx.ModelProto
        The graph as it is stored; not to be changed.
    """

    facts: Facts
    model: onnx.ModelProto

    @property
    def names(self) -> list[str]:
        """The names of the weights, in the order of the network."""
        return [i.name for i in self.model.graph.initializer]

    @cached_property
    def parameters(self) -> dict[str, FloatArray]:
        """The weights by name, in the order of the network, as float32."""
        return {i.name: numpy_helper.to_array(i).astype(np.float32) for i in self.model.graph.initializer}

    def at(
        self,
        stages: Sequence[str],
        output_stride: int,
        parameters: Mapping[str, npt.NDArray[np.floating[Any]]] | None = None,
    ) -> onnx.ModelProto:
        """Return the graph of some stages at an output stride.

        Parameters
        ----------
        stages : sequence of str
            Whose maps it returns, in this order.
        output_stride : int
            One of the facts'.
        parameters : mapping of str to array, optional
            Weights that replace those of these names.

        Raises
        ------
        SppnetError
            If the backbone has no such stages, stride or weights.
        """
        self.facts.check_stages(stages)
        changed = self.facts.variant(output_stride).changed
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        outputs = {output.name: output for output in self.model.graph.output}
        del model.graph.output[:]
        model.graph.output.extend(outputs[output_of(stage)] for stage in stages)
        for node in model.graph.node:
            for name, values in changed.get(node.name, {}).items():
                attribute = next(a for a in node.attribute if a.name == name)
                attribute.CopyFrom(onnx.helper.make_attribute(name, values))
        if parameters:
            self.check_parameters(parameters)
            _replace(model, parameters)
        return model

    def check_parameters(self, parameters: Mapping[str, npt.NDArray[np.floating[Any]]]) -> None:
        """Raise an error unless these are weights of the network, by name and shape."""
        shapes = {i.name: tuple(i.dims) for i in self.model.graph.initializer}
        wrong = [name for name, value in parameters.items() if shapes.get(name) != value.shape]
        if wrong:
            raise SppnetError(f"found weights that {self.facts.name} does not have, first {wrong[0]}")

    def with_parameters(self, parameters: Mapping[str, npt.NDArray[np.floating[Any]]]) -> Graph:
        """Return the graph with other weights, for a file of its own."""
        self.check_parameters(parameters)
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        _replace(model, parameters)
        return make_graph(model, self.facts)

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        return self.model.SerializeToString(deterministic=True)  # type: ignore[no-any-return]

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        with atomic_path(path) as temporary:
            temporary.write_bytes(self.to_bytes())


def geometry_of(stride: int) -> Geometry:
    """Return where the cells of a level lie: its training puts them in the middles of squares."""
    return Geometry(float(stride), (stride - 1) / 2)


def output_of(stage: str) -> str:
    """Return the name of the graph's output that is the map of a stage."""
    return f"stage_{stage}"


def make_graph(model: onnx.ModelProto, facts: Facts) -> Graph:
    """Return a graph with its facts, whose digest is taken anew, in its metadata."""
    values = {**asdict(facts), "digest": _digest(model)}
    stored = {"format": FORMAT, "version": VERSION, "cells": _CELLS, **values}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {_KEY: json.dumps(stored)})
    return Graph(Facts.of(values), model)


def read_graph(path: str | Path) -> Graph:
    """Read the file of a backbone.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    SppnetError
        If it is too large, no ONNX file, damaged, without its metadata, or of another version.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: found no such file, expected a backbone (.onnx)")
    if file.stat().st_size > _LARGEST:
        raise SppnetError(
            f"{path}: found {file.stat().st_size / 1e9:.1f} GB, expected a backbone of at most "
            f"{_LARGEST / 1e9:.1f} GB"
        )
    return graph_of(file.read_bytes(), str(path))


def graph_of(content: bytes, place: str) -> Graph:
    """Return the graph that the bytes of a file hold; errors, as of `read_graph`, name its place."""
    expected = "expected a backbone that sppnet backbone make wrote"
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError:
        raise SppnetError(f"{place}: found no whole ONNX file, {expected}") from None
    text = {p.key: p.value for p in model.metadata_props}.get(_KEY)
    if text is None:
        found = "an ONNX file without the metadata of a backbone" if model.graph.node else "no ONNX file"
        raise SppnetError(f"{place}: found {found}, {expected}")
    try:
        stored = json.loads(text)
        mark = stored.pop("format"), stored.pop("version")
        if mark != (FORMAT, VERSION):
            raise SppnetError(f"{place}: found {mark[0]} {mark[1]}, expected {FORMAT} {VERSION}")
        stored.pop("cells")
        facts = Facts.of(stored)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, SppnetError):
            raise
        raise SppnetError(f"{place}: found damaged metadata ({error}), {expected}") from None
    _check(model, facts, place)
    return Graph(facts, model)


def _check(model: onnx.ModelProto, facts: Facts, place: str) -> None:
    """Raise an error for a graph that its metadata do not describe, or that reaches beyond its file."""
    outputs = {output.name for output in model.graph.output}
    missing = [stage for stage in facts.channels if output_of(stage) not in outputs]
    if missing:
        raise SppnetError(f"{place}: damaged, found no map of the stage {missing[0]}")
    foreign = [node.op_type for node in model.graph.node if node.domain not in ("", "ai.onnx")]
    if foreign:
        raise SppnetError(f"{place}: found the operator {foreign[0]}, expected those of ONNX alone")
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise SppnetError(f"{place}: found weights in another file, expected them in this one")
    if _digest(model) != facts.digest:
        raise SppnetError(f"{place}: damaged, found weights that are not those of its digest")


def _digest(model: onnx.ModelProto) -> str:
    """Return the SHA-256 of the stored weights, in their order."""
    digest = hashlib.sha256()
    for tensor in model.graph.initializer:
        digest.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)}".encode())
        digest.update(tensor.raw_data)
    return digest.hexdigest()


def _replace(model: onnx.ModelProto, parameters: Mapping[str, npt.NDArray[np.floating[Any]]]) -> None:
    """Replace weights, each kept in the precision that it had."""
    for tensor in model.graph.initializer:
        if tensor.name in parameters:
            kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            tensor.raw_data = np.ascontiguousarray(parameters[tensor.name], kind).tobytes()
