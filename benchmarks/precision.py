"""What lower precision of the network brings and costs: seconds of a pass, and mAP. Run as::

    python benchmarks/precision.py DATA --model animals --split val --calibrate train

The network of a detector runs in float32, as sppnet runs it; in bfloat16, where the processor has it; and in
int8, quantised statically (per channel, activations by their largest values on some training photos) by
ONNX Runtime's tools. SVMs and all else stay as they are. OpenVINO, sppnet's own runtime, runs all three.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.progress import track

import onnx
import sppnet.features.inference as inference
from common import commit, machine, table
from sppnet.datasets import read_dataset
from sppnet.detection.detector import Detector
from sppnet.evaluation.detection import evaluate_detections
from sppnet.features.backbone import Backbone
from sppnet.images import read_image, resize, whole_image_size


class Photos(CalibrationDataReader):
    """Feeds standardised photos to the calibration."""

    def __init__(self, backbone: Backbone, side: int, paths: list[Path]) -> None:
        self.name = backbone.model.graph.input[0].name
        self.values = iter(self._standardised(backbone, side, path) for path in paths)

    def _standardised(self, backbone: Backbone, side: int, path: Path) -> np.ndarray:
        pixels = read_image(path)
        height, width = pixels.shape[:2]
        small = resize(pixels, *whole_image_size(height, width, side))
        values = (backbone.padded(small) - backbone.mean) / backbone.std
        return values.transpose(0, 3, 1, 2).astype(np.float32)

    def get_next(self) -> dict[str, np.ndarray] | None:
        values = next(self.values, None)
        return None if values is None else {self.name: values}


def quantised(backbone: Backbone, photos: Photos) -> onnx.ModelProto:
    """Return the network in int8."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("a.onnx", "b.onnx", "c.onnx")]
        onnx.save(backbone.model, paths[0])
        quant_pre_process(str(paths[0]), str(paths[1]), skip_symbolic_shape=True)
        quantize_static(
            str(paths[1]),
            str(paths[2]),
            photos,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "Add"],
        )
        return onnx.load(paths[2])


def compiled(model: onnx.ModelProto, backbone: Backbone, precision: str) -> Any:
    network = inference._prepared(model, backbone.mean, backbone.std)
    settings = {"INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": 1}
    return inference.CompiledGraph(inference._core().compile_model(network, "CPU", settings))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--model", default="animals")
    parser.add_argument("--split", default="val")
    parser.add_argument("--calibrate", default="train")
    parser.add_argument("--photos", type=int, default=100, help="to calibrate on")
    parser.add_argument("--images", type=int, help="to test on; default: all")
    args = parser.parse_args()
    detector = Detector.load(args.model)
    backbone, side = detector.fitted_.backbone, detector.fitted_.side
    assert side is not None
    paths = [sample.path for sample in read_dataset(args.data, args.calibrate)][::7][: args.photos]
    ways = {
        "float32": compiled(backbone.model, backbone, "f32"),
        "bfloat16": compiled(backbone.model, backbone, "bf16"),
        "int8": compiled(quantised(backbone, Photos(backbone, side, paths)), backbone, "f32"),
    }
    samples = list(read_dataset(args.data, args.split))[: args.images]
    found: dict[str, list[Any]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for sample in track(samples, "Detecting"):
        pixels = read_image(sample.path)
        for name, run in ways.items():
            backbone.__dict__["_run"] = run
            start = time.perf_counter()
            encoded = detector.encode(pixels)
            seconds[name].append(time.perf_counter() - start)
            found[name].append(detector.predict(encoded, threshold=0.0, scores="svm"))
    rows = []
    for name in ways:
        thresholds = dict.fromkeys(detector.classes_, 0.5)
        report = evaluate_detections(
            found[name], [s.target for s in samples], detector.classes_, 0, thresholds
        )
        rows.append((name, f"{100 * report.mean_ap:.1f}", f"{statistics.median(seconds[name]):.4f}"))
    print(f"{machine()}; commit {commit()}; {args.model}, {len(samples)} photos of {args.split}\n")
    print(table(("network", "mAP", "s to encode"), rows))


if __name__ == "__main__":
    main()
