"""What the model in use finds in all photos, and how much of it is in doubt."""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from sppnet.serve.errors import Gone, Refused
from sppnet.serve.matching import same
from sppnet.serve.schema import Found, Labelled, ModelFacts, Results, UsedModel

if TYPE_CHECKING:
    from pathlib import Path

    from sppnet.serve.store import Store

_IN_USE = "model"


class ResultList:
    """Models of a project, and the detections of the one in use.

    Parameters
    ----------
    store : Store
    folder : Path
        Where the files of the models lie.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder

    def add_model(self, model: str, name: str, made: str, facts: Mapping[str, Any]) -> None:
        """Take in a model, whose file lies in the folder, and use it from now on."""
        values = (
            *(model, name, made, f"{model}.safetensors"),
            *(json.dumps(facts["classes"]), json.dumps(facts["thresholds"]), facts["mean_ap"]),
        )
        with self.store.change() as connection:
            connection.execute("INSERT OR REPLACE INTO models VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        self.use(model)

    def use(self, model: str) -> None:
        """Use another model: what the last one found is dropped."""
        self._row(model)
        with self.store.change() as connection:
            connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (_IN_USE, model))
            connection.execute("DELETE FROM results WHERE model != ?", (model,))
            connection.execute("UPDATE photos SET found = 0, doubt = NULL")

    def renamed(self, model: str, names: Mapping[str, str], file: str) -> None:
        """Take the file in which a model has other names of classes; what it found is renamed, too."""
        row = self._row(model)
        classes = [names.get(name, name) for name in json.loads(row["classes"])]
        thresholds = {names.get(name, name): least for name, least in json.loads(row["thresholds"]).items()}
        found = self.store.rows("SELECT photo, found FROM results WHERE model = ?", model)
        rows = [(json.dumps(_renamed(json.loads(one["found"]), names)), one["photo"]) for one in found]
        with self.store.change() as connection:
            connection.execute(
                "UPDATE models SET classes = ?, thresholds = ?, file = ? WHERE id = ?",
                (json.dumps(classes), json.dumps(thresholds), file, model),
            )
            connection.executemany("UPDATE results SET found = ? WHERE photo = ?", rows)

    @property
    def in_use(self) -> str | None:
        """The id of the model in use."""
        return self.store.fact(_IN_USE)

    def place(self, model: str) -> Path:
        """Return where the file of a model lies, or lay before it vanished."""
        return self.folder / str(self._row(model)["file"])

    def file(self, model: str) -> Path:
        """Return the file of a model."""
        path = self.place(model)
        if not path.is_file():
            raise Gone("model file", f"{path.name}, which has vanished from the project")
        return path

    def used(self) -> UsedModel | None:
        """Return what is known of the model in use."""
        row = None if self.in_use is None else self._row(self.in_use)
        if row is None:
            return None
        classes = json.loads(row["classes"])
        return UsedModel(id=row["id"], name=row["name"], classes=classes, made=row["made"])

    def models(self) -> list[ModelFacts]:
        """Return what is known of all models, the newest last."""
        found = []
        for row in self.store.rows("SELECT * FROM models ORDER BY made, id"):
            path = self.folder / row["file"]
            found.append(
                ModelFacts(
                    **{name: row[name] for name in ("id", "name", "made", "mean_ap")},
                    classes=json.loads(row["classes"]),
                    bytes=path.stat().st_size if path.is_file() else 0,
                    used=row["id"] == self.in_use,
                )
            )
        return found

    def _row(self, model: str) -> sqlite3.Row:
        row = self.store.row("SELECT * FROM models WHERE id = ?", model)
        if row is None:
            raise Gone("model", "the id of one of the project's models")
        return row

    def thresholds(self, model: str | None = None) -> dict[str, float]:
        """Return the least probability of each class of the model in use: what was chosen, or its own."""
        model = model or self.in_use
        if model is None:
            return {}
        own: dict[str, float] = json.loads(self._row(model)["thresholds"])
        return own | {name: value for name, value in self.chosen().items() if name in own}

    def chosen(self) -> dict[str, float]:
        """Return the thresholds that somebody chose."""
        rows = self.store.rows("SELECT name, threshold FROM classes WHERE threshold IS NOT NULL")
        return {row["name"]: row["threshold"] for row in rows}

    def keep(self, photo: str, file: Path, found: Sequence[Mapping[str, Any]]) -> None:
        """Keep what the model of a file found in a photo, unless another one is in use by now."""
        model = self.in_use
        if model is None or self.place(model) != file:
            return
        with self.store.change() as connection:
            values = (photo, model, json.dumps(found))
            connection.execute("INSERT OR REPLACE INTO results VALUES (?, ?, ?)", values)
        self.count([photo])

    def count(self, photos: Sequence[str] | None = None) -> None:
        """Count what is found in photos, and how much of it is in doubt; by default in all of them."""
        thresholds, rows = self.thresholds(), []
        for photo, found in self._found(photos).items():
            shown = [one for one in found if one.score >= thresholds.get(one.label, 1.0)]
            right = sum(one.state != "rejected" for one in shown)
            rows.append((right, _doubt(found, thresholds), photo))
        with self.store.change() as connection:
            connection.executemany("UPDATE photos SET found = ?, doubt = ? WHERE id = ?", rows)

    def all(self) -> Results:
        """Return what is found in all photos."""
        used = self.used()
        return Results(
            model=None if used is None else used.id,
            classes=[] if used is None else used.classes,
            thresholds=self.thresholds(),
            photos={photo: found for photo, found in self._found(None).items() if found},
        )

    def _found(self, photos: Sequence[str] | None) -> dict[str, list[Found]]:
        """Return detections by photo, with what was said of each."""
        some = "" if photos is None else f"AND id IN ({', '.join('?' * len(photos))})"
        sql = f"SELECT photo, results.found FROM results JOIN photos ON id = photo WHERE NOT gone {some}"
        found = {row["photo"]: json.loads(row["found"]) for row in self.store.rows(sql, *(photos or ()))}
        right, wrong = self._judged(photos)
        return {
            photo: [Found(**one, state=_state(one, right[photo], wrong[photo])) for one in rows]
            for photo, rows in found.items()
        }

    def _judged(
        self, photos: Sequence[str] | None
    ) -> tuple[dict[str, list[Labelled]], dict[str, list[Labelled]]]:
        some = "" if photos is None else f"WHERE photo IN ({', '.join('?' * len(photos))})"
        judged: tuple[dict[str, list[Labelled]], ...] = (defaultdict(list), defaultdict(list))
        for row in self.store.rows(f"SELECT * FROM boxes {some}", *(photos or ())):
            box = (row["x1"], row["y1"], row["x2"], row["y2"])
            judged[row["rejected"]][row["photo"]].append(
                Labelled.model_construct(box=box, label=row["label"])
            )
        return judged[0], judged[1]

    def missing(self, count: int) -> list[str]:
        """Return encoded photos that the model in use was not asked about."""
        if self.in_use is None:
            return []
        sql = (
            "SELECT id FROM photos WHERE gone = 0 AND state = 'encoded' AND id NOT IN"
            " (SELECT photo FROM results WHERE model = ?) ORDER BY name LIMIT ?"
        )
        return [row["id"] for row in self.store.rows(sql, self.in_use, count)]

    def set_thresholds(self, thresholds: Mapping[str, float]) -> None:
        """Refuse thresholds of classes that the model in use does not have."""
        known = self.thresholds()
        for name in thresholds:
            if name not in known:
                raise Refused(422, f"a threshold of {name!r}", f"one of {', '.join(known) or 'none yet'}")


def _renamed(found: Sequence[dict[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    return [one | {"label": names.get(one["label"], one["label"])} for one in found]


def _state(
    one: Mapping[str, Any], right: Sequence[Labelled], wrong: Sequence[Labelled]
) -> Literal["new", "accepted", "rejected"]:
    """Return what was said of a detection."""
    asked = Labelled.model_construct(box=tuple(one["box"]), label=one["label"])
    if same(asked, right):
        return "accepted"
    return "rejected" if same(asked, wrong) else "new"


def _doubt(found: Sequence[Found], thresholds: Mapping[str, float]) -> float | None:
    """Return how near to its threshold the most doubtful new detection is: 1 at it, 0 far away."""
    doubts = []
    for one in found:
        least = thresholds.get(one.label)
        if one.state == "new" and least is not None:
            away = (one.score - least) / max(1 - least if one.score >= least else least, 1e-6)
            doubts.append(1 - abs(away))
    return max(doubts, default=0.0)
