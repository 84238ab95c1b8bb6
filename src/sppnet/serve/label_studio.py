"""The protocol of Label Studio's machine-learning backends: its users get boxes to correct, and fits.

In a project of Label Studio, "Model" takes the address of this server with ``/label-studio``, and the token
as password. Tasks are told apart by the names of their photos, which must be those of the opened folder:
nothing is fetched from anywhere.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree.ElementTree import ParseError, fromstring

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from sppnet import __version__
from sppnet.boxes import Target
from sppnet.datasets.entries import Entry
from sppnet.datasets.label_studio import label_studio_tasks
from sppnet.serve.errors import Refused
from sppnet.serve.schema import BoxesGiven, Change, LabelledBox
from sppnet.serve.workers import answer

if TYPE_CHECKING:
    from sppnet.serve.studio import Studio

label_studio = APIRouter(prefix="/label-studio", tags=["label studio"])

_MOST_TASKS = 1000
_SUBMITTED = ("ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_CREATED")
_HASH = re.compile(r"[0-9a-f]{8}-(.+)", re.DOTALL)  # before the name of a photo that was uploaded


class Task(BaseModel):
    """A task of Label Studio: what of it names the photo."""

    id: int | str | None = None
    data: dict[str, Any] = {}


class Predict(BaseModel):
    """A request for predictions."""

    tasks: Annotated[list[Task], Field(max_length=_MOST_TASKS)]
    label_config: Annotated[str, Field(max_length=1_000_000)] = ""


class Event(BaseModel):
    """What happened in Label Studio."""

    action: str = ""
    task: Task | None = None
    annotation: dict[str, Any] | None = None


@label_studio.get("/health")
def health() -> dict[str, str]:
    """Tell Label Studio that there is a model."""
    return {"status": "UP", "model_class": "sppnet"}


@label_studio.post("/setup")
def setup(request: Request, about: dict[str, Any]) -> dict[str, str]:
    """Tell Label Studio which model there is."""
    return {"model_version": _version(request.app.state.studio)}


@label_studio.post("/predict")
async def predict(request: Request, asked: Predict) -> dict[str, Any]:
    """Return what the model in use finds in the photos of tasks."""
    studio: Studio = request.app.state.studio
    model, names = studio.results.in_use, _control(asked.label_config)
    if model is None:
        raise Refused(409, "no model", "a fit first, or a model to begin with")
    known = await asyncio.to_thread(_by_name, studio)
    results = []
    for task in asked.tasks:
        photo = _photo(task, known)
        results.append(await _prediction(studio, photo, names) if photo else _nothing(studio))
    return {"results": results, "model_version": _version(studio)}


@label_studio.post("/webhook", status_code=201)
def webhook(request: Request, event: Event) -> dict[str, Any]:
    """Take in an annotation that was submitted, and fit to all of them as soon as there are enough."""
    studio: Studio = request.app.state.studio
    if event.action not in _SUBMITTED or event.task is None or event.annotation is None:
        return {"taken": False}
    photo = _photo(event.task, _by_name(studio))
    if photo is None:
        raise Refused(404, "a task of another photo", "one of the opened folder, told by its name")
    width, height = studio.photos.size(photo)
    boxes = _boxes(event.annotation.get("result"), width, height)
    revision = studio.labels.of(photo).revision
    studio.labels.put(photo, BoxesGiven(revision=revision, boxes=boxes, reviewed=True))
    studio.annotations.write(photo)
    studio.hub.tell(Change(what="boxes", photo=photo))
    return {"taken": True, "boxes": len(boxes), "fits": studio.fits.wish()}


def _version(studio: Studio) -> str:
    used = studio.results.used()
    return f"sppnet {__version__}" if used is None else f"{used.name} {used.id}"


def _by_name(studio: Studio) -> dict[str, str]:
    """Return the photos by the last part of their names, if that is one photo's alone."""
    known: dict[str, str] = {}
    twice = set()
    for row in studio.store.rows("SELECT id, place FROM photos WHERE gone = 0"):
        name = os.path.basename(os.fsdecode(row["place"]))
        twice |= {name} & known.keys()
        known[name] = row["id"]
    return {name: photo for name, photo in known.items() if name not in twice}


def _photo(task: Task, known: Mapping[str, str]) -> str | None:
    """Return the photo that a task is of, if it is one of ours."""
    for value in task.data.values():
        if not isinstance(value, str):
            continue
        parts = urlsplit(value) if len(value) < 10_000 else urlsplit("")
        path = parse_qs(parts.query)["d"][0] if "d=" in parts.query else unquote(parts.path)
        name = path.rpartition("/")[2]
        hashed = _HASH.fullmatch(name)
        for one in (name, hashed[1] if hashed else name):
            if one in known:
                return known[one]
    return None


def _control(config: str) -> tuple[str, str]:
    """Return the names of what boxes are drawn with, and on, in an interface."""
    try:
        tags = () if "<!" in config else fromstring(config).iter("RectangleLabels")
    except ParseError:
        tags = ()
    found = next(((tag.get("name"), tag.get("toName")) for tag in tags), (None, None))
    return found[0] or "label", found[1] or "image"


async def _prediction(studio: Studio, photo: str, names: tuple[str, str]) -> dict[str, Any]:
    model = studio.results.in_use
    assert model is not None
    file, path = studio.results.file(model), await asyncio.to_thread(studio.photos.path, photo)
    found = await answer(studio.engine, "results", file, path)
    least = studio.results.thresholds()
    shown = [one for one in found if one["score"] >= least[one["label"]]]
    width, height = await asyncio.to_thread(studio.photos.size, photo)
    target = Target.of([one["box"] for one in shown], [one["label"] for one in shown])
    scores = np.array([one["score"] for one in shown], np.float32)
    task = label_studio_tasks([Entry(path.name, path.name, height, width, target, scores)])[0]
    prediction: dict[str, Any] = task["predictions"][0]
    for region in prediction["result"]:
        region["from_name"], region["to_name"] = names
    return prediction | {"model_version": _version(studio)}


def _nothing(studio: Studio) -> dict[str, Any]:
    return {"model_version": _version(studio), "score": 0.0, "result": []}


def _boxes(result: Any, width: int, height: int) -> list[LabelledBox]:
    """Return the rectangles of an annotation that lie in the photo."""
    boxes = []
    for region in result if isinstance(result, Sequence) else ():
        value = region.get("value") if isinstance(region, dict) else None
        if not isinstance(value, dict) or not value.get("rectanglelabels"):
            continue
        try:
            x, y, w, h = (float(value[name]) / 100 for name in ("x", "y", "width", "height"))
            corners = x * width, y * height, (x + w) * width, (y + h) * height
            boxes.append(LabelledBox(box=corners, label=str(value["rectanglelabels"][0])))
        except (KeyError, TypeError, ValueError, IndexError):
            raise Refused(422, f"the region {str(value)[:80]}", "a box in per cent, and a label") from None
    return boxes
