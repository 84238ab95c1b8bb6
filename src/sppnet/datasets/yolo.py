"""YOLO: a text file of relative boxes for each image, and a YAML file or a list that names the classes."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sppnet.datasets.entries import Entry, by_split, check_lines, check_stems, decimals
from sppnet.datasets.findings import Annotation, Findings, Record
from sppnet.datasets.splits import is_split, split_of_folders
from sppnet.datasets.tree import Format, Layout, Names, Tree, clean, file_key, find_photo, suffix_of, tail_of
from sppnet.errors import DatasetError
from sppnet.storage import atomic_path, numbered_lines, read_text

_SPLITS = ("train", "val", "test")
_TOLERANCE = 1e-3  # by which a relative coordinate may pass 0 or 1
_UNLABELLED = "images without a label file, taken as negatives"
_YAML = (".yaml", ".yml")
_NOTHING = ("", "~", "null", "Null", "NULL")  # in YAML
_LISTS = frozenset({"classes.txt", "class_names.txt", "names.txt", "labels.txt", "predefined_classes.txt"})
_NAMES_KEY = re.compile(rb"""^["']?names["']?\s*[:=]""", re.MULTILINE)
_LINE = re.compile(rb"\s*\d+(\s+-?[0-9.]+([eE][-+]?\d+)?){4,}\s*")
_COLUMNS = "5 numbers: class, centre x, centre y, width, height; or the class and the corners of a polygon"


class _Source(NamedTuple):
    """Where the images of a split are: a folder, a list, or (without a path) all folders named so."""

    split: str | None
    path: str


class _Classes(NamedTuple):
    """The classes by number, and how many columns of a line count: all, or 5 where key points follow."""

    names: Mapping[int, str]
    columns: int | None = None


def _fits(path: Path, head: bytes) -> bool:
    suffix = path.suffix.lower()
    if suffix in _YAML:
        return path.stem in ("data", "dataset") or bool(
            _NAMES_KEY.search(path.read_bytes().replace(b"\0", b""))
        )
    if suffix == ".data":
        return bool(_NAMES_KEY.search(head))
    if suffix in (".names", ".labels") or path.name.lower() in _LISTS:
        return True
    lines = head.splitlines()
    if lines and not head.endswith((b"\n", b"\r")) and path.stat().st_size > len(head):
        lines.pop()  # it may be cut
    lines = [line for line in lines if line.strip()]
    return bool(lines) and all(map(_LINE.fullmatch, lines))


def _locate(tree: Tree, names: Sequence[str]) -> Layout | None:
    """Understand a description, or label files and a list of classes; see `sppnet.datasets.tree.Format`."""
    suffixes = {name: suffix_of(name) for name in names}
    described = [name for name in names if suffixes[name] in _YAML] or [
        n for n in names if suffixes[n] == ".data"
    ]
    lists = [n for n in names if suffixes[n] in (".names", ".labels") or Path(n).name.lower() in _LISTS]
    labels = [name for name in names if suffixes[name] == ".txt" and name not in lists]
    if described:
        name = _first(tree, described)
        classes, sources = (_by_yaml if suffixes[name] in _YAML else _by_data)(tree, tree.path(name))
    elif lists and labels:
        name, classes, sources = lists[0], _Classes(_one_list(tree, lists)), []
    else:
        return None
    if not sources:
        photos = [photo for photo in tree.photos.names if tree.photos.base == tree.base]
        found = dict.fromkeys(split_of_folders(photo) for photo in photos)
        if len(found) > 1 and all(map(split_of_folders, labels)):
            found.pop(None, None)  # photos outside all splits, which nobody has annotated
        sources = [_Source(split, "") for split in found]
    splits: dict[str, list[_Source]] = {}
    for source in sources:
        if source.split is not None:
            splits.setdefault(source.split, []).append(source)
    return Layout(splits, sources, partial(_records, tree, classes, labels), name)


def _first(tree: Tree, names: Sequence[str]) -> str:
    """Return the description that lies highest; of several, the one with the usual name."""
    depth = min(name.count("/") for name in names)
    highest = [name for name in names if name.count("/") == depth]
    usual = [name for name in highest if Path(name).stem == "data"] or [
        n for n in highest if Path(n).stem == "dataset"
    ]
    if len(usual or highest) > 1:
        raise DatasetError(
            f"{tree.root}: found {' and '.join((usual or highest)[:2])}, expected one; name it"
        )
    return (usual or highest)[0]


def _by_yaml(tree: Tree, file: Path) -> tuple[_Classes, list[_Source]]:
    """Return the classes and the sources that a YAML file names."""
    content = _description(file)
    classes = _named_classes(file, content)
    path = content.get("path")
    base = clean(path) if isinstance(path, str) and path not in _NOTHING else ""
    bases = [file.parent / base, file.parent, Path(base)]
    entries = [
        (str(key), entry)
        for key, value in content.items()
        if key not in ("path", "names")
        for entry in (value if isinstance(value, list) else [value])
        if isinstance(entry, str) and entry not in _NOTHING
    ]
    # Splits have any names; other keys name no folder that is there.
    named = [
        (key, entry) for key, entry in entries if is_split(key) or os.path.exists(bases[0] / clean(entry))
    ]
    return _Classes(classes, 5 if "kpt_shape" in content else None), _sources(tree, file, named, bases)


def _named_classes(file: Path, content: Mapping[str, Any]) -> dict[int, str]:
    """Return the classes that a YAML file names in a list, or by their numbers."""
    names = content.get("names")
    named: Any = dict(enumerate(names)) if isinstance(names, list) else names
    try:
        classes = {int(number): name for number, name in named.items()}
    except (AttributeError, TypeError, ValueError):
        classes = {}
    proper = (isinstance(name, str) and name.strip() for name in classes.values())
    if not classes or len(classes) < len(named) or not all(proper):
        short = reprlib.Repr()  # a few lines of YAML can stand for more names than any memory holds
        short.maxlevel = 2
        found = f"found {short.repr(names)} as names"
        raise DatasetError(f"{file}: {found}, expected class names, or index: name")
    count = content.get("nc")
    if isinstance(count, str) and count.isdecimal() and int(count) not in (len(classes), max(classes) + 1):
        raise DatasetError(f"{file}: found {count} classes (nc) and {len(classes)} names, expected as many")
    return _told_apart(file, classes)


def _told_apart(file: Path, classes: dict[int, str]) -> dict[int, str]:
    """Return classes by their numbers; raise an error if two have one name."""
    numbers: dict[str, int] = {}
    for number, name in classes.items():
        if numbers.setdefault(name, number) != number:
            both = f"found the classes {numbers[name]} and {number} both named {name!r}"
            raise DatasetError(f"{file}: {both}, expected different names")
    return classes


def _by_data(tree: Tree, file: Path) -> tuple[_Classes, list[_Source]]:
    """Return the classes and the sources that an ``obj.data`` names."""
    pairs = [text.partition("=")[::2] for _, text in numbered_lines(file)]
    content = {key.strip(): value.strip() for key, value in pairs}
    listed = content.get("names", "")
    names = _found(tree, listed, [file.parent]) if listed else None
    if names is None:
        raise DatasetError(f"{file}: found no {listed or 'file'} (names), expected a list of classes")
    named = [(key, value) for key, value in content.items() if is_split(key) and value]
    return _Classes(_class_list(Path(names))), _sources(tree, file, named, [file.parent])


def _sources(
    tree: Tree, file: Path, named: Sequence[tuple[str, str]], bases: Sequence[Path]
) -> list[_Source]:
    """Return the folders and lists of images that a description names; those that are missing are counted."""
    found = [(key, entry, _found(tree, entry, bases)) for key, entry in named]
    missing = [f"{entry} ({key})" for key, entry, path in found if path is None]
    if found and len(missing) == len(found):
        raise DatasetError(f"{file}: found no {missing[0]}, expected a folder or list of images")
    for text in missing:
        tree.left.add(f"named in {file.name} and not there", text)
    return [_Source(key, path) for key, _, path in found if path is not None]


def _found(tree: Tree, entry: str, bases: Sequence[Path]) -> str | None:
    """Return the path of what a description names: from its own folder, or as much of its end as there is."""
    written = clean(entry)
    for place in (*bases, Path()):
        path = os.path.normpath(place / written)
        if os.path.exists(path):
            return path
    # Tools write the paths of their own disks, and ../train/images where train/images is meant.
    parts = tail_of(written).split("/")
    for start in range(len(parts)):
        for place in bases:
            path = os.path.normpath(place.joinpath(*parts[start:]))
            if os.path.exists(path):
                return path
    return None


def _description(file: Path) -> dict[Any, Any]:
    """Return what a YAML file says, all values as they are written: classes are named no, 007 and 12:30."""
    try:
        content = yaml.load(file.read_bytes(), yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = mark.line + 1 if mark else 1
        raise DatasetError(f"{file}:{line}: found no YAML ({problem or 'not text'}), expected YAML") from None
    except RecursionError:
        raise DatasetError(
            f"{file}: found no YAML that can be read (lists in lists), expected YAML"
        ) from None
    return content if isinstance(content, dict) else {}


def _class_list(file: Path) -> dict[int, str]:
    """Return the classes of a list, a line each."""
    lines = list(numbered_lines(file))
    for number, (where, name) in enumerate(lines, 1):
        if where != f"{file}:{number}":
            raise DatasetError(f"{where}: found {name!r} after an empty line, expected a class in every line")
    return _told_apart(file, dict(enumerate(name for _, name in lines)))


def _one_list(tree: Tree, names: Sequence[str]) -> dict[int, str]:
    """Return the classes of lists that must be equal: exports have one in each split."""
    lists = {name: _class_list(tree.path(name)) for name in names}
    first = names[0]
    for name, classes in lists.items():
        if classes != lists[first]:
            raise DatasetError(
                f"{tree.path(name)}: found other classes than in {tree.path(first)}, expected the same"
            )
    return lists[first]


def _records(
    tree: Tree, classes: _Classes, labels: Sequence[str], sources: Sequence[_Source], findings: Findings
) -> Iterator[Record]:
    """Yield the images of folders and lists."""
    findings.number({name: number for number, name in classes.names.items()})
    splits = {source.split for source in sources if source.split is not None}
    for source in sources:
        photos = []
        for where, name, path in _photos(tree, source, splits):
            photos.append((where, name, path))
        yield from _labelled(tree, classes, labels, source, photos, findings)


def _photos(tree: Tree, source: _Source, splits: set[str]) -> Iterator[tuple[str, str, str]]:
    """Yield place, name and path of the images of a source; a path that is not there is as it was written."""
    if not source.path:
        for name in tree.photos.names:
            if split_of_folders(name) == source.split:
                path = tree.photos.path(name)
                yield path, Path(name).stem, path
    elif os.path.isdir(source.path):
        yield from _in_folder(tree, source.path)
    else:
        file = Path(source.path)
        for where, line in numbered_lines(file, names=True):
            path = _listed(tree, file, where, line, source.split, splits)
            yield where, tail_of(os.path.splitext(clean(line))[0]), path


def _in_folder(tree: Tree, folder: str) -> Iterator[tuple[str, str, str]]:
    """Yield the images below a folder, inside the tree or elsewhere."""
    start = (
        ""
        if folder == os.path.normpath(tree.base)
        else os.path.relpath(folder, tree.base).replace(os.sep, "/") + "/"
    )
    held = (
        [name for name in tree.photos.names if name.startswith(start)]
        if tree.photos.base == tree.base
        else []
    )
    names = Names(tree.base, held)
    if start.startswith("../"):
        names, start = Tree(Path(folder)).photos, ""
    if not names.names or names.base not in (tree.base, Path(folder)):
        raise DatasetError(f"{folder}: found no image, expected some")
    for name in names.names:
        path = names.path(name)
        yield path, os.path.splitext(name[len(start) :])[0], path


def _listed(tree: Tree, file: Path, where: str, line: str, split: str | None, splits: set[str]) -> str:
    """Return the path of an image in a list."""
    written = clean(line)
    for place in (file.parent, Path()):
        path = os.path.normpath(place / written)
        if os.path.isfile(path):
            return path
    if not line.isprintable() and line != line.encode("utf-8", "replace").decode():
        raise DatasetError(
            f"{where}: found bytes that are no text in UTF-8, expected UTF-8, or the name of a file"
        )
    return find_photo(tree, Record("", line, file, where, None, (), split=split), splits) or ""


def _labelled(
    tree: Tree,
    classes: _Classes,
    labels: Sequence[str],
    source: _Source,
    photos: Sequence[tuple[str, str, str]],
    findings: Findings,
) -> Iterator[Record]:
    """Yield images with the boxes of their label files, and label files without an image."""
    held = {path: _label_file(path) for _, _, path in photos if path}
    if not any(held.values()):
        held = _by_stem(tree, labels, source, list(held), findings)
    owners: dict[str, str] = {}
    shared = Record("", "", Path(source.path or tree.base), "", None, (), split=source.split, relative=True)
    for where, name, path in photos:
        label = held.get(path)
        with findings.collect():
            if label and owners.setdefault(label, path) != path:
                both = f"{owners[label]} and {path}"
                raise DatasetError(f"{label}: found 2 images for these labels ({both}), expected one")
            rows = _rows(Path(label), classes, findings) if label else []
            findings.counts[_UNLABELLED] += label is None and path != ""
            yield shared._replace(name=name, file=name, where=where, rows=rows, photo=path)
    if photos and not owners:
        expected = f"expected for example {_label_paths(photos[0][2])[0]}"
        findings.errors.append(f"{tree.root}: found no label file for any image, {expected}")
    if source.path == "" or os.path.isdir(source.path):
        yield from _orphans(tree, labels, source, owners)


def _label_paths(photo: str) -> list[str]:
    """Return where the labels of an image may be: in ``labels`` for its folder ``images``, or beside it."""
    parts = os.path.splitext(photo)[0].split(os.sep)
    beside = os.sep.join(parts) + ".txt"
    if "images" not in parts[:-1]:
        return [beside]
    parts[-2 - parts[-2::-1].index("images")] = "labels"
    return [os.sep.join(parts) + ".txt", beside]


def _label_file(photo: str) -> str | None:
    return next((path for path in _label_paths(photo) if os.path.isfile(path)), None)


def _by_stem(
    tree: Tree, labels: Sequence[str], source: _Source, photos: Sequence[str], findings: Findings
) -> dict[str, str | None]:
    """Return the label files of images by their stems, where folders are named otherwise than usual."""
    names = labels or [name for name in tree.files if suffix_of(name) == ".txt"]
    known, held = Names(tree.base, names), dict.fromkeys(photos)
    splits = {split for split in map(split_of_folders, names) if split is not None}
    for photo in photos:
        with findings.collect():
            written = os.path.splitext(os.path.relpath(photo, tree.base))[0].replace(os.sep, "/")
            for named in known.called(written, file_key(written), by_stem=True):
                name = known.find(named, written, Path(photo), source.split, splits)
                if name is not None:
                    held[photo] = known.path(name)
                    break
    return held


def _orphans(
    tree: Tree, labels: Sequence[str], source: _Source, owners: Mapping[str, str]
) -> Iterator[Record]:
    """Yield label files that belong to no image."""
    apart = {
        os.path.dirname(label)
        for label, photo in owners.items()
        if os.path.dirname(photo) != os.path.dirname(label)
    }
    folders = apart | {os.path.dirname(label) for label in owners}
    names, fitting = Names(tree.base, []), set(labels)
    for name in tree.files:
        if suffix_of(name) != ".txt" or (path := names.path(name)) in owners:
            continue
        folder = os.path.dirname(path)
        mine = folder in folders or (source.path == "" and split_of_folders(name) == source.split)
        empty = folder in apart and not read_text(Path(path)).strip()
        if (mine and name in fitting) or empty:
            yield Record(
                name, name, Path(path), path, None, (), split=source.split, stem=os.path.splitext(name)[0]
            )


def _rows(file: Path, classes: _Classes, findings: Findings) -> list[Annotation]:
    """Return the boxes of a label file."""
    rows = []
    for where, text in numbered_lines(file):
        with findings.collect():
            rows.append(_row(where, text, classes))
    return rows


def _row(where: str, text: str, classes: _Classes) -> Annotation:
    """Return the box of a line of a label file."""
    try:
        number, *values = map(float, text.split()[: classes.columns])
    except ValueError:
        raise DatasetError(f"{where}: found {text[:80]!r}, expected {_COLUMNS}") from None
    if len(values) < 4 or len(values) == 5 or len(values) % 2:
        raise DatasetError(f"{where}: found {text[:80]!r}, expected {_COLUMNS}")
    if number not in classes.names:
        found = text.split()[0]
        raise DatasetError(
            f"{where}: found the class {found}, expected one of the {len(classes.names)} named"
        )
    if not all(-_TOLERANCE <= value <= 1 + _TOLERANCE for value in values):
        raise DatasetError(f"{where}: found {text[:80]!r}, expected coordinates from 0 to 1")
    label = classes.names[int(number)]
    if len(values) > 4:
        x, y = values[::2], values[1::2]
        return Annotation((min(x), min(y), max(x), max(y)), label, f"{where}: polygon of {label!r}")
    a, b, w, h = values
    box = (a - w / 2, b - h / 2, a + w / 2, b + h / 2)
    return Annotation(box, label, f"{where}: box {a:g} {b:g} {w:g} {h:g} of {label!r}")


def write_yolo(folder: Path, entries: Sequence[Entry], classes: Sequence[str]) -> list[Path]:
    """Write ``data.yaml``, and in ``labels`` a text file for each image and the ``classes.txt`` of LabelImg.

    Boxes are written with all digits. Difficult objects and crowds cannot be held, nor can scores.

    Parameters
    ----------
    folder : Path
        An existing folder.
    entries : sequence of Entry
        The images, whose places begin with ``images/``; names must differ in more than their suffix.
    classes : sequence of str
        All class names; their numbers count from 0 in this order.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    SppnetError
        If a class name has more than one line, or two names of images differ in their suffix.
    OSError
        If a file cannot be written.
    """
    check_lines(classes, "YOLO")
    sources: dict[str, str] = {}
    files = [folder / "data.yaml"]
    for split, part in by_split(entries).items():
        check_stems((entry.name for entry in part), "YOLO")
        sources[split or "train"] = "/".join(filter(None, ["images", split]))
        labels = folder / "/".join(filter(None, ["labels", split]))
        texts = {labels / "classes.txt": "".join(f"{name}\n" for name in classes)}
        texts |= {folder / _label_paths(entry.place)[0]: _label_text(entry, classes) for entry in part}
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                temporary.write_text(text, "utf-8", "surrogateescape")
        files += texts
    keys = _keys(sources)
    description = {
        **{keys[split]: source for split, source in sources.items()},
        "names": dict(enumerate(classes)),
    }
    with atomic_path(files[0]) as temporary:
        temporary.write_text(yaml.safe_dump(description, sort_keys=False, allow_unicode=True), "utf-8")
    return files


def _keys(splits: Collection[str]) -> dict[str, str]:
    """Return the key of each split in a YAML file: train, val or test where its name begins so."""
    keys = {split: split for split in _SPLITS if split in splits}
    for split in splits:
        free = (key for key in _SPLITS if split.startswith(key) and key not in keys.values())
        keys.setdefault(split, next(free, split))
    return keys


def _label_text(entry: Entry, classes: Sequence[str]) -> str:
    """Return the boxes of an image, a line each: class, centre, width and height as shares of the image."""
    lines = []
    for box, label in zip(entry.target.boxes, entry.target.labels, strict=True):
        x1, y1, x2, y2 = decimals(box)
        x, y = (x1 + x2) / 2 / entry.width, (y1 + y2) / 2 / entry.height
        w, h = (x2 - x1) / entry.width, (y2 - y1) / entry.height
        lines.append(f"{classes.index(label)} {x!r} {y!r} {w!r} {h!r}\n")
    return "".join(lines)


YOLO = Format(
    (*_YAML, ".data", ".names", ".labels", ".txt"),
    _fits,
    _locate,
    "data.yaml or obj.data, or classes.txt and a .txt file of numbers for each photo",
)
