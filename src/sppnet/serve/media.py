"""The API's addresses for pixels: photos that are looked at, dropped, searched, detected in."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response

from sppnet.errors import ImageError, SppnetError
from sppnet.images import check_pixels, image_header
from sppnet.serve import schema
from sppnet.serve.errors import Busy, Refused
from sppnet.serve.folders import DROPPED
from sppnet.serve.schema import PhotoId
from sppnet.serve.workers import answer

if TYPE_CHECKING:
    from sppnet.serve.studio import Studio

THUMBNAIL = 256
MOST_BYTES = 64 * 2**20
"""Of one image."""

media = APIRouter(prefix="/api/v1", max_body_size=MOST_BYTES)

# Images that are received at once; more are refused before they are.
_RECEIVED = 24
_PATIENCE = 20.0
_PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/jpeg": {}}},
    404: {"model": schema.Failure},
}
_IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_SUFFIXES = {"image/jpeg": ".jpg", "image/png": ".png", "image/webp": ".webp", "image/bmp": ".bmp"}


def _studio(request: Request) -> Studio:
    studio: Studio = request.app.state.studio
    return studio


@media.get("/photos/{photo}/thumbnail", tags=["photos"], response_class=Response, responses=_PICTURE)
async def thumbnail(request: Request, photo: PhotoId) -> Response:
    """Return a small picture of a photo."""
    return await _picture(request, photo, THUMBNAIL, keep=True)


@media.get("/photos/{photo}/image", tags=["photos"], response_class=Response, responses=_PICTURE)
async def image(
    request: Request, photo: PhotoId, side: Annotated[int, Query(ge=16, le=4096)] = 1600
) -> Response:
    """Return a photo, upright, its longer side at most so many pixels, without metadata."""
    return await _picture(request, photo, side)


async def _picture(request: Request, photo: str, side: int, keep: bool = False) -> Response:
    studio = _studio(request)
    tag = f'"{studio.photos.stamp(photo)}-{side}"'
    headers = {"ETag": tag, "Cache-Control": "private, max-age=60, must-revalidate"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    kept = studio.opened.project / "thumbnails" / f"{tag[1:-1]}.jpg"
    if keep and kept.is_file():
        content = await asyncio.to_thread(kept.read_bytes)
    else:
        path = await asyncio.to_thread(studio.photos.path, photo)
        content = await answer(studio.pictures, "jpeg", path, side)
        if keep:
            with suppress(OSError):
                await asyncio.to_thread(kept.write_bytes, content)
    return Response(content, media_type="image/jpeg", headers=headers)


@media.post("/photos", status_code=201, tags=["photos"], openapi_extra=_IMAGE_BODY)
async def add_photo(
    request: Request, x_name: Annotated[str, Header(max_length=1000)] = "photo"
) -> schema.Photo:
    """Put a photo into the project."""
    studio = _studio(request)
    async with received(request) as path:
        kind = request.headers.get("content-type", "").partition(";")[0]
        folder = studio.photos.folders[DROPPED]
        place = folder.free_name(x_name, _SUFFIXES.get(kind, ".jpg"))
        path.rename(place)
    photo = await asyncio.to_thread(studio.photos.add, DROPPED, place)
    studio.wake()
    studio.tell_photos(photo.id)
    return photo


@asynccontextmanager
async def received(request: Request) -> AsyncIterator[Path]:
    """Lend the file of an image that is sent, received part by part and checked by its header.

    Raises
    ------
    Busy
        If too many are being received.
    ImageError
        If it is no image, or has too many pixels.
    """
    state = request.app.state
    if state.receiving >= _RECEIVED:
        async for _ in _parts(request):
            pass  # A client that is still sending would not read the answer.
        raise Busy(state.receiving)
    path = _studio(request).opened.project / "incoming" / secrets.token_hex(8)
    state.receiving += 1
    try:
        with path.open("xb") as file:
            async for part in _parts(request):
                file.write(part)
        await asyncio.to_thread(_check, path)
        yield path
    except SppnetError as error:
        raise error if isinstance(error, Refused) else SppnetError(_unplaced(error, path)) from None
    finally:
        state.receiving -= 1
        path.unlink(missing_ok=True)


async def _parts(request: Request) -> AsyncIterator[bytes]:
    """Yield the parts of a body; who sends none for too long is not waited for."""
    parts = request.stream()
    while True:
        try:
            async with asyncio.timeout(_PATIENCE):
                yield await anext(parts)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Refused(408, f"nothing sent for {_PATIENCE:g} s", "an image") from None


def _unplaced(error: Exception, path: Path) -> str:
    """Return what an error says of an image, without where the server keeps it."""
    return str(error).replace(f"{path}: ", "")


def _check(path: Path) -> None:
    try:
        header = image_header(path)
    except ImageError as error:
        found = _unplaced(error, path).removeprefix("found ").partition(", expected")[0]
        raise Refused(415, found, "an image") from None
    try:
        check_pixels(path, header.width, header.height)
    except ImageError as error:
        raise Refused(413, *_unplaced(error, path).removeprefix("found ").split(", expected ")) from None


@media.post("/detect", tags=["models"], openapi_extra=_IMAGE_BODY)
async def detect(
    request: Request, threshold: Annotated[float | None, Query(ge=0, le=1, allow_inf_nan=False)] = None
) -> schema.DetectionsFile:
    """Find objects in an image with the model in use; scores are probabilities."""
    studio = _studio(request)
    model = studio.results.in_use
    if model is None:
        raise Refused(409, "no model", "a fit first, or a model to begin with")
    async with received(request) as path:
        found = await answer(
            studio.engine, "detect", studio.results.file(model), path, threshold, studio.results.chosen()
        )
    return schema.DetectionsFile(**found)


@media.post("/embed", tags=["search"], openapi_extra=_IMAGE_BODY)
async def embed(
    request: Request, box: Annotated[list[str] | None, Query(max_length=1000)] = None
) -> schema.Vectors:
    """Return vectors of boxes of an image, or of the whole of it: those that the search compares."""
    asked = [_corners(text) for text in box or ()]
    async with received(request) as path:
        vectors = await answer(_studio(request).engine, "embed", path, asked)
    return schema.Vectors(vectors=vectors, length=len(vectors[0]))


def _corners(text: str) -> tuple[float, ...]:
    try:
        x1, y1, x2, y2 = (float(part) for part in text.split(","))
    except ValueError:
        raise Refused(422, f"the box {text!r}", "four numbers between commas: x1,y1,x2,y2") from None
    return x1, y1, x2, y2
