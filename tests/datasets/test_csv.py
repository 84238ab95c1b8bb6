import os

import numpy as np
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

    def test_rows_without_a_split_are_counted(self, tmp_path):
        file = self.table(tmp_path, "1.png,1,2,30,40,cat,train", "2.png,1,2,3,4,cat,")
        data = read_dataset(file)
        assert (len(data), data.split, data.notes) == (1, "train", ("rows without a split, left out: 1",))
        assert len(read_dataset(file, "all")) == 2

    def test_rows_of_one_photo_that_state_two_sizes(self, tmp_path):
        rows = ("1.png,1,2,30,40,a,128,96", "1.png,20,40,60,80,b,256,192", "1.png,3,4,30,40,c,,")
        header = "path,x1,y1,x2,y2,label,width,height"
        table = self.table(tmp_path, *rows, header=header)
        (sample,) = read_dataset(table)
        assert sample.target.labels == ("a", "b", "c")
        assert sample.target.boxes.tolist() == [[1, 2, 30, 40], [10, 20, 30, 40], [3, 4, 30, 40]]
        (tmp_path / "1.png").unlink()
        write(table, "\n".join([header, *rows[:2]]))
        with pytest.raises(
            ValueError, match=r"csv:3: found a photo of 256 x 192, expected 128 x 96 as in .*:2"
        ):
            read_dataset(table, photos=False)

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


class TestOtherTables:
    """Tables of other tools: tests/datasets/test_tools.py draws them whole."""

    def table(self, root, text, name="boxes.csv"):
        save(root / "a b.png", scene(1).image)
        save(root / "b.png", scene(2).image)
        return write(root / name, text)

    @pytest.mark.parametrize(
        "text",
        [
            "filename,width,height,class,xmin,ymin,xmax,ymax\na b.png,128,96,cat,1,2,30,40\n",
            'Filename;Class;XMin;YMin;XMax;YMax\r\n"a b.png";cat;1,0;2;30;40\r\n',
            "image_path\txmin\tymin\txmax\tymax\tlabel\na b.png\t1\t2\t30\t40\tcat\n",
            ",image,xmin,ymin,xmax,ymax,label\n0,a b.png,1,2,30,40,cat\n",
            "a b.png,1,2,30,40,cat\n",
            "a b.png;1;2;30;40;cat\n",
            "ImageID,LabelName,XMin,XMax,YMin,YMax\na b,cat,0.0078125,0.234375,0.02083333333,0.41666666667\n",
            "./old/place/a b.png,1,2,30,40,cat\n",
            "path,x1,y1,x2,y2,label,score,width,height\n.\\a b.png,1,2,30,40,cat,0.5,128,96\n",
        ],
    )
    def test_one_box(self, text, tmp_path):
        (sample,) = read_dataset(self.table(tmp_path, text))
        assert (sample.path.name, sample.target.labels) == ("a b.png", ("cat",))
        np.testing.assert_allclose(sample.target.boxes, [[1, 2, 30, 40]], atol=1e-5)

    def test_images_without_boxes(self, tmp_path):
        text = "b.png,,,,,\na b.png,1,2,30,40,cat\n"
        data = read_dataset(self.table(tmp_path, text))
        assert [(s.path.name, len(s.target.labels)) for s in data] == [("b.png", 0), ("a b.png", 1)]
        assert data.notes == ("images without objects: 1",)

    def test_tables_named_after_splits(self, tmp_path):
        header = "filename,width,height,class,xmin,ymin,xmax,ymax\n"
        self.table(tmp_path, f"{header}a b.png,128,96,cat,1,2,30,40\n", "train_labels.csv")
        self.table(tmp_path, f"{header}b.png,128,96,cat,1,2,30,40\n", "test_labels.csv")
        assert dataset_splits(tmp_path) == ("test", "train")
        assert [s.path.name for s in read_dataset(tmp_path, "train")] == ["a b.png"]
        assert len(read_dataset(tmp_path, "all")) == 2
        self.table(tmp_path, f"{header}b.png,128,96,cat,1,2,30,40\n", "more.csv")
        assert "expected one table of boxes; name it" in only_error(tmp_path)

    def test_flags_and_names_that_were_made_safe(self, tmp_path):
        text = (
            "path,x1,y1,x2,y2,label,difficult,crowd\na b.png,1,2,30,40,'=1+1,1,0\na b.png,1,2,9,9,'t,0,true\n"
        )
        (sample,) = read_dataset(self.table(tmp_path, text))
        assert sample.target.labels == ("=1+1", "'t")
        assert sample.target.difficult.tolist() == [True, False]
        assert sample.target.crowd.tolist() == [False, True]

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            (
                "filename,width,height,class,xmin,ymin,xmax,ymax\nb.png,x,96,cat,1,2,3,4",
                ":2: found the height '96' and",
            ),
            (
                "filename,width,height,class,xmin,ymin,xmax,ymax\nb.png,500,96,cat,1,2,3,4",
                ":2: annotated as 500 x 96",
            ),
            (
                "image_path,xmin,ymin,xmax,ymax,label\nb.png,1,2,3,,cat",
                ":2: found 1, 2, 3, , expected the numbers",
            ),
            ("b.png,1,2,30,40,cat\nb.png,1,2,30,cat", ":2: found a row of length 5, expected 6"),
            ("b.png,1,2,30,40,cat\nc.png,1,2,30,40,cat", ":2: found no image 'c.png'"),
            ("b.png,40,2,30,40,cat", ":1: box 40, 2, 30, 40 of 'cat' is inverted or empty"),
            ("image,1,2,3,4,cat", "found a .csv file of none of the formats"),
            ("name,age\nx,3", "found a .csv file of none of the formats"),
        ],
    )
    def test_bad_tables(self, text, says, tmp_path):
        assert says in only_error(self.table(tmp_path, text))
