"""The command that says what a file of sppnet's is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import sppnet.cli.console as console
import sppnet.cli.options as opt
from sppnet.errors import SppnetError

if TYPE_CHECKING:
    from sppnet.detection.detector import Detector

_FILE = "Detector, classifier, backbone, vectors, index or exported model, or the name of one."
_JSON = "File for the same as JSON, or - to print it."


def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_FILE, autocompletion=opt.models)],
    json_file: Annotated[Path | None, typer.Option("--json", help=_JSON, allow_dash=True)] = None,
) -> None:
    """Say what a file is, what it was fitted on, how good it is, and under which licence."""
    path = _path(model)
    if json_file is not None and str(json_file) != "-":
        console.check_places(json_file, None, [path])
    facts, detector = _facts(path)
    if str(json_file) == "-":
        print(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        if not (detector is not None and name == "quality"):
            print(f"{name}: {_shown(value)}")
    if detector is not None:
        console.print_quality(detector, detector.classes_)
    console.write_json(json_file, facts)


def _path(model: str) -> Path:
    """Return the file or folder of a model that is given by path or name."""
    from sppnet.models import model_path, shipped

    if Path(model).is_dir():
        return Path(model)
    return model_path(model, suffix=".onnx" if model in shipped(".onnx") else ".safetensors")


def _facts(path: Path) -> tuple[dict[str, Any], Detector | None]:
    """Return what a file says of itself, and a detector whole."""
    from sppnet.storage import file_format

    place: dict[str, Any] = {"file": str(path)}
    if path.is_dir():
        from sppnet.retrieval.manifest import read_manifest

        about = read_manifest(path)
        size = sum(file["bytes"] for file in about["files"].values())
        kept = {"photos": about["images"], "vectors": about["count"], "regions": about["regions"]}
        return {"kind": "index", **place, "bytes": size, **kept, "source": about["source"]}, None
    place["bytes"] = path.stat().st_size
    if path.suffix == ".onnx":
        return _onnx_facts(path, place), None
    kind = file_format(path)
    if kind == "sppnet-detector":
        return _detector_facts(path, place)
    readers: dict[str, Callable[[Path], dict[str, Any]]] = {
        "sppnet-network": _classifier_facts,
        "sppnet-vectors": _vector_facts,
        "sppnet-embedder": _embedder_facts,
    }
    if kind not in readers:
        raise SppnetError(f"{path}: found {kind or 'no mark of sppnet'}, expected a file that sppnet wrote")
    return {
        "kind": kind.removeprefix("sppnet-").replace("network", "classifier"),
        **place,
        **readers[kind](path),
    }, None


def _detector_facts(path: Path, place: Mapping[str, Any]) -> tuple[dict[str, Any], Detector]:
    from sppnet.detection.detector import Detector
    from sppnet.detection.file import read_facts

    detector, stored = Detector.load(path), read_facts(path)
    fitted, origin = detector.fitted_, stored["backbone"]
    quality = {}
    for k, (name, threshold) in enumerate(zip(detector.classes_, detector.thresholds_.tolist(), strict=True)):
        counts = fitted.quality.at(k, threshold)
        quality[name] = {
            "learned_from": int(fitted.objects[k]),
            "threshold": round(threshold, 4),
            "measured_photos": int(fitted.quality.photos[k]),
            "measured_objects": counts.objects,
            "folds": int(fitted.quality.folds[k]),
            "AP": _known(float(fitted.quality.average_precision[k])),
            **{name: _known(getattr(counts, name)) for name in ("precision", "recall", "f1")},
            "false_alarms": counts.false_alarms,
        }
    windows = console.windows_of(detector) + (", or maps" if fitted.objectness is not None else "")
    facts = {
        "kind": "detector",
        **place,
        "classes": list(detector.classes_),
        "fitted_on": f"{len(fitted.photos)} photos, {int(fitted.objects.sum())} objects",
        "scores": "probabilities that a detection is right",
        "backbone": origin["name"] + (", trained" if _was_trained(detector) else ""),
        "layer": detector.layer,
        "windows": windows + (f", moved {detector.moves} times" if detector.moves > 1 else ""),
        "scales": list(detector.pooling.scales),
        "levels": list(detector.levels),
        "licence": origin["licence"],
        "source": origin["source"],
        "sppnet": stored["sppnet"],
        "quality": quality,
    }
    return facts, detector


def _was_trained(detector: Detector) -> bool:
    backbone = detector.fitted_.backbone
    return bool(backbone.tuned) or len(detector.fitted_.history) > 0


def _classifier_facts(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        about = {name: json.loads(file.metadata()[name]) for name in ("titles", "about", "backbone")}
        photos = len(file.get_tensor("photos"))
    origin = about["backbone"]
    return {
        "classes": about["titles"],
        "fitted_on": f"{photos} photos" if photos else "photos that are not listed",
        "backbone": origin["name"],
        "about": about["about"],
        "licence": origin["licence"],
        "source": origin["source"],
    }


def _vector_facts(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        rows, length = file.get_slice("vectors").get_shape()
    return {"vectors": rows, "length": length, **_embedder_facts(path)}


def _embedder_facts(path: Path) -> dict[str, Any]:
    from sppnet.retrieval.embedder import Embedder

    return {"embedder": Embedder.load(path).signature}


def _onnx_facts(path: Path, place: Mapping[str, Any]) -> dict[str, Any]:
    import onnx
    from sppnet.features.graph import read_graph

    about = {p.key: p.value for p in onnx.load(path, load_external_data=False).metadata_props}
    if "backbone" in about:
        told = {name: json.loads(value) for name, value in about.items() if name != "sppnet"}
        return {"kind": "exported model", **place, **told}
    facts = read_graph(path).facts
    return {
        "kind": "backbone",
        **place,
        "name": facts.name,
        "network": facts.network,
        "stages": list(facts.channels),
        "strides": list(facts.strides),
        "licence": facts.licence,
        "source": facts.source,
        "digest": facts.digest,
    }


def _known(value: float) -> float | None:
    return None if value != value else round(value, 4)


def _shown(value: Any) -> str:
    """Return a value as a line has it: lists between commas, long ones cut."""
    if isinstance(value, list):
        more = [f"... ({len(value)} in all)"] if len(value) > 12 else []
        return ", ".join([*map(str, value[:12]), *more])
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items())
    return str(value) if value not in ("", None) else "not known"
