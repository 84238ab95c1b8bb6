"""Files: written whole or not at all, read with the line number of what is wrong."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from sppnet.arrays import to_numpy
from sppnet.errors import SppnetError

# Not str.splitlines, which would cut names at rare characters that are no ends of lines.
_LINE_END = re.compile(r"\r\n|\r|\n")

# Names that safetensors has for kinds of numbers.
_KINDS = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "U8": "u1", "U64": "<u8"}


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Lend a temporary file beside `path`, which takes its place when the ``with`` block ends well.

    A block that raises leaves `path` as it was and removes the temporary file.

    Parameters
    ----------
    path : path
        The file to write; replaced if it exists. Its folder must exist.

    Yields
    ------
    Path
        An empty file in the folder of `path`, with its suffix.

    Raises
    ------
    OSError
        If the folder is missing or not writable, or `path` is something other than a file.
    """
    path = Path(path)
    temporary = _new_sibling(path)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        # Some writers make a file of their own that only its owner may read.
        temporary.chmod(stat.S_IMODE(mode))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(path: str | Path) -> None:
    """Raise now, before long work, the `OSError` that `atomic_path` would raise for `path` after it."""
    _new_sibling(Path(path)).unlink()


def check_suffix(path: str | Path, suffix: str, purpose: str = "") -> None:
    """Raise a `SppnetError` unless a path ends in a suffix; the error may go on with what it is for."""
    found = Path(path).suffix
    if found != suffix:
        raise SppnetError(f"{path}: found the suffix {found!r}, expected {suffix}{purpose}")


def check_folder(folder: Path) -> None:
    """Raise now, before long work, if a folder is not there and cannot be made with those that it lies in."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    above = missing[-1].parent if missing else folder
    if not above.is_dir():
        raise OSError(f"{above}: found a file, expected a folder, or nothing yet")
    if missing:
        check_writable(missing[-1])


def check_new_folder(folder: Path) -> None:
    """Raise now, before long work, if a folder that is to be made is there already and holds something."""
    check_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise OSError(f"{folder}: found a folder with files in it, expected an empty one, or nothing yet")
    if not folder.exists():
        check_writable(folder)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Lend a temporary folder, whose content becomes that of `folder` when the ``with`` block ends well.

    Parameters
    ----------
    folder : Path
        To be made, or empty; the folder that it lies in must exist.

    Yields
    ------
    Path
        An empty folder, removed with all that is in it if the block raises.

    Raises
    ------
    OSError
        If `folder` holds something, or cannot be made.
    """
    check_new_folder(folder)
    # A folder that is there may be another disk, or the one in which somebody works, and stays.
    stays = folder.exists()
    place = folder.absolute()
    temporary = (place if stays else place.parent) / f".{place.name[:100]}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        yield temporary
        if stays:
            for child in temporary.iterdir():
                child.replace(place / child.name)
            temporary.rmdir()
        else:
            temporary.replace(place)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _new_sibling(path: Path) -> Path:
    """Create an empty temporary file beside `path`."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: found a folder or a device, expected the name of a file to write")
    temporary = path.with_name(f".{path.stem[:100]}-{secrets.token_hex(4)}{path.suffix}")
    try:
        temporary.touch(exist_ok=False)
    except OSError as error:
        reason = f"{path}: cannot write ({error.strerror}), expected an existing, writable folder"
        raise type(error)(reason) from None
    return temporary


def write_tensors(path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all; equal content gives equal files.

    Parameters
    ----------
    path : path
        Replaced if it exists.
    tensors : mapping from str to array or tensor
        What to store, by name; in any layout, on any device.
    metadata : mapping from str to str
        What the file says of itself, such as its ``format`` and ``version``.

    Raises
    ------
    OSError
        If it cannot be written: no folder, no permission, no space.
    """
    from safetensors.numpy import save_file

    plain = {name: np.asarray(to_numpy(tensor), order="C") for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(plain, temporary, dict(metadata))
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(f"{path}: cannot write ({error})") from None
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, which are written in random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(length))


def file_format(path: Path) -> str | None:
    """Return the format that a safetensors file of ours names; None of any other file."""
    try:
        return _metadata(path).get("format")
    except (SafetensorError, OSError):
        return None


def read_metadata(path: str | Path, expected: str, version: str) -> dict[str, str]:
    """Return the metadata of a safetensors file of ours.

    Parameters
    ----------
    path : path
        The file; none of its tensors is read.
    expected, version : str
        The format that it must name, and the version of this format.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    SppnetError
        If it is no safetensors file, damaged, or of another format or version; says what was found.
    """
    if not Path(path).is_file():
        found = "a folder" if Path(path).is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: found {found}, expected an {expected} file")
    try:
        metadata = _metadata(path)
    except (SafetensorError, OSError) as error:
        raise SppnetError(
            f"{path}: found no safetensors file ({error}), expected an {expected} file"
        ) from None
    mark = (metadata.get("format"), metadata.get("version"))
    if mark != (expected, version):
        found = " ".join(filter(None, mark)) or "a safetensors file without a format mark"
        older = " (made by another version of sppnet)" if mark[0] == expected else ""
        raise SppnetError(f"{path}: found {found}, expected {expected} {version}{older}")
    return metadata


def map_tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the tensors of a safetensors file unread: they come from disk as they are looked at.

    They may be changed; that stays in memory, and the file as it is.

    Raises
    ------
    SppnetError
        If it is no safetensors file, or holds numbers of a kind that we do not write.
    OSError
        If it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(start, size) - 8))
            header.pop("__metadata__", None)
            return {name: _mapped(path, start, about) for name, about in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SppnetError(f"{path}: found no safetensors file ({error})") from None


def _mapped(path: Path, start: int, about: Mapping[str, Any]) -> npt.NDArray[Any]:
    kind, shape = np.dtype(_KINDS[about["dtype"]]), tuple(about["shape"])
    if 0 in shape:  # No part of a file.
        return np.zeros(shape, kind)
    return np.memmap(path, kind, "c", start + about["data_offsets"][0], shape)


def _metadata(path: str | Path) -> dict[str, str]:
    with safe_open(path, "np") as file:
        return file.metadata() or {}


def digest_of(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """Return the SHA-256 of the numbers of arrays, in their order, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(array.tobytes())
    return digest.hexdigest()


def read_checkpoint(
    path: Path, expected: str, version: str
) -> tuple[dict[str, str], dict[str, npt.NDArray[Any]]]:
    """Return metadata and arrays of a run that was stopped.

    Parameters
    ----------
    path : Path
        The file.
    expected, version : str
        Its format and the version of this format.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    SppnetError
        Where `read_metadata` raises it; the message says what helps.
    """
    from safetensors.numpy import load_file

    try:
        return read_metadata(path, expected, version), load_file(path)
    except SppnetError as error:
        raise SppnetError(f"{error}; remove it to start anew") from None


def write_json(path: Path, content: Any) -> None:
    """Write JSON, with null for numbers that are not finite; the file appears whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json_text(content), "utf-8")


def json_text(content: Any) -> str:
    """Return JSON in ASCII, with null for numbers that are not finite."""
    return json.dumps(_plain(content), indent=1, allow_nan=False) + "\n"


def _plain(content: Any) -> Any:
    """Return what JSON can hold: null for numbers that are not."""
    if isinstance(content, Mapping):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises
    ------
    SppnetError
        If it is no JSON: names file and line.
    """
    try:
        return json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise SppnetError(f"{path}:{error.lineno}: found no JSON ({error.msg}), expected JSON") from None
    except UnicodeDecodeError as error:
        raise SppnetError(f"{path}: found bytes that are no text ({error.reason}), expected JSON") from None
    except (RecursionError, ValueError) as error:  # thousands of brackets or digits
        raise SppnetError(f"{path}: found no JSON that can be read ({error}), expected JSON") from None


def encoding_of(start: bytes) -> str:
    """Return the encoding that a text must be in by its first two bytes: ``"utf-16"`` or ``"utf-8-sig"``."""
    return "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def read_text(path: Path, names: bool = False) -> str:
    """Return the content of a text file: UTF-8, with or without a byte order mark, or UTF-16 with one.

    Parameters
    ----------
    path : Path
        The file.
    names : bool
        Whether it holds names of files, which may be of any bytes: those that are no UTF-8 come as
        surrogates, which `os.fsencode` turns back into their bytes.

    Raises
    ------
    SppnetError
        If it is text in another encoding, or no text: names file and line.
    """
    content = path.read_bytes()
    encoding = encoding_of(content[:2])
    wide = encoding == "utf-16"
    try:
        text = content.decode(encoding, "surrogateescape" if names and not wide else "strict")
        wrong = text.find("\0")
        found = "a byte of 0"
    except UnicodeDecodeError as error:
        text = content[: error.start].decode(encoding, "replace")
        wrong = len(text)
        found = f"bytes that are no text in {'UTF-16' if wide else 'UTF-8'}"
    if wrong >= 0:
        line = len(_LINE_END.findall(text, 0, wrong)) + 1
        raise SppnetError(f"{path}:{line}: found {found}, expected text in UTF-8, or in UTF-16 with its mark")
    return text


def numbered_lines(path: Path, names: bool = False) -> Iterator[tuple[str, str]]:
    """Yield ``path:line`` and the stripped text of each line of a text file that is not blank.

    The parameters and errors are those of `read_text`.
    """
    for number, line in enumerate(_LINE_END.split(read_text(path, names)), 1):
        if line.strip():
            yield f"{path}:{number}", line.strip()
