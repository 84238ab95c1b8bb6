import json
import shutil
import time
from pathlib import Path

import pytest

from layouts import STEMS, jpeg, xml
from sppnet.datasets import read_dataset
from sppnet.datasets.findings import Record
from sppnet.datasets.tree import Names, Tree, clean, find_photo, suffix_of, tail_of
from sppnet.errors import DatasetError
from trees import write


def found(root, file, source="ann/a.json", split=None, splits=(), stem=""):
    """Return the photo that is found for a name, relative to the root."""
    record = Record("", file, root / source, "a", None, (), split=split, stem=stem)
    path = find_photo(Tree(root), record, splits)
    return None if path is None else Path(path).relative_to(root).as_posix()


@pytest.fixture
def tree(tmp_path):
    """Return a function that makes empty files below a folder."""

    def make(*names):
        for name in names:
            write(tmp_path / name, "")
        return tmp_path

    return make


class TestFindPhoto:
    @pytest.mark.parametrize(
        "written",
        [
            "a b.jpg",
            "./a b.jpg",
            "../a b.jpg",
            "x/a b.jpg",
            "C:\\x\\a b.jpg",
            "a%20b.jpg",
            "A B.JPG",
            "a b.png",
        ],
    )
    def test_ways_to_write(self, tree, written):
        assert found(tree("photos/a b.jpg", "photos/b.jpg"), written) == "photos/a b.jpg"

    def test_absolute(self, tree, tmp_path):
        root = tree("set/a.jpg", "other/a.jpg")
        record = Record("", str(root / "other/a.jpg"), root / "set/x.json", "", None, ())
        assert find_photo(Tree(root / "set"), record, ()) == str(root / "other/a.jpg")

    def test_outside_the_folder(self, tree):
        root = tree("set/b.jpg", "other/a.jpg")
        record = Record("", "../other/a.jpg", root / "set/x.json", "", None, ())
        assert find_photo(Tree(root / "set"), record, ()) == str(root / "other/a.jpg")

    def test_none(self, tree):
        assert found(tree("b.jpg"), "a.jpg") is found(tree("b.jpg"), "") is None

    def test_letters(self, tree):
        root = tree("p/A.jpg", "p/a.JPG", "p/u\u0308.jpg")
        assert found(root, "A.jpg") == "p/A.jpg"
        assert found(root, "a.JPG") == "p/a.JPG"
        assert found(root, "\u00fc.jpg") == "p/u\u0308.jpg"
        with pytest.raises(DatasetError, match=r"found 2 files for 'a.jpg' \(p/A.jpg and p/a.JPG\)"):
            found(root, "a.jpg")

    def test_most_folders_that_agree(self, tree):
        root = tree("x/b/c/1.jpg", "x/a/c/1.jpg", "c/1.jpg")
        assert found(root, "a/c/1.jpg") == "x/a/c/1.jpg"
        assert found(root, "/elsewhere/b/c/1.jpg") == "x/b/c/1.jpg"

    def test_nearest(self, tree):
        root = tree("x/1.jpg", "x/y/1.jpg", "z/1.jpg", "z/y/y/y/1.jpg")
        assert found(root, "1.jpg", "x/a.json") == "x/1.jpg"
        assert found(root, "1.jpg", "z/y/a.json") == "z/1.jpg"
        with pytest.raises(DatasetError, match=r"found 2 files for '1.jpg' \(x/1.jpg and z/1.jpg\)"):
            found(root, "1.jpg", "a.json")

    def test_splits(self, tree):
        root = tree("train/1.jpg", "valid/1.jpg", "1.jpg", "valid/2.jpg", "more/2.jpg", "valid/3.jpg")
        splits = ("train", "val")
        assert found(root, "1.jpg", split="train", splits=splits) == "train/1.jpg"
        assert found(root, "1.jpg", split="val", splits=splits) == "valid/1.jpg"
        assert found(root, "2.jpg", split="train", splits=splits) == "more/2.jpg"
        assert found(root, "3.jpg", split="train", splits=splits) is None
        assert found(root, "3.jpg") == "valid/3.jpg"

    def test_stems_before_names(self, tree):
        root = tree("p/1.jpg", "p/2.jpg")
        assert found(root, "2.jpg", stem="xml/1") == "p/1.jpg"
        assert found(root, "2.jpg", stem="xml/3") == "p/2.jpg"

    def test_masks_come_last(self, tree):
        root = tree("photos/1.jpg", "SegmentationClass/1.png", "masks/2.png")
        assert found(root, "", stem="Annotations/1") == "photos/1.jpg"
        assert found(root, "", stem="Annotations/2") == "masks/2.png"


class TestManyOfOneName:
    """Frames of videos have the same names in every folder."""

    def test_the_same_is_found(self, tree):
        root = tree(*(f"p/{clip}/1.jpg" for clip in range(20)), "p/0/1.png", "masks/5/1.png")
        assert found(root, "", stem="xml/7/1") == "p/7/1.jpg"
        assert found(root, "", stem="xml/5/1") == "p/5/1.jpg"
        assert found(root, "1.png", stem="xml/0/1") == "p/0/1.png"
        assert found(root, "x/12/1.jpg") == "p/12/1.jpg"
        assert found(root, "q/1.jpg", "p/3/a.json") == "p/3/1.jpg"
        with pytest.raises(DatasetError, match=r"found 20 files for 'q/1.jpg'"):
            found(root, "q/1.jpg")

    def test_in_little_time(self):
        names = [f"p/{clip:03d}/{frame:03d}.jpg" for clip in range(300) for frame in range(30)]
        known = Names(Path(), names)
        start = time.perf_counter()
        for name in names:
            written = f"x/{name[2:-4]}"
            (first, *_) = known.called(written, name[-7:-4], by_stem=True)
            assert known.find(first, written, Path("a.json"), None, ()) == name
        assert time.perf_counter() - start < 5  # all of one name for each would take minutes


def test_paths():
    assert clean(" C:\\a\\b.jpg ") == "/a/b.jpg"
    assert clean("./a:b.jpg") == "./a:b.jpg"
    assert tail_of("../a//b/./c.jpg") == "a/b/c.jpg"
    assert [suffix_of(name) for name in ("a.JPG", "a.b/c", ".hidden", "x.tar.GZ")] == [".jpg", "", "", ".gz"]


def test_a_file_alone_walks_no_folder_that_it_need_not(tmp_path):
    """What lies around a file may be a lot, or forbid to be walked."""
    (tmp_path / "circle").mkdir()
    (tmp_path / "circle" / "back").symlink_to(tmp_path)
    (tmp_path / "1.jpg").write_bytes(jpeg(STEMS[0]))
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 64, "height": 48}],
        "annotations": [],
        "categories": [],
    }
    file = write(tmp_path / "a.json", json.dumps(content))
    assert len(read_dataset(file)) == 1
    with pytest.raises(DatasetError, match="found a circle"):
        read_dataset(tmp_path)


def test_the_folder_above_is_not_looked_into_for_more_than_annotations(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / f"{STEMS[0]}.jpg").write_bytes(jpeg(STEMS[0]))
    write(tmp_path / "set" / f"{STEMS[0]}.xml", xml(STEMS[0]).decode())
    assert read_dataset(tmp_path / "set")[0].path == tmp_path / "photos" / f"{STEMS[0]}.jpg"
    shutil.move(tmp_path / "set" / f"{STEMS[0]}.xml", tmp_path / "set" / "deeper.xml")
    (tmp_path / "set" / "xml").mkdir()
    shutil.move(tmp_path / "set" / "deeper.xml", tmp_path / "set" / "xml" / f"{STEMS[0]}.xml")
    with pytest.raises(DatasetError, match="found no image"):
        read_dataset(tmp_path / "set")
