"""The backbone inside the file of a model: by name where it comes with sppnet, or else its whole graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sppnet.errors import SppnetError
from sppnet.features.backbone import Backbone
from sppnet.features.graph import graph_of, read_graph
from sppnet.models import shipped
from sppnet.storage import digest_of

Arrays = dict[str, npt.NDArray[Any]]

_GRAPH, _TUNED = "graph", "backbone."


def backbone_state(backbone: Backbone) -> tuple[dict[str, Any], Arrays]:
    """Return what a model's file keeps of its backbone, for `backbone_of`: facts for JSON, and arrays."""
    facts = {
        "name": backbone.name,
        "digest": backbone.digest,
        "stages": backbone.stages,
        "output_stride": backbone.output_stride,
        "tuned": digest_of(backbone.tuned),
        "licence": backbone.graph.facts.licence,
        "source": backbone.graph.facts.source,
    }
    arrays: Arrays = {f"{_TUNED}{name}": value for name, value in backbone.tuned.items()}
    if not _is_shipped(backbone):
        arrays[_GRAPH] = np.frombuffer(backbone.graph.to_bytes(), np.uint8)
    return facts, arrays


def backbone_of(
    place: str | Path, facts: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]], device: str = "cpu"
) -> Backbone:
    """Return the backbone that a model's file keeps.

    Parameters
    ----------
    place : path
        The file, for error messages.
    facts, arrays
        What `backbone_state` gave; other arrays may be among them.
    device : str
        ``"cpu"``, or a PyTorch device.

    Raises
    ------
    SppnetError
        If it is damaged, or the model was made with other weights of a backbone than come with sppnet.
    """
    name, digest, stages, stride = (facts[k] for k in ("name", "digest", "stages", "output_stride"))
    if _GRAPH in arrays:
        graph = graph_of(arrays[_GRAPH].tobytes(), f"{place}, its backbone")
        backbone = Backbone(graph, stages, stride, device)
    elif name in shipped(".onnx"):
        backbone = Backbone.shared(name, stages, stride, device)
    else:
        raise SppnetError(f"{place}: damaged, found no graph of the backbone {name!r}")
    if backbone.digest != digest:
        raise SppnetError(
            f"{place}: found the backbone {name} with weights {backbone.digest[:16]}, expected {digest[:16]}"
        )
    found = {n.removeprefix(_TUNED): v for n, v in arrays.items() if n.startswith(_TUNED)}
    # In the network's order, in which they were when their digest was taken.
    tuned = {n: found.pop(n) for n in backbone.graph.names if n in found}
    if found:
        raise SppnetError(f"{place}: found weights that {name} does not have, first {next(iter(found))}")
    try:
        backbone = backbone.retuned(tuned) if tuned else backbone
    except SppnetError as error:
        raise SppnetError(f"{place}: {error}") from None
    if digest_of(tuned) != facts["tuned"]:
        raise SppnetError(f"{place}: damaged, found other tuned weights of the backbone than were written")
    return backbone


def _is_shipped(backbone: Backbone) -> bool:
    """Return whether a backbone is one that comes with sppnet, but for what was tuned."""
    path = shipped(".onnx").get(backbone.name)
    return path is not None and read_graph(path).facts.digest == backbone.digest
