"""The application: addresses, what guards them, and what a client is told when something goes wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from sppnet import __version__
from sppnet.errors import SppnetError
from sppnet.serve import schema
from sppnet.serve.downloads import downloads
from sppnet.serve.errors import Gone, Refused
from sppnet.serve.label_studio import label_studio
from sppnet.serve.labels import Stale
from sppnet.serve.media import media
from sppnet.serve.metrics import CONTENT_TYPE, Counted, Metrics
from sppnet.serve.routes import api, studio_of
from sppnet.serve.security import Guard, Rules

if TYPE_CHECKING:
    from sppnet.serve.studio import Studio

STATIC = Path(__file__).parent / "static"


MOST_JSON = 8 * 2**20
"""Bytes of a body that is no image."""


def make_app(studio: Studio, rules: Rules) -> Guard:
    """Return the application that serves a project.

    Parameters
    ----------
    studio : Studio
        The project; the application works on it from its start to its end.
    rules : Rules
        Who may ask what.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with studio.at_work():
            yield

    app = FastAPI(
        title="sppnet serve",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        max_body_size=MOST_JSON,
    )
    metrics = Metrics(studio)
    app.state.studio, app.state.receiving, app.state.metrics = studio, 0, metrics
    app.add_middleware(Counted, metrics=metrics)
    app.include_router(media)
    app.include_router(api)
    app.include_router(downloads)
    app.include_router(label_studio)
    app.add_api_route("/api/v1/health", health, methods=["GET"], tags=["server"])
    app.add_api_route(
        "/api/v1/metrics", metrics_text, methods=["GET"], tags=["server"], response_class=PlainTextResponse
    )
    for kind, handler in (
        (SppnetError, _refused),
        (OSError, _failed),
        (RequestValidationError, _invalid),
        (HTTPException, _http),
        (Exception, _broken),
    ):
        app.add_exception_handler(kind, handler)
    app.add_api_route("/", page, methods=["GET"], include_in_schema=False)
    if (STATIC / "assets").is_dir():
        app.mount("/assets", StaticFiles(directory=STATIC / "assets"))
    return Guard(app, rules)


def health(request: Request) -> schema.Health:
    """Tell that the server answers, and whether its engine is ready."""
    studio = studio_of(request)
    return schema.Health(version=__version__, ready=studio.engine.ready, name=studio.name)


def metrics_text(request: Request) -> PlainTextResponse:
    """Tell what the server did so far, as Prometheus reads it."""
    return PlainTextResponse(request.app.state.metrics.text(), media_type=CONTENT_TYPE)


def page() -> FileResponse:
    """Return the page."""
    path = STATIC / "index.html"
    if not path.is_file():
        raise Gone("page", "the built page, which comes with the package: make page builds it")
    return FileResponse(path)


def _answer(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status)


def _refused(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, Stale):
        content = {"error": {"message": str(error)}, "current": error.current.model_dump()}
        return JSONResponse(content, 409)
    if isinstance(error, Refused):
        headers = {"Retry-After": "1"} if error.status == 429 else None
        about = {"message": str(error), "found": error.found, "expected": error.expected}
        return JSONResponse({"error": about}, error.status, headers)
    return _answer(422, str(error))


def _failed(request: Request, error: Exception) -> JSONResponse:
    return _answer(507, str(error))


def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return _answer(422, f"{place}: {first['msg']}")


def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(
        {"error": {"message": str(error.detail)}}, error.status_code, dict(error.headers or {})
    )


def _broken(request: Request, error: Exception) -> JSONResponse:
    """Tell of a bug only that there is one; the log is told all of it."""
    return _answer(500, "Something went wrong in the server; its log says more.")
