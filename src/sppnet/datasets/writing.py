"""Data sets in any of the formats, with their photos: `write_dataset`, and `convert` from one to another.

Boxes are written as they are held, in pixels of the upright photos, and so are the sizes. Photos are copied
byte for byte, with their EXIF orientation, which labelling tools apply as `read_image` does.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from sppnet.datasets.coco import write_coco
from sppnet.datasets.csv import write_csv
from sppnet.datasets.entries import Entry, names_below
from sppnet.datasets.label_studio import write_label_studio
from sppnet.datasets.reading import dataset_splits, read_dataset
from sppnet.datasets.records import Dataset, Sample
from sppnet.datasets.splits import without_unions
from sppnet.datasets.voc import write_voc
from sppnet.datasets.yolo import write_yolo
from sppnet.errors import SppnetError, check_choice
from sppnet.images import image_size
from sppnet.storage import atomic_folder, check_new_folder

DatasetFormat = Literal["voc", "coco", "yolo", "csv", "labelstudio"]
Photos = Literal["copy", "link", "none"]

_HELD = {"voc": ("difficult",), "coco": ("difficult", "crowd"), "csv": ("difficult", "crowd")}


class Written(NamedTuple):
    """What was written.

    Attributes
    ----------
    root : Path
        The folder.
    format : str
        Its format.
    splits : tuple of str
        Its splits; none if it has none.
    images, objects : int
        How many there are.
    notes : tuple of str
        What was put right or left out in reading and in writing, each with its count.
    """

    root: Path
    format: str
    splits: tuple[str, ...]
    images: int
    objects: int
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    out: str | Path,
    format: DatasetFormat,
    split: str | None = None,
    photos: Photos = "copy",
) -> Written:
    """Write a data set in another format.

    Parameters
    ----------
    source : path
        Folder or file, as `read_dataset` takes it.
    out, format, photos
        As in `write_dataset`. Without photos the source need not have them either, if it holds their sizes.
    split : str, optional
        The split to write, as `read_dataset` takes it; by default all of them, kept apart. One that only
        repeats images of others, such as VOC's ``trainval``, is left out.

    Returns
    -------
    Written
        Where and what, with all that is to be said about it.

    Raises
    ------
    DatasetError
        If the source cannot be read.
    SppnetError, OSError
        As in `write_dataset`, most of them before the source is read.
    """
    out = Path(out)
    _check(out, format, photos)
    names = dataset_splits(source)
    wanted = names if split is None and len(names) > 1 else (split,)
    parts = [read_dataset(source, name, photos=photos != "none") for name in wanted]
    kept, repeated = without_unions(parts)
    written = write_dataset(kept, out, format, photos)
    notes = [note if part.split is None else f"{part.split}: {note}" for part in kept for note in part.notes]
    notes += [f"split {part.split} left out: it repeats images of other splits" for part in repeated]
    if split is None and len(names) > 1:
        everything = {sample.path for sample in read_dataset(source, "all", photos=photos != "none")}
        rest = everything - {sample.path for part in kept for sample in part}
        notes += [f"images in no split, left out: {len(rest)}"] if rest else []
    return written._replace(notes=(*notes, *written.notes))


def write_dataset(
    data: Dataset | Sequence[Dataset], out: str | Path, format: DatasetFormat, photos: Photos = "copy"
) -> Written:
    """Write a data set as a folder, whole or not at all.

    Photos keep their names and the folders in which they lie below the deepest folder that holds all of their
    split; they come to ``JPEGImages`` (VOC) or ``images``, with a folder for each split.

    Parameters
    ----------
    data : Dataset or sequence of Dataset
        What was read; several are kept as splits, by their `Dataset.split`.
    out : path
        The folder: to be made, or empty.
    format : {"voc", "coco", "yolo", "csv", "labelstudio"}
        Boxes come back equal from all of them. Flags that a format cannot hold are counted in the notes:
        VOC has no crowds, YOLO and Label Studio have neither these nor difficult objects.
    photos : {"copy", "link", "none"}
        ``link`` writes symbolic links to where the photos lie; ``none`` writes annotations only.

    Returns
    -------
    Written
        Where and what.

    Raises
    ------
    SppnetError
        If two data sets are of one split, a photo comes twice, an image is in memory, or the format cannot
        hold a name or tell two photos apart.
    OSError
        If `out` holds something already or cannot be written, or a photo cannot be read.
    """
    out, parts = Path(out), [data] if isinstance(data, Dataset) else list(data)
    _check(out, format, photos)
    splits = [part.split for part in parts]
    if len(set(splits)) < len(splits):
        raise SppnetError(f"found the splits {splits}, expected each once")
    placed = list(_placed(parts, format))
    entries = [entry for entry, _ in placed]
    ids = {name: number for part in reversed(parts) for name, number in part.category_ids.items()}
    classes = sorted(ids, key=lambda name: (str(type(ids[name])), ids[name], name))
    with atomic_folder(out) as folder:
        _write(folder, entries, classes, format)
        for entry, path in placed if photos != "none" else ():
            _put(path, folder / entry.place, photos)
    return Written(
        out,
        format,
        tuple(split for split in splits if split),
        len(entries),
        sum(len(entry.target.labels) for entry in entries),
        _lost(entries, format),
    )


def _check(out: Path, format: str, photos: str) -> None:
    check_choice("format", format, get_args(DatasetFormat))
    check_choice("way with photos", photos, get_args(Photos))
    check_new_folder(out)


def _placed(parts: Sequence[Dataset], format: str) -> Iterator[tuple[Entry, Path]]:
    """Yield the entries of all images with the paths of their photos."""
    by_part = [names_below([sample.path for sample in part]) for part in parts]
    stems = Counter(os.path.splitext(name)[0].casefold() for names in by_part for name in names)
    # VOC has one folder for all splits, in which names must be different.
    apart = format == "voc" and max(stems.values(), default=0) > 1 and len(parts) > 1
    for part, names in zip(parts, by_part, strict=True):
        met: set[str] = set()
        for sample, name in zip(part, names, strict=True):
            if name in met:
                raise SppnetError(f"{part.root}: found the photo {name} twice, expected it once")
            met.add(name)
            if apart:
                name = f"{part.split}/{name}"
            folders = ["JPEGImages"] if format == "voc" else list(filter(None, ["images", part.split]))
            place = "/".join([*folders, name])
            height, width = _size(sample)
            yield Entry(name, place, height, width, sample.target, None, part.split), sample.path


def _size(sample: Sample) -> tuple[int, int]:
    return sample.size or image_size(sample.path)


def _write(folder: Path, entries: Sequence[Entry], classes: Sequence[str], format: str) -> None:
    """Write the annotations."""
    writers: dict[str, Callable[[], object]] = {
        "voc": lambda: write_voc(folder, entries),
        "coco": lambda: write_coco(folder, entries, classes),
        "yolo": lambda: write_yolo(folder, entries, classes),
        "csv": lambda: write_csv(folder / "boxes.csv", entries),
        "labelstudio": lambda: write_label_studio(folder / "tasks.json", entries, classes),
    }
    writers[format]()


def _put(photo: Path, place: Path, photos: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if photos == "link":
        place.symlink_to(photo.absolute())
    else:
        shutil.copyfile(photo, place)


def _lost(entries: Sequence[Entry], format: str) -> tuple[str, ...]:
    """Say which flags of boxes the format cannot hold."""
    flags = {
        "difficult": sum(int(entry.target.difficult.sum()) for entry in entries),
        "crowd": sum(int(entry.target.crowd.sum()) for entry in entries),
    }
    held = _HELD.get(format, ())
    return tuple(
        f"boxes marked {name}, written as ordinary ones, which {format} cannot tell: {count}"
        for name, count in flags.items()
        if count and name not in held
    )
