"""The API's addresses for files to take away: boxes, detections, counts, the report, models."""

from __future__ import annotations

import asyncio
import re
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from sppnet.serve import schema
from sppnet.serve.errors import Refused
from sppnet.serve.schema import ExportFormat, ExportWhat
from sppnet.serve.training import examples
from sppnet.serve.workers import answer

if TYPE_CHECKING:
    from sppnet.serve.studio import Studio

downloads = APIRouter(prefix="/api/v1")

_FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {}}},
    404: {"model": schema.Failure},
    409: {"model": schema.Failure},
}
_UNFIT = re.compile(r"[^-\w. ()]+")
_KINDS = {".csv": "text/csv", ".json": "application/json", ".zip": "application/zip", ".html": "text/html"}
# Seconds that a report or an ONNX file may take.
_PATIENCE = 900.0


def _studio(request: Request) -> Studio:
    studio: Studio = request.app.state.studio
    return studio


@downloads.get("/export", tags=["export"], response_class=FileResponse, responses=_FILE)
async def export(
    request: Request, what: ExportWhat = "boxes", format: ExportFormat = "csv", photos: bool = False
) -> FileResponse:
    """Return boxes, or detections at the thresholds, in the format of another program."""
    studio = _studio(request)
    return await _made(studio, lambda place: studio.exporter.write(what, format, photos, place))


@downloads.get("/export/counts.csv", tags=["export"], response_class=FileResponse, responses=_FILE)
async def counts(request: Request) -> FileResponse:
    """Return how many objects of each class there are in each photo, as a spreadsheet."""
    studio = _studio(request)
    return await _made(studio, studio.exporter.counts)


@downloads.get("/export/report.html", tags=["export"], response_class=FileResponse, responses=_FILE)
async def report(request: Request) -> FileResponse:
    """Return how good the model in use is on the labelled photos, as a page that holds its pictures."""
    studio = _studio(request)
    model = studio.results.in_use
    if model is None:
        raise Refused(409, "no model", "a fit first, or a model to begin with")
    data = [tuple(example) for example in await asyncio.to_thread(examples, studio.labels, studio.store)]
    if not data:
        raise Refused(409, "no labelled photo", "some boxes first")
    arguments = (studio.results.file(model), studio.results.chosen(), data)
    place = _folder(studio)
    return await _written(place, _reported(studio, arguments, place))


@downloads.get("/models/{model}/file", tags=["models"], response_class=FileResponse, responses=_FILE)
async def model_file(request: Request, model: str) -> FileResponse:
    """Return a model as its file, with the thresholds that were chosen: `sppnet detect run` takes it."""
    studio = _studio(request)
    place = _folder(studio)
    return await _written(place, _saved(studio, model, place))


@downloads.get("/models/{model}/onnx", tags=["models"], response_class=FileResponse, responses=_FILE)
async def model_onnx(request: Request, model: str) -> FileResponse:
    """Return a model as an ONNX file, from pixels to boxes, with the thresholds that were chosen."""
    studio = _studio(request)
    place = _folder(studio)
    return await _written(place, _as_onnx(studio, model, place))


async def _saved(studio: Studio, model: str, place: Path) -> Path:
    """Write a model with the thresholds that were chosen."""
    file = await asyncio.to_thread(studio.results.file, model)
    out = place / f"{_UNFIT.sub('_', studio.name) or 'model'}.safetensors"
    await answer(studio.engine, "save", file, studio.results.chosen(), out)
    return out


async def _as_onnx(studio: Studio, model: str, place: Path) -> Path:
    """Write a model as ONNX, by the command that does so, beside all else."""
    file = await _saved(studio, model, place)
    out = file.with_suffix(".onnx")
    line = (sys.executable, "-m", "sppnet", "export", file, "--out", out)
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*line, stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        async with asyncio.timeout(_PATIENCE):
            status = await process.wait()
    except BaseException:
        process.kill()
        raise
    if status:
        raise Refused(500, f"an export that ended with status {status}", "an ONNX file")
    return out


async def _reported(studio: Studio, arguments: tuple[Any, ...], place: Path) -> Path:
    out = place / "report.html"
    await answer(studio.engine, "report", *arguments, out, limit=_PATIENCE)
    return out


async def _made(studio: Studio, make: Callable[[Path], Path]) -> FileResponse:
    """Return a file that is made in a folder of its own."""
    place = _folder(studio)
    return await _written(place, asyncio.to_thread(make, place))


async def _written(place: Path, making: Awaitable[Path]) -> FileResponse:
    """Return a file as soon as it is made; its folder is removed after that, or at once if it is not."""
    try:
        return _sent(await making, place)
    except BaseException:
        _remove(place)
        raise


def _folder(studio: Studio) -> Path:
    return Path(tempfile.mkdtemp(prefix="export-", dir=studio.opened.project / "incoming"))


def _remove(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)


def _sent(path: Path, place: Path) -> FileResponse:
    """Return a file that is removed with its folder once it is sent; never shown as a page of this server."""
    name = quote(path.name)
    return FileResponse(
        path,
        media_type=_KINDS.get(path.suffix, "application/octet-stream"),
        headers={"Content-Disposition": f"attachment; filename*=UTF-8''{name}"},
        background=BackgroundTask(_remove, place),
    )
