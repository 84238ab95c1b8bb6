"""Many images or boxes become a file of vectors, or a folder of shards: what is there, and what is left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np

from sppnet.errors import SppnetError
from sppnet.parallel import Runner, Running, Threads
from sppnet.progress import Track, no_track
from sppnet.retrieval import shards
from sppnet.retrieval.embedder import SAMPLE, Embedder, check_same
from sppnet.retrieval.jobs import Job, read_jobs
from sppnet.retrieval.vectors import VectorWriter, parts_folder
from sppnet.storage import check_folder, check_suffix, check_writable


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


def embed(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    boxes: str | Path | None = None,
    split: str | None = None,
    embedder: Embedder | None = None,
    append: bool = False,
    half: bool = False,
    per_shard: int = shards.PER_SHARD,
    **running: Unpack[Running],
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
        work goes on, its parts lie in the folder ``<out>.parts``. A name that ends in ``.parquet`` is that of
        a folder of shards, which whoever embeds writes; see `sppnet.retrieval.shards.read_shards`.
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
    per_shard : int
        Images of a shard.
    **running
        ``track``: a callable, ``track(items, description)`` yields the items and may draw progress.
        ``cluster``: whose workers embed, see `sppnet.cluster.Cluster`; by default this process.

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
    track, cluster = running.get("track", no_track), running.get("cluster")
    _check_out(out, append, per_shard)
    if boxes is not None and embedder.view != "full":
        raise SppnetError(f"found boxes for the view {embedder.view!r}, expected the view 'full'")
    jobs, notes = read_jobs([sources] if isinstance(sources, str | Path) else list(sources), boxes, split)
    if out.resolve() in {job.path.resolve() for job in jobs}:
        raise SppnetError(f"{out}: found a file that is to be read, expected another for the results")
    known = _projections(out, append)
    ready = _with_projection(embedder, known, jobs, Running(track=track, cluster=cluster))
    if out.suffix == shards.SUFFIX:
        return _embed_shards(out, jobs, notes, shards.Sharding(ready, half), per_shard, track, cluster)
    writer = VectorWriter(out, ready, half=half, append=append)
    waiting = _missing(jobs, writer)
    start = time.perf_counter()
    failures = _write(writer, waiting, track, cluster)
    seconds = time.perf_counter() - start
    count = writer.finish() if len(failures) < len(jobs) else 0
    earlier = len(jobs) - len(waiting)
    return Embedded(count, ready.length, len(jobs), earlier, tuple(failures), notes, seconds)


def _check_out(out: Path, append: bool, per_shard: int) -> None:
    """Raise now, before long work, what is wrong with the place of the results."""
    if out.suffix != shards.SUFFIX:
        check_suffix(out, ".safetensors", f", or {shards.SUFFIX} for a folder of shards")
        check_writable(out)
        if parts_folder(out).is_file():
            raise OSError(f"{parts_folder(out)}: found a file, expected a folder, or nothing yet")
        return
    check_folder(out)
    if append:
        raise SppnetError(f"{out}: found a folder of shards to append to, expected a file of vectors")
    if per_shard < 1:
        raise SppnetError(f"found {per_shard} images of a shard, expected at least 1")


def _projections(out: Path, append: bool) -> list[Path]:
    """Return where the projection of an earlier run may lie; the last is where a new one is kept."""
    if out.suffix == shards.SUFFIX:
        return [out / shards.EMBEDDER]
    kept = parts_folder(out) / "embedder.safetensors"
    return [out, kept] if append else [kept]


def _embed_shards(
    out: Path,
    jobs: Sequence[Job],
    notes: tuple[str, ...],
    work: shards.Sharding,
    per_shard: int,
    track: Track,
    cluster: Runner | None,
) -> Embedded:
    """Make the shards of a run that are not there yet."""
    every = shards.begin(out, jobs, work, per_shard)
    done = [shards.written(shard) for shard in every]
    waiting = [shard for shard, found in zip(every, done, strict=True) if found is None]
    start = time.perf_counter()
    stream = (cluster or Threads(1)).stream(work, waiting, together=1)
    made = [found for _, found in zip(track(waiting, "Embedding shards"), stream, strict=True)]
    seconds = time.perf_counter() - start
    there = [*filter(None, done), *made]
    failures = tuple(line for shard in there for line in shard.failures)
    earlier = len(jobs) - sum(len(shard.jobs) for shard in waiting)
    count, length = sum(shard.vectors for shard in there), work.embedder.length
    return Embedded(count, length, len(jobs), earlier, failures, notes, seconds)


def _write(writer: VectorWriter, jobs: Sequence[Job], track: Track, cluster: Runner | None) -> list[str]:
    """Embed images and give their vectors to a writer; return what could not be read."""
    failures: list[str] = []
    images, boxes = [job.path for job in jobs], [job.boxes for job in jobs]
    stream = writer.embedder.stream(images, boxes, cluster=cluster)
    for job, found in zip(track(jobs, "Embedding"), stream, strict=True):
        if isinstance(found, Exception):
            failures.append(str(found))
        else:
            writer.add(str(job.path), found, job.embedded(), job.labels)
    return failures


def _with_projection(
    embedder: Embedder, places: Sequence[Path], jobs: Sequence[Job], running: Running
) -> Embedder:
    """Return the embedder ready to embed: with the projection of an earlier run, or a new one."""
    if embedder.__sklearn_is_fitted__():
        return embedder
    track = running["track"]
    for earlier in places:
        if earlier.exists():
            known = Embedder.load(earlier, backbone=embedder.backbone, device=embedder.device)
            check_same(earlier, known, embedder)
            return known
    order = np.random.default_rng(embedder.seed).permutation(len(jobs))[:SAMPLE]
    chosen = [jobs[i] for i in order.tolist()]
    images, boxes = [job.path for job in chosen], [job.boxes for job in chosen]
    stream = embedder.unprojected().stream(images, boxes, cluster=running["cluster"])
    results = [found for _, found in zip(track(chosen, "Sampling"), stream, strict=True)]
    rows = [found for found in results if not isinstance(found, Exception)]
    if not rows:
        raise next(found for found in results if isinstance(found, Exception))
    learned = Embedder(**embedder.get_params())
    for _ in track(["projection"], "Learning the projection"):
        learned.fit_vectors(rows)
    places[-1].parent.mkdir(exist_ok=True)
    learned.save(places[-1])
    return learned


def _missing(jobs: Sequence[Job], writer: VectorWriter) -> list[Job]:
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
