"""The command that finds objects in images."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import sppnet.cli.console as console
import sppnet.cli.options as opt


def run(
    model: opt.Model,
    images: opt.Images,
    out: opt.Out = None,
    json_file: opt.Json = None,
    threshold: Annotated[float, typer.Option(help="Least score; at 0 the SVM is undecided.")] = opt.SHOWN,
    ensemble: opt.Ensemble = None,
    proposals: opt.OtherProposals = None,
    max_bad: opt.MaxBad = opt.BAD,
    max_pixels: opt.MaxPixels = None,
    device: opt.Device = "cpu",
) -> None:
    """Find objects in images, by one detector or several; print them, draw them, write them as JSON."""
    files = console.model_files([model, *(ensemble or [])])

    from sppnet.detection.detector import Detector
    from sppnet.drawing import draw_detections, picture_paths
    from sppnet.images import find_images, write_image

    paths = console.notes_of(find_images(images)).paths
    pictures = [] if out is None else picture_paths(out, paths)
    console.check_places(json_file, out, [*paths, *files], pictures)
    detector = console.together([Detector.load(file, device=device) for file in files], files)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, ...]] = []
    records: list[dict[str, Any]] = []
    failures: list[str] = []
    stream = detector.stream(paths, proposals=proposals, threshold=threshold)
    for i, result in enumerate(console.track(stream, "Detecting", len(paths))):
        if isinstance(result, Exception):
            failures.append(str(result))
            continue
        (pixels, found), path = result, paths[i]
        height, width = pixels.shape[:2]
        records.append({"image": str(path), "height": height, "width": width, "detections": found.facts()})
        for label, score, box in zip(found.labels, found.scores, found.boxes, strict=True):
            rows.append((path.name, label, f"{score:.2f}", ", ".join(f"{edge:.0f}" for edge in box)))
        if not found.labels:
            rows.append((path.name, "-", "", f"nothing scores {threshold:g} or more"))
        if out is not None:
            write_image(pictures[i], draw_detections(pixels, found, detector.classes_))
    console.print_rows(("image", "class", "score", "box (x1, y1, x2, y2)"), rows)
    console.write_json(json_file, records)
    if out is not None and records:
        print(f"pictures in {out}")
    console.end(failures, len(paths), max_bad)
