"""The folders that photos lie in: listed without links that lead out of them, opened only below them."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from sppnet.images import SUFFIXES, images_among
from sppnet.serve.errors import Gone
from sppnet.walking import LeftOut, list_folder, shown

FOLDER, DROPPED = 0, 1
"""Which of a project's two folders a photo lies in: the opened one, or the project's own."""

_OUTSIDE = "a link that leads out of the folder"
_ODD = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')
_LONGEST = 120


class Listed(NamedTuple):
    """A photo that lies in a folder.

    Attributes
    ----------
    place : bytes
        Its name below the folder, ``/`` between folders.
    name : str
        The same as text that can be shown, whatever its bytes.
    size, stamp : int
        Bytes of the file, and nanoseconds of its last change.
    """

    place: bytes
    name: str
    size: int
    stamp: int


class Folder:
    """A folder of photos.

    Parameters
    ----------
    root : Path
        The folder.
    without : Path
        A folder below it that is not looked into: the project's.
    """

    def __init__(self, root: Path, without: Path | None = None) -> None:
        self.root = Path(os.path.realpath(root))
        self._without = None if without is None else os.path.realpath(without)

    def photos(self, left: LeftOut) -> Iterator[Listed]:
        """Yield the photos of the folder at any depth; links out of it are counted among what is left out.

        Raises
        ------
        DatasetError
            If a link leads back to a folder that holds it.
        OSError
            If a folder cannot be listed.
        """
        waiting = [b""]
        while waiting:
            files, folders = list_folder(self.root, waiting.pop(), left)
            for place in images_among(files, left):
                listed = self._listed(place, left)
                if listed is not None:
                    yield listed
            waiting += [place for place in folders if self._may_enter(place, left)]

    def _listed(self, place: bytes, left: LeftOut) -> Listed | None:
        path = self._path(place)
        if not self._holds(path):
            left.add(_OUTSIDE, place)
            return None
        facts = path.stat()
        return Listed(place, shown(place), facts.st_size, facts.st_mtime_ns)

    def _may_enter(self, place: bytes, left: LeftOut) -> bool:
        path = self._path(place)
        if self._without is not None and os.path.realpath(path) == self._without:
            return False
        inside = self._holds(path)
        if not inside:
            left.add(_OUTSIDE, place)
        return inside

    def _path(self, place: bytes) -> Path:
        return self.root / os.fsdecode(place)

    def _holds(self, path: Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self.root)

    def open(self, place: bytes) -> Path:
        """Return the path of a photo, free of links, which lies below the folder at this moment.

        Raises
        ------
        Gone
            If it has vanished, or is a link out of the folder by now.
        """
        path = Path(os.path.realpath(self._path(place)))
        if not (path.is_relative_to(self.root) and path.is_file()):
            raise Gone("photo", f"{shown(place)}, which has vanished from its folder")
        return path

    def free_name(self, header: str, suffix: str) -> Path:
        """Return where a file of a name that someone sent can be put: below the folder, over no other.

        Parameters
        ----------
        header : str
            The name, percent-encoded; folders in it and characters that no file should have are dropped.
        suffix : str
            Of its format, for a name without one that tells it.
        """
        name = _ODD.sub("_", unquote(header, errors="replace").replace("\\", "/").rpartition("/")[2])
        stem, own = os.path.splitext(name.strip(". "))
        stem = stem.encode("utf-8", "replace")[:_LONGEST].decode("utf-8", "ignore") or "photo"
        ending = own if own.lower() in SUFFIXES else suffix
        tries = (f"{stem} ({i})" if i else stem for i in range(1000))
        paths = (self.root / f"{one}{ending}" for one in tries)
        unused = next((path for path in paths if not os.path.lexists(path)), None)
        return unused or self.root / f"{stem}-{secrets.token_hex(4)}{ending}"
