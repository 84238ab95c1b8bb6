"""The state of a project in one SQLite file: each change is written at once, and whole or not at all."""

from __future__ import annotations

import errno
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sppnet.errors import SppnetError

VERSION = 1
"""Of the tables; a file of another version is refused."""

_TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE photos (
    id TEXT PRIMARY KEY, root INTEGER NOT NULL, place BLOB NOT NULL, name TEXT NOT NULL,
    size INTEGER NOT NULL, stamp INTEGER NOT NULL, gone INTEGER NOT NULL DEFAULT 0,
    width INTEGER NOT NULL DEFAULT 0, height INTEGER NOT NULL DEFAULT 0,
    state TEXT NOT NULL DEFAULT 'waiting', error TEXT,
    revision INTEGER NOT NULL DEFAULT 0, reviewed INTEGER NOT NULL DEFAULT 0,
    boxes INTEGER NOT NULL DEFAULT 0, unwritten INTEGER NOT NULL DEFAULT 0,
    found INTEGER NOT NULL DEFAULT 0, doubt REAL
) STRICT;
CREATE INDEX photos_by_name ON photos (gone, name);
CREATE TABLE boxes (
    photo TEXT NOT NULL REFERENCES photos (id), place INTEGER NOT NULL, rejected INTEGER NOT NULL,
    x1 REAL NOT NULL, y1 REAL NOT NULL, x2 REAL NOT NULL, y2 REAL NOT NULL,
    label TEXT NOT NULL, origin TEXT NOT NULL, PRIMARY KEY (photo, rejected, place)
) STRICT;
CREATE INDEX boxes_by_label ON boxes (label);
CREATE TABLE classes (name TEXT PRIMARY KEY, place INTEGER NOT NULL, threshold REAL) STRICT;
CREATE TABLE models (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, made TEXT NOT NULL, file TEXT NOT NULL,
    classes TEXT NOT NULL, thresholds TEXT NOT NULL, mean_ap REAL
) STRICT;
CREATE TABLE fits (
    id TEXT PRIMARY KEY, made TEXT NOT NULL, state TEXT NOT NULL, seconds REAL NOT NULL DEFAULT 0,
    error TEXT, quality TEXT
) STRICT;
CREATE TABLE results (photo TEXT PRIMARY KEY, model TEXT NOT NULL, found TEXT NOT NULL) STRICT;
"""


class Store:
    """A SQLite file that any thread of this process may read and change; changes take turns.

    Parameters
    ----------
    path : Path
        The file; made if it is missing.

    Raises
    ------
    SppnetError
        If it is of another version, damaged, or no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.RLock()
        self.is_new = not path.exists()
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._connection.row_factory = sqlite3.Row
        try:
            self._prepare()
        except sqlite3.DatabaseError as error:
            raise SppnetError(f"{path}: found no project file ({error}), expected one of sppnet's") from None

    def _prepare(self) -> None:
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            "busy_timeout = 5000",
        ):
            self._connection.execute(f"PRAGMA {pragma}")
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._connection.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
        elif version != VERSION:
            expected = f"{VERSION} (made by another version of sppnet)"
            raise SppnetError(f"{self.path}: found a project of version {version}, expected {expected}")

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """Lend the connection for changes that are all made when the ``with`` block ends well, or none.

        Raises
        ------
        OSError
            If the disk is full, or the file cannot be written.
        """
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException as error:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise OSError(errno.ENOSPC, f"{self.path}: cannot save ({error})") from None
                raise

    def rows(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """Return what a question gives."""
        with self._lock:
            return self._connection.execute(sql, values).fetchall()

    def row(self, sql: str, *values: Any) -> sqlite3.Row | None:
        """Return the first row of what a question gives, if there is one."""
        with self._lock:
            found: sqlite3.Row | None = self._connection.execute(sql, values).fetchone()
            return found

    def fact(self, name: str) -> str | None:
        """Return a fact by name, None if it is not known."""
        found = self.row("SELECT value FROM facts WHERE name = ?", name)
        return None if found is None else str(found["value"])

    def keep(self, name: str, value: str) -> None:
        """Keep a fact."""
        with self.change() as connection:
            connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    def close(self) -> None:
        """Close the file; what was changed is in it."""
        with self._lock:
            self._connection.close()
