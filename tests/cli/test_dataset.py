import shutil
from pathlib import Path

import numpy as np
import pytest

from commands import fails, read_json, succeeds
from sppnet.datasets import read_dataset
from sppnet.images import read_image
from trees import coco_tree, save, scene, voc_tree, voc_xml, write


@pytest.fixture
def shapes():
    voc_tree(Path("shapes"), {"train": 3, "val": 2})
    return Path("shapes")


class TestShow:
    def test_what_was_understood(self, shapes):
        outcome = succeeds("dataset", shapes, "--json", "d.json")
        assert "shapes: voc, 2 splits: train, val" in outcome.out
        assert "photos with their boxes in out/dataset.jpg" in outcome.out
        for word in ("class", "train", "val", "all", "box side", "disc", "objects", "photos"):
            assert word in outcome.out
        assert read_image("out/dataset.jpg").shape[1] == 1280
        facts = read_json("d.json")
        assert (facts["format"], facts["images"], facts["splits"]["train"]["images"]) == ("voc", 5, 3)

    def test_one_split_on_a_sheet_of_ones_own(self, shapes):
        outcome = succeeds("dataset", "--split", "val", shapes, "--out", "sheets/val.png")
        assert "2 splits: train, val" in outcome.out
        assert Path("sheets/val.png").is_file()
        assert succeeds("dataset", "show", shapes, "--split", "val").out.count("\n") > 5

    def test_notes_and_warnings(self):
        save(Path("odd/a.jpg"), scene(1).image)
        write(Path("odd/a.xml"), voc_xml([(0, 0, 200, 50)], ["one $ of [red]a[/] kind"]))
        shutil.copy("odd/a.jpg", "odd/b.jpg")
        outcome = succeeds("dataset", "odd")
        assert "note: boxes that reached beyond their image, clipped: 1" in outcome.err
        assert "warning: the class 'one $ of [red]a[/] kind' has one box" in outcome.err
        assert "1 without annotation" in outcome.err
        assert "[red]a[/]" in outcome.out

    def test_a_photo_in_two_splits(self, shapes):
        shutil.copy(shapes / "JPEGImages/000001.jpg", shapes / "JPEGImages/000004.jpg")
        assert "warning: photos in more than one split: 1" in succeeds("dataset", shapes).err

    def test_bad_input(self, shapes):
        fails("dataset", "nowhere", says=["nowhere", "found no such folder"])
        fails("dataset", shapes, "--split", "tset", says=["no single split 'tset'", "train, val"])
        fails("dataset", shapes, "--out", "sheet.txt", says=["sheet.txt", "suffix"])
        annotation = shapes / "Annotations/000002.xml"
        write(annotation, annotation.read_text().replace("<xmin>", "<xmin>x", 1))
        fails("dataset", shapes, says=[f"{annotation}:", "<xmin>", "number"])


class TestConvert:
    @pytest.mark.parametrize("to", ["coco", "csv", "labelstudio", "voc", "yolo"])
    def test_there_and_back(self, shapes, to):
        outcome = succeeds("dataset", "convert", shapes, "--to", to, "other")
        assert "other: 5 photos with " in outcome.out
        assert "2 splits: train, val" in outcome.out
        for split in ("train", "val"):
            for one, other in zip(read_dataset(shapes, split), read_dataset("other", split), strict=True):
                np.testing.assert_allclose(one.target.boxes, other.target.boxes, atol=1e-3)
                assert one.target.labels == other.target.labels
                assert one.path.read_bytes() == other.path.read_bytes()

    def test_one_split_without_photos(self, shapes):
        succeeds("dataset", "convert", shapes, "other", "--to", "coco", "--split", "val", "--photos", "none")
        assert not list(Path("other").rglob("*.jpg"))
        assert len(read_dataset("other", photos=False)) == 2

    def test_bad_input(self, shapes):
        coco_tree(Path("there"))
        fails(
            "dataset", "convert", shapes, "there", "--to", "voc", says=["there", "found a folder with files"]
        )
        fails("dataset", "convert", "nowhere", "other", "--to", "voc", says=["nowhere", "found no such"])
        fails("dataset", "convert", shapes, "other", "--to", "tfrecord", says=["tfrecord", "--to"])
        assert not Path("other").exists()
