"""The photos of a project: known by opaque ids, found in their folders, with what is known of each."""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppnet.errors import SppnetError
from sppnet.images import image_size
from sppnet.serve.errors import Gone
from sppnet.serve.schema import Photo, Photos
from sppnet.walking import LeftOut

if TYPE_CHECKING:
    from sppnet.serve.folders import Folder, Listed
    from sppnet.serve.store import Store

_ANNOTATED = frozenset({".xml", ".txt", ".json", ".csv", ".yaml", ".yml"})
_ORDERS = {"name": "name", "doubt": "doubt IS NULL, doubt DESC, name"}
_SHOWN = {
    "all": "",
    "labelled": "AND (boxes > 0 OR reviewed)",
    "unlabelled": "AND NOT (boxes > 0 OR reviewed)",
    "found": "AND found > 0",
}


class PhotoList:
    """What is known of the photos of a project.

    Parameters
    ----------
    store : Store
        Where it is kept.
    folders : mapping of int to Folder
        Where they lie, by the number that the store has for each.

    Attributes
    ----------
    annotated : bool
        Whether files lie beside the photos that may be annotations, as the last `scan` saw it.
    """

    def __init__(self, store: Store, folders: Mapping[int, Folder]) -> None:
        self.store, self.folders = store, folders
        secret = store.fact("secret")
        if secret is None:
            secret = secrets.token_hex(16)
            store.keep("secret", secret)
        self._key = bytes.fromhex(secret)
        self.annotated = False

    def id_of(self, root: int, place: bytes) -> str:
        """Return the id of a photo: the same each time, and told by nobody who does not know the project."""
        return hashlib.blake2b(b"%d/%s" % (root, place), digest_size=8, key=self._key).hexdigest()

    def scan(self) -> tuple[str, ...]:
        """Bring the list up to date with the folders; return a note on what was left out.

        Photos that have vanished are hidden, and what is known of them is kept. Those that changed are looked
        at anew.
        """
        left, notes = LeftOut(), list[str]()
        for root, folder in self.folders.items():
            try:
                self._take_in(root, list(folder.photos(left)))
            except (SppnetError, OSError) as error:
                notes.append(str(error))
        self.annotated = not _ANNOTATED.isdisjoint(left.found)
        return (*notes, *left.notes())

    def _take_in(self, root: int, listed: Iterable[Listed]) -> None:
        rows = [(self.id_of(root, one.place), root, *one) for one in listed]
        with self.store.change() as connection:
            connection.execute("UPDATE photos SET gone = 1 WHERE root = ?", (root,))
            connection.executemany(
                "INSERT INTO photos (id, root, place, name, size, stamp) VALUES (?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET gone = 0, width = iif(size = excluded.size"
                " AND stamp = excluded.stamp, width, 0), state = iif(size = excluded.size"
                " AND stamp = excluded.stamp AND state = 'encoded', 'encoded', 'waiting'),"
                " size = excluded.size, stamp = excluded.stamp",
                rows,
            )

    def add(self, root: int, path: Path) -> Photo:
        """Take in a file that was put into a folder, and return what is known of it."""
        facts, place = path.stat(), path.name.encode()
        listed = (place, path.name, facts.st_size, facts.st_mtime_ns)
        photo = self.id_of(root, place)
        height, width = image_size(path)
        with self.store.change() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO photos (id, root, place, name, size, stamp, width, height)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (photo, root, *listed, width, height),
            )
        return self.get(photo)

    def page(self, offset: int, limit: int, order: str, show: str, text: str) -> Photos:
        """Return some photos, and how many there are.

        Parameters
        ----------
        offset, limit : int
            Where to begin, and how many.
        order : {"name", "doubt"}
        show : {"all", "labelled", "unlabelled", "found"}
        text : str
            What names must hold, whatever its case.
        """
        where = f"gone = 0 {_SHOWN[show]} AND instr(lower(name), lower(?))"
        total = self.store.row(f"SELECT count(*) FROM photos WHERE {where}", text)
        ordered = f"SELECT * FROM photos WHERE {where} ORDER BY {_ORDERS[order]}, id LIMIT ? OFFSET ?"
        rows = self.store.rows(ordered, text, limit, offset)
        assert total is not None
        return Photos(total=total[0], photos=self._measured(rows))

    def get(self, photo: str) -> Photo:
        """Return what is known of a photo."""
        return self._measured([self.row(photo)])[0]

    def row(self, photo: str) -> sqlite3.Row:
        """Return what the store has of a photo.

        Raises
        ------
        Gone
            If there is no such photo.
        """
        row = self.store.row("SELECT * FROM photos WHERE id = ? AND gone = 0", photo)
        if row is None:
            raise Gone("photo", "the id of one of the project's photos")
        return row

    def path(self, photo: str) -> Path:
        """Return the file of a photo; see `Folder.open`."""
        row = self.row(photo)
        return self.folders[row["root"]].open(row["place"])

    def place(self, row: sqlite3.Row) -> Path:
        """Return where the photo of a row lies by its name, whether it is still there or not."""
        return self.folders[row["root"]].root / os.fsdecode(row["place"])

    def stamp(self, photo: str) -> str:
        """Return what changes when a photo's file does."""
        row = self.row(photo)
        return f"{row['id']}-{row['size']:x}-{row['stamp']:x}"

    def size(self, photo: str) -> tuple[int, int]:
        """Return width and height of a photo, upright.

        Raises
        ------
        ImageError
            If it cannot be read.
        """
        row = self.row(photo)
        if not row["width"]:
            height, width = image_size(self.path(photo))
            self._keep_sizes([(width, height, photo)])
            return width, height
        return row["width"], row["height"]

    def _measured(self, rows: Iterable[sqlite3.Row]) -> list[Photo]:
        """Return photos with their sizes, which are read now of those that are new."""
        facts = [{name: row[name] for name in Photo.model_fields} | {"row": row} for row in rows]
        new = []
        for one in facts:
            row: Any = one.pop("row")
            if not one["width"] and one["state"] == "waiting":
                one |= self._header(row)
                new.append((one["width"], one["height"], one["id"]))
        if new:
            self._keep_sizes(new)
        return [Photo(**one) for one in facts]

    def _header(self, row: sqlite3.Row) -> dict[str, Any]:
        try:
            height, width = image_size(self.folders[row["root"]].open(row["place"]))
            return {"width": width, "height": height}
        except (SppnetError, OSError):
            return {}

    def _keep_sizes(self, sizes: list[tuple[int, int, str]]) -> None:
        with self.store.change() as connection:
            connection.executemany("UPDATE photos SET width = ?, height = ? WHERE id = ?", sizes)

    def waiting(self, count: int) -> list[str]:
        """Return photos that are to be encoded, labelled ones first."""
        order = "boxes = 0, name LIMIT ?"
        sql = f"SELECT id FROM photos WHERE gone = 0 AND state = 'waiting' ORDER BY {order}"
        return [row["id"] for row in self.store.rows(sql, count)]

    def encoded(self, photo: str, height: int, width: int) -> None:
        """Keep that a photo was encoded, and its size."""
        with self.store.change() as connection:
            connection.execute(
                "UPDATE photos SET state = 'encoded', error = NULL, height = ?, width = ? WHERE id = ?",
                (height, width, photo),
            )

    def forgotten(self, known: Iterable[str]) -> None:
        """Take photos as not encoded whose regions are not known."""
        with self.store.change() as connection:
            lost = set(self.all("state = 'encoded'")) - set(known)
            rows = [(photo,) for photo in lost]
            connection.executemany("UPDATE photos SET state = 'waiting' WHERE id = ?", rows)

    def gone(self) -> list[str]:
        """Return the photos that have vanished."""
        return [row["id"] for row in self.store.rows("SELECT id FROM photos WHERE gone = 1")]

    def failed(self, photo: str, error: str) -> None:
        """Keep why a photo cannot be encoded."""
        with self.store.change() as connection:
            connection.execute("UPDATE photos SET state = 'failed', error = ? WHERE id = ?", (error, photo))

    def all(self, condition: str = "1") -> list[str]:
        """Return the ids of the photos that are there, by name: those that a condition in SQL holds for."""
        sql = f"SELECT id FROM photos WHERE gone = 0 AND {condition} ORDER BY name"
        return [row["id"] for row in self.store.rows(sql)]
