"""Walks through folders: the same files for every command, and a count of what is left out.

Names are bytes, so that those that are no UTF-8 come through, relative to where a walk begins, with ``/``
between folders.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from sppnet.errors import DatasetError

NOWHERE = "leading nowhere"  # of links
_MAC = b"__MACOSX"


class LeftOut:
    """What was passed over: of each kind how many, and the first by name."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, bytes]] = {}

    def add(self, kind: str, name: bytes | str) -> None:
        """Count one more.

        Parameters
        ----------
        kind : str
            What follows the count, the same for one and for many: ``".txt"``, ``"in no class folder"``.
        name : bytes or str
            Of the file.
        """
        name = os.fsencode(name)
        count, first = self.found.get(kind, (0, name))
        self.found[kind] = count + 1, min(first, name)

    def notes(self) -> tuple[str, ...]:
        """Return one line, ``6 files left out: 4 .txt, first a.txt; ...``, or none if nothing was."""
        if not self.found:
            return ()
        most_first = sorted(self.found.items(), key=lambda item: (-item[1][0], item[0]))
        kinds = (f"{count} {kind}, first {shown(first)}" for kind, (count, first) in most_first)
        total = sum(count for count, _ in self.found.values())
        return (f"{total} file{'s' * (total > 1)} left out: {'; '.join(kinds)}",)


def walk(root: Path, left: LeftOut, below: bytes = b"") -> list[bytes]:
    """List all files at any depth below a folder.

    Hidden files and folders, those whose names begin with a dot, are not looked at, and neither are folders
    ``__MACOSX``, where ZIP archives made on a Mac hold what only a Mac needs. Links are followed.

    Parameters
    ----------
    root : path
        Where the names start from.
    left : LeftOut
        Counts what is neither file nor folder, and links that lead nowhere.
    below : bytes
        Where to begin below `root`: a folder's name, ending in ``/``.

    Returns
    -------
    list of bytes
        Names relative to `root`, sorted.

    Raises
    ------
    DatasetError
        If a link leads back to a folder that holds it.
    OSError
        If a folder cannot be listed.
    """
    names: list[bytes] = []
    waiting = [below]
    while waiting:
        files, folders = list_folder(root, waiting.pop(), left)
        names += files
        waiting += folders
    names.sort()
    return names


def list_folder(root: Path, below: bytes, left: LeftOut) -> tuple[list[bytes], list[bytes]]:
    """Return the files and the folders (ending in ``/``) that lie in a folder, unsorted; see `walk`."""
    files, folders = [], []
    place = os.path.join(os.fsencode(root), below)
    try:
        with os.scandir(place) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(b".") or name == _MAC:
                    continue
                try:
                    is_file, is_folder = entry.is_file(), entry.is_dir()
                except OSError:  # links in a circle, or into a folder that may not be entered
                    is_file = is_folder = False
                if is_folder:
                    _check_link(Path(os.fsdecode(entry.path)))
                    folders.append(below + name + b"/")
                elif is_file:
                    files.append(below + name)
                else:
                    kind = NOWHERE if entry.is_symlink() else "neither file nor folder"
                    left.add(kind, below + name)
    except OSError as error:
        reason = f"{shown(place)}: cannot list ({error.strerror}), expected a readable folder"
        raise type(error)(reason) from None
    return files, folders


def matches(pattern: str) -> Iterator[Path]:
    """Yield the files and folders that a pattern finds, in any order, but for hidden ones.

    Parameters
    ----------
    pattern : str
        With ``*``, ``?``, ``[ab]``, and ``**`` for folders at any depth.

    Raises
    ------
    DatasetError
        If a link leads back to a folder that holds it.
    """
    checked: set[Path] = set()
    for name in glob.iglob(pattern, recursive=True):
        path = Path(name)
        # One by one and at once: a circle would have as many names as the system allows links in one.
        for folder in {path, *path.parents} - checked:
            checked.add(folder)
            _check_link(folder)
        if not path.name.startswith("."):
            yield path


def shown(*parts: bytes) -> str:
    """Return a path as text that any terminal takes, whatever its bytes."""
    return os.path.normpath(os.path.join(*parts)).decode("utf-8", "backslashreplace")


def _check_link(path: Path) -> None:
    """Raise an error if a link leads to a folder on its own path, by which a walk would never end."""
    if path.is_symlink() and path.is_dir() and any(map(path.samefile, path.absolute().parents)):
        expected = "no link to a folder that holds the link"
        raise DatasetError(f"{shown(os.fsencode(path))}: found a circle, expected {expected}")
