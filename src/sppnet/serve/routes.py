"""The API's addresses for photos, boxes, fits and results."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent

from sppnet.serve import schema
from sppnet.serve.schema import PhotoId
from sppnet.serve.training import can_fit
from sppnet.serve.workers import answer

if TYPE_CHECKING:
    from sppnet.serve.studio import Studio

api = APIRouter(prefix="/api/v1")

_FAILURES: dict[int | str, dict[str, Any]] = {
    404: {"model": schema.Failure},
    422: {"model": schema.Failure},
}
_GOING = ("waiting", "running")


def studio_of(request: Request) -> Studio:
    """Return the project that the application serves."""
    studio: Studio = request.app.state.studio
    return studio


@api.get("/project", tags=["project"])
def project(request: Request) -> schema.ProjectFacts:
    """Return what is known of the project as a whole."""
    return studio_of(request).facts()


@api.patch("/project", tags=["project"], responses=_FAILURES)
def change_project(request: Request, change: schema.ProjectChange) -> schema.ProjectFacts:
    """Change where annotations go, or the classes: their names, their order, which there are."""
    studio = studio_of(request)
    if change.annotations is not None:
        studio.store.keep("annotations", change.annotations)
    if change.rename:
        studio.rename(change.rename)
    if change.classes is not None:
        studio.labels.order(change.classes)
    studio.hub.tell(schema.Change(what="classes"))
    if change.rename:
        studio.hub.tell(schema.Change(what="results"))
    return studio.facts()


@api.get("/photos", tags=["photos"])
def photos(
    request: Request,
    offset: Annotated[int, Query(ge=0, le=10_000_000)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
    order: Literal["name", "doubt"] = "name",
    show: Literal["all", "labelled", "unlabelled", "found"] = "all",
    text: Annotated[str, Query(max_length=200)] = "",
) -> schema.Photos:
    """List photos."""
    return studio_of(request).photos.page(offset, limit, order, show, text)


@api.get("/photos/{photo}", tags=["photos"], responses=_FAILURES)
def photo(request: Request, photo: PhotoId) -> schema.Photo:
    """Return what is known of a photo."""
    return studio_of(request).photos.get(photo)


@api.get("/photos/{photo}/boxes", tags=["boxes"], responses=_FAILURES)
def boxes(request: Request, photo: PhotoId) -> schema.Boxes:
    """Return the boxes of a photo."""
    return studio_of(request).labels.of(photo)


@api.put("/photos/{photo}/boxes", tags=["boxes"], responses=_FAILURES | {409: {"model": schema.Conflict}})
def put_boxes(request: Request, photo: PhotoId, given: schema.BoxesGiven) -> schema.Boxes:
    """Replace the boxes of a photo; they are on the disk when this is answered."""
    studio = studio_of(request)
    return _kept(studio, photo, studio.labels.put(photo, given))


@api.post("/photos/{photo}/review", tags=["boxes"], responses=_FAILURES | {409: {"model": schema.Conflict}})
def review(request: Request, photo: PhotoId, given: schema.Review) -> schema.Boxes:
    """Take detections as right or as wrong."""
    studio = studio_of(request)
    return _kept(studio, photo, studio.labels.review(photo, given))


def _kept(studio: Studio, photo: str, boxes: schema.Boxes) -> schema.Boxes:
    """Write the XML file of a photo, and tell everyone that its boxes changed."""
    if can_fit(studio.labels.classes()).ok:
        studio.fitter.start()  # A fit is near: its process need not be waited for then.
    warning = studio.annotations.write(photo)
    studio.results.count([photo])
    studio.hub.tell(schema.Change(what="boxes", photo=photo))
    return boxes.model_copy(update={"warning": warning})


@api.post("/search", tags=["search"], responses=_FAILURES)
async def search(request: Request, asked: schema.Search) -> schema.Regions:
    """Find regions of all photos that are like one of a photo."""
    studio = studio_of(request)
    path = await asyncio.to_thread(studio.photos.path, asked.photo)
    found = await answer(studio.engine, "search", asked.photo, path, asked.box, asked.limit)
    return schema.Regions(**found)


@api.post("/fits", status_code=202, tags=["fits"], responses=_FAILURES | {409: {"model": schema.Failure}})
def start_fit(request: Request) -> schema.Fit:
    """Start a fit to the boxes that there are."""
    return studio_of(request).fits.start()


@api.get("/fits/{fit}", tags=["fits"], responses=_FAILURES)
def fit(request: Request, fit: str) -> schema.Fit:
    """Return how far a fit is, or how it ended."""
    return studio_of(request).fits.get(fit)


@api.delete("/fits/{fit}", tags=["fits"], responses=_FAILURES)
def cancel_fit(request: Request, fit: str) -> schema.Fit:
    """End a fit that goes on."""
    return studio_of(request).fits.cancel(fit)


@api.get("/fits/{fit}/events", tags=["fits"], response_class=EventSourceResponse)
async def fit_events(request: Request, fit: str) -> AsyncIterator[ServerSentEvent]:
    """Tell how far a fit is, until it ends."""
    studio = studio_of(request)
    changes = studio.hub.listen()
    last = await asyncio.to_thread(studio.fits.get, fit)
    yield ServerSentEvent(event="fit", data=last)
    if last.state not in _GOING:
        return
    async for change in changes:
        if change.fit is not None and change.fit.id == fit:
            yield ServerSentEvent(event="fit", data=change.fit)
            if change.fit.state not in _GOING:
                return


@api.get("/events", tags=["project"], response_class=EventSourceResponse)
async def events(request: Request) -> AsyncIterator[ServerSentEvent]:
    """Tell what changes, as long as somebody listens."""
    async for change in studio_of(request).hub.listen():
        yield ServerSentEvent(event="project", data=change)


@api.get("/results", tags=["results"])
def results(request: Request) -> schema.Results:
    """Return what the model in use finds in all photos, down to a small probability."""
    return studio_of(request).results.all()


@api.patch("/results/thresholds", tags=["results"], responses=_FAILURES)
def thresholds(request: Request, given: dict[schema.Name, schema.Share]) -> dict[str, float]:
    """Choose from which probability on the detections of classes count."""
    studio = studio_of(request)
    studio.results.set_thresholds(given)
    studio.labels.set_thresholds(given)
    studio.results.count()
    studio.hub.tell(schema.Change(what="results"))
    return studio.results.thresholds()


@api.get("/quality", tags=["fits"])
def quality(request: Request) -> schema.Qualities:
    """Return how good each fit is on photos that it did not learn from."""
    return schema.Qualities(fits=studio_of(request).fits.qualities())


@api.get("/models", tags=["models"])
def models(request: Request) -> list[schema.ModelFacts]:
    """List the models of the project."""
    return studio_of(request).results.models()


@api.post("/models/{model}/use", tags=["models"], responses=_FAILURES)
def use_model(request: Request, model: str) -> list[schema.ModelFacts]:
    """Take a model's detections as the results from now on."""
    studio = studio_of(request)
    studio.results.use(model)
    studio.wake()
    studio.hub.tell(schema.Change(what="results"))
    return studio.results.models()
