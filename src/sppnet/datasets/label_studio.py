"""Label Studio: a JSON file of tasks, each an image with boxes in per cent, and the XML of its interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from sppnet.datasets.entries import Entry, check_xml, decimals
from sppnet.storage import atomic_path, write_json

_LOCAL = "/data/local-files/?d="  # where Label Studio serves files of its own machine


def write_label_studio(file: Path, entries: Sequence[Entry], classes: Sequence[str]) -> list[Path]:
    """Write the tasks of a Label Studio project, and beside them the XML of its labelling interface.

    Images are named as files that Label Studio serves from the folder in its setting
    ``LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT``. Difficult objects and crowds cannot be held.

    Parameters
    ----------
    file : Path
        The JSON file; the interface has its name with the suffix ``.xml``.
    entries : sequence of Entry
        The images. Boxes with scores become predictions, others annotations.
    classes : sequence of str
        All class names, as the interface offers them.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    SppnetError
        If XML has no place for a class name.
    OSError
        If a file cannot be written.
    """
    check_xml(classes, "Label Studio")
    write_json(file, label_studio_tasks(entries))
    interface = file.with_suffix(".xml")
    with atomic_path(interface) as temporary:
        temporary.write_text(_interface(classes), "utf-8")
    return [file, interface]


def label_studio_tasks(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return images as Label Studio imports them: a prediction's score is the mean of its boxes."""
    tasks = []
    for number, entry in enumerate(entries, 1):
        regions = [_region(entry, k) for k in range(len(entry.target.labels))]
        content: dict[str, Any] = {"result": regions}
        if entry.scores is not None:
            score = float(entry.scores.mean()) if len(entry.scores) else 0.0
            content = {"model_version": "sppnet", "score": round(score, 6), **content}
        about = {"image": _LOCAL + quote(entry.place, errors="surrogateescape")}
        about |= {"split": entry.split} if entry.split else {}
        kind = "annotations" if entry.scores is None else "predictions"
        tasks.append({"id": number, "data": about, kind: [content]})
    return tasks


def _region(entry: Entry, k: int) -> dict[str, Any]:
    """Return a box as a region: its corner and sides in per cent of the image."""
    x1, y1, x2, y2 = decimals(entry.target.boxes[k])
    box = {
        **{"x": 100 * x1 / entry.width, "y": 100 * y1 / entry.height},
        **{"width": 100 * (x2 - x1) / entry.width, "height": 100 * (y2 - y1) / entry.height},
    }
    return {
        **{"id": f"box{k + 1}", "type": "rectanglelabels", "from_name": "label", "to_name": "image"},
        **{"original_width": entry.width, "original_height": entry.height, "image_rotation": 0},
        "value": {**box, "rotation": 0, "rectanglelabels": [entry.target.labels[k]]},
        **({} if entry.scores is None else {"score": decimals(entry.scores)[k]}),
    }


def _interface(classes: Sequence[str]) -> str:
    """Return the interface to which the tasks fit, for "Labeling Interface, Code" in a project's settings."""
    labels = "".join(f"    <Label value={quoteattr(name)}/>\n" for name in classes)
    return (
        '<View>\n  <Image name="image" value="$image"/>\n'
        f'  <RectangleLabels name="label" toName="image">\n{labels}  </RectangleLabels>\n</View>\n'
    )
