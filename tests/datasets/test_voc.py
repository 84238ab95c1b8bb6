import shutil
from collections import Counter

import pytest

from sppnet.datasets import dataset_splits, read_dataset
from trees import errors, only_error, save, scene, voc_tree, voc_xml, write


@pytest.fixture
def voc(tmp_path):
    """A VOC folder of two images; the annotation of the first is for the test to replace."""
    voc_tree(tmp_path, {"train": 2})
    return tmp_path


@pytest.fixture
def xml(voc):
    return voc / "Annotations" / "000001.xml"


class TestVoc:
    def test_without_a_split_everything_annotated(self, tmp_path):
        voc_tree(tmp_path)
        shutil.rmtree(tmp_path / "ImageSets")
        assert len(read_dataset(tmp_path)) == 6
        (tmp_path / "Annotations" / "000006.xml").unlink()
        dataset = read_dataset(tmp_path)
        assert (len(dataset), dataset.split, dataset.format) == (5, None, "voc")
        left = "1 file left out: 1 without annotation, first JPEGImages/000006.jpg"
        assert dataset.notes == (left,)

    @pytest.mark.parametrize("below", ["VOC2007", "VOCdevkit/VOC2007"])
    def test_nested(self, tmp_path, below):
        voc_tree(tmp_path / below)
        assert len(read_dataset(tmp_path, "val")) == 2
        voc_tree(tmp_path / below / ".." / "VOC2012")
        both = read_dataset(tmp_path, "val")  # each folder's list stands for its own files
        assert len(both) == len({sample.path for sample in both}) == 4

    def test_second_column_of_a_split(self, voc):
        write(voc / "ImageSets" / "Main" / "disc_train.txt", "000001 -1\n000002  1\n")
        assert [sample.name for sample in read_dataset(voc, "disc_train")] == ["000001", "000002"]

    def test_difficult_and_fractional(self, voc, xml):
        text = voc_xml([(9, 19, 30, 40), (0, 0, 5, 5)], ["disc", "disc"])
        text = text.replace("<difficult>0<", "<difficult>1<", 1).replace("<xmin>10<", "<xmin>10.5<")
        write(xml, text)
        target = read_dataset(voc)[0].target
        assert target.boxes.tolist() == [[9.5, 19, 30, 40], [0, 0, 5, 5]]
        assert target.difficult.tolist() == [True, False]

    def test_boxes_of_parts_are_not_objects(self, voc, xml):
        part = "<part><name>edge</name><bndbox><xmin>1</xmin></bndbox></part></object>"
        write(xml, voc_xml([(9, 19, 30, 40)], ["disc"]).replace("</object>", part))
        assert read_dataset(voc)[0].target.labels == ("disc",)

    def test_size_from_the_header_where_the_annotation_has_none(self, voc, xml):
        for text in (
            voc_xml([(100, 80, 140, 99)], ["disc"], size=None),
            voc_xml([(100, 80, 140, 99)], ["disc"]).replace("size>", "other>"),
        ):
            write(xml, text)
            assert read_dataset(voc)[0].target.boxes.tolist() == [[100, 80, 128, 96]]

    def test_boxes_beyond_the_image_are_clipped_and_counted(self, voc, xml):
        write(xml, voc_xml([(-1, -1, 30, 40), (100, 80, 140, 96), (0, 0, 128, 96)], ["disc"] * 3))
        dataset = read_dataset(voc)
        assert dataset[0].target.boxes.tolist() == [[0, 0, 30, 40], [100, 80, 128, 96], [0, 0, 128, 96]]
        assert dataset.notes == ("boxes that reached beyond their image, clipped: 2",)

    def test_negative_images_are_kept_and_counted(self, voc, xml):
        write(xml, voc_xml([], []))
        dataset = read_dataset(voc)
        assert dataset[0].target.boxes.shape == (0, 4)
        assert dataset.notes == ("images without objects: 1",)

    @pytest.mark.parametrize(
        ("box", "problem"),
        [
            ((30, 10, 20, 40), "is inverted or empty"),
            ((30, 10, 40, 10), "is inverted or empty"),
            ((128, 10, 150, 40), "lies outside the image of 128 x 96"),
            ((10, -30, 20, 0), "lies outside the image of 128 x 96"),
        ],
    )
    def test_impossible_boxes(self, voc, xml, box, problem):
        write(xml, voc_xml([(0, 0, 9, 9), box], ["disc", "square"]))
        numbers = f"{box[0] + 1} {box[1] + 1} {box[2]} {box[3]}"
        assert f"{xml}:19: box {numbers} of 'square' {problem}" in only_error(voc)

    @pytest.mark.parametrize(
        ("old", "new", "line", "found"),
        [
            ("<xmin>10<", "<xmin>ten<", 10, "found 'ten' as <xmin>, expected a number"),
            ("<xmin>10<", "<xmin>nan<", 10, "found 'nan' as <xmin>"),
            ("<xmin>10</xmin>", "", 9, "found <bndbox> without <xmin>"),
            ("bndbox", "box", 6, "found <object> without <bndbox>"),
            ("<name>disc</name>", "", 6, "found <object> without <name>"),
            ("<name>disc</name>", "<name> </name>", 6, "found an object without a name"),
            ("<difficult>0<", "<difficult>maybe<", 8, "found 'maybe' as <difficult>"),
            ("<width>128<", "<width>wide<", 3, "found 'wide' as <width>"),
            ("<ymax>40</ymax>", "<ymax>40</ymax", 14, "found malformed XML"),
            ("annotation>", "html>", 1, "found <html>, expected <annotation>"),
            ("<annotation>", '<?xml version="1.0" encoding="odd"?><annotation>', 1, "found malformed XML"),
        ],
    )
    def test_malformed(self, voc, xml, old, new, line, found):
        write(xml, voc_xml([(9, 19, 30, 40)], ["disc"]).replace(old, new))
        message = only_error(voc)
        assert message.startswith(f"{xml}:{line}: ")
        assert found in message

    def test_cut_short(self, voc, xml):
        xml.write_text("")
        assert only_error(voc).startswith(f"{xml}:1: found malformed XML")

    def test_ten_errors_are_listed_and_all_are_counted(self, voc, xml):
        write(xml, voc_xml([(9, 9, 9, 20)] * 12, ["disc"] * 12))
        write(xml.with_name("000002.xml"), "<annotation>")
        write(xml.with_name("000002.xml"), "<annotation>")
        first, *listed, last = errors(voc)
        assert first == f"{voc}: found 13 errors, expected none"
        places = [f"{xml.with_name('000002.xml')}:1", *(f"{xml}:{9 + 10 * i}" for i in range(9))]
        assert [line.split(": ")[0] for line in listed] == places
        assert last == "and 3 more"

    def test_repeated_image(self, voc):
        write(voc / "ImageSets" / "Main" / "train.txt", "000001\n\n000001\n000002\n")
        assert [sample.name for sample in read_dataset(voc, "train")] == ["000001", "000002"]

    def test_two_files_of_one_name(self, voc):
        save(voc / "JPEGImages" / "000001.png", scene(1).image)
        assert "000001.xml: found 2 files for 'Annotations/000001' (JPEGImages/000001.jpg and" in only_error(
            voc
        )

    def test_split_names_an_image_without_annotation(self, voc, xml):
        xml.unlink()
        assert "train.txt:1: found no annotation of '000001', expected" in only_error(voc, "train")

    def test_empty_split(self, voc):
        write(voc / "ImageSets" / "Main" / "val.txt", "\n")
        assert "no single split 'val', expected one of: train; or all" in only_error(voc, "val")

    def test_no_image_sets(self, voc):
        for path in (voc / "ImageSets" / "Main").iterdir():
            path.unlink()
        assert len(read_dataset(voc)) == 2
        assert "found no split 'train', expected none" in only_error(voc, "train")

    def test_boxes_that_cvat_turned(self, voc, xml):
        turned = "<attribute><name>rotation</name><value>90.0</value></attribute>"
        text = voc_xml([(20, 30, 60, 50)], ["disc"])
        write(xml, text.replace("</bndbox>", f"</bndbox><attributes>{turned}</attributes>"))
        assert read_dataset(voc)[0].target.boxes.tolist() == [[30, 20, 50, 60]]

    def test_an_empty_size_is_none(self, voc, xml):
        write(xml, voc_xml([(20, 30, 60, 50)], ["disc"]).replace(">96<", "><").replace(">128<", "> <"))
        assert read_dataset(voc)[0].target.boxes.tolist() == [[20, 30, 60, 50]]

    def test_no_images(self, voc):
        for path in (voc / "JPEGImages").iterdir():
            path.unlink()
        first, *lines = errors(voc)
        assert first.startswith(f"{voc}: found 2 bad photos of 2, expected at most 1%")
        assert f"{voc}/Annotations/000001.xml: found no image '000001' in {voc}" in lines[0]

    def test_real_data(self, shared_data):
        dataset = read_dataset(shared_data("voc2012-animals"), "train")
        assert len(dataset) == 1697
        assert dataset.notes == ()
        count = Counter(label for sample in dataset for label in sample.target.labels)
        usual = {"dog": 765, "cat": 608, "person": 579, "sheep": 509, "horse": 376, "cow": 348}
        assert {name: count[name] for name in usual} == usual  # difficult objects included
        assert sum(int(sample.target.difficult.sum()) for sample in dataset) == 430

    def test_splits(self, voc):
        write(voc / "ImageSets" / "Main" / "disc_val.txt", "")
        write(voc / "Annotations" / "000001.xml", "no XML")
        assert dataset_splits(voc) == ("train",)  # without content, a list is none
        write(voc / "ImageSets" / "Main" / "disc_val.txt", "000001 -1\n")
        assert dataset_splits(voc) == ("disc_val", "train")
        (voc / "ImageSets").rename(voc / "Lists")
        assert dataset_splits(voc) == ()
        (voc / "Annotations").rename(voc / "test")
        assert dataset_splits(voc) == ("test",)
