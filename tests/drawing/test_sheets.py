import numpy as np
import pytest
from PIL import Image

from sppnet.boxes import Target
from sppnet.datasets import read_dataset
from sppnet.datasets.records import Sample
from sppnet.drawing.colours import class_colour
from sppnet.drawing.detections import draw_region, draw_target
from sppnet.drawing.sheets import chosen_samples, contact_sheet, draw_dataset, draw_hits, message_tile, scaled
from sppnet.images import resize
from sppnet.retrieval.index import Hit
from trees import SHAPES, voc_tree


def grey(height=120, width=160):
    return np.full((height, width, 3), 128, np.uint8)


def test_contact_sheet_shrinks_pictures_into_a_grid():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
    pictures = [np.full((100 + 50 * i, 300, 3), colour, np.uint8) for i, colour in enumerate(colours)]
    sheet = contact_sheet(pictures, [f"picture {i}" for i in range(5)], columns=2, side=100)
    assert sheet.dtype == np.uint8
    assert sheet.shape == (3 * 122, 2 * 100, 3)
    for i, colour in enumerate(colours):
        row, column = divmod(i, 2)
        tile = sheet[row * 122 : row * 122 + 100, column * 100 : column * 100 + 100]
        assert tuple(tile[50, 50]) == colour
        assert tuple(tile[50, 0]) == (24, 24, 24)
        line = sheet[row * 122 + 100 : row * 122 + 122, column * 100 : column * 100 + 100]
        titles = [f"picture {n}" if n != i else "another" for n in range(5)]
        differs = (contact_sheet(pictures, titles, columns=2, side=100) != sheet).any(axis=2)
        rows, columns = np.nonzero(differs)
        assert row * 122 + 100 <= rows.min(), "the title stands below its picture"
        assert rows.max() < (row + 1) * 122
        assert column * 100 <= columns.min() <= columns.max() < (column + 1) * 100
        assert (line > 150).any(), "the title is light"
    assert (sheet[2 * 122 :, 100:] == 24).all(), "the last place is empty"


def test_contact_sheet_of_one_pixel_and_of_nothing():
    sheet = contact_sheet([np.zeros((1, 1, 3), np.uint8)], ["dot"], columns=1, side=50)
    assert sheet.shape == (72, 50, 3)
    assert contact_sheet([], [], columns=3, side=50).shape == (0, 150, 3)
    with pytest.raises(ValueError, match="argument"):
        contact_sheet([grey()], [])


def test_a_long_title_loses_its_end():
    sheet = contact_sheet([grey()] * 2, ["x" * 300, "b"], columns=2, side=100)
    alone = contact_sheet([grey()] * 2, ["x" * 300, ""], columns=2, side=100)
    assert (sheet[100:, 100:] != alone[100:, 100:]).any()
    assert (alone[100:, 96:] == 24).all(), "it does not run into the next"


def test_hits_lie_on_a_sheet_behind_the_query_each_with_its_region(tmp_path):
    Image.fromarray(grey(960, 1280)).save(tmp_path / "large.png")
    box = np.array([40, 30, 120, 100], np.float32)
    hits = [Hit("large.png", 8 * box, 0.9), Hit("none.png", box, 0.8)]
    sheet, failures = draw_hits(grey(), box, hits, tmp_path)
    assert len(failures) == 1
    assert "none.png" in failures[0]
    large = resize(grey(960, 1280), 360, 480)
    expected = contact_sheet(
        [draw_region(grey(), box), draw_region(large, 3 * box)], ["query", "1  0.900  large.png"]
    )
    assert np.array_equal(sheet, expected)


# --- data sets ----------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    voc_tree(tmp_path / "voc", {"train": 8})
    return read_dataset(tmp_path / "voc", "train")


def test_a_data_set_is_drawn_with_named_boxes(data):
    sheet = draw_dataset(data)
    assert sheet.shape == (2 * 342, 1280, 3)
    first = data[0]
    tile = draw_target(np.asarray(Image.open(first.path)), first.target, data.classes)
    y, x = (320 - tile.shape[0]) // 2, (320 - tile.shape[1]) // 2
    assert np.array_equal(sheet[y : y + tile.shape[0], x : x + tile.shape[1]], tile)
    for shape in SHAPES:
        assert (sheet == class_colour(shape, data.classes)).all(axis=2).any()
    np.testing.assert_array_equal(sheet, draw_dataset(data))
    assert draw_dataset(data, 3).shape == (342, 1280, 3)


def test_a_photo_that_cannot_be_read_has_a_tile_that_says_so(data):
    data[1].path.write_bytes(b"no photo")
    data[2].path.unlink()
    sheet = draw_dataset(data)
    for i in (1, 2):
        tile = sheet[:320, 320 * i : 320 * i + 320]
        assert (tile == 70).all(axis=2).mean() > 0.7
        assert (tile > 200).all(axis=2).any()
    assert not (sheet[:320, :320] == 70).all(axis=2).any()


def some(*labels):
    """Samples with objects of these classes, by their first letters."""
    boxes = [[0, 0, 9, 9]]
    return [Sample(f"{i}", grey(), Target.of(boxes * len(each), list(each))) for i, each in enumerate(labels)]


def test_chosen_are_samples_of_every_class_and_of_all_parts():
    data = some(*["a"] * 40, "ab", *["a"] * 20, "c", "", "")
    assert chosen_samples(data, 2) == [40, 61], "rare classes first"
    chosen = chosen_samples(data, 6)
    assert {40, 61} < set(chosen)
    assert len(set(chosen)) == 6
    assert chosen == sorted(chosen)
    assert max(np.diff(chosen)) < 25
    assert chosen_samples(data, 100) == list(range(64))
    assert chosen_samples([], 5) == []
    assert len(chosen_samples(some(*"abcdefgh"), 3)) == 3


def test_scaled_and_message():
    small, target = scaled(grey(400, 800), Target.of([[80, 40, 400, 200]], ["cat"]), 200)
    assert small.shape == (100, 200, 3)
    assert target.boxes.tolist() == [[20, 10, 100, 50]]
    same, _ = scaled(grey(), Target.of([], []), 200)
    np.testing.assert_array_equal(same, grey())
    assert message_tile("cannot be read: " + "word " * 500, 100).shape == (100, 100, 3)
