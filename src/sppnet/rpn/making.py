"""A trained network becomes a backbone's graph, which runs without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sppnet.arrays import to_numpy
from sppnet.features.graph import (
    ANSWERS,
    MAPS,
    STAGES,
    STRIDES,
    Facts,
    Graph,
    Variant,
    geometry_of,
    make_graph,
)
from sppnet.features.making import check_graph, exported, store_weights
from sppnet.rpn.network import PyramidNetwork

_PREFIX = "network."


def graph_of(network: PyramidNetwork, facts: Facts, kinds: Sequence[str]) -> Graph:
    """Return the graph of a network, its weights in half precision.

    Parameters
    ----------
    network : PyramidNetwork
    facts : Facts
        Those of the backbone that it started from; its maps and strides are replaced.
    kinds : sequence of str
        Names of the classes that it tells apart.
    """
    frozen = network.frozen()
    model = exported(frozen, STAGES)
    store_weights(model, {n: to_numpy(v) for n, v in frozen.state_dict().items()}, _PREFIX)
    channels = {**dict.fromkeys(MAPS, network.width), **dict.fromkeys(ANSWERS, 5 + len(kinds))}
    places = {
        stage: geometry_of(stride)
        for stages in (MAPS, ANSWERS)
        for stage, stride in zip(stages, STRIDES, strict=True)
    }
    variant = Variant(places, max(STRIDES), {})
    told = replace(facts, channels=channels, strides={max(STRIDES): variant}, kinds=tuple(kinds))
    graph = make_graph(model, told)
    check_graph(graph, frozen)
    return graph
