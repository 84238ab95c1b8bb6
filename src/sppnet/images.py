"""Image files to pixels and back, and the resizing of pixels.

An image is an ``(H, W, 3)`` uint8 array, RGB and upright. See docs/conventions.md.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.ImageFile import ImageFile

from sppnet.arrays import Image as AnyImage
from sppnet.arrays import Pixels
from sppnet.errors import ImageError, SppnetError, check_extra, has_extra
from sppnet.remote import address_of, listed, open_file
from sppnet.storage import atomic_path
from sppnet.walking import NOWHERE, LeftOut, matches, walk

MAX_PIXELS = 50_000_000
MAX_PIXELS_VARIABLE = "SPPNET_MAX_PIXELS"

# Longer strips are shrunk to the area of one of this aspect, or a few rows of pixels would fill the memory.
MAX_ASPECT = 16

_HEIC_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
# Those of files that can be read: AVIF where Pillow was built with it, HEIC with the extra.
SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".png", ".apng", ".bmp", ".dib", ".tif", ".tiff"),
        *(".webp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
        *([".avif"] if AvifImagePlugin.SUPPORTED else []),
        *(_HEIC_SUFFIXES if has_extra("heic") else []),
    }
)
_SUFFIXES = frozenset(map(os.fsencode, SUFFIXES))
_WRITTEN = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"})

_FORMATS: tuple[tuple[tuple[bytes, ...], type[ImageFile]], ...] = (
    ((b"\xff\xd8\xff",), JpegImagePlugin.JpegImageFile),  # also the first picture of an MPO
    ((b"\x89PNG\r\n\x1a\n",), PngImagePlugin.PngImageFile),
    ((b"BM",), BmpImagePlugin.BmpImageFile),
    (tuple(bytes([size, 0, 0, 0]) for size in (12, 40, 52, 56, 64, 108, 124)), BmpImagePlugin.DibImageFile),
    (tuple(TiffImagePlugin.PREFIXES), TiffImagePlugin.TiffImageFile),
    ((b"RIFF",), WebPImagePlugin.WebPImageFile),
    ((b"GIF87a", b"GIF89a"), GifImagePlugin.GifImageFile),
    ((b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf"), PpmImagePlugin.PpmImageFile),
)
_EXPECTED = "a JPEG, PNG, BMP, TIFF, WebP, GIF, PPM, AVIF or HEIC image"

_JPEG_END = b"\xff\xd9"
_EXPECTED_SOURCE = "expected an image file, a folder or a pattern"
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})

# Where Pillow keeps metadata in which an orientation may stand.
_ORIENTED = frozenset({"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"})
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str | Path, *, max_pixels: int | None = None) -> Pixels:
    """Read an image file.

    The EXIF orientation is applied. Transparent pixels are composited on white. Of several frames the first
    is taken. 16-bit grey is scaled to 8 bit; 32-bit integers are taken as 16-bit and floats as 0 to 1 where
    all values fit, and else stretched from their minimum and maximum to 0 and 255. Colour profiles are not
    applied. A JPEG that lacks its end marker is read with a warning where all its pixels are there.

    Parameters
    ----------
    path : path
        JPEG, PNG, BMP, TIFF, WebP, GIF, PPM, AVIF (where Pillow was built with it) or HEIC (with the extra
        ``sppnet[heic]``), told by content and not by suffix.
    max_pixels : int, optional
        Larger images are refused on the word of their header, before any pixel is decoded. By default what
        the environment variable ``SPPNET_MAX_PIXELS`` says, which all threads and processes see, or
        50 million.

    Returns
    -------
    (H, W, 3) uint8
        RGB, upright.

    Raises
    ------
    ImageError
        If the file is empty, truncated, no image, a folder, or larger than `max_pixels`.
    FileNotFoundError
        If there is no such file.
    """
    limit = _max_pixels() if max_pixels is None else max_pixels
    with _opened(Path(path)) as image:
        width, height = image.size
        if width * height > limit:
            raise ImageError(
                f"{path}: found {width} x {height} = {width * height} pixels, "
                f"expected at most {limit} (--max-pixels, max_pixels=)"
            )
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            return _upright(_whole_jpeg(Path(path), image))
        return _upright(image)


def pixels_of(image: AnyImage) -> Pixels:
    """Return the pixels of whatever stands for one image.

    Parameters
    ----------
    image : path, str, PIL.Image.Image or (H, W, 3) uint8 array
        A file is read by `read_image`; an image of Pillow's is turned upright as its EXIF orientation says,
        and any mode becomes RGB; an array must be RGB and upright already, and is not copied.

    Returns
    -------
    (H, W, 3) uint8
        RGB, upright.

    Raises
    ------
    ImageError
        If the file cannot be read, or an array has another shape or type.
    FileNotFoundError
        If there is no such file.
    SppnetError
        If it is something else, such as a list of images.
    """
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            found = f"an array {image.shape} of {image.dtype}"
            raise ImageError(f"found {found}, expected an image: (H, W, 3) of uint8, RGB")
        return image
    if isinstance(image, Image.Image):
        return _upright(image)
    kind = type(image).__name__
    raise SppnetError(f"found {kind}, expected one image: a path, an (H, W, 3) uint8 array or a PIL image")


def photo_keys(images: Iterable[Path | Pixels]) -> npt.NDArray[np.uint64]:
    """Return a number for each image that another image has only by the rarest chance.

    A model keeps those of the photos that it was fitted on, so that it can tell when it is measured on them.

    Parameters
    ----------
    images : iterable of Path or (H, W, 3) uint8
        Of a file its bytes count, of an array its shape and pixels.

    Returns
    -------
    (n,) uint64
        In the order of the images.
    """

    def key(image: Path | Pixels) -> int:
        content = (
            image.read_bytes() if isinstance(image, Path) else repr(image.shape).encode() + image.tobytes()
        )
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")

    return np.fromiter(map(key, images), np.uint64)


def readable_keys(paths: Iterable[Path]) -> npt.NDArray[np.uint64]:
    """Return `photo_keys` of those files that can be read."""

    def keys(path: Path) -> npt.NDArray[np.uint64]:
        try:
            return photo_keys([path])
        except OSError:
            return np.zeros(0, np.uint64)

    return np.concatenate([np.zeros(0, np.uint64), *map(keys, paths)])


class ImageHeader(NamedTuple):
    """What the header of an image file says.

    Attributes
    ----------
    height, width : int
        Of the pixels as they are stored, before any turning.
    orientation : int
        EXIF orientation, 1 (upright) to 8; 5 and above swap height and width.
    """

    height: int
    width: int
    orientation: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the upright image, as `read_image` gives it."""
        return (self.height, self.width) if self.orientation < 5 else (self.width, self.height)


def image_header(path: str | Path) -> ImageHeader:
    """Read the size and orientation of an image file; no pixel is decoded.

    HEIC files turn their pixels themselves and are always upright here.

    Raises
    ------
    ImageError
        If the header cannot be read.
    FileNotFoundError
        If there is no such file.
    """
    with _opened(Path(path)) as image:
        width, height = image.size
        orientation = _orientation(image)
        if isinstance(image, TiffImagePlugin.TiffImageFile) and orientation >= 5:
            width, height = height, width  # Pillow has swapped them
        return ImageHeader(height, width, orientation)


def image_size(path: str | Path) -> tuple[int, int]:
    """Return the height and width that `read_image` would give, from the header alone.

    Raises
    ------
    ImageError
        If the header cannot be read.
    FileNotFoundError
        If there is no such file.
    """
    return image_header(path).size


def images_among(names: Iterable[bytes], left: LeftOut) -> list[bytes]:
    """Return those of the names of files that end as images do, in `SUFFIXES`, and count the others."""
    images = []
    for name in names:
        if name[name.rfind(b".") :].lower() in _SUFFIXES:
            images.append(name)
        else:
            left.add(_unread_kind(name), name)
    return images


class Found(NamedTuple):
    """Image files, and what lies beside them.

    Attributes
    ----------
    paths : list of Path
        The image files.
    notes : tuple of str
        A line for each source in which files were left out: how many of each kind, and the first by name.
    """

    paths: list[Path]
    notes: tuple[str, ...]


def find_images(sources: Sequence[str | Path]) -> Found:
    """List the image files that `sources` name, in their order and each once.

    Parameters
    ----------
    sources : sequence of paths
        A file is taken whatever its suffix. A folder gives the images in it at any depth, a pattern (``*``,
        ``?``, ``[ab]``, and ``**`` for folders at any depth) the images that match, and those in folders that
        match, both sorted and without hidden files; there an image is a file with one of the `SUFFIXES`, and
        the others are counted in the notes.

    Raises
    ------
    SppnetError
        If a source is not there or gives no image, or `sources` is one path and no list of them.
    DatasetError
        If a link leads back to a folder that holds it.
    OSError
        If a folder cannot be listed.
    """
    if isinstance(sources, str | Path):
        expected = f"a list of paths, such as [{str(sources)!r}]"
        raise SppnetError(f"found the path {str(sources)!r}, expected {expected}")
    found: dict[Path, None] = {}
    notes: dict[str, None] = {}
    for source in sources:
        left = LeftOut()
        images = _images_of(source, left)
        said = left.notes()
        if not images:
            beside = "".join(f"; {note}" for note in said)
            raise SppnetError(f"{source}: found no image, {_EXPECTED_SOURCE}{beside}")
        found.update(dict.fromkeys(images))
        notes.update(dict.fromkeys(f"{source}: {note}" for note in said))
    return Found(list(found), tuple(notes))


def resize(image: Pixels, height: int, width: int) -> Pixels:
    """Resize an image to `height` x `width`.

    Bilinear without antialiasing, as in the paper's released code; only where both sides shrink to less than
    half, where bilinear would skip pixels, each new pixel is the mean of the area it covers.

    Parameters
    ----------
    image : (H, W, 3) uint8
    height, width : int
        The new size, at least 1 x 1.
    """
    if height < 1 or width < 1:
        raise SppnetError(f"found a new size of {height} x {width}, expected at least 1 x 1")
    shrinks = image.shape[0] > 2 * height and image.shape[1] > 2 * width
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (width, height), interpolation=method), np.uint8)


def shorter_side_size(height: int, width: int, s: int) -> tuple[int, int]:
    """Return the height and width that bring the shorter side to `s` and keep the aspect.

    The longer side is rounded up, as in the paper's released code, and has no upper limit.
    """
    shorter = min(height, width)
    return -(-height * s // shorter), -(-width * s // shorter)


def whole_image_size(height: int, width: int, s: int) -> tuple[int, int]:
    """Return the height and width at which a network sees a whole image whose shorter side becomes `s`.

    The aspect is kept; an image longer than `MAX_ASPECT` times its shorter side gets a smaller one, to have
    no more pixels than that.
    """
    h, w = shorter_side_size(height, width, s)
    if max(h, w) <= MAX_ASPECT * min(h, w):
        return h, w
    shrink = s * math.sqrt(MAX_ASPECT / (h * w))
    return max(1, round(h * shrink)), max(1, round(w * shrink))


def view_windows(height: int, width: int, size: int, middles: bool = False) -> npt.NDArray[np.int64]:
    """Return where the square views of an image lie: centre, corners, and the middles of its sides.

    Parameters
    ----------
    height, width : int
        Size of the image in pixels, at least `size` each.
    size : int
        Side of the views in pixels.
    middles : bool
        Whether the middles of the four sides are views, too (paper section 3.1.5).

    Returns
    -------
    (V, 4) int64
        Boxes x1, y1, x2, y2, half-open, each once: 5 or 9, fewer where some coincide. The centre comes first.
    """
    right, bottom = width - size, height - size
    if min(right, bottom) < 0:
        raise SppnetError(
            f"found a {height} x {width} image, expected at least {size} x {size} for its views"
        )
    middle, centre = right // 2, bottom // 2
    corners = [(0, 0), (right, 0), (0, bottom), (right, bottom)]
    sides = [(middle, 0), (0, centre), (right, centre), (middle, bottom)] if middles else []
    starts = np.array(list(dict.fromkeys([(middle, centre), *corners, *sides])))
    return np.concatenate([starts, starts + size], axis=1)


def check_picture(path: str | Path) -> None:
    """Raise a `SppnetError` unless `write_image` knows the suffix of a path."""
    if Path(path).suffix.lower() not in _WRITTEN:
        allowed = ", ".join(sorted(_WRITTEN))
        raise SppnetError(f"{path}: found the suffix {Path(path).suffix!r}, expected one of {allowed}")


def write_image(path: str | Path, image: Pixels, quality: int = 95) -> None:
    """Write an image in the format of the suffix of `path`; the file appears whole or not at all.

    Parameters
    ----------
    path : path
        With one of the suffixes jpg, jpeg, png, bmp, tif, tiff, webp, gif. Its folder must exist.
    image : (H, W, 3) uint8
        RGB.
    quality : int
        Of JPEG and WebP, 1 to 95.

    Raises
    ------
    SppnetError
        If the suffix is another.
    OSError
        If the folder is missing or not writable.
    """
    check_picture(path)
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, quality=quality)


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile]:
    """Read a header; what fails here or in the ``with`` block is raised as an `ImageError`.

    Pillow's own `Image.open` would warn about large images, or refuse them, by a limit that is global.
    """
    try:
        if address_of(path) is None and not stat.S_ISREG(path.stat().st_mode):
            raise ImageError(f"{path}: found a folder or a device, expected {_EXPECTED}")
        opened = open_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: found no such file, expected {_EXPECTED}") from None
    with opened as file:
        plugin = _plugin(path, file.read(64))
        file.seek(0)
        try:
            yield plugin(file)
        except ImageError:
            raise
        except Exception as error:  # a damaged field can make Pillow raise anything
            reason = str(error).strip() or type(error).__name__
            kind = "truncated" if "truncated" in reason.lower() else "damaged"
            raise ImageError(f"{path}: found a {kind} file ({reason}), expected {_EXPECTED}") from None


def _plugin(path: Path, start: bytes) -> type[ImageFile]:
    """Return Pillow's reader for a file that begins with `start`."""
    for magic, plugin in _FORMATS:
        if start.startswith(magic):
            return plugin
    if start[4:8] != b"ftyp":
        found = f"a file that starts with {start[:8]!r}" if start else "an empty file"
        raise ImageError(f"{path}: found {found}, expected {_EXPECTED}")
    box = start[8 : int.from_bytes(start[:4], "big")]
    brands = {box[i : i + 4] for i in range(0, len(box), 4)}
    if brands & {b"avif", b"avis"}:
        return AvifImagePlugin.AvifImageFile
    if not brands & _HEIC_BRANDS:
        found = f"a file of the kind {box[:4].decode('ascii', 'backslashreplace')!r}"
        raise ImageError(f"{path}: found {found}, expected {_EXPECTED}")
    try:
        check_extra("heic", f"{path}: reading HEIC")
    except SppnetError as error:
        raise ImageError(str(error)) from None

    from pillow_heif import HeifImageFile

    reader: type[ImageFile] = HeifImageFile
    return reader


def _max_pixels() -> int:
    """Return the most pixels of an image unless the caller says otherwise."""
    given = os.environ.get(MAX_PIXELS_VARIABLE, "")
    if not given:
        return MAX_PIXELS
    if not given.isdecimal() or int(given) < 1:
        raise SppnetError(f"{MAX_PIXELS_VARIABLE}={given}: expected a number of pixels, such as 200000000")
    return int(given)


def _whole_jpeg(path: Path, image: ImageFile) -> Image.Image:
    """Return a JPEG decoded; raise an error if its end is missing, also where zeros stand for it.

    If the end marker alone is missing, the decoder takes nothing of what stands between the data and a new
    marker, and gives the same pixels whatever that is.
    """
    assert image.fp is not None
    image.fp.seek(-1, os.SEEK_END)
    last = image.fp.read(1)
    image.fp.seek(0)
    try:
        image.load()
        if last != b"\0":
            return image
    except OSError:
        pass
    with open_file(path) as file:
        content = file.read().rstrip(b"\0").rstrip(b"\xff")
    if content.endswith(_JPEG_END):
        return image
    fillings = (b"", b"\x55" * 64, b"\xaa" * 64)
    files = (BytesIO(content + filling + _JPEG_END) for filling in fillings)
    first, *others = map(JpegImagePlugin.JpegImageFile, files)
    if any(other.tobytes() != first.tobytes() for other in others):
        raise ImageError(f"{path}: found a truncated JPEG, expected a whole one")
    warnings.warn(f"{path}: found a JPEG without its end marker; its pixels are all there", stacklevel=3)
    return first


def _upright(image: Image.Image) -> Pixels:
    """Return the pixels of an image, turned as its EXIF orientation says, as (H, W, 3) uint8."""
    # Pillow turns TIFF itself on loading.
    orientation = 1 if isinstance(image, TiffImagePlugin.TiffImageFile) else _orientation(image)
    image.load()
    return _rgb(image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) to 8; 5 and above swap height and width."""
    if not image.info.keys() & _ORIENTED and not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1
    try:
        # Not image.getexif(): for PNG it would decode the pixels in search of late metadata.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # metadata that cannot be read leaves the picture as it is
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _rgb(image: Image.Image) -> Pixels:
    """Return a decoded image of any mode as (H, W, 3) uint8."""
    if image.mode.startswith(("I", "F")):
        return np.repeat(_eight_bit(np.asarray(image))[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        visible = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", visible.size, "white"), visible)
    return np.array(image.convert("RGB"))


def _eight_bit(values: npt.NDArray[Any]) -> Pixels:
    """Scale (H, W) values to 0..255: from 0..65535 or (floats) 0..1 where they fit, else from min..max."""
    if not np.isfinite(values).all():
        raise SppnetError("values that are not finite")
    low, high = float(values.min()), float(values.max())
    top = 65535.0 if np.issubdtype(values.dtype, np.integer) else 1.0
    if low >= 0 and high <= top:
        low, high = 0.0, top
    scale = 255 / (high - low) if high > low else 0.0
    return np.round((values.astype(np.float64) - low) * scale).astype(np.uint8)


def _images_of(source: str | Path, left: LeftOut) -> list[Path]:
    """Return the image files that a file, a folder or a pattern names; count what is left out."""
    path, address = Path(source), address_of(source)
    if address is not None:
        return _images_at(address, left)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _images_below(path, left)
    if not glob.has_magic(str(source)):
        found = "neither a file nor a folder" if path.exists() else "no such file or folder"
        raise SppnetError(f"{source}: found {found}, {_EXPECTED_SOURCE}")
    images: list[Path] = []
    walked: set[Path] = set()
    for match in sorted(matches(str(source))):  # a folder comes before what is in it
        if not walked.isdisjoint(match.parents):
            continue
        if match.is_dir():
            walked.add(match)
            images += _images_below(match, left)
        elif match.is_file():
            images += [match for _ in images_among([os.fsencode(match)], left)]
        else:
            left.add(NOWHERE, os.fsencode(match))
    return images


def _images_at(address: str, left: LeftOut) -> list[Path]:
    """Return the image files that an address names."""
    files = {os.fsencode(path): path for path in listed(address)}
    return [files[name] for name in images_among(files, left)]


def _images_below(folder: Path, left: LeftOut) -> list[Path]:
    return [folder / os.fsdecode(name) for name in images_among(walk(folder, left), left)]


def _unread_kind(name: bytes) -> str:
    """Return in a word what a file is that is left out because its suffix is not one of `SUFFIXES`."""
    suffix = os.path.splitext(name)[1].decode("utf-8", "backslashreplace").lower()
    if suffix in _HEIC_SUFFIXES:
        return f'{suffix} (pip install "sppnet[heic]")'
    return suffix or "without a suffix"
