import os

import pytest

from sppnet.datasets import dataset_splits, read_dataset
from trees import only_error, save, scene, write


class TestCsv:
    def table(self, root, *rows, header="path,x1,y1,x2,y2,label,split"):
        for n in (1, 2):
            save(root / f"{n}.png", scene(n).image)
        return write(root / "boxes.csv", "\n".join([header, *rows]) + "\n")

    def test_boxes_as_they_are(self, tmp_path):
        rows = ("1.png,10,5.5,20,40,cat,train", '"2.png",0,0,128,96,dog,val', "1.png,1,2,3,4,dog,train")
        data = read_dataset(self.table(tmp_path, *rows), "all")
        assert data.classes == ("cat", "dog")
        assert [sample.name for sample in data] == ["1.png", "2.png"]
        assert data[0].target.boxes.tolist() == [[10, 5.5, 20, 40], [1, 2, 3, 4]]
        assert data[0].target.labels == ("cat", "dog")
        (only,) = read_dataset(tmp_path / "boxes.csv", "val")
        assert (only.path, only.target.labels) == (tmp_path / "2.png", ("dog",))

    def test_boxes_without_labels(self, tmp_path):
        data = read_dataset(self.table(tmp_path, "1.png,1,2,30,40", header="path,x1,y1,x2,y2"))
        assert data[0].target.labels == ("box",)

    def test_boxes_beyond_the_image_are_clipped_and_counted(self, tmp_path):
        data = read_dataset(self.table(tmp_path, "1.png,-5,0,500,96,cat,"))
        assert data[0].target.boxes.tolist() == [[0, 0, 128, 96]]
        assert data.notes == ("boxes that reached beyond their image, clipped: 1",)

    @pytest.mark.parametrize(
        ("row", "says"),
        [
            ("1.png,5,5,5,9,cat,", ":2: box 5, 5, 5, 9 of 'cat' is inverted or empty"),
            ("1.png,x,5,5,9,cat,", ":2: found x, 5, 5, 9, expected the numbers"),
            ("1.png,5,5", ":2: found a row of length 3, expected 7 as in line 1"),
            ("3.png,1,1,5,9,cat,", ":2: found no image '3.png'"),
            ("1.png,nan,1,5,9,cat,", "is inverted or empty"),
        ],
    )
    def test_bad_rows(self, row, says, tmp_path):
        assert says in only_error(self.table(tmp_path, row))

    def test_bad_files(self, tmp_path):
        file = self.table(tmp_path, "1.png,1,2", header="path,x1,y1")
        assert "found a .csv file of none of the formats known here" in only_error(file)
        file = self.table(tmp_path, "1.png,1,2,30,40,cat,train")
        assert "found no single split 'test', expected one of: train; or all" in only_error(file, "test")
        assert "found no image, expected at least one" in only_error(self.table(tmp_path))

    def test_splits(self, tmp_path):
        file = self.table(tmp_path, "gone.png,x,y,,,cat,val ", "1.png,1,2,30,40,cat,train", "1.png,1,2,3,4,,")
        assert dataset_splits(file) == ("train", "val")
        assert dataset_splits(self.table(tmp_path, "1.png,1,2,30,40", header="path,x1,y1,x2,y2")) == ()

    def test_spaces_about_names(self, tmp_path):
        data = read_dataset(self.table(tmp_path, "1.png, 1, 2, 30, 40, sea lion , val "), "val")
        assert data[0].target.labels == ("sea lion",)

    @pytest.mark.parametrize(
        ("header", "expected"),
        [
            ("path,x1,y1,x2,y2,x1", "expected path, x1, y1, x2 and y2 once each"),
            ("path,x1,y1,x2,y2,label,label", "and label at most once"),
        ],
    )
    def test_columns_that_come_twice(self, tmp_path, header, expected):
        file = self.table(tmp_path, "1.png,1,2,30,40,5,5"[: 2 * len(header.split(","))], header=header)
        assert expected in only_error(file)

    def test_bytes_that_are_no_text(self, tmp_path):
        file = self.table(tmp_path)
        file.write_bytes(b"path,x1,y1,x2,y2,label\n1.png,1,2,30,40,caf\xe9\n")
        assert only_error(file).startswith(f"{file}:2: found bytes that are no text in UTF-8")
        os.rename(tmp_path / "1.png", os.fsencode(tmp_path) + b"/\xe9.png")
        file.write_bytes(b"path,x1,y1,x2,y2\n\xe9.png,1,2,30,40\n")
        assert read_dataset(file)[0].target.boxes.tolist() == [[1, 2, 30, 40]]

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    def test_encodings(self, tmp_path, encoding):
        file = self.table(tmp_path)
        os.rename(tmp_path / "1.png", tmp_path / "ü (1).png")
        file.write_bytes("path,x1,y1,x2,y2,label\r\nü (1).png,1,2,30,40,猫\r\n".encode(encoding))
        (sample,) = read_dataset(file)
        assert (sample.target.labels, sample.target.boxes.tolist()) == (("猫",), [[1, 2, 30, 40]])
