"""Folders of vectors as Parquet files, shards, that workers write side by side and other programs read.

A shard holds the vectors of so many images in the order of the run, and appears whole or not at all: a run
that was stopped makes those that lack. What is no table has a name that begins with an underscore: readers of
Parquet folders pass over it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sppnet.errors import SppnetError, check_extra
from sppnet.retrieval.tables import VectorTable, join_tables
from sppnet.storage import atomic_path, read_json, write_json

if TYPE_CHECKING:
    from sppnet.retrieval.embedder import Embedder, Vectors
    from sppnet.retrieval.jobs import Job

FORMAT, VERSION = "sppnet-shards", 1
SUFFIX = ".parquet"
EMBEDDER, _RUN = "_embedder.safetensors", "_run.json"
PER_SHARD = 256
"""Images of a shard."""

_KEY = b"sppnet"


@dataclass(frozen=True)
class Shard:
    """Some images of a run, and the file of their vectors.

    Attributes
    ----------
    path : Path
        The file.
    jobs : tuple of Job
        The images.
    run : str
        What tells its run from others, 64 hexadecimal digits.
    """

    path: Path
    jobs: tuple[Job, ...]
    run: str

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that whoever makes the shard must see; the run's own file shows that the folder is shared."""
        return (self.path.with_name(_RUN), *(job.path for job in self.jobs))


@dataclass(frozen=True)
class Written:
    """What is in a shard: so many vectors, and a line for each image that could not be read."""

    vectors: int
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Sharding:
    """The work of making shards.

    Attributes
    ----------
    embedder : Embedder
        Makes the vectors; ready to embed.
    half : bool
        Whether they are written in half precision.
    """

    embedder: Embedder
    half: bool

    def open(self) -> Callable[[Shard], Written]:
        """Return what embeds the images of a shard and writes it."""
        return self._make

    def _make(self, shard: Shard) -> Written:
        # A worker that died behind its last line has left the file.
        if (there := written(shard)) is not None:
            return there
        found: list[tuple[Job, Vectors]] = []
        failures: list[str] = []
        stream = self.embedder.stream([job.path for job in shard.jobs], [job.boxes for job in shard.jobs])
        for job, result in zip(shard.jobs, stream, strict=True):
            if isinstance(result, Exception):
                failures.append(str(result))
            else:
                found.append((job, result))
        table = _joined(found, self.embedder.length, np.float16 if self.half else np.float32)
        _write(shard, table, failures)
        return Written(len(table), tuple(failures))


def begin(folder: Path, jobs: Sequence[Job], work: Sharding, per_shard: int) -> list[Shard]:
    """Make the folder of a run, or go on with one, and return its shards.

    Raises
    ------
    SppnetError
        If pyarrow is not installed, the folder holds the shards of another run (says what differs) or other
        files, or the name of an image is no text.
    OSError
        If the folder cannot be written to.
    """
    check_extra("ray", "writing Parquet")
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "embedder": work.embedder.signature,
        "precision": "float16" if work.half else "float32",
        "images": len(jobs),
        "images of a shard": per_shard,
        "names and boxes": _digest(jobs),
    }
    folder.mkdir(exist_ok=True)
    place = folder / _RUN
    if place.exists():
        _check_run(folder, read_json(place), facts)
    elif strange := [path for path in sorted(folder.iterdir()) if path.name not in (_RUN, EMBEDDER)]:
        raise SppnetError(
            f"{folder}: found {strange[0].name} in it, expected shards of this run, or nothing yet"
        )
    else:
        write_json(place, facts)
    work.embedder.save(folder / EMBEDDER)
    run = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    starts = range(0, len(jobs), per_shard)
    return [
        Shard(folder / f"part-{i:06}{SUFFIX}", tuple(jobs[start : start + per_shard]), run)
        for i, start in enumerate(starts)
    ]


def written(shard: Shard) -> Written | None:
    """Return what is in a shard, None if it is not there yet.

    Raises
    ------
    SppnetError
        If the file is damaged or of another run.
    """
    if not shard.path.exists():
        return None
    from pyarrow import ArrowException, parquet

    try:
        metadata = parquet.read_metadata(shard.path)
        facts = json.loads((metadata.metadata or {})[_KEY])
    except (ArrowException, KeyError, ValueError) as error:
        raise SppnetError(
            f"{shard.path}: found no shard ({error}), expected one of sppnet's; remove it"
        ) from None
    if facts["run"] != shard.run:
        raise SppnetError(
            f"{shard.path}: found the shard of another run, expected one of this run; remove it"
        )
    return Written(metadata.num_rows, tuple(facts["failures"]))


def is_shards(folder: str | Path) -> bool:
    """Tell whether a path is a folder of shards."""
    return Path(folder).suffix == SUFFIX and (Path(folder) / _RUN).is_file()


def read_shards(folder: str | Path) -> VectorTable:
    """Read a folder of shards, all of it, into memory; `Embedder.load` reads its ``_embedder.safetensors``.

    Raises
    ------
    SppnetError
        If it is none, is not finished (says how many shards lack), or one of them is damaged.
    """
    return join_tables(list(shard_tables(folder)))


def shard_tables(folder: str | Path) -> Iterator[VectorTable]:
    """Yield the tables of a folder of shards, in the order of the run; errors are those of `read_shards`."""
    folder = Path(folder)
    check_extra("ray", "reading Parquet")
    if not is_shards(folder):
        raise SppnetError(
            f"{folder}: found no shards, expected a folder that sppnet embed --out NAME.parquet wrote"
        )
    facts = read_json(folder / _RUN)
    count = -(-facts["images"] // facts["images of a shard"])
    paths = [folder / f"part-{i:06}{SUFFIX}" for i in range(count)]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise SppnetError(
            f"{folder}: found {count - len(missing)} of {count} shards, expected {missing[0].name}, too; "
            "the same sppnet embed goes on"
        )
    return map(_read, paths)


def _joined(found: Sequence[tuple[Job, Vectors]], length: int, kind: Any) -> VectorTable:
    """Return the rows of images as one table; of none, an empty one."""
    tables = [
        VectorTable(vectors.astype(kind), (str(job.path),) * len(vectors), job.embedded(), job.labels)
        for job, vectors in found
    ]
    return join_tables(
        [VectorTable(np.zeros((0, length), kind), (), np.zeros((0, 4), np.float32), ()), *tables]
    )


def _write(shard: Shard, table: VectorTable, failures: Sequence[str]) -> None:
    import pyarrow
    from pyarrow import parquet

    length = table.vectors.shape[1]
    columns = {
        "image": pyarrow.array(table.names, pyarrow.string()),
        "box": _lists(table.boxes, 4),
        "label": pyarrow.array(table.labels, pyarrow.string()),
        "vector": _lists(table.vectors, length),
    }
    facts = {"run": shard.run, "failures": list(failures)}
    content = pyarrow.table(columns, metadata={_KEY: json.dumps(facts)})
    with atomic_path(shard.path) as temporary:
        try:
            parquet.write_table(content, temporary, use_dictionary=["image", "label"])
        except OSError as error:
            raise OSError(f"{shard.path}: cannot write ({error.strerror or error})") from None


def _lists(rows: Any, length: int) -> Any:
    import pyarrow

    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), length)


def _read(path: Path) -> VectorTable:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(path).combine_chunks()
        box, vector = (_rows(table.column(name)) for name in ("box", "vector"))
        names, labels = (tuple(table.column(name).to_pylist()) for name in ("image", "label"))
    except (ArrowException, KeyError, OSError) as error:
        raise SppnetError(
            f"{path}: found a damaged shard ({error}), expected a whole one; remove it"
        ) from None
    return VectorTable(vector, names, box, labels)


def _rows(column: Any) -> Any:
    """Return a column of lists of equal length as an array of rows."""
    length = column.type.list_size
    kind = column.type.value_type.to_pandas_dtype()
    parts = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, length) for chunk in column.chunks]
    return np.concatenate([np.zeros((0, length), kind), *parts])


def _digest(jobs: Sequence[Job]) -> str:
    digest = hashlib.sha256()
    for job in jobs:
        try:
            digest.update(str(job.path).encode() + b"\0")
        except UnicodeEncodeError:
            raise SppnetError(
                f"{job.path!r}: found a name that is no text, expected text for Parquet"
            ) from None
        if job.boxes is not None:
            digest.update(job.boxes.tobytes())
        digest.update(json.dumps(job.labels).encode())
    return digest.hexdigest()


def _check_run(folder: Path, found: Any, expected: dict[str, Any]) -> None:
    """Raise an error that says what differs if there are shards of another run."""
    known = found if isinstance(found, dict) else {}
    for name, value in expected.items():
        if known.get(name) != value:
            raise SppnetError(
                f"{folder}: found the shards of another run, {name}: {known.get(name)}; expected {value}"
            )
