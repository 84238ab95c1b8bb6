import colorsys

import numpy as np
import pytest

from sppnet.drawing.colours import BLACK, PALETTE, WHITE, class_colour, luminance, text_colour

# What a colour is to the blind of red (protanopia) and of green (deuteranopia), in linear RGB: G. M. Machado
# et al., "A Physiologically-based Model for Simulation of Color Vision Deficiency" (2009), severity 1.
SEEN = {
    "all": np.eye(3),
    "no red": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "no green": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}


def lab(colours, seen):
    """CIE L*a*b* of sRGB colours (D65) as somebody sees them."""
    share = np.array(colours) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ seen.T, 0, 1)
    xyz = (
        linear
        @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
        / np.array([0.9505, 1, 1.089])
    )
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), 841 / 108 * xyz + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def least_distance(colours, seen):
    places = lab(colours, SEEN[seen])
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    return distances[~np.eye(len(colours), dtype=bool)].min()


# A difference of 2.3 is just noticed, one of 10 is seen at a glance.
@pytest.mark.parametrize("seen", SEEN)
def test_eight_classes_are_told_apart_in_colour_blindness(seen):
    names = [f"class {i}" for i in range(8)]
    colours = [class_colour(name, names) for name in names]
    assert tuple(colours) == PALETTE
    assert least_distance(colours, seen) > 15


def test_the_measure_finds_what_is_not_told_apart():
    hues = [tuple(round(255 * v) for v in colorsys.hsv_to_rgb(i / 8, 0.85, 0.95)) for i in range(8)]
    assert least_distance(hues, "all") > 15
    assert least_distance(hues, "no green") < 10


def test_colours_are_distinct_and_do_not_depend_on_order():
    names = ["cat", "dog", "bird"]
    colours = [class_colour(name, names) for name in names]
    assert colours == [PALETTE[1], PALETTE[2], PALETTE[0]]
    assert colours == [class_colour(name, names[::-1] + names) for name in names]
    for count in (9, 80, 300):
        many = [f"class {i:03}" for i in range(count)]
        colours = [class_colour(name, many) for name in many]
        assert len(set(colours)) == count
        assert all(0 <= value <= 255 for colour in colours for value in colour)
    assert colours[:8] == list(PALETTE)


def test_text_has_the_higher_contrast():
    assert luminance(BLACK) == 0
    assert luminance(WHITE) == pytest.approx(1)
    assert luminance((188, 188, 188)) == pytest.approx(0.5029, abs=1e-3)
    assert text_colour(WHITE) == text_colour((240, 228, 66)) == BLACK
    assert text_colour(BLACK) == text_colour((0, 0, 255)) == WHITE
    names = [f"class {i:02}" for i in range(80)]
    for ground in (class_colour(name, names) for name in names):
        light, dark = sorted((luminance(ground), luminance(text_colour(ground))))[::-1]
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2, level AA
