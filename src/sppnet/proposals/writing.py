"""Windows of many image files, written to one file: what the command ``sppnet propose`` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sppnet.boxes import Windows
from sppnet.errors import SppnetError
from sppnet.images import find_images, read_image
from sppnet.parallel import Runner, Threads, thread_count
from sppnet.progress import Track, no_track
from sppnet.proposals.choosing import parse
from sppnet.proposals.file import check_name, image_key, write_windows
from sppnet.proposals.method import Proposer, propose_for
from sppnet.storage import check_writable


@dataclass(frozen=True)
class Proposed:
    """What `propose` wrote.

    Attributes
    ----------
    images : int
        Number of images with windows in the file. If it is 0, no file was written.
    windows : int
        Number of their windows.
    failures : tuple of str
        What was wrong with the other images, a line for each.
    notes : tuple of str
        What was left out beside the images, with its count.
    """

    images: int
    windows: int
    failures: tuple[str, ...]
    notes: tuple[str, ...]


def propose(
    images: Sequence[str | Path],
    method: str | Proposer,
    out: str | Path,
    *,
    track: Track = no_track,
    cluster: Runner | None = None,
) -> Proposed:
    """Propose windows for image files and write them to a file, which is a method like any other afterwards.

    Parameters
    ----------
    images : sequence of path
        Image files, folders or patterns; see `sppnet.images.find_images`.
    method : str or Proposer
        A method, or its name as `parse` takes it.
    out : path
        The file to write, which ends in ``.npz``; see `write_windows`. `read_windows` reads it.
    track : callable
        ``track(items, description)`` yields the items and may draw progress.
    cluster : Runner, optional
        Whose workers propose, see `sppnet.cluster.Cluster`; by default a thread for each core.

    Returns
    -------
    Proposed
        How many windows were written, and which images failed: these do not stop the others.

    Raises
    ------
    SppnetError
        If there is no image or no such method, or `out` does not end in ``.npz``.
    OSError
        If `out` cannot be written.
    """
    check_name(out)
    check_writable(out)
    proposer = parse(method) if isinstance(method, str) else method
    paths, notes = find_images(images)
    entries: list[tuple[str, str, Windows]] = []
    failures: list[str] = []
    stream = (cluster or Threads(thread_count())).stream(_Entering(proposer), paths)
    for path, found in zip(track(paths, "Proposing windows"), stream, strict=True):
        if isinstance(found, Exception):
            failures.append(str(found))
        else:
            entries.append((path.name, *found))
    if entries:
        write_windows(out, entries)
    return Proposed(len(entries), sum(len(w.boxes) for _, _, w in entries), tuple(failures), notes)


@dataclass(frozen=True)
class _Entering:
    """The work of making an image's entry in a file: key and windows, or the error that it gave."""

    method: Proposer

    def open(self) -> Callable[[Path], tuple[str, Windows] | SppnetError | OSError]:
        return self._entry

    def _entry(self, path: Path) -> tuple[str, Windows] | SppnetError | OSError:
        try:
            pixels = read_image(path)
            return image_key(pixels), propose_for(path, pixels, self.method)
        except (SppnetError, OSError) as error:
            return error
