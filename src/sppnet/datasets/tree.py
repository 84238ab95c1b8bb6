"""The files of a data set: a folder walked once, its photos by name, and the photo that a record means."""

from __future__ import annotations

import codecs
import os
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from sppnet.datasets.splits import same_split
from sppnet.errors import DatasetError
from sppnet.images import SUFFIXES, images_among
from sppnet.storage import encoding_of
from sppnet.walking import LeftOut, walk

if TYPE_CHECKING:
    from sppnet.datasets.findings import Findings, Record

PROJECT = "sppnet-project"
"""The folder in which `sppnet serve` keeps what it knows of the photos beside it: their boxes, too."""

_HEAD = 4096  # bytes of a file by which its format is told
_MANY = 8  # files of one name, from which on they are looked up by their folder first
_PICTURES = frozenset({".heic", ".heif", ".hif", ".dng", ".cr2", ".nef", ".arw", ".jp2", ".psd"}) - SUFFIXES
_NO_PHOTOS = frozenset(
    {"segmentationclass", "segmentationobject", "segmentation", "segmentations", "mask", "masks"}
)


class Layout(NamedTuple):
    """What a format understood of a data set's files, before it reads them.

    Attributes
    ----------
    splits : mapping from str
        The parts of the data set by name, each a sequence of what only the format knows, such as its files;
        empty where it has none.
    whole : sequence
        All of it, in the same form.
    read : callable
        ``read(part, findings)`` yields the records of a part.
    shown : str
        The file that tells the format best, for an error about several formats.
    """

    splits: Mapping[str, Sequence[Any]]
    whole: Sequence[Any]
    read: Callable[[Any, Findings], Iterator[Record]]
    shown: str

    @property
    def has_rest(self) -> bool:
        """Whether something lies outside all the splits."""
        return len(self.whole) > sum(map(len, self.splits.values()))


class Format(NamedTuple):
    """A format of data sets.

    Attributes
    ----------
    suffixes : collection of str
        Those that its files may have, in small letters.
    fits : callable
        ``fits(path, head)`` tells by the first 4,096 bytes of a file, in UTF-8 (it may read on), whether it
        is of the format. A file of which it can tell that it means to be, but is damaged, fits.
    locate : callable
        ``locate(tree, names)`` returns what the format makes of the files that fit, and None of nothing.
    looks : str
        What such data looks like, for an error.
    """

    suffixes: Collection[str]
    fits: Callable[[Path, bytes], bool]
    locate: Callable[[Tree, Sequence[str]], Layout | None]
    looks: str


class Tree:
    """The files below a folder, or around one file, of which it is walked at most once.

    Attributes
    ----------
    root : Path
        What was named: a folder or a file.
    looks_up : bool
        Whether photos may be looked for in the folder above `base`.
    pages : bool
        Whether the folder `PROJECT` in `base` counts.
    base : Path
        The folder from which names start: `root`, or that of the file.
    left : LeftOut
        What was passed over.
    met : set of str
        The paths of the photos that annotations were found for, good or bad.
    """

    def __init__(self, root: Path, looks_up: bool = False, pages: bool = True) -> None:
        self.root, self.looks_up, self.pages = root, looks_up, pages
        self.base = root if root.is_dir() else root.parent
        self.left = LeftOut()
        self.met: set[str] = set()

    @cached_property
    def files(self) -> dict[str, None]:
        """All files below `base`, by names with ``/`` between folders, sorted."""
        names = map(os.fsdecode, walk(self.base, self.left))
        return dict.fromkeys(name for name in names if self.pages or not is_of_page(name))

    @cached_property
    def folders(self) -> dict[str, None]:
        """All folders that hold files or folders with files, with ``""`` for `base`."""
        found: dict[str, None] = {"": None}
        for name in self.files:
            folder = name.rpartition("/")[0]
            while folder and folder not in found:
                found[folder] = None
                folder = folder.rpartition("/")[0]
        return found

    @cached_property
    def candidates(self) -> dict[str, list[str]]:
        """The files that may hold annotations, by suffix in small letters; if a file was named only this."""
        found: dict[str, list[str]] = {}
        for name in self.files if self.root.is_dir() else (self.root.name,):
            found.setdefault(suffix_of(name), []).append(name)
        return found

    def fitting(self, formats: Mapping[str, Format]) -> dict[str, list[str]]:
        """Return the files that fit each format; each file is opened once."""
        found: dict[str, list[str]] = {name: [] for name in formats}
        for suffix, names in self.candidates.items():
            asked = [(found[name], known.fits) for name, known in formats.items() if suffix in known.suffixes]
            for name in names if asked else ():
                path = self.path(name)
                head = head_of(path)
                for fitting, fits in asked:
                    if fits(path, head):
                        fitting.append(name)
        return found

    def path(self, name: str) -> Path:
        """Return the path of a file by its name in the tree."""
        return self.base / name

    @cached_property
    def photos(self) -> Names:
        """The photos below `base`; for annotations in a folder of their own, below the folder above it."""
        names = [name for name in self.files if suffix_of(name) in SUFFIXES]
        alone = self.root.is_file() or any("/" not in name for name in self.files)
        if names or not alone or not self.looks_up:
            return Names(self.base, names)
        above = self.base.absolute().parent
        try:
            walked = map(os.fsdecode, walk(above, LeftOut()))
        except (DatasetError, OSError):  # something else lies there
            return Names(self.base, [])
        return Names(above, [name for name in walked if suffix_of(name) in SUFFIXES])

    def leave_out(self, wanted: Callable[[str], bool]) -> None:
        """Count what could have been a photo of the data set and was not met.

        Parameters
        ----------
        wanted : callable
            Tells by the name of a photo whether it lies where photos were read.
        """
        if not self.root.is_dir() or self.photos.base != self.base:
            return
        images_among([os.fsencode(name) for name in self.files if suffix_of(name) in _PICTURES], self.left)
        for name in self.photos.names:
            if self.photos.path(name) not in self.met and wanted(name) and not _is_mask(name):
                self.left.add("without annotation", name)


def is_of_page(name: str) -> bool:
    """Tell whether a file of a tree is one that `sppnet serve` keeps."""
    return name.startswith(f"{PROJECT}/")


class Names:
    """Files below a folder, found by what a data set calls them.

    Parameters
    ----------
    base : Path
        The folder from which names start.
    names : sequence of str
        The files, with ``/`` between folders.
    """

    def __init__(self, base: Path, names: Sequence[str]) -> None:
        self.base, self.names = base, names
        self._start = os.path.join(str(base), "") if str(base) != "." else ""
        self._near: dict[Path, str] = {}
        self._splits: dict[tuple[str, str], bool | None] = {}

    def path(self, name: str) -> str:
        """Return the path of a file."""
        return self._start + name

    @cached_property
    def by_name(self) -> dict[str, list[str]]:
        """The files of each name without folders, in small letters."""
        return _grouped(self.names, file_key)

    @cached_property
    def by_stem(self) -> dict[str, list[str]]:
        """The files of each name without folders and suffix, in small letters."""
        return _grouped(self.names, stem_key)

    @cached_property
    def _by_folder(self) -> dict[tuple[str, str], list[str]]:
        """The files of each stem in a folder of each name, in small letters."""
        found: dict[tuple[str, str], list[str]] = {}
        for name in self.names:
            found.setdefault((_folder_key(name), stem_key(name)), []).append(name)
        return found

    def called(self, written: str, key: str, by_stem: bool) -> Iterator[list[str]]:
        """Yield the files that may be meant, the likelier ones first where there are many.

        Frames of videos have the same names in every folder: those in a folder of the name that is written
        come before all of them.

        Parameters
        ----------
        written : str
            The path as it is written, with ``/`` between folders.
        key : str
            `file_key` or `stem_key` of the name that is looked for.
        by_stem : bool
            Whether it is a stem.
        """
        named = (self.by_stem if by_stem else self.by_name).get(key, [])
        if len(named) > _MANY:
            stem = key if by_stem else stem_key(key)
            close = self._by_folder.get((_folder_key(written), stem), [])
            yield [name for name in close if (by_stem or file_key(name) == key) and not _is_mask(name)]
        yield named

    def find(
        self, named: Sequence[str], written: str, source: Path, own: str | None, splits: Collection[str]
    ) -> str | None:
        """Choose the file that is meant among those of a name.

        A file in a folder named after the split wins, and those in folders of other splits are out. Then the
        names count: those whose last folders agree in the longest row with what is written, then the nearest
        to the file where it is written.

        Parameters
        ----------
        named : sequence of str
            The files that may be meant.
        written : str
            The name as it is written, with ``/`` between folders.
        source : Path
            The file where it is written.
        own : str or None
            The split of the record.
        splits : collection of str
            All splits of the data set.

        Returns
        -------
        str or None
            Its name; None if none is left.

        Raises
        ------
        DatasetError
            If two fit equally well: names both.
        """
        if own is not None:
            held = [(name, self._split(name, own, splits)) for name in named]
            named = [name for name, is_own in held if is_own] or [n for n, is_own in held if is_own is None]
        if len(named) > 1:
            near = self._folder_of(source)
            ranks = {name: _rank(name, written, near) for name in named}
            best = max(ranks.values())
            named = [name for name, rank in ranks.items() if rank == best]
        if len(named) > 1:
            both = " and ".join(named[:2])
            raise DatasetError(f"{source}: found {len(named)} files for {written!r} ({both}), expected one")
        return named[0] if named else None

    def _split(self, name: str, own: str, splits: Collection[str]) -> bool | None:
        """Tell whether a file lies in a folder of the split, of another one (False), or of none (None)."""
        folder = name.rpartition("/")[0]
        if (folder, own) not in self._splits:
            parts = folder.split("/")
            held = [split for split in splits if any(same_split(part, split) for part in parts)]
            is_own = own in held or any(same_split(part, own) for part in parts)
            self._splits[folder, own] = True if is_own else (False if held else None)
        return self._splits[folder, own]

    def _folder_of(self, source: Path) -> str:
        """Return the folder of a file, relative to `base`."""
        if source.parent not in self._near:
            self._near[source.parent] = os.path.relpath(source.parent, self.base).replace(os.sep, "/")
        return self._near[source.parent]


def find_photo(tree: Tree, record: Record, splits: Collection[str]) -> str | None:
    """Return the path of the photo that a record means; None if there is none.

    Parameters
    ----------
    tree : Tree
        The files of the data set.
    record : Record
        A path that is written is looked up as it is, from the folder of the file where it is written and from
        those above it; as it is and with ``%20`` read as a space. Then photos of the same name are looked
        for, then those of the same stem.
    splits : collection of str
        All splits of the data set.

    Raises
    ------
    DatasetError
        If two photos fit equally well: names both.
    """
    if record.photo:
        return record.photo
    if record.stem:
        wanted = file_key(clean(record.file))
        for named in tree.photos.called(record.stem, file_key(record.stem), by_stem=True):
            exact = [name for name in named if file_key(name) == wanted]
            found = tree.photos.find(exact or named, record.stem, record.source, record.split, splits)
            if found is not None:
                return tree.photos.path(found)
    for written in dict.fromkeys((clean(record.file), clean(unquote(record.file)))):
        found = written and _as_written(tree, written, record, splits)
        if found:
            return found
    return None


def clean(name: str) -> str:
    """Return a path as it is written by some tool, with ``/`` between folders and without a drive letter."""
    name = name.strip().replace("\\", "/")
    return name[2:] if name[1:2] == ":" and name[:1].isalpha() else name


def tail_of(name: str) -> str:
    """Return a path without what leads out of folders: ``train/images`` of ``../train/images``."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def suffix_of(name: str) -> str:
    """Return the suffix of a file in small letters, with its dot."""
    base = _base(name)
    dot = base.rfind(".")
    return base[dot:].lower() if dot > 0 else ""


def head_of(path: Path) -> bytes:
    """Return the first 4,096 bytes of a text file, in UTF-8 and without a mark; its mark tells UTF-16."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if encoding_of(head[:2]) == "utf-16":
        return head.decode("utf-16", "ignore").encode()
    return head.removeprefix(codecs.BOM_UTF8)


def _as_written(tree: Tree, written: str, record: Record, splits: Collection[str]) -> str | None:
    """Return the photo of a name that is written, by the path if there is a file, and else by its end."""
    if os.path.isabs(written) and os.path.isfile(written):
        return written
    if tree.root.is_file():  # what lies around a file may be a lot, and is walked only if it must
        path = os.path.join(record.source.parent, written)
        if os.path.isfile(path):
            return os.path.normpath(path)
    tail = tail_of(written)
    name = _base(tail)
    photos = tree.photos
    by_name = photos.called(tail, file_key(name), by_stem=False)
    for named in chain(by_name, photos.called(tail, stem_key(name), by_stem=True)):
        exact = [other for other in named if _base(other) == name]
        found = photos.find(exact or named, tail, record.source, record.split, splits)
        if found is not None:
            return photos.path(found)
    path = os.path.normpath(os.path.join(record.source.parent, written))
    return path if os.path.isfile(path) else None


def _rank(name: str, written: str, near: str) -> tuple[int, int, int]:
    """Return how well a file fits what is written in a folder: the greater the better."""
    parts, expected = name.split("/"), written.split("/")
    agreeing = 0
    for part, other in zip(parts[-2::-1], expected[-2::-1], strict=False):
        if _key(part) != _key(other):
            break
        agreeing += 1
    here = [] if near == "." else near.split("/")
    common = next((i for i, (a, b) in enumerate(zip(parts[:-1], here, strict=False)) if a != b), None)
    if common is None:
        common = min(len(parts) - 1, len(here))
    return not _is_mask(name), agreeing, 2 * common - len(parts) - len(here)


def _folder_key(name: str) -> str:
    """Return the name of the innermost folder of a path, in small letters."""
    return file_key(name.rpartition("/")[0])


def _is_mask(name: str) -> bool:
    """Tell whether a picture lies in a folder of masks, which are no photos."""
    return not _NO_PHOTOS.isdisjoint(part.lower() for part in name.split("/")[:-1])


def _grouped(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(key(name), []).append(name)
    return found


def file_key(name: str) -> str:
    """Return the name of a file without folders, in a form that is equal however letters are written."""
    return _key(_base(name))


def stem_key(name: str) -> str:
    """Return the name of a file without folders and suffix, in a form that is equal however it is written."""
    return _key(os.path.splitext(_base(name))[0])


def _base(name: str) -> str:
    return name[name.rfind("/") + 1 :]


def _key(name: str) -> str:
    """Return a name in a form that is equal for small and capital letters and for all ways to set accents."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()
