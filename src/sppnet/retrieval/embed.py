"""Many images or boxes become a file of vectors: what is embedded, what is there, and what is left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sppnet.arrays import Boxes
from sppnet.datasets.image_folder import read_image_folder
from sppnet.datasets.reading import dataset_format, read_dataset
from sppnet.errors import SppnetError
from sppnet.images import SUFFIXES, find_images, image_size
from sppnet.progress import Track, no_track
from sppnet.retrieval.embedder import SAMPLE, Embedder, check_same
from sppnet.retrieval.vectors import VectorWriter, parts_folder
from sppnet.storage import check_suffix, check_writable

_TABLES = (".csv", ".json", ".yaml", ".yml")


@dataclass(frozen=True)
class Embedded:
    """What `embed` did.

    Attributes
    ----------
    vectors : int
        Number of vectors in the file; 0 if no image could be read, and then the file is as it was.
    length : int
        Numbers in a vector.
    images : int
        Number of images that were asked for.
    earlier : int
        Number of those whose vectors were there already.
    failures : tuple of str
        A line for each image that could not be read; the file has no vectors of it.
    notes : tuple of str
        What was left out or put right on reading the images and boxes, each with its count.
    seconds : float
        Wall-clock time of embedding, without that of learning a projection and of writing the file.
    """

    vectors: int
    length: int
    images: int
    earlier: int
    failures: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float


class _Job(NamedTuple):
    """An image to embed: whole or some boxes of it, and the label of each row."""

    path: Path
    boxes: Boxes | None
    labels: tuple[str, ...]

    def embedded(self) -> Boxes:
        """Return the (R, 4) boxes that its vectors stand for."""
        if self.boxes is not None:
            return self.boxes
        height, width = image_size(self.path)
        return np.array([[0, 0, width, height]], np.float32)


def embed(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    boxes: str | Path | None = None,
    split: str | None = None,
    embedder: Embedder | None = None,
    append: bool = False,
    half: bool = False,
    track: Track = no_track,
) -> Embedded:
    """Write a vector for each image, or each box in images, to a file; a run that was stopped goes on.

    Parameters
    ----------
    sources : path or sequence of paths
        Image files, folders of images and patterns, see `sppnet.images.find_images`; or one data set, whose
        images get the names of their class folders as labels where they have some. With `boxes` they say
        which of its images are embedded, and may be empty for all.
    out : path
        The file to write, ending in ``.safetensors``; see `sppnet.retrieval.vectors.read_vectors`. While the
        work goes on, its parts lie in the folder ``<out>.parts``.
    boxes : path, optional
        Data set whose boxes are embedded, in any format of `sppnet.datasets.read_dataset`.
    split : str, optional
        The part of the data set to read.
    embedder : Embedder, optional
        Makes the vectors. A projection that is not learned yet is taken from the file or its parts, or
        learned from some of the images; the embedder itself stays as it is. By default ``Embedder()``.
    append : bool
        Whether vectors that the file has are kept; its images are not embedded again.
    half : bool
        Whether the vectors are written in half precision.
    track : callable
        ``track(items, description)`` yields the items and may draw progress.

    Returns
    -------
    Embedded
        The number of vectors, the images that could not be read, and more.

    Raises
    ------
    SppnetError
        If there is nothing to embed, an image is named twice, or what is there already was made by another
        embedder, or of other boxes or images.
    OSError
        If the file cannot be written.
    """
    out, embedder = Path(out), Embedder() if embedder is None else embedder
    check_suffix(out, ".safetensors")
    check_writable(out)
    if parts_folder(out).is_file():
        raise OSError(f"{parts_folder(out)}: found a file, expected a folder, or nothing yet")
    if boxes is not None and embedder.view != "full":
        raise SppnetError(f"found boxes for the view {embedder.view!r}, expected the view 'full'")
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    jobs, notes = _whole_images(given, split) if boxes is None else _boxes(Path(boxes), split, given)
    if out.resolve() in {job.path.resolve() for job in jobs}:
        raise SppnetError(f"{out}: found a file that is to be read, expected another for the results")
    ready = _with_projection(embedder, out, append, jobs, track)
    writer = VectorWriter(out, ready, half=half, append=append)
    waiting = _missing(jobs, writer)
    start = time.perf_counter()
    failures = _write(writer, waiting, track)
    seconds = time.perf_counter() - start
    count = writer.finish() if len(failures) < len(jobs) else 0
    earlier = len(jobs) - len(waiting)
    return Embedded(count, ready.length, len(jobs), earlier, tuple(failures), notes, seconds)


def _write(writer: VectorWriter, jobs: Sequence[_Job], track: Track) -> list[str]:
    """Embed images and give their vectors to a writer; return what could not be read."""
    failures: list[str] = []
    stream = writer.embedder.stream([job.path for job in jobs], [job.boxes for job in jobs])
    for job, found in zip(track(jobs, "Embedding"), stream, strict=True):
        if isinstance(found, Exception):
            failures.append(str(found))
        else:
            writer.add(str(job.path), found, job.embedded(), job.labels)
    return failures


def _whole_images(sources: Sequence[str | Path], split: str | None) -> tuple[list[_Job], tuple[str, ...]]:
    """Return the images to embed, with the labels that folders of classes give them, and notes."""
    if not sources:
        raise SppnetError("found no image, expected image files, folders or patterns, or boxes")
    place = Path(sources[0])
    if len(sources) > 1 or not _is_dataset(place):
        paths, notes = find_images(sources)
        return [_Job(path, None, ("",)) for path in _distinct(paths)], notes
    if dataset_format(place) is not None:
        dataset = read_dataset(place, split)
        return [_Job(sample.path, None, ("",)) for sample in dataset], dataset.notes
    labelled = read_image_folder(place, split)
    return [_Job(path, None, (labelled.classes[label],)) for path, label in labelled], labelled.notes


def _is_dataset(place: Path) -> bool:
    """Tell a folder of folders, or a table, from images and a folder of images."""
    if place.is_dir():
        return not any(path.suffix.lower() in SUFFIXES for path in place.iterdir())
    return place.suffix.lower() in _TABLES


def _boxes(
    place: Path, split: str | None, sources: Sequence[str | Path]
) -> tuple[list[_Job], tuple[str, ...]]:
    """Return the images with boxes, all of a data set or some, with the boxes' labels, and notes."""
    dataset = read_dataset(place, split)
    own = _distinct([sample.path for sample in dataset])
    targets = {sample.path.resolve(): sample.target for sample in dataset if sample.target.labels}
    paths, beside = find_images(sources) if sources else (own, ())
    found = [(path, targets[path.resolve()]) for path in _distinct(paths) if path.resolve() in targets]
    if not found:
        raise SppnetError(f"{place}: found no box of the {len(paths)} images, expected some")
    notes = (*dataset.notes, *beside)
    if len(found) < len(paths):
        notes = (*notes, f"images without boxes, left out: {len(paths) - len(found)}")
    return [_Job(path, target.boxes, target.labels) for path, target in found], notes


def _distinct(paths: Sequence[Path]) -> Sequence[Path]:
    """Return the paths, unless two are one file."""
    files: dict[Path, Path] = {}
    for path in paths:
        first = files.setdefault(path.resolve(), path)
        if first is not path:
            raise SppnetError(f"{path}: found the same file as {first}, expected each image once")
    return paths


def _with_projection(
    embedder: Embedder, out: Path, append: bool, jobs: Sequence[_Job], track: Track
) -> Embedder:
    """Return the embedder ready to embed: with the projection of an earlier run, or a new one."""
    if embedder.__sklearn_is_fitted__():
        return embedder
    kept = parts_folder(out) / "embedder.safetensors"
    for earlier in (out if append else kept, kept):
        if earlier.exists():
            known = Embedder.load(earlier, backbone=embedder.backbone, device=embedder.device)
            check_same(earlier, known, embedder)
            return known
    order = np.random.default_rng(embedder.seed).permutation(len(jobs))[:SAMPLE]
    chosen = [jobs[i] for i in order.tolist()]
    stream = embedder.unprojected().stream([job.path for job in chosen], [job.boxes for job in chosen])
    results = [found for _, found in zip(track(chosen, "Sampling"), stream, strict=True)]
    rows = [found for found in results if not isinstance(found, Exception)]
    if not rows:
        raise next(found for found in results if isinstance(found, Exception))
    learned = Embedder(**embedder.get_params())
    for _ in track(["projection"], "Learning the projection"):
        learned.fit_vectors(rows)
    kept.parent.mkdir(exist_ok=True)
    learned.save(kept)
    return learned


def _missing(jobs: Sequence[_Job], writer: VectorWriter) -> list[_Job]:
    """Return the images still to embed; raise an error if what is there is not what is asked for."""
    names = {str(job.path) for job in jobs}
    strange = sorted(writer.part_names - names)
    if strange:
        raise SppnetError(
            f"{writer.folder}: parts of a run with {strange[0]}; start that again, or remove the folder"
        )
    waiting = []
    for job in jobs:
        known = writer.done.get(str(job.path))
        if known is None:
            waiting.append(job)
        elif not np.array_equal(known, job.embedded()):
            raise SppnetError(
                f"{writer.path}: found other boxes of {job.path}, expected those that are asked for"
            )
    return waiting
