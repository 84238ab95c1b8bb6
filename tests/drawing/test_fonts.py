import base64
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw

from sppnet.drawing import fonts
from sppnet.drawing.fonts import (
    LINE,
    draw_text,
    joined,
    legible,
    page_fonts,
    plot_families,
    shortened,
    text_width,
)


@pytest.fixture
def _alone(monkeypatch):
    """No font but the first."""
    first = fonts._files()[:1]
    monkeypatch.setattr(fonts, "_files", lambda: first)
    monkeypatch.setattr(fonts, "_system", tuple)
    fonts._font_of.cache_clear()
    yield
    fonts._font_of.cache_clear()


def drawn(text, size=24):
    picture = Image.new("RGB", (round(text_width(text, size)) + 8, round(LINE * size)), "white")
    draw_text(ImageDraw.Draw(picture), (4, 0), text, size, (0, 0, 0))
    return np.asarray(picture.convert("L")) < 128


# --- what is drawn ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["猫", "고양이", "ねこ", "кошка", "γάτα", "قطة", "חתול", "बिल्ली", "แมว", "кішка ☂", "čížek"]
)
def test_names_of_any_script_are_drawn_as_they_are(name):
    pytest.importorskip("manimgx_fonts_cjk")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert legible(name) == name
    ink = drawn(name)
    assert ink.any()
    # No letter is the box that stands for a missing one.
    for letter in {c for c in name if c.isalpha()}:
        boxes = drawn("\U0010ffff" if letter != "\U0010ffff" else "x")
        assert not np.array_equal(drawn(letter), boxes)


@pytest.mark.usefixtures("_alone")
def test_a_letter_that_no_font_has_becomes_its_number():
    with pytest.warns(
        UserWarning, match=r'letters 猫: they are drawn as U\+732B; pip install "sppnet\[fonts\]"'
    ):
        assert legible("big 猫") == "big U+732B"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert legible("small 猫") == "small U+732B", "told once"
    assert legible("кошка") == "кошка"


def test_what_is_not_seen_is_written_out():
    assert legible("a\nb\tc") == "aU+000AbU+0009c"
    assert legible("caf\udce9") == "caf\\xe9"
    assert legible("a\u2028b") == "aU+2028b"
    for plain in ("", "cat", "$5 or $10", "_other", "[bold]", "a\\b"):
        assert legible(plain) == plain


def test_a_broken_font_of_the_system_is_passed_over(monkeypatch, tmp_path):
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"\0\1\0\0 no font")
    assert fonts._letters(broken) == frozenset()
    monkeypatch.setattr(fonts, "_system", lambda: (broken,))
    fonts._font_of.cache_clear()
    with pytest.warns(UserWarning, match="no font"):
        assert legible("\U0001f9ff\U00010380").endswith("U+10380")
    fonts._font_of.cache_clear()


# --- how it is drawn ----------------------------------------------------------------------------------------


def test_text_lies_in_its_line_and_is_as_wide_as_measured():
    for size in (11, 30, 77):
        for text in ("Åfgjpqy|", "cow 93 %"):
            picture = Image.new("L", (1200, 200), 255)
            draw_text(ImageDraw.Draw(picture), (20, 50), text, size, 0)
            rows, columns = np.nonzero(np.asarray(picture) < 128)
            assert rows.min() >= 50 - 1
            assert rows.max() < 50 + LINE * size
            assert columns.min() >= 19
            assert columns.max() <= 21 + text_width(text, size)
            assert columns.max() - columns.min() > 0.85 * text_width(text, size)


def test_a_score_stays_right_of_a_name_that_is_written_from_the_right():
    text, name = joined("قطة", " 93 %"), drawn("قطة")
    together = drawn(text)
    np.testing.assert_array_equal(together[:, : name.shape[1] - 6], name[:, :-6])
    assert together[:, name.shape[1] :].any()


def test_runs_keep_their_order_and_lose_nothing():
    text = "猫 cat 93 % кошка"
    assert "".join(part for part, _ in fonts._runs(text)) == text
    assert list(fonts._runs("")) == []
    assert text_width("", 20) == 0


def test_shortened():
    assert shortened("cat", 20, 500) == "cat"
    short = shortened("a very long name of a class", 20, 120)
    assert short.endswith("…")
    assert "a very" in short
    assert text_width(short, 20) <= 120 < text_width("a very long name", 20)
    assert shortened("cat", 20, 3) == ""


# --- plots and pages ----------------------------------------------------------------------------------------


def test_plots_know_the_fonts():
    assert plot_families(["cat"]) == ["DejaVu Sans"]
    pytest.importorskip("manimgx_fonts_cjk")
    families = plot_families(["猫", "cat", "狗"])
    assert families == ["DejaVu Sans", "sppnet NotoSansCJKVFotf"]
    from matplotlib.font_manager import FontProperties, fontManager

    assert Path(fontManager.findfont(FontProperties(family=families[1]))).name == "NotoSansCJK-VF.otf.ttc"


def test_a_page_carries_the_letters_that_a_system_may_lack():
    pytest.importorskip("manimgx_fonts_cjk")
    assert page_fonts("cat кошка") == []
    (font,) = page_fonts("猫 and 狗")
    assert font.letters == "U+72D7, U+732B"
    assert len(font.address) < 100_000
    head, data = font.address.split(",")
    assert head == "data:font/ttf;base64"
    with TTFont(io.BytesIO(base64.b64decode(data))) as cut:
        assert {ord("猫"), ord("狗")} <= set(cut.getBestCmap()) <= {ord(c) for c in "猫狗"}
