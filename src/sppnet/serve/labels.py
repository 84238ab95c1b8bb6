"""The boxes of photos and the classes that they are of: every change is on the disk before it is answered."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from sppnet.serve.errors import Refused
from sppnet.serve.matching import without_same
from sppnet.serve.schema import Boxes, BoxesGiven, ClassFacts, Labelled, LabelledBox, Review

if TYPE_CHECKING:
    from sppnet.serve.photos import PhotoList

Kind = TypeVar("Kind", bound=Labelled)


class Stale(Refused):
    """Boxes that were made from an older revision than there is, by another page."""

    def __init__(self, given: int, current: Boxes) -> None:
        super().__init__(409, f"changes of revision {given}", f"of revision {current.revision}")
        self.current = current


class Labels:
    """Boxes and classes of a project.

    Parameters
    ----------
    photos : PhotoList
        Its photos.
    """

    def __init__(self, photos: PhotoList) -> None:
        self.photos, self.store = photos, photos.store

    def of(self, photo: str) -> Boxes:
        """Return what is known of a photo."""
        row = self.photos.row(photo)
        rows = self.store.rows("SELECT * FROM boxes WHERE photo = ? ORDER BY place", photo)
        return Boxes(
            revision=row["revision"],
            boxes=[_box(one) for one in rows if not one["rejected"]],
            rejected=[_labelled(one) for one in rows if one["rejected"]],
            reviewed=bool(row["reviewed"]),
        )

    def put(self, photo: str, given: BoxesGiven) -> Boxes:
        """Replace what is known of a photo, boxes cut off at its borders.

        Raises
        ------
        Stale
            If it was changed since, by someone else.
        Refused
            If a box lies outside the photo.
        """
        width, height = self.photos.size(photo)
        kept = [_inside(box, width, height) for box in given.boxes]
        rejected = [_inside(box, width, height) for box in given.rejected]
        with self.store.change() as connection:
            current = self.of(photo)
            if current.revision != given.revision:
                raise Stale(given.revision, current)
            _write(connection, photo, kept, rejected)
            values = (given.reviewed, len(kept), photo)
            connection.execute(
                "UPDATE photos SET revision = revision + 1, reviewed = ?, boxes = ?, unwritten = 1"
                " WHERE id = ?",
                values,
            )
            _make_classes(connection, (box.label for box in kept))
        return self.of(photo)

    def review(self, photo: str, given: Review) -> Boxes:
        """Take detections as objects, and others as none; what overlaps them is replaced."""
        before = self.of(photo)
        accepted = [LabelledBox(box=one.box, label=one.label, origin="accepted") for one in given.accept]
        judged = [*given.accept, *given.reject]
        boxes = [*without_same(before.boxes, judged), *accepted]
        rejected = [*without_same(before.rejected, judged), *given.reject]
        revision, reviewed = before.revision, before.reviewed
        return self.put(
            photo, BoxesGiven(revision=revision, boxes=boxes, rejected=rejected, reviewed=reviewed)
        )

    def add_new(self, photo: str, boxes: Sequence[LabelledBox]) -> None:
        """Take in boxes that lie beside a photo, unless someone has labelled it already."""
        if self.photos.row(photo)["revision"] == 0 and boxes:
            self.put(photo, BoxesGiven(revision=0, boxes=list(boxes), reviewed=True))

    def classes(self) -> list[ClassFacts]:
        """Return the classes in their order."""
        sql = (
            "SELECT name, threshold, (SELECT count(*) FROM boxes JOIN photos ON photos.id = boxes.photo"
            " WHERE label = classes.name AND NOT rejected AND NOT gone) AS boxes FROM classes ORDER BY place"
        )
        return [ClassFacts(**row) for row in self.store.rows(sql)]

    def rename(self, names: Mapping[str, str]) -> list[str]:
        """Give classes other names, all at once; two that get one name become one.

        Returns
        -------
        list of str
            The photos whose boxes changed.
        """
        marks = ", ".join("?" * len(names))
        changed = self.store.rows(f"SELECT DISTINCT photo FROM boxes WHERE label IN ({marks})", *names)
        known = [one.name for one in self.classes()]
        for name in names:
            if name not in known:
                raise Refused(422, f"the class {name!r}", f"one of {', '.join(known) or 'none'}")
        before: dict[str, str] = {}
        for name in known:
            before.setdefault(names.get(name, name), name)
        with self.store.change() as connection:
            connection.executemany(
                "UPDATE boxes SET label = ? WHERE label = ?",
                [(f"\x01{new}", old) for old, new in names.items()],
            )
            connection.execute(
                "UPDATE boxes SET label = substr(label, 2) WHERE substr(label, 1, 1) = char(1)"
            )
            _write_classes(connection, before)
            connection.executemany(
                "UPDATE photos SET revision = revision + 1, unwritten = 1 WHERE id = ?",
                [(row["photo"],) for row in changed],
            )
        return [row["photo"] for row in changed]

    def order(self, names: Sequence[str]) -> None:
        """Make these the classes, in this order.

        Raises
        ------
        Refused
            If one is left out that has boxes.
        """
        lost = [one for one in self.classes() if one.boxes and one.name not in names]
        if lost:
            raise Refused(422, f"no {lost[0].name!r}, which has {lost[0].boxes} boxes", "all that have some")
        with self.store.change() as connection:
            _write_classes(connection, {name: name for name in names})

    def set_thresholds(self, thresholds: Mapping[str, float]) -> None:
        """Keep the least probabilities of classes that somebody chose."""
        with self.store.change() as connection:
            _make_classes(connection, thresholds)
            connection.executemany(
                "UPDATE classes SET threshold = ? WHERE name = ?",
                [(value, name) for name, value in thresholds.items()],
            )


def _box(row: sqlite3.Row) -> LabelledBox:
    corners = (row["x1"], row["y1"], row["x2"], row["y2"])
    return LabelledBox(box=corners, label=row["label"], origin=row["origin"])


def _labelled(row: sqlite3.Row) -> Labelled:
    return Labelled(box=(row["x1"], row["y1"], row["x2"], row["y2"]), label=row["label"])


def _inside(box: Kind, width: int, height: int) -> Kind:
    """Return a box cut off at the borders of its photo."""
    x1, y1, x2, y2 = box.box
    inside = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if not (inside[0] < inside[2] and inside[1] < inside[3]):
        shown = ", ".join(f"{edge:g}" for edge in box.box)
        raise Refused(422, f"the box {shown}", f"one inside the photo of {width} x {height} pixels")
    return box.model_copy(update={"box": inside})


def _write(
    connection: sqlite3.Connection, photo: str, boxes: Iterable[Labelled], rejected: Iterable[Labelled]
) -> None:
    connection.execute("DELETE FROM boxes WHERE photo = ?", (photo,))
    rows = [
        (photo, place, wrong, *box.box, box.label, getattr(box, "origin", ""))
        for wrong, part in enumerate((boxes, rejected))
        for place, box in enumerate(part)
    ]
    connection.executemany("INSERT INTO boxes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)


def _make_classes(connection: sqlite3.Connection, names: Iterable[str]) -> None:
    """Make classes of names that are none yet, after the others."""
    connection.executemany(
        "INSERT OR IGNORE INTO classes SELECT ?, coalesce(max(place) + 1, 0), NULL FROM classes",
        [(name,) for name in dict.fromkeys(names)],
    )


def _write_classes(connection: sqlite3.Connection, names: Mapping[str, str]) -> None:
    """Make these names the classes, each with the threshold of what it was called before."""
    kept = dict(connection.execute("SELECT name, threshold FROM classes").fetchall())
    connection.execute("DELETE FROM classes")
    rows = [(name, place, kept.get(before)) for place, (name, before) in enumerate(names.items())]
    connection.executemany("INSERT INTO classes VALUES (?, ?, ?)", rows)
