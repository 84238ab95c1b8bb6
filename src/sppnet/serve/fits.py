"""The fits of a project: one at a time, in a process of its own, told of as they go on."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sppnet.serve.errors import Gone, Refused
from sppnet.serve.schema import Change, ClassQuality, Fit, FitState, Quality
from sppnet.serve.training import can_fit, examples, learned_classes

if TYPE_CHECKING:
    from sppnet.serve.events import Hub
    from sppnet.serve.labels import Labels
    from sppnet.serve.results import ResultList
    from sppnet.serve.workers import Worker

# Until so much is done, nobody can tell how long the rest takes.
_EARLY = 0.1


@dataclass
class _Running:
    """The fit that goes on."""

    id: str
    begun: float
    stage: str = "Starting"
    share: float = 0.0

    def facts(self) -> Fit:
        """Return how far it is."""
        seconds = time.monotonic() - self.begun
        left = seconds * (1 - self.share) / self.share if self.share >= _EARLY else None
        state: FitState = "running" if self.share else "waiting"
        return Fit(
            id=self.id,
            state=state,
            stage=self.stage,
            share=self.share,
            seconds=round(seconds, 2),
            left=None if left is None else round(left, 1),
            error=None,
            quality=None,
        )


class Fits:
    """Starts, ends and remembers fits.

    Parameters
    ----------
    labels : Labels
    results : ResultList
        Takes the models.
    hub : Hub
        Is told how far a fit is.
    worker : Worker
        The process that fits.
    done : callable
        Called when another model is there.
    """

    def __init__(
        self, labels: Labels, results: ResultList, hub: Hub, worker: Worker, done: Callable[[], None]
    ) -> None:
        self.labels, self.results, self.hub, self.worker = labels, results, hub, worker
        self.store, self._done = labels.store, done
        self._running: _Running | None = None
        self._wished = False
        with self.store.change() as connection:
            lost = "The server was stopped while it went on; fit again, no box was lost."
            connection.execute(
                "UPDATE fits SET state = 'failed', error = ? WHERE state IN ('waiting', 'running')", (lost,)
            )

    def start(self) -> Fit:
        """Start a fit.

        Raises
        ------
        Refused
            If one goes on, or there is too little to learn from.
        """
        if self._running is not None:
            raise Refused(409, "a fit that goes on", "none: wait for it, or cancel it")
        classes = self.labels.classes()
        enough = can_fit(classes)
        if not enough.ok:
            raise Refused(422, f"too little to learn from: {enough.reason}", "more boxes")
        data = [tuple(example) for example in examples(self.labels, self.store)]
        if not data:
            raise Refused(422, "no labelled photo in its folder any more", "some")
        fit, made = secrets.token_hex(8), datetime.now(UTC).isoformat(timespec="seconds")
        with self.store.change() as connection:
            connection.execute("INSERT INTO fits (id, made, state) VALUES (?, ?, 'running')", (fit, made))
        self._running = _Running(fit, time.monotonic())
        out = self.results.folder / f"{fit}.safetensors"
        answer = self.worker.ask("fit", fit, data, learned_classes(classes), out)
        answer.add_done_callback(lambda future: self._end(fit, made, future))
        self._tell()
        return self._running.facts()

    def wish(self) -> bool:
        """Start a fit as soon as that can be, if there is enough to learn from; return whether there is."""
        if not can_fit(self.labels.classes()).ok:
            return False
        self._wished = self._running is not None
        if not self._wished:
            self.start()
        return True

    def told(self, event: Mapping[str, Any]) -> None:
        """Take what the process says of how far it is."""
        running = self._running
        if running is not None and running.id == event["fit"]:
            running.stage, running.share = event["stage"], event["share"]
            self._tell()

    def cancel(self, fit: str) -> Fit:
        """End a fit that goes on; one that has ended stays as it is."""
        found = self.get(fit)
        if found.state in ("waiting", "running"):
            self.worker.kill()
        return self.get(fit)

    def _end(self, fit: str, made: str, answer: Future[dict[str, Any]]) -> None:
        state, error, quality = "done", None, None
        running, self._running = self._running, None
        assert running is not None
        try:
            facts = answer.result()
            number = len(self.results.models()) + 1
            quality = self._quality(fit, made, facts)
            self.results.add_model(fit, f"Fit {number}", made, facts)
        except CancelledError:
            state = "cancelled"
        except Exception as failure:
            state, error = "failed", _said(failure)
        kept = None if quality is None else quality.model_dump_json()
        values = (state, time.monotonic() - running.begun, error, kept, fit)
        with self.store.change() as connection:
            connection.execute(
                "UPDATE fits SET state = ?, seconds = ?, error = ?, quality = ? WHERE id = ?", values
            )
        self.hub.tell(Change(what="fit", fit=self.get(fit)))
        if state == "done":
            self._done()
        if self._wished:
            self.wish()

    def _tell(self) -> None:
        if self._running is not None:
            self.hub.tell(Change(what="fit", fit=self._running.facts()))

    def get(self, fit: str) -> Fit:
        """Return how far a fit is, or how it ended."""
        running = self._running
        if running is not None and running.id == fit:
            return running.facts()
        row = self.store.row("SELECT * FROM fits WHERE id = ?", fit)
        if row is None:
            raise Gone("fit", "the id of one of the project's fits")
        quality = None if row["quality"] is None else Quality(**json.loads(row["quality"]))
        share = 1.0 if row["state"] == "done" else 0.0
        facts = {"seconds": round(row["seconds"], 2), "left": None, "error": row["error"]}
        return Fit(id=fit, state=row["state"], stage="", share=share, quality=quality, **facts)

    def last(self) -> Fit | None:
        """Return the fit that goes on, or else the last one."""
        if self._running is not None:
            return self._running.facts()
        row = self.store.row("SELECT id FROM fits ORDER BY made DESC, rowid DESC LIMIT 1")
        return None if row is None else self.get(row["id"])

    def qualities(self) -> list[Quality]:
        """Return how good each fit is, the newest last."""
        rows = self.store.rows("SELECT quality FROM fits WHERE quality IS NOT NULL ORDER BY made, rowid")
        return [Quality(**json.loads(row["quality"])) for row in rows]

    def _quality(self, fit: str, made: str, facts: Mapping[str, Any]) -> Quality:
        before = self.qualities()
        classes = {
            name: ClassQuality(**{key: one[key] for key in ClassQuality.model_fields})
            for name, one in facts["quality"].items()
        }
        quality = Quality(
            fit=fit,
            made=made,
            photos=facts["photos"],
            objects=facts["objects"],
            words=[f"{name}: {one['words']}" for name, one in facts["quality"].items()],
            mean_ap=facts["mean_ap"],
            classes=classes,
            changed=[],
        )
        changed = changes(before[-1], quality) if before else []
        return quality.model_copy(update={"changed": changed})


def changes(old: Quality, new: Quality) -> list[str]:
    """Say what changed from one fit to the next."""
    said = []
    for what, before, after in (
        ("photos", old.photos, new.photos),
        ("objects", old.objects, new.objects),
    ):
        if before != after:
            said.append(f"learned from {after} {what}, {abs(after - before)} {_more(after - before)}")
    said += [f"{name} is new" for name in new.classes if name not in old.classes]
    said += [f"{name} is not learned any more" for name in old.classes if name not in new.classes]
    for name, one in new.classes.items():
        before_one = old.classes.get(name)
        if before_one is not None:
            said += _moved(name, "finds", before_one.recall, one.recall)
            said += _moved(name, "is right in", before_one.precision, one.precision)
    return said


def _more(difference: int) -> str:
    return "more than before" if difference > 0 else "fewer than before"


def _moved(name: str, what: str, before: float | None, after: float | None) -> list[str]:
    if before is None or after is None or round(100 * before) == round(100 * after):
        return []
    return [f"{name}: {what} {100 * after:.0f} %, before {100 * before:.0f} %"]


def _said(failure: Exception) -> str:
    """Return what a person is told of a failure: of a bug only that there is one."""
    if isinstance(failure, ValueError | OSError):
        return str(failure)
    return "Something went wrong in the fit; the log of the server says more."
