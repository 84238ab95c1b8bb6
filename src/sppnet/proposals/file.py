"""Windows in a file: written once, then a method like any other."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sppnet.arrays import Pixels
from sppnet.boxes import Windows
from sppnet.errors import SppnetError
from sppnet.features.encoded import EncodedImage
from sppnet.proposals.method import Proposer, ranked
from sppnet.storage import atomic_path, check_suffix


@dataclass(frozen=True)
class WindowsFromFile(Proposer):
    """Windows computed before, looked up by the pixels of the image; `read_windows` makes one.

    Attributes
    ----------
    path : str
        The file that they were read from.
    digest : str
        A digest of the file's content: other windows in a file of the same name are another method.
    windows : mapping of str to Windows
        The windows of each image, by its `image_key`.
    """

    path: str
    digest: str
    windows: Mapping[str, Windows] = field(repr=False, compare=False)

    def __call__(self, image: Pixels, encoded: EncodedImage | None = None) -> Windows:
        """Look up the windows of one image; see `sppnet.proposals.method.Proposer`.

        Raises
        ------
        SppnetError
            If the file has none of this image.
        """
        key, (height, width) = image_key(image), image.shape[:2]
        if key not in self.windows:
            raise SppnetError(
                f"found an image ({width} x {height}) without windows in {self.path}, "
                f"expected one of the {len(self.windows)} images of that file, pixel by pixel"
            )
        boxes, scores = self.windows[key]
        return ranked(boxes[np.argsort(-scores, kind="stable")], (height, width))


def image_key(image: Pixels) -> str:
    """Return 32 hexadecimal digits that stand for the size and the pixels of an image."""
    key = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    key.update(image.tobytes())
    return key.hexdigest()


def write_windows(path: str | Path, entries: Iterable[tuple[str, str, Windows]]) -> None:
    """Write candidate windows to a file, for `read_windows` or anything else that knows NumPy.

    The file is an ordinary ``.npz`` of five arrays. With N images and R windows in all they are ``names`` and
    ``keys`` (N strings each), ``counts`` (N integers that sum to R), ``boxes`` (R, 4) and ``scores`` (R,),
    the windows of the first image first.

    Parameters
    ----------
    path : path
        The file to write, which ends in ``.npz``; replaced if it exists.
    entries : iterable of (str, str, Windows)
        For each image: a name for people, its `image_key`, and its windows.

    Raises
    ------
    SppnetError
        If `path` does not end in ``.npz``.
    """
    check_name(path)
    rows = list(entries)
    with atomic_path(path) as temporary:
        np.savez_compressed(
            temporary,
            names=np.array([name for name, _, _ in rows], np.str_),
            keys=np.array([key for _, key, _ in rows], np.str_),
            counts=np.array([len(windows.boxes) for _, _, windows in rows], np.int64),
            boxes=np.concatenate([np.zeros((0, 4), np.float32), *(windows.boxes for _, _, windows in rows)]),
            scores=np.concatenate([np.zeros(0, np.float32), *(windows.scores for _, _, windows in rows)]),
        )


def check_name(path: str | Path) -> None:
    """Raise a `SppnetError` if a path is no name for a file of windows."""
    check_suffix(path, ".npz", " for a file of windows")


def read_windows(path: str | Path) -> WindowsFromFile:
    """Read a file that `write_windows` wrote, as a method.

    Raises
    ------
    SppnetError
        If the file is something else, or damaged.
    FileNotFoundError
        If there is no such file.
    """
    content = Path(path).read_bytes()
    try:
        with np.load(io.BytesIO(content)) as file:
            keys, counts = file["keys"], file["counts"]
            boxes, scores = file["boxes"].astype(np.float32), file["scores"].astype(np.float32)
        ends = np.cumsum(counts)[:-1]
        parts = zip(keys, np.split(boxes, ends), np.split(scores, ends), strict=True)
        windows = {str(key): Windows(b, s) for key, b, s in parts} if len(keys) else {}
    except Exception as error:  # a damaged archive can make zipfile raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise SppnetError(f"{path}: found {reason}, expected a file that sppnet propose wrote") from None
    if boxes.shape != (counts.sum(), 4) or scores.shape != (counts.sum(),):
        raise SppnetError(
            f"{path}: found boxes {boxes.shape} and scores {scores.shape}, "
            f"expected those of {counts.sum()} windows"
        )
    wrong = ~(np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    if wrong.any():
        raise SppnetError(
            f"{path}: found {wrong.sum()} windows such as {boxes[wrong][0].tolist()}, "
            "expected x1 < x2 and y1 < y2"
        )
    return WindowsFromFile(str(path), hashlib.blake2b(content, digest_size=8).hexdigest(), windows)
