"""Colours of classes, told apart in colour blindness, and of the text on them."""

from __future__ import annotations

from collections.abc import Sequence

Colour = tuple[int, int, int]

PALETTE: tuple[Colour, ...] = (
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (213, 94, 0)),
    *((0, 114, 178), (204, 121, 167), (240, 228, 66), (136, 34, 85)),
)
"""Eight colours that are told apart in every colour blindness of red and green.

Those of Okabe and Ito, "Color Universal Design" (2008), with the wine red of Tol, "Colour Schemes" (2021), in
place of black, which dark photos hide.
"""

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
# Shares of black (negative) or white that more than eight classes get, palette by palette.
_SHADES = (0.0, -0.4, 0.5, -0.6, 0.3, -0.2, 0.65, -0.7, 0.15, -0.5)


def class_colour(name: str, names: Sequence[str]) -> Colour:
    """Return the RGB colour of a class, one of `names`; it does not depend on their order.

    Up to eight classes take the colours of `PALETTE` in sorted order; more take darker and lighter ones of
    the same hues in turn.
    """
    number = sorted(set(names)).index(name)
    turn, place = divmod(number, len(PALETTE))
    whole, shade = divmod(turn, len(_SHADES))
    # After eighty classes shades come back, a little changed.
    share = _SHADES[shade] + whole / 50
    end = WHITE if share > 0 else BLACK
    red, green, blue = (
        round(c + min(1.0, abs(share)) * (e - c)) for c, e in zip(PALETTE[place], end, strict=True)
    )
    return red, green, blue


def text_colour(ground: Colour) -> Colour:
    """Return black or white, whichever has the higher contrast with a ground (WCAG 2's measure)."""
    light = luminance(ground) + 0.05
    return BLACK if light / 0.05 >= 1.05 / light else WHITE


def luminance(colour: Colour) -> float:
    """Return the relative luminance of an sRGB colour, 0 (black) to 1 (white)."""
    linear = (c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour)
    return sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
