"""An opened project: its photos, boxes, models and fits, and the processes that work on them."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from sppnet import __version__
from sppnet.errors import SppnetError
from sppnet.serve.annotations import Annotations
from sppnet.serve.events import Hub
from sppnet.serve.exporting import Exporter
from sppnet.serve.fits import Fits
from sppnet.serve.folders import DROPPED, FOLDER, Folder
from sppnet.serve.labels import Labels
from sppnet.serve.photos import PhotoList
from sppnet.serve.results import ResultList
from sppnet.serve.schema import Change, ProjectFacts
from sppnet.serve.store import Store
from sppnet.serve.training import can_fit
from sppnet.serve.workers import LATER, Kind, Worker

ENGINE = "sppnet.serve.engine:Engine"
"""What makes the process that knows the network."""

# Photos that are given to the engine ahead, so that it never waits for the next one.
_AHEAD = 3
_SECONDS = 60.0


@dataclass(frozen=True)
class Opened:
    """What is opened.

    Attributes
    ----------
    folder : Path or None
        Where the photos lie; None for those alone that are dropped on the page.
    project : Path
        The folder that keeps everything else; made if it is missing.
    model : Path or None
        The file of a detector to begin with.
    annotations : {"project", "beside"} or None
        Where XML files go; None leaves that as it was.
    demo : bool
        Whether it is the demonstration.
    """

    folder: Path | None
    project: Path
    model: Path | None = None
    annotations: str | None = None
    demo: bool = False


class Studio:
    """An opened project.

    Parameters
    ----------
    opened : Opened

    Raises
    ------
    SppnetError
        If another server has the project open, or it is of another version.
    OSError
        If its folder cannot be made or written.
    """

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        for name in ("", "photos", "models", "incoming", "thumbnails"):
            (opened.project / name).mkdir(parents=True, exist_ok=True)
        self._held = _hold(opened.project)
        self.store = Store(opened.project / "project.sqlite")
        dropped = Folder(opened.project / "photos")
        given = {} if opened.folder is None else {FOLDER: Folder(opened.folder, opened.project)}
        self.photos = PhotoList(self.store, given | {DROPPED: dropped})
        self.labels = Labels(self.photos)
        self.annotations = Annotations(self.labels, opened.project)
        if opened.annotations is not None:
            self.store.keep("annotations", opened.annotations)
        self.hub = Hub()
        self.notes: tuple[str, ...] = ()
        self.results = ResultList(self.store, opened.project / "models")
        self.pictures = Worker(Kind("sppnet.serve.pictures:Pictures", capacity=400, limit=30.0))
        self.engine = Worker(Kind(ENGINE, (opened.project,), threads=3, capacity=64, limit=_SECONDS))
        fitter = Kind("sppnet.serve.fitting:Fitting", (opened.project,), limit=6 * 3600.0, niceness=5)
        self.fitter = Worker(fitter, lambda event: self.fits.told(event))
        self.fits = Fits(self.labels, self.results, self.hub, self.fitter, self.wake)
        self.exporter = Exporter(self.labels, self.results)
        self._more = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def name(self) -> str:
        """What the project is called."""
        if self.opened.demo:
            return "Demo"
        return (self.opened.folder or self.opened.project).resolve().name

    def wake(self) -> None:
        """Look for work again: there may be photos to encode or to detect in."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._more.set)

    def facts(self) -> ProjectFacts:
        """Return what is known of the project as a whole."""
        classes, thresholds = self.labels.classes(), self.results.thresholds()
        counts = self.store.row(
            "SELECT count(*) AS photos, coalesce(sum(boxes > 0 OR reviewed), 0) AS labelled,"
            " coalesce(sum(state = 'encoded'), 0) AS encoded, coalesce(sum(boxes), 0) AS boxes"
            " FROM photos WHERE gone = 0"
        )
        assert counts is not None
        folder = self.opened.folder
        return ProjectFacts(
            name=self.name,
            folder=None if folder is None else str(folder),
            project_folder=str(self.opened.project),
            annotations=self.annotations.where,
            classes=[one.model_copy(update={"threshold": thresholds.get(one.name)}) for one in classes],
            **dict(counts),
            can_fit=can_fit(classes),
            model=self.results.used(),
            fit=self.fits.last(),
            demo=self.opened.demo,
            version=__version__,
            notes=list(self.notes),
        )

    def counts(self) -> dict[str, int]:
        """Return how many photos there are, and how many of them are encoded."""
        encoded = "coalesce(sum(state = 'encoded'), 0) AS encoded"
        row = self.store.row(f"SELECT count(*) AS photos, {encoded} FROM photos WHERE gone = 0")
        assert row is not None
        return dict(row)

    def tell_photos(self, photo: str | None = None) -> None:
        """Tell everyone that photos changed."""
        counts = self.counts()
        self.hub.tell(Change(what="photos", photo=photo, encoded=counts["encoded"], photos=counts["photos"]))

    def rename(self, names: Mapping[str, str]) -> None:
        """Give classes other names: those of boxes, of models, and of what the one in use found.

        A model keeps its names where two of its classes would have one.
        """
        for photo in self.labels.rename(names):
            self.annotations.write(photo)
        for model in self.results.models():
            known = {name: names[name] for name in model.classes if name in names}
            classes = {known.get(name, name) for name in model.classes}
            if known and len(classes) == len(model.classes):
                self._rename_in(model.id, known)
        self.results.count()
        self.wake()

    def _rename_in(self, model: str, names: dict[str, str]) -> None:
        # Another file, not that one written over: whoever reads it goes on with what it was.
        old, out = self.results.file(model), self.results.folder / f"{model}-{token_hex(4)}.safetensors"
        self.engine.ask("rename", old, names, out).result()
        self.results.renamed(model, names, out.name)
        old.unlink(missing_ok=True)

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Work on the project as long as the ``with`` block goes on, and end all processes then."""
        self._loop = asyncio.get_running_loop()
        self.hub.attach(self._loop)
        tasks = [asyncio.create_task(self._begin())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for worker in (self.fitter, self.engine, self.pictures):
                await asyncio.to_thread(worker.close)
            await asyncio.to_thread(self.annotations.write_all)
            self.store.close()
            self._held.close()

    async def _begin(self) -> None:
        """List the photos, start the processes, and work on."""
        self.notes = await asyncio.to_thread(self.photos.scan)
        self.tell_photos()
        self.pictures.start()
        self.engine.start()
        await asyncio.to_thread(self.annotations.write_all)
        try:
            known = await self._later("known", self.photos.gone())
        except (SppnetError, OSError, RuntimeError) as error:
            self.notes = (*self.notes, f"nothing can be computed, boxes are saved all the same: {error}")
            self.tell_photos()
            return
        await asyncio.to_thread(self.photos.forgotten, known)
        await self._take_in()
        await self._take_model()
        while True:
            await self._work()
            await self._more.wait()
            self._more.clear()

    async def _take_in(self) -> None:
        """Take in, once, annotations that lie beside the photos."""
        folder = self.opened.folder
        if folder is None or not self.photos.annotated or self.store.fact("taken") is not None:
            return
        try:
            found = await self._later("annotations", folder)
            taken = await asyncio.to_thread(self.annotations.take_in, found)
            self.notes = (*self.notes, f"boxes of {taken} photos taken in, which lie beside them")
        except (ValueError, OSError) as error:
            self.notes = (*self.notes, f"no boxes taken in: {error}")
        await asyncio.to_thread(self.store.keep, "taken", "1")
        self.hub.tell(Change(what="classes"))
        self.hub.tell(Change(what="boxes"))

    async def _take_model(self) -> None:
        """Use, if no other one is in use, the model that was given."""
        from sppnet.storage import atomic_path

        given = self.opened.model
        if given is None:
            return
        try:
            facts = await self._later("describe", given)
        except (ValueError, OSError) as error:
            self.notes = (*self.notes, f"model not used: {error}")
            return
        with atomic_path(self.results.folder / f"{given.stem}.safetensors") as temporary:
            temporary.write_bytes(given.read_bytes())
        await asyncio.to_thread(self.results.add_model, given.stem, given.stem, "", facts)
        self.hub.tell(Change(what="results"))

    async def _later(self, method: str, *arguments: Any) -> Any:
        return await asyncio.wrap_future(self.engine.ask(method, *arguments, rank=LATER))

    async def _work(self) -> None:
        """Encode photos and detect in them until nothing is left; a few at once."""
        running: set[asyncio.Task[None]] = set()
        begun: set[tuple[str, str]] = set()
        while True:
            for task in await asyncio.to_thread(self._tasks, begun):
                begun.add(task)
                running.add(asyncio.create_task(self._do(*task)))
                if len(running) >= _AHEAD:
                    break
            if not running:
                return
            _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)

    def _tasks(self, begun: set[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return what is to be done and was not begun: first what the model finds, then what is new."""
        model, many, wanted = self.results.in_use, _AHEAD + 1, []
        if model is not None:
            name = self.results.place(model).name
            wanted = [(f"results {name}", photo) for photo in self.results.missing(many)]
        wanted += [("encode", photo) for photo in self.photos.waiting(many)]
        return [task for task in wanted if task not in begun]

    async def _do(self, what: str, photo: str) -> None:
        """Do one thing for a photo; what goes wrong is kept with it."""
        try:
            if what == "encode":
                path, stamp = self.photos.path(photo), self.photos.stamp(photo)
                height, width = await self._later("encode", photo, stamp, path)
                await asyncio.to_thread(self.photos.encoded, photo, height, width)
                self.tell_photos(photo)
            else:
                await self._find(self.results.folder / what.removeprefix("results "), photo)
        except CancelledError:
            raise
        except Exception as error:
            said = str(error) if isinstance(error, ValueError | OSError) else "cannot be read"
            with suppress(OSError, SppnetError):
                await asyncio.to_thread(self.photos.failed, photo, said)
            self.tell_photos(photo)

    async def _find(self, file: Path, photo: str) -> None:
        model = self.results.in_use
        if model is None or self.results.place(model) != file:
            return  # Another one is in use by now, and is asked.
        found = await self._later("results", self.results.file(model), self.photos.path(photo))
        await asyncio.to_thread(self.results.keep, photo, file, found)
        self.hub.tell(Change(what="results", photo=photo))


def _hold(project: Path) -> sqlite3.Connection:
    """Take a project for this server alone, until it ends, however it ends."""
    held = sqlite3.connect(project / "lock.sqlite", check_same_thread=False, isolation_level=None, timeout=0)
    try:
        held.execute("PRAGMA journal_mode = DELETE")
        held.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError:
        held.close()
        raise SppnetError(
            f"{project}: found it open in another server, expected one server a project"
        ) from None
    return held
