"""Frames of video files and webcams, and video files made of pictures. OpenCV decodes and encodes."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from sppnet.arrays import Pixels
from sppnet.errors import ImageError
from sppnet.images import resize
from sppnet.storage import atomic_path

_EXPECTED = "a video: mp4, mov, avi, mkv or webm"
_WEBCAM, _WEBCAMS = "webcam", "webcam, webcam:1 and so on"
# What a file begins with: mkv and webm, mpg, wmv, flv, ogg.
_MAGIC = (b"\x1aE\xdf\xa3", b"\x00\x00\x01\xba", b"\x30\x26\xb2\x75", b"FLV\x01", b"OggS")
# The box that an mp4 or mov file begins with; the brands of ftyp are those of pictures, too.
_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"})
_PICTURES = frozenset({b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"})


class Frame(NamedTuple):
    """A frame of a video.

    Attributes
    ----------
    number : int
        From 0, counting also those that are passed over.
    seconds : float
        Time from the beginning; of a webcam, since it was opened.
    pixels : (H, W, 3) uint8
        RGB, upright.
    """

    number: int
    seconds: float
    pixels: Pixels


def is_video(source: str | Path) -> bool:
    """Tell whether a source is a webcam (``webcam``, ``webcam:1``) or a file that begins as a video does."""
    if not Path(source).exists():
        return _webcam_number(source) is not None
    try:
        with Path(source).open("rb") as file:
            start = file.read(12)
    except OSError:  # also of a folder
        return False
    if start[4:8] in _BOXES:
        return start[8:12] not in _PICTURES
    return start.startswith(_MAGIC) or (start.startswith(b"RIFF") and start[8:12] == b"AVI ")


class Video:
    """A video file or a webcam, opened; closed by ``with``.

    Memory holds one frame, however long the video is.

    Parameters
    ----------
    source : path or str
        A video file, told by its content, or ``webcam``, ``webcam:1`` and so on.

    Attributes
    ----------
    name : str
        The source.
    live : bool
        Whether it is a webcam.
    fps : float
        Frames per second, as the file or the webcam states; 25 where it says nothing.
    count : int or None
        Number of frames that the file states; None of a webcam, or where it says nothing.

    Raises
    ------
    ImageError
        If there is no such webcam, or the file has no frame that can be read.

    Examples
    --------
    ::

        with Video("clip.mp4") as video:
            for number, seconds, pixels in video.frames(every=10):
                print(seconds, detector.predict(pixels).labels)
    """

    def __init__(self, source: str | Path) -> None:
        self.name = str(source)
        number = None if Path(source).exists() else _webcam_number(source)
        self.live = number is not None
        _silence()
        if number is not None:
            self._capture = cv2.VideoCapture(number)
        else:
            with _plain(Path(source)) as name:
                # Told to be a file, or ffmpeg would take a name with a colon for an address.
                self._capture = cv2.VideoCapture(f"file:{name}", cv2.CAP_FFMPEG)
        self._start = time.monotonic()
        self._first: Pixels | None = self._read() if self._capture.isOpened() else None
        if self._first is None:
            self.close()
            if self.live:
                raise ImageError(f"{source}: found no webcam that gives a picture, expected {_WEBCAMS}")
            raise ImageError(f"{source}: found no frame that can be read, expected {_EXPECTED}")
        stated = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = float(stated) if 0 < stated <= 1000 else 25.0
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.count = int(count) if not self.live and 0 < count < 2**40 else None

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file or the webcam."""
        self._capture.release()

    def frames(self, every: int = 1) -> Iterator[Frame]:
        """Yield the frames, each once.

        Parameters
        ----------
        every : int
            Of so many frames one is yielded, beginning with the first.
        """
        pixels, self._first = self._first, None
        number = 0
        while pixels is not None:
            yield Frame(number, self._seconds(number), pixels)
            for _ in range(every - 1):
                self._capture.grab()
            number += every
            pixels = self._read()

    def _read(self) -> Pixels | None:
        picture: Any = self._capture.read()[1]
        return None if picture is None else _swapped(picture)

    def _seconds(self, number: int) -> float:
        """Return the time of the frame that was read last."""
        if self.live:
            return time.monotonic() - self._start
        stated = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        return float(stated) if stated > 0 or not number else number / self.fps


@contextmanager
def video_writer(path: str | Path, fps: float) -> Iterator[Callable[[Pixels, float], None]]:
    """Write an mp4 file, which appears whole when the ``with`` block ends well, or not at all.

    Parameters
    ----------
    path : path
        The file, ending in ``.mp4``; replaced if it exists.
    fps : float
        Frames per second.

    Yields
    ------
    callable
        ``add(pixels, seconds)`` with an (H, W, 3) uint8 RGB picture and the time at which it is shown; it
        stays until the next. All get the size of the first.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    _silence()
    with atomic_path(path) as temporary, _plain(temporary) as name:
        written = _Written(name, fps)
        try:
            yield written.add
        finally:
            written.close()


class _Written:
    """A video file that grows."""

    def __init__(self, name: str, fps: float) -> None:
        self.name, self.fps, self.count = name, fps, 0
        self._writer: cv2.VideoWriter | None = None
        self._last: Pixels | None = None
        self._size = (0, 0)

    def add(self, pixels: Pixels, seconds: float) -> None:
        """Show a picture from a time on."""
        picture = _swapped(pixels)
        if self._writer is None:
            height, width = pixels.shape[:2]
            # The colours of two by two pixels are stored together.
            self._size = (width + width % 2, height + height % 2)
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(f"file:{self.name}", cv2.CAP_FFMPEG, code, self.fps, self._size)
            if not self._writer.isOpened():
                raise OSError(f"{self.name}: cannot write a video of {width} x {height} pixels")
        self._repeat(round(seconds * self.fps))
        height, width = picture.shape[:2]
        right, below = self._size[0] - width, self._size[1] - height
        if 0 <= right <= 1 and 0 <= below <= 1:
            self._last = np.pad(picture, ((0, below), (0, right), (0, 0)), mode="edge")
        else:
            self._last = resize(picture, *self._size[::-1])

    def _repeat(self, until: int) -> None:
        """Write the last picture until there are so many frames."""
        while self._writer is not None and self._last is not None and self.count < until:
            self._writer.write(self._last)
            self.count += 1

    def close(self) -> None:
        """Write what is left."""
        self._repeat(self.count + 1)
        if self._writer is not None:
            self._writer.release()


def _webcam_number(source: str | Path) -> int | None:
    """Return the number of a webcam, if the source is one."""
    kind, _, number = str(source).partition(":")
    if kind != _WEBCAM or not (number or "0").isdecimal():
        return None
    return int(number or "0")


def _silence() -> None:
    """Let OpenCV and ffmpeg say nothing: what is wrong is said in one line by who calls them."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def _swapped(pixels: Pixels) -> Pixels:
    """Return RGB as the BGR of OpenCV, or the other way round."""
    return np.ascontiguousarray(pixels[..., ::-1])


@contextmanager
def _plain(path: Path) -> Iterator[str]:
    """Lend a name for a file that OpenCV takes: its own, or that of a link if it is no UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder, f"file{path.suffix}")
            link.symlink_to(path.absolute())
            yield str(link)
    else:
        yield str(path)
