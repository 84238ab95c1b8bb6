"""Text in any script, in pictures and plots: each letter in a font that has it, or else by its number.

Most letters are in DejaVu Sans, which comes with matplotlib. The others are looked for in the fonts of the
extra ``sppnet[fonts]`` (Noto, for nearly all scripts), and in those of the system.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ImageDraw, ImageFont

from sppnet.drawing.colours import Colour

# The packages of the extra, smallest files first.
_PACKAGES = ("manimgx_fonts", "manimgx_fonts_cjk")
_SUFFIXES = {".ttf", ".otf", ".ttc"}
# Fonts that have a box, or nothing, for every letter.
_EMPTY = ("lastresort", "adobeblank")
# Of the system's fonts the plain ones first: those without serifs, of one weight for all scripts.
_PLAIN = ("notosans", "sans", "gothic", "hei", "pingfang", "segoe", "arial", "nirmala")
# What may stand in any font: it goes on in that of the letters before it.
_COMMON = frozenset("MNPSZ")
_REGULAR = 400
# Between a name and a score, which must not go to the other side of a name in Arabic: Unicode's own mark.
_LEFT_TO_RIGHT = "\u200e"
# Height of a line, and of what is above its base, in heights of the font.
LINE, ABOVE = 1.3, 1.0


def legible(text: str) -> str:
    r"""Return text of one line whose letters can all be drawn.

    A letter that no font here has becomes its number, ``U+732B``, with a warning that says what helps; so do
    breaks of lines and other letters that are not to be seen. A byte that is no UTF-8 becomes ``\xff``.
    """
    if text.isascii() and text.isprintable():
        return text
    _tell("".join(sorted({letter for letter in text if _drawable(letter) and _font_of(letter) is None})))
    return "".join(_written(letter) for letter in text)


def joined(*parts: str) -> str:
    """Return parts as one text that is drawn from left to right, whichever way each is written."""
    return _LEFT_TO_RIGHT.join(parts)


def text_width(text: str, size: int) -> float:
    """Return the width in pixels of `legible` text in a font of a height in pixels."""
    return float(sum(_font(path, size).getlength(part) for part, path in _runs(text)))


def shortened(text: str, size: int, width: float) -> str:
    """Return text that is no wider than `width`, with dots in place of its end; empty if none is."""
    if text_width(text, size) <= width:
        return text
    for end in range(len(text) - 1, 0, -1):
        short = f"{text[:end].rstrip()}…"
        if text_width(short, size) <= width:
            return short
    return ""


def draw_text(
    pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, colour: Colour
) -> None:
    """Draw `legible` text.

    Parameters
    ----------
    pen : ImageDraw
        Draws into the picture.
    place : (float, float)
        Left and upper border of the line, which is `LINE` times `size` high.
    text : str
        What to draw.
    size : int
        Height of the font in pixels.
    colour : (int, int, int)
        Its colour.
    """
    x, y = place
    for part, path in _runs(text):
        font = _font(path, size)
        pen.text((x, y + ABOVE * size), part, fill=colour, font=font, anchor="ls")
        x += font.getlength(part)


def plot_families(texts: Iterable[str]) -> list[str]:
    """Return matplotlib's names of the fonts that some texts need, and make these known to it."""
    from matplotlib.font_manager import FontEntry, fontManager

    families = ["DejaVu Sans"]
    for path in dict.fromkeys(path for text in texts for _, path in _runs(text)):
        if path != _files()[0]:
            family = _family(path)
            families.append(family)
            if all(entry.name != family for entry in fontManager.ttflist):
                # `addfont` would find that the first weight of a variable font is a thin one.
                entry = FontEntry(str(path), name=family, weight=_REGULAR, size="scalable")
                fontManager.ttflist.append(entry)
    return families


class PageFont(NamedTuple):
    """A font that a page carries.

    Attributes
    ----------
    family : str
        What the page calls it.
    address : str
        The font itself, as a ``data:`` address.
    letters : str
        Which letters it has, as CSS's ``unicode-range`` wants them.
    """

    family: str
    address: str
    letters: str


def page_fonts(text: str) -> list[PageFont]:
    """Return fonts for the letters of a page that its reader's system may lack, cut down to these letters.

    Parameters
    ----------
    text : str
        All that the page says.

    Returns
    -------
    list of PageFont
        Only of the extra's fonts, which may be passed on.
    """
    from fontTools.subset import Options, Subsetter
    from fontTools.ttLib import TTFont

    files: dict[Path, set[int]] = {}
    for letter in set(text):
        path = None if letter.isascii() else _font_of(letter)
        if path is not None and path in _files()[1:]:
            files.setdefault(path, set()).add(ord(letter))
    found = []
    for path, letters in sorted(files.items()):
        subsetter, buffer = Subsetter(Options(layout_features=["*"], notdef_outline=True)), io.BytesIO()
        subsetter.populate(unicodes=letters)
        with TTFont(path, lazy=True, fontNumber=0) as font:
            subsetter.subset(font)
            font.save(buffer)
        address = f"data:font/ttf;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        numbers = ", ".join(f"U+{letter:X}" for letter in sorted(letters))
        found.append(PageFont(_family(path), address, numbers))
    return found


def _family(path: Path) -> str:
    """Return a name for a font, of letters that no pattern and no style sheet takes for its own."""
    return f"sppnet {''.join(filter(str.isalnum, path.stem))}"


@cache
def _tell(missing: str) -> None:
    """Warn of letters that no font has, once."""
    if missing:
        warnings.warn(
            f"no font here has the letters {' '.join(missing)}: they are drawn as U+{ord(missing[0]):04X}; "
            'pip install "sppnet[fonts]" brings fonts for nearly all scripts',
            stacklevel=3,
        )


def _written(letter: str) -> str:
    if _font_of(letter) is not None:
        return letter
    if 0xDC80 <= ord(letter) <= 0xDCFF:  # what Python makes of a byte that is no UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return "" if unicodedata.category(letter) == "Cf" else f"U+{ord(letter):04X}"


def _drawable(letter: str) -> bool:
    """Return whether a letter is one to be seen."""
    return not unicodedata.category(letter).startswith(("C", "Zl", "Zp"))


def _runs(text: str) -> Iterator[tuple[str, Path]]:
    """Yield the parts of a text, each with a font that has all its letters."""
    for part in filter(None, text.split(_LEFT_TO_RIGHT)):
        if part.isascii():
            yield part, _files()[0]
            continue
        paths: list[Path] = []
        for letter in part:
            before = paths[-1] if paths else None
            common = unicodedata.category(letter)[0] in _COMMON
            goes_on = before is not None and common and ord(letter) in _letters(before)
            paths.append(before if before is not None and goes_on else _font_of(letter) or _files()[0])
        for path, run in groupby(zip(part, paths, strict=True), key=lambda pair: pair[1]):
            yield "".join(letter for letter, _ in run), path


@cache
def _font_of(letter: str) -> Path | None:
    """Return the first font that has a letter."""
    if unicodedata.category(letter).startswith(("Cc", "Cs", "Zl", "Zp")):
        return None
    return next((path for path in _fonts() if ord(letter) in _letters(path)), None)


def _fonts() -> Iterator[Path]:
    """Yield the fonts there are; the system is searched only for what the others lack."""
    yield from _files()
    yield from _system()


@cache
def _files() -> tuple[Path, ...]:
    """Return the font of nearly all text, and those of the extra."""
    # Importing matplotlib for the place of its files would take a third of a second.
    paths = [folder / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf" for folder in _folders("matplotlib")]
    for folder in (folder for name in _PACKAGES for folder in _folders(name)):
        files = (path for path in folder.iterdir() if path.suffix in _SUFFIXES)
        paths += sorted(files, key=lambda path: path.name)
    return tuple(paths)


def _folders(package: str) -> list[Path]:
    """Return where a package lies; nowhere if it is not installed."""
    spec = importlib.util.find_spec(package)
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []


@cache
def _system() -> tuple[Path, ...]:
    from matplotlib.font_manager import findSystemFonts

    def rank(path: Path) -> tuple[int, str]:
        name = path.stem.lower().replace(" ", "").replace("-", "")
        return next((i for i, part in enumerate(_PLAIN) if part in name), len(_PLAIN)), str(path)

    found = [Path(name) for name in findSystemFonts()]
    return tuple(sorted((p for p in found if not p.stem.lower().startswith(_EMPTY)), key=rank))


@cache
def _letters(path: Path) -> frozenset[int]:
    """Return the numbers of the letters that a font has; none of one that cannot be read, or has pixels."""
    from fontTools.ttLib import TTFont

    try:
        with TTFont(path, lazy=True, fontNumber=0) as font:
            # Coloured emoji come as pixels of one size.
            outlines = any(table in font for table in ("glyf", "CFF ", "CFF2"))
            return frozenset(font.getBestCmap() or ()) if outlines else frozenset()
    except Exception:  # a damaged font can make fontTools raise anything; another one may do
        return frozenset()


@lru_cache(maxsize=64)
def _font(path: Path, size: int) -> Any:
    font = ImageFont.truetype(path, size)
    with contextlib.suppress(OSError):  # of a font of one weight
        font.set_variation_by_axes([_REGULAR])
    return font
