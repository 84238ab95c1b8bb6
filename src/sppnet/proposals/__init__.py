"""Candidate windows: boxes that may hold an object, whatever its class.

A method is a frozen record of settings. Called on an image it returns ``(R, 4)`` boxes and ``(R,)`` scores,
best first: no box twice, every box inside the image, the whole image always the first. The scores tell the
rank and nothing more: they fall evenly from 1 towards 0, so that those of several methods can be merged.
Equal pixels and settings give equal windows.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt
from platformdirs import user_cache_path

from sppnet.arrays import Boxes, FloatArray, Pixels
from sppnet.boxes import Windows, area, clip, nms
from sppnet.errors import SppnetError
from sppnet.features.encoded import EncodedImage
from sppnet.images import pixels_of
from sppnet.storage import atomic_path

_VERSION = 1  # to be raised whenever equal settings come to give other windows

_COLOURS: Mapping[str, Callable[[Pixels], Any]] = {
    "hsv": lambda image: cv2.cvtColor(image, cv2.COLOR_RGB2HSV),
    "lab": lambda image: cv2.cvtColor(image, cv2.COLOR_RGB2Lab),
    "rgb": lambda image: image,
    "hue": lambda image: cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 0].copy(),
    "grey": lambda image: cv2.cvtColor(image, cv2.COLOR_RGB2GRAY),
}


class Proposer(Protocol):
    """What every method does; its settings show in its `repr`."""

    @property
    def signature(self) -> str:
        """Text that differs wherever the windows might: part of the key in the cache of `propose_all`."""
        return f"{self!r}, version {_VERSION}"

    def __call__(self, image: Pixels, encoded: EncodedImage | None = None) -> Windows:
        """Return (R, 4) boxes and (R,) scores, best first, of an (H, W, 3) uint8 RGB image."""
        ...


@dataclass(frozen=True)
class SelectiveSearch(Proposer):
    """Selective search: segments of the image, merged by similarity until one is left (Uijlings et al., 2013).

    The defaults search a small copy of the image in many ways, which finds more objects and sooner than a
    large one in few ways (measured by ``benchmarks/proposals.py``). The windows come shuffled, always the
    same way: the search itself has no better order.

    Attributes
    ----------
    side : int
        The image is shrunk to about `side` x `side` pixels in area.
    colours : tuple of {"hsv", "lab", "rgb", "hue", "grey"}
        Colour spaces to search in.
    k : tuple of float
        Thresholds of the segmentation (Felzenszwalb and Huttenlocher, 2004); greater gives larger segments.
    min_segment : int
        Pixels of the smallest segment, in the shrunk image.
    sigma : float
        Blur before the segmentation, in pixels of the shrunk image.
    similarity : tuple of str
        What decides the next merge: the mean of some of the similarityes of colour (C), texture (T), size (S)
        and fill (F).
    min_side : int
        Lower or narrower windows are dropped; pixels of the original image.
    max_overlap : float
        Of two windows with a greater IoU the smaller is dropped.
    """

    side: int = 130
    colours: tuple[str, ...] = ("hsv", "lab", "rgb", "hue", "grey")
    k: tuple[float, ...] = (150,)
    min_segment: int = 30
    sigma: float = 0.5
    similarity: tuple[str, ...] = ("CTSF", "TSF", "F", "S")
    min_side: int = 20
    max_overlap: float = 0.9

    def __call__(self, image: Pixels, encoded: EncodedImage | None = None) -> Windows:
        """Return (R, 4) boxes and (R,) scores, best first, of an (H, W, 3) uint8 RGB image."""
        segmentation = _ximgproc().segmentation
        small = _shrink(image, self.side)
        search = segmentation.createSelectiveSearchSegmentation()
        for colour in self.colours:
            search.addImage(_COLOURS[colour](small))
        for k in self.k:
            search.addGraphSegmentation(segmentation.createGraphSegmentation(self.sigma, k, self.min_segment))
        measures = {
            "C": segmentation.createSelectiveSearchSegmentationStrategyColor(),
            "T": segmentation.createSelectiveSearchSegmentationStrategyTexture(),
            "S": segmentation.createSelectiveSearchSegmentationStrategySize(),
            "F": segmentation.createSelectiveSearchSegmentationStrategyFill(),
        }
        for letters in self.similarity:
            together = segmentation.createSelectiveSearchSegmentationStrategyMultiple()
            for letter in letters:
                together.addStrategy(measures[letter], 1 / len(letters))
            search.addStrategy(together)
        x, y, width, height = search.process().T
        boxes = _enlarge(np.stack([x, y, x + width, y + height], axis=1), small, image)
        # OpenCV's own order hangs on the random numbers of the C library; its set of boxes does not.
        boxes = np.unique(_drop_small(boxes, self.min_side), axis=0)
        boxes = boxes[nms(boxes, area(boxes), self.max_overlap)]
        return _ranked(np.random.default_rng(0).permutation(boxes), image)


@dataclass(frozen=True)
class EdgeBoxes(Proposer):
    """Edge boxes: windows that hold many contours whole, best first (Zitnick and Dollar, 2014).

    The edges are the gradients of the image in Lab, thinned, where the paper learns an edge detector.

    Attributes
    ----------
    max_boxes : int
        Number of windows at most, besides the whole image.
    side : int
        The image is shrunk to about `side` x `side` pixels in area.
    blur : float
        Sigma before the gradients are taken, in pixels of the shrunk image.
    min_edge : float
        Weaker edges are passed over; half the strongest edge counts as 1.
    alpha, beta, eta : float
        The paper's step of the sliding window, threshold of the suppression of overlapping windows, and rate
        at which that falls from one window to the next.
    min_side : int
        Lower or narrower windows are dropped; pixels of the original image.
    """

    max_boxes: int = 450
    side: int = 220
    blur: float = 1.5
    min_edge: float = 0.15
    alpha: float = 0.65
    beta: float = 0.95
    eta: float = 0.9993
    min_side: int = 20

    def __call__(self, image: Pixels, encoded: EncodedImage | None = None) -> Windows:
        """Return (R, 4) boxes and (R,) scores, best first, of an (H, W, 3) uint8 RGB image."""
        small = _shrink(image, self.side)
        search = _ximgproc().createEdgeBoxes(
            alpha=self.alpha,
            beta=self.beta,
            eta=self.eta,
            maxBoxes=self.max_boxes,
            edgeMinMag=self.min_edge,
            # The paper's 1,000 pixels of the original image.
            minBoxArea=max(100.0, 1000 * small.size / image.size),
        )
        rectangles, _ = search.getBoundingBoxes(*_edges(small, self.blur))
        x, y, width, height = np.reshape(rectangles, (-1, 4)).T
        # OpenCV's corners are 1-based and its box holds the pixels x to x + width, both included.
        boxes = _enlarge(np.stack([x - 1, y - 1, x + width, y + height], axis=1), small, image)
        return _ranked(_drop_small(boxes, self.min_side), image)


@dataclass(frozen=True)
class DenseWindows(Proposer):
    """A grid of windows of several sizes and shapes, the large ones first; it does not look at the image.

    Attributes
    ----------
    scales : tuple of float
        Sides of the windows, as shares of the image's (of the square of equal area).
    aspects : tuple of float
        Widths over heights.
    step : float
        Distance of neighbours, at most, as a share of their width and height.
    min_side : int
        Lower or narrower windows are dropped; in pixels.
    """

    scales: tuple[float, ...] = (0.71, 0.5, 0.35, 0.25)
    aspects: tuple[float, ...] = (0.5, 1.0, 2.0)
    step: float = 0.4
    min_side: int = 20

    def __call__(self, image: Pixels, encoded: EncodedImage | None = None) -> Windows:
        """Return (R, 4) boxes and (R,) scores, best first, of an (H, W, 3) uint8 RGB image."""
        boxes = [np.zeros((0, 4))]
        for scale in sorted(self.scales, reverse=True):
            for aspect in self.aspects:
                side = scale * _side(image)
                width = min(side * math.sqrt(aspect), image.shape[1])
                height = min(side / math.sqrt(aspect), image.shape[0])
                x, y = np.meshgrid(
                    _grid(image.shape[1] - width, self.step * width),
                    _grid(image.shape[0] - height, self.step * height),
                )
                boxes.append(np.stack([x, y, x + width, y + height], axis=-1).reshape(-1, 4))
        return _ranked(_drop_small(np.concatenate(boxes), self.min_side), image)


@dataclass(frozen=True)
class Combined(Proposer):
    """The windows of several methods, merged by rank, in proportion to their numbers.

    Attributes
    ----------
    methods : tuple of Proposer
        At least one.
    """

    methods: tuple[Proposer, ...]

    def __call__(self, image: Pixels, encoded: EncodedImage | None = None) -> Windows:
        """Return (R, 4) boxes and (R,) scores, best first, of an (H, W, 3) uint8 RGB image."""
        boxes, scores = zip(*(method(image) for method in self.methods), strict=True)
        order = np.argsort(-np.concatenate(scores), kind="stable")
        return _ranked(np.concatenate(boxes)[order], image)


@dataclass(frozen=True)
class WindowsFromFile(Proposer):
    """Windows computed before, looked up by the pixels of the image; `read_windows` makes one.

    Attributes
    ----------
    path : str
        Where they were read from.
    digest : str
        Of the content of the file.
    windows : mapping of str to (boxes, scores)
        By `image_key`.
    """

    path: str
    digest: str
    windows: Mapping[str, Windows] = field(repr=False, compare=False)

    def __call__(self, image: Pixels, encoded: EncodedImage | None = None) -> Windows:
        """Return (R, 4) boxes and (R,) scores, best first, of an (H, W, 3) uint8 RGB image of the file."""
        key = image_key(image)
        if key not in self.windows:
            height, width = image.shape[:2]
            raise SppnetError(
                f"found an image ({width} x {height}) without windows in {self.path}, "
                f"expected one of the {len(self.windows)} images of that file, pixel by pixel"
            )
        boxes, scores = self.windows[key]
        return _ranked(boxes[np.argsort(-scores, kind="stable")], image)


METHODS: Mapping[str, Proposer] = {
    "selective-search": SelectiveSearch(),
    "selective-search-quality": SelectiveSearch(side=200, k=(100, 250), min_segment=50),
    "edge-boxes": EdgeBoxes(),
    "dense": DenseWindows(),
}
"""The methods that `parse` knows by name."""


def parse(text: str) -> Proposer:
    """Return the method that a text names.

    Parameters
    ----------
    text : str
        A name in `METHODS`, several joined by ``+``, or the path of a file that `write_windows` wrote, which
        ends in ``.npz``.

    Raises
    ------
    SppnetError
        If it is none of these, or the file is not what it should be.
    FileNotFoundError
        If there is no such file.
    """
    if text.endswith(".npz"):
        return read_windows(text)
    names = text.split("+")
    if not set(names) <= METHODS.keys():
        raise SppnetError(
            f"found the proposal method {text!r}, "
            f"expected {', '.join(METHODS)}, several joined by +, or a .npz file of windows"
        )
    methods = tuple(METHODS[name] for name in names)
    return methods[0] if len(methods) == 1 else Combined(methods)


def image_key(image: Pixels) -> str:
    """Return 32 hexadecimal digits that stand for the size and the pixels of an image."""
    key = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    key.update(image.tobytes())
    return key.hexdigest()


def write_windows(path: str | Path, entries: Iterable[tuple[str, str, Boxes, FloatArray]]) -> None:
    """Write candidate windows to a file, for `read_windows` or anything else that knows NumPy.

    The file is an ordinary ``.npz`` of five arrays. With N images and R windows in all they are ``names`` and
    ``keys`` (N strings each), ``counts`` (N integers that sum to R), ``boxes`` (R, 4) and ``scores`` (R,),
    the windows of the first image first.

    Parameters
    ----------
    path : path
        Ends in ``.npz``; replaced if it exists.
    entries : iterable of (name, key, boxes, scores)
        For each image: a name for people, its `image_key`, and its windows in pixels of the original image,
        0-based and half-open.

    Raises
    ------
    SppnetError
        If `path` does not end in ``.npz``.
    """
    if Path(path).suffix != ".npz":
        raise SppnetError(
            f"{path}: found the suffix {Path(path).suffix!r}, expected .npz for a file of windows"
        )
    rows = list(entries)
    with atomic_path(path) as temporary:
        np.savez_compressed(
            temporary,
            names=np.array([name for name, _, _, _ in rows], np.str_),
            keys=np.array([key for _, key, _, _ in rows], np.str_),
            counts=np.array([len(boxes) for _, _, boxes, _ in rows], np.int64),
            boxes=np.concatenate([np.zeros((0, 4), np.float32), *(boxes for _, _, boxes, _ in rows)]),
            scores=np.concatenate([np.zeros(0, np.float32), *(scores for _, _, _, scores in rows)]),
        )


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


def cache_folder() -> Path:
    """Return the folder of the user's caches for `propose_all`; it may not exist yet."""
    return user_cache_path("sppnet") / "proposals"


def propose_all(
    images: Sequence[str | Path | Pixels],
    method: Proposer,
    cache: str | Path | None = None,
    workers: int | None = None,
) -> Iterator[Windows]:
    """Propose windows for many images, several at a time.

    Parameters
    ----------
    images : sequence of path, str or (H, W, 3) uint8 RGB
        The images.
    method : Proposer
        What proposes the windows, from the pixels alone.
    cache : path, optional
        Folder to keep windows in, made if missing. They are found again by the bytes of the image,
        whatever its name, and the `Proposer.signature` of the method; a damaged entry is computed again.
    workers : int, optional
        Number of threads; by default one for each core. (OpenCV works without holding Python's lock.)

    Yields
    ------
    Windows
        In the order of the images.

    Raises
    ------
    SppnetError, OSError
        From the first image that cannot be read or proposed for; the message names it.
    """
    if cache is not None:
        Path(cache).mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        yield from pool.map(lambda image: _propose(image, method, cache), images)
    finally:
        pool.shutdown(cancel_futures=True)


def _propose(image: str | Path | Pixels, method: Proposer, cache: str | Path | None) -> Windows:
    if cache is None:
        return _propose_now(image, method)
    key = hashlib.blake2b(method.signature.encode(), digest_size=16)
    if isinstance(image, np.ndarray):
        key.update(image_key(image).encode())
    else:
        key.update(Path(image).read_bytes())
    entry = Path(cache) / f"{key.hexdigest()}.windows"
    windows = _read_entry(entry)
    if windows is None:
        windows = _propose_now(image, method)
        table = np.column_stack(windows).tobytes()
        with atomic_path(entry) as temporary:
            temporary.write_bytes(_checksum(table) + table)
    return windows


def _propose_now(image: str | Path | Pixels, method: Proposer) -> Windows:
    pixels = pixels_of(image)
    try:
        return method(pixels)
    except SppnetError as error:
        raise error if isinstance(image, np.ndarray) else SppnetError(f"{image}: {error}") from None


def _read_entry(entry: Path) -> Windows | None:
    """Return the windows of a cache entry; None if it is missing or damaged."""
    if not entry.exists():
        return None
    content = entry.read_bytes()
    checksum, table = content[:16], content[16:]
    if checksum != _checksum(table):
        return None
    columns = np.frombuffer(table, np.float32).reshape(-1, 5)
    return Windows(columns[:, :4].copy(), columns[:, 4].copy())


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _ximgproc() -> Any:
    if not hasattr(cv2, "ximgproc"):
        raise SppnetError(
            "found OpenCV without ximgproc, expected the package opencv-contrib-python-headless "
            "and no other of OpenCV beside it"
        )
    return cv2.ximgproc


def _side(image: Pixels) -> float:
    """Return the side of the square as large as the image, but at least a tenth of the longer side.

    That bounds the work on strips.
    """
    height, width = image.shape[:2]
    side: float = max(math.sqrt(height * width), height / 10, width / 10)
    return side


def _shrink(image: Pixels, side: int) -> Pixels:
    scale = min(1.0, side / _side(image))
    height, width = image.shape[:2]
    size = max(1, round(scale * width)), max(1, round(scale * height))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def _enlarge(boxes: npt.NDArray[Any], small: Pixels, image: Pixels) -> FloatArray:
    """Return boxes of the shrunk image in pixels of the original."""
    scale = np.array(image.shape[1::-1]) / small.shape[1::-1]
    result: FloatArray = boxes * np.tile(scale, 2)
    return result


def _drop_small(boxes: FloatArray, min_side: int) -> FloatArray:
    return boxes[(boxes[:, 2:] - boxes[:, :2] >= min_side).all(axis=1)]


def _grid(room: float, step: float) -> FloatArray:
    """Return evenly spaced positions from 0 to `room`, at most `step` apart."""
    return np.linspace(0, room, math.ceil(room / step) + 1)


def _edges(image: Pixels, blur: float) -> tuple[FloatArray, FloatArray]:
    """Return the (H, W) strength, 0 to 1, and direction, 0 to pi, of the thinned edges of an image."""
    lab = cv2.cvtColor(cv2.GaussianBlur(image, (0, 0), blur), cv2.COLOR_RGB2Lab)
    gradient = np.stack([cv2.Sobel(lab, cv2.CV_32F, 1, 0), cv2.Sobel(lab, cv2.CV_32F, 0, 1)])
    strongest = np.square(gradient).sum(axis=0).argmax(axis=-1)
    dx, dy = np.take_along_axis(gradient, strongest[None, ..., None], axis=-1)[..., 0]
    strength, direction = np.hypot(dx, dy), np.arctan2(dy, dx)
    # An edge is stronger than what lies one pixel before and behind it. The margin keeps even slopes out.
    y, x = np.mgrid[: strength.shape[0], : strength.shape[1]].astype(np.float32)
    step_x, step_y = np.cos(direction), np.sin(direction)
    before = cv2.remap(strength, x - step_x, y - step_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    behind = cv2.remap(strength, x + step_x, y + step_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    edge = (strength > 1.001 * before) & (strength >= behind)
    top = max(float(np.percentile(strength, 99.5)), float(strength.max()) / 4, 1e-6)
    return np.where(edge, np.minimum(strength / top, 1), 0).astype(np.float32), np.mod(direction, np.pi)


def _ranked(boxes: FloatArray, image: Pixels) -> Windows:
    """Finish boxes that come best first: inside the image, the whole image before them, no box twice."""
    height, width = image.shape[:2]
    inside = clip(np.concatenate([[[0, 0, width, height]], boxes]), width, height)
    inside = inside[area(inside) > 0]
    _, first = np.unique(inside, axis=0, return_index=True)
    unique = inside[np.sort(first)]
    return Windows(unique, np.linspace(1, 0, len(unique), endpoint=False, dtype=np.float32))
