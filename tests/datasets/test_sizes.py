import numpy as np
import pytest
from PIL import Image

from sppnet.datasets import read_dataset
from sppnet.datasets.sizes import Frame, frame_of, turned
from sppnet.images import ImageHeader, read_image
from trees import errors, only_error, save, scene, voc_xml, write

ORIENTATION = 0x0112
HEIGHT, WIDTH = 40, 60


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_as_pixels_do(tmp_path, orientation):
    """The box of a bright rectangle, turned, is where the image reader shows the rectangle."""
    x1, y1, x2, y2 = 5, 8, 25, 14
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[y1:y2, x1:x2] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    rows, columns = np.nonzero(read_image(tmp_path / "a.png")[:, :, 0])
    seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    boxes = np.array([(x1, y1, x2, y2)], np.float64)
    found = turned(boxes, orientation, np.array([HEIGHT * 1.0]), np.array([WIDTH * 1.0]))
    assert found.tolist() == [seen]


@pytest.mark.parametrize(
    ("annotated", "header", "frame"),
    [
        ((40, 60), (40, 60, 1), Frame.SEEN),
        (None, (40, 60, 1), Frame.SEEN),
        ((80, 120), (40, 60, 1), Frame.SEEN),
        ((3000, 4000), (1000, 1333, 1), Frame.SEEN),
        ((1000, 1333), (3000, 4000, 1), Frame.SEEN),
        ((60, 40), (40, 60, 1), None),
        ((40, 63), (40, 60, 1), None),
        ((64, 64), (48, 64, 1), None),
        ((60, 40), (40, 60, 6), Frame.SEEN),
        ((40, 60), (40, 60, 6), Frame.STORED),
        ((20, 30), (40, 60, 8), Frame.STORED),
        ((30, 20), (40, 60, 8), Frame.SEEN),
        ((40, 40), (40, 40, 5), Frame.EITHER),
        ((40, 60), (40, 60, 3), Frame.EITHER),
        ((60, 40), (40, 60, 2), None),
        ((50, 60), (40, 60, 7), None),
        (None, (40, 60, 6), Frame.EITHER),
        ((100, 101), (100, 101, 6), Frame.STORED),  # nearly square, but exactly the one
        ((50, 50), (100, 101, 6), Frame.EITHER),
    ],
)
def test_what_was_annotated(annotated, header, frame):
    assert frame_of(annotated, ImageHeader(*header)) is frame


def photo(root, name, orientation=1, size=(HEIGHT, WIDTH), annotated=(HEIGHT, WIDTH), box=(5, 8, 25, 14)):
    """Save a photo that is stored in a size, and its annotation."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    root.mkdir(exist_ok=True)
    Image.fromarray(scene(1, *size).image).save(root / f"{name}.jpg", exif=exif)
    write(root / f"{name}.xml", voc_xml([box], ["disc"], annotated))


class TestRead:
    def boxes(self, root):
        return {sample.name: sample.target.boxes[0].tolist() for sample in read_dataset(root)}

    def test_turned(self, tmp_path):
        photo(tmp_path, "a", 6)
        photo(tmp_path, "b", 1)
        data = read_dataset(tmp_path)
        assert [sample.size for sample in data] == [(WIDTH, HEIGHT), (HEIGHT, WIDTH)]
        assert self.boxes(tmp_path) == {"a": [40 - 14, 5, 40 - 8, 25], "b": [5, 8, 25, 14]}
        assert data.notes == ("photos turned by EXIF after they were annotated, boxes turned with them: 1",)

    def test_shrunk(self, tmp_path):
        photo(tmp_path, "a", annotated=(80, 120))
        assert self.boxes(tmp_path) == {"a": [2.5, 4, 12.5, 7]}
        assert read_dataset(tmp_path).notes == ("photos of another scale than annotated, boxes scaled: 1",)

    def test_turned_and_shrunk(self, tmp_path):
        photo(tmp_path, "a", 8, annotated=(80, 120))
        assert self.boxes(tmp_path) == {"a": [4, (120 - 25) / 2, 7, (120 - 5) / 2]}

    @pytest.mark.parametrize(
        ("annotated", "box"), [((40, 60), [15, 26, 35, 32]), ((60, 40), [25, 8, 45, 14])]
    )
    def test_upside_down_as_the_others(self, tmp_path, annotated, box):
        """Where the sizes do not tell, the photos that do tell how the tool works."""
        photo(tmp_path, "a", 3, box=(25, 8, 45, 14))
        photo(tmp_path, "b", 6, annotated=annotated)
        assert self.boxes(tmp_path)["a"] == box

    def test_nothing_tells(self, tmp_path):
        photo(tmp_path, "a", 3)
        photo(tmp_path, "b", 6, size=(40, 40), annotated=(40, 40))
        data = read_dataset(tmp_path)
        assert data[0].target.boxes.tolist() == data[1].target.boxes.tolist() == [[5, 8, 25, 14]]
        (note,) = data.notes
        assert note.startswith("photos turned by EXIF, of which sizes do not tell")
        assert note.endswith(": 2")

    def test_another_photo(self, tmp_path):
        photo(tmp_path, "a", annotated=(60, 60))
        photo(tmp_path, "b")
        assert only_error(tmp_path) == (
            f"{tmp_path / 'a.xml'}: annotated as 60 x 60, the photo {tmp_path / 'a.jpg'} is 60 x 40"
        )
        data = read_dataset(tmp_path, max_bad=0.5)
        assert [sample.name for sample in data] == ["b"]
        (bad,) = data.notes  # and not once more, as a photo without annotation
        assert bad.startswith("photos that are missing, unreadable or of another size, left out (")
        assert "annotated as 60 x 60" in bad
        assert bad.endswith("): 1")

    def test_bad_photos_are_listed(self, tmp_path):
        for number in range(12):
            photo(tmp_path, f"p{number:02d}")
            if number % 2:
                (tmp_path / f"p{number:02d}.jpg").unlink()
        (tmp_path / "p00.jpg").write_bytes(b"no photo")
        first, *lines = errors(tmp_path)
        assert first.startswith(f"{tmp_path}: found 7 bad photos of 12, expected at most 1%")
        assert len(lines) == 7
        assert lines[0].startswith(f"{tmp_path / 'p00.jpg'}: found a file that starts with b'no photo'")
        assert len(read_dataset(tmp_path, max_bad=7 / 12)) == 5
        with pytest.raises(ValueError, match=r"found 1.5 as max_bad, expected a share from 0 to 1"):
            read_dataset(tmp_path, max_bad=1.5)

    def test_without_photos(self, tmp_path):
        photo(tmp_path, "a", 6)
        expected = [[5, 8, 25, 14]]
        data = read_dataset(tmp_path, photos=False)  # nothing is held against the photo
        assert (data[0].size, data[0].target.boxes.tolist()) == ((HEIGHT, WIDTH), expected)
        (tmp_path / "a.jpg").unlink()
        data = read_dataset(tmp_path, photos=False)
        assert (data[0].size, data[0].target.boxes.tolist(), data.notes) == ((HEIGHT, WIDTH), expected, ())
        write(tmp_path / "a.xml", voc_xml([(5, 8, 25, 14)], ["disc"], None))
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.jpg")
        data = read_dataset(tmp_path, photos=False)  # the photo knows what the annotation does not
        assert (data[0].size, data[0].target.boxes.tolist()) == ((HEIGHT, WIDTH), expected)
        (tmp_path / "a.jpg").unlink()
        message = "a.xml: found no size of the image, expected one, or its photo"
        with pytest.raises(ValueError, match=message):
            read_dataset(tmp_path, photos=False)

    def test_yolo_is_of_the_upright_photo(self, tmp_path):
        photo(tmp_path, "a", 6)
        (tmp_path / "a.xml").unlink()
        write(tmp_path / "a.txt", "0 0.5 0.25 1 0.5\n")
        write(tmp_path / "classes.txt", "disc\n")
        data = read_dataset(tmp_path)
        assert data[0].target.boxes.tolist() == [[0, 0, 40, 30]]
        assert data.notes == ("photos turned by EXIF, boxes taken as of the upright photo: 1",)
        (same,) = read_dataset(tmp_path, photos=False)  # shares of the photo's size, which it must tell
        assert same.target.boxes.tolist() == [[0, 0, 40, 30]]


def test_an_object_annotated_twice(tmp_path):
    save(tmp_path / "a.jpg", scene(1).image)
    boxes = [(5, 8, 25, 14), (5, 8, 25, 14), (5, 8, 25, 15), (5, 8, 25, 14)]
    write(tmp_path / "a.xml", voc_xml(boxes, ["disc", "disc", "disc", "cat"]))
    data = read_dataset(tmp_path)
    assert data[0].target.labels == ("disc", "disc", "cat")
    assert data[0].target.boxes[:, 3].tolist() == [14, 15, 14]
    assert data.notes == ("objects annotated twice, merged: 1",)
