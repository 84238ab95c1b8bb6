"""The splits of a data set: how folders and files name them, which is meant, which to learn from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sppnet.errors import DatasetError

if TYPE_CHECKING:
    from sppnet.datasets.records import Dataset

Part = TypeVar("Part")

ALL = "all"
"""What stands for all splits together."""

_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
    "trainval": "trainval",
}
_NAME = re.compile(rf"({'|'.join(_WORDS)})[-_ ]?(\d*)", re.IGNORECASE)


def is_split(name: str) -> bool:
    """Tell whether a folder's name is one that splits have: ``train``, ``Valid``, ``test2017``."""
    return _NAME.fullmatch(name) is not None


def same_split(one: str, other: str) -> bool:
    """Tell whether two names mean one split, as ``val``, ``valid`` and ``val2017`` do."""
    first, second = _NAME.fullmatch(one), _NAME.fullmatch(other)
    if first is None or second is None:
        return one.casefold() == other.casefold()
    words = _WORDS[first[1].lower()] == _WORDS[second[1].lower()]
    return words and (first[2] == second[2] or not (first[2] and second[2]))


def split_of_folders(name: str) -> str | None:
    """Return the innermost folder of a path that is named as splits are; None without one."""
    return next((part for part in name.split("/")[-2::-1] if is_split(part)), None)


def split_of_stem(stem: str) -> str | None:
    """Return the only word of a file's name that is named as splits are: ``train`` of ``labels_train``."""
    found = [word for word in re.split(r"[^A-Za-z0-9]+", stem) if is_split(word)]
    return found[0] if len(found) == 1 else None


def split_of_file(name: str) -> str | None:
    """Return the split that a file with annotations of many photos is of, by its folders or its own name."""
    return split_of_folders(name) or split_of_stem(Path(name).stem)


def by_folder(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the files that lie in folders named as splits are, by split; their order is kept."""
    found: dict[str, list[str]] = {}
    for name in names:
        split = split_of_folders(name)
        if split is not None:
            found.setdefault(split, []).append(name)
    return found


def by_file(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the files of each split, by `split_of_file`; their order is kept."""
    found: dict[str, list[str]] = {}
    for name in names:
        split = split_of_file(name)
        if split is not None:
            found.setdefault(split, []).append(name)
    return found


def pick_split(
    root: Path, splits: Mapping[str, Part], whole: Part, split: str | None, has_rest: bool = False
) -> tuple[str | None, Part]:
    """Choose a split by its name, by a beginning that only it has, or as the only one there is.

    Parameters
    ----------
    root : Path
        What an error names.
    splits : mapping from str
        The splits there are, by name.
    whole : value
        What stands for everything: all the splits together, or a data set without any.
    split : str, optional
        The name that was asked for; ``"all"`` is everything.
    has_rest : bool
        Whether something lies outside all splits, so that the only one must be named, too.

    Returns
    -------
    tuple of str or None, and value
        The whole name, and what `splits` holds for it; None and `whole` for everything.

    Raises
    ------
    DatasetError
        If it is none of them or the beginning of several, or if none was asked for and there are several.
    """
    if split not in splits and (split == ALL or (split is None and not splits)):
        return None, whole
    fitting = [name for name in splits if name == split] or [n for n in splits if n.startswith(split or "")]
    if len(fitting) == 1 and split is None and has_rest:
        found = f"the split {fitting[0]!r} and more outside of it, none chosen"
        raise DatasetError(f"{root}: found {found}, expected {fitting[0]} or {ALL}")
    if len(fitting) == 1:
        return fitting[0], splits[fitting[0]]
    if not splits:
        raise DatasetError(f"{root}: found no split {split!r}, expected none, as all is in one part")
    names = ", ".join(sorted(splits)) if len(splits) <= 20 else ", ".join(sorted(splits)[:20]) + ", ..."
    found = f"no single split {split!r}" if split else f"{len(splits)} splits and none chosen"
    raise DatasetError(f"{root}: found {found}, expected one of: {names}; or {ALL}")


def default_training_split(splits: Iterable[str]) -> str | None:
    """Return the split to learn from where none was named.

    Parameters
    ----------
    splits : iterable of str
        The names of the splits there are, as `dataset_splits` or `image_folder_splits` lists them.

    Returns
    -------
    str or None
        ``train`` or ``training``, or else the only one that begins with ``train`` (such as ``train2017``), or
        that begins with ``trainval`` where no other begins so; None where there is no such split, or several
        and none of these names.
    """
    beginning = [name for name in splits if name.casefold().startswith("train")]
    exact = [name for name in beginning if name.casefold() in ("train", "training")]
    plain = [name for name in beginning if not name.casefold().startswith("trainval")]
    fitting = exact[:1] or plain or beginning
    return fitting[0] if len(fitting) == 1 else None


def without_unions(parts: Sequence[Dataset]) -> tuple[list[Dataset], list[Dataset]]:
    """Part splits from those that only repeat images of others, such as VOC's ``trainval``.

    Returns
    -------
    two lists of Dataset
        The splits that hold each image for themselves, in their order; and the others, the largest first.
    """
    kept, repeated = list(parts), []
    for part in sorted(parts, key=len, reverse=True):
        others = {sample.path for other in kept if other is not part for sample in other}
        if len(kept) > 1 and others.issuperset(sample.path for sample in part):
            kept.remove(part)
            repeated.append(part)
    return kept, repeated
