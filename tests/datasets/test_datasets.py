import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sppnet.datasets import read_dataset
from sppnet.errors import DatasetError
from sppnet.images import read_image
from trees import (
    SHAPES,
    SPLITS,
    coco_json,
    coco_tree,
    save,
    scene,
    scenes,
    voc_tree,
    voc_xml,
    write,
    yolo_tree,
)

TREES = {"voc": voc_tree, "coco": coco_tree, "yolo": yolo_tree}
DATA = Path(os.environ.get("SPPNET_DATA", Path(__file__).parents[2] / "shared" / "data"))


def errors(root, split=None, **options):
    """Return the lines of the error that reading must end in."""
    with pytest.raises(DatasetError) as caught:
        read_dataset(root, split, **options)
    return str(caught.value).splitlines()


def only_error(root, split=None, **options):
    lines = errors(root, split, **options)
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def voc(tmp_path):
    """A VOC folder of two images; the annotation of the first is for the test to replace."""
    voc_tree(tmp_path, {"train": 2})
    return tmp_path


@pytest.fixture
def xml(voc):
    return voc / "Annotations" / "000001.xml"


@pytest.fixture
def coco(tmp_path):
    """A COCO folder of two images, and a function to change its annotations."""
    coco_tree(tmp_path, {"train": 2})
    path = tmp_path / "annotations" / "instances_train.json"

    def change(function):
        content = json.loads(path.read_text())
        function(content)
        path.write_text(json.dumps(content))
        return path

    return change


@pytest.fixture
def yolo(tmp_path):
    yolo_tree(tmp_path, {"train": 2})
    return tmp_path


@pytest.fixture
def label(yolo):
    return yolo / "labels" / "train" / "000001.txt"


class TestEveryFormat:
    @pytest.mark.parametrize("format", TREES)
    @pytest.mark.parametrize("split", SPLITS)
    def test_reads_what_was_drawn(self, tmp_path, format, split):
        drawn = TREES[format](tmp_path)[split]
        dataset = read_dataset(tmp_path, split)
        assert (len(dataset), dataset.split, dataset.root) == (SPLITS[split], split, tmp_path)
        assert dataset.notes == ()
        assert dataset.classes == tuple(sorted({label for s in drawn.values() for label in s.labels}))
        assert list(dataset.image_ids) == [sample.name for sample in dataset]
        for sample, (name, (image, boxes, labels)) in zip(dataset, drawn.items(), strict=True):
            assert sample.name == (str(int(name)) if format == "coco" else name)
            assert read_image(sample.path).shape == image.shape
            assert sample.target.boxes.dtype == np.float32
            np.testing.assert_allclose(sample.target.boxes, boxes, atol=1e-4)
            assert sample.target.labels == tuple(labels)
            assert not sample.target.ignored.any()

    def test_is_a_sequence(self, tmp_path):
        voc_tree(tmp_path)
        dataset = read_dataset(tmp_path, "train")
        part = dataset[1:3]
        assert [sample.name for sample in part] == [dataset[1].name, dataset[2].name]
        assert part.classes == dataset.classes
        assert dataset[-1] in dataset

    @pytest.mark.parametrize("format", TREES)
    def test_unknown_split_lists_the_others(self, tmp_path, format):
        TREES[format](tmp_path)
        assert only_error(tmp_path, "test").endswith(
            "found no single split 'test', expected one of: train, val"
        )

    @pytest.mark.parametrize("format", TREES)
    def test_missing_image(self, tmp_path, format):
        TREES[format](tmp_path, {"train": 3})
        next(tmp_path.rglob("000002.jpg")).unlink()
        assert "000002" in only_error(tmp_path)

    @pytest.mark.parametrize("format", ["coco", "yolo"])
    def test_a_split_must_be_chosen(self, tmp_path, format):
        TREES[format](tmp_path)
        assert only_error(tmp_path).endswith("found 2 splits and none chosen, expected one of: train, val")

    def test_unrecognised(self, tmp_path):
        message = only_error(tmp_path)
        for part in (str(tmp_path), "Annotations/*.xml", "instances_*.json", "data.yaml", "classes.txt"):
            assert part in message
        assert "data.yaml" not in only_error(tmp_path, format="voc")

    def test_two_formats_at_once(self, tmp_path):
        voc_tree(tmp_path, {"train": 2})
        yolo_tree(tmp_path, {"train": 3})
        assert "found voc and yolo data, expected format=" in only_error(tmp_path)
        assert len(read_dataset(tmp_path, format="voc")) == 2
        assert len(read_dataset(tmp_path, format="yolo")) == 3

    def test_unknown_format(self, tmp_path):
        with pytest.raises(ValueError, match="found the format 'xml', expected one of voc, coco, yolo"):
            read_dataset(tmp_path, format="xml")

    def test_no_root(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="gone: found no such folder or file"):
            read_dataset(tmp_path / "gone")


class TestVoc:
    def test_without_a_split_everything_annotated(self, tmp_path):
        voc_tree(tmp_path)
        assert len(read_dataset(tmp_path)) == 6
        (tmp_path / "Annotations" / "000006.xml").unlink()
        dataset = read_dataset(tmp_path)
        assert (len(dataset), dataset.split) == (5, None)
        assert dataset.notes == ("images without an annotation file, left out: 1",)

    @pytest.mark.parametrize("below", ["VOC2007", "VOCdevkit/VOC2007"])
    def test_nested(self, tmp_path, below):
        voc_tree(tmp_path / below)
        assert len(read_dataset(tmp_path, "val")) == 2
        voc_tree(tmp_path / below / ".." / "VOC2012")
        assert "found several VOC folders" in only_error(tmp_path, "val")

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
        first, *listed, last = errors(voc)
        assert first == f"{voc}: found 13 errors, expected none"
        assert [line.split(": ")[0] for line in listed] == [f"{xml}:{9 + 10 * i}" for i in range(10)]
        assert last == "and 3 more"

    def test_repeated_image(self, voc):
        write(voc / "ImageSets" / "Main" / "train.txt", "000001\n\n000001\n")
        assert f"{voc}/ImageSets/Main/train.txt:3: found image '000001' again" in only_error(voc, "train")

    def test_two_files_of_one_name(self, voc):
        save(voc / "JPEGImages" / "000001.png", scene(1).image)
        assert "000001.xml: found 2 images for '000001'" in only_error(voc)

    def test_split_names_an_image_without_annotation(self, voc, xml):
        xml.unlink()
        assert "train.txt:1: found no annotation of '000001', expected" in only_error(voc, "train")

    def test_empty_split(self, voc):
        write(voc / "ImageSets" / "Main" / "val.txt", "\n")
        assert only_error(voc, "val") == f"{voc}: found no image in split 'val', expected at least one"

    def test_no_image_sets(self, voc):
        for path in (voc / "ImageSets" / "Main").iterdir():
            path.unlink()
        assert len(read_dataset(voc)) == 2
        assert only_error(voc, "train").endswith("expected one of: (none)")

    def test_no_images(self, voc):
        for path in (voc / "JPEGImages").iterdir():
            path.unlink()
        assert f"{voc / 'JPEGImages'}: found no image" in only_error(voc)

    @pytest.mark.skipif(not (DATA / "voc2012-animals").is_dir(), reason=f"no voc2012-animals in {DATA}")
    def test_real_data(self):
        dataset = read_dataset(DATA / "voc2012-animals", "train")
        assert len(dataset) == 1697
        assert dataset.notes == ()
        count = Counter(label for sample in dataset for label in sample.target.labels)
        usual = {"dog": 765, "cat": 608, "person": 579, "sheep": 509, "horse": 376, "cow": 348}
        assert {name: count[name] for name in usual} == usual  # difficult objects included
        assert sum(int(sample.target.difficult.sum()) for sample in dataset) == 430


class TestCoco:
    def test_json_with_images_in_many_places(self, tmp_path):
        named = scenes({"train": 2})["train"]
        for folder in ("", "images", "train2017", "images/train2017", "../images", "../train2017"):
            root = tmp_path / folder.replace("/", "-").replace("..", "up") / "data"
            file = write(root / "instances_train2017.json", json.dumps(coco_json(named)))
            for name, (image, _, _) in named.items():
                save(root / folder / f"{name}.jpg", image)
            dataset = read_dataset(file)
            assert (len(dataset), dataset.split) == (2, "train2017")

    def test_json_with_images_in_the_folder_of_the_split(self, tmp_path):
        named = scenes({"train": 1})["train"]
        file = write(tmp_path / "labels.json", json.dumps(coco_json(named)))
        save(tmp_path / "images" / "mine" / "000001.jpg", named["000001"].image)
        assert len(read_dataset(file, "mine")) == 1
        message = only_error(file)
        assert message.startswith(f"{file}: found none of its images (000001.jpg, ...), expected them in")
        assert str(tmp_path / "images") in message

    def test_beginning_of_a_split(self, tmp_path):
        coco_tree(tmp_path, {"train2017": 2, "val2017": 1})
        assert read_dataset(tmp_path, "train").split == "train2017"

    def test_exports_with_a_file_in_each_split(self, tmp_path):
        for split, named in scenes(SPLITS).items():
            write(tmp_path / split / "_annotations.coco.json", json.dumps(coco_json(named)))
            for name, (image, _, _) in named.items():
                save(tmp_path / split / f"{name}.jpg", image)
        assert len(read_dataset(tmp_path, "train")) == 4
        assert len(read_dataset(tmp_path / "val")) == 2

    def test_crowds_ids_and_negatives(self, tmp_path, coco):
        def change(content):
            content["annotations"][0]["iscrowd"] = 1
            content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 1]

        coco(change)
        dataset = read_dataset(tmp_path)
        assert dataset[0].target.crowd.tolist() == [True, False]
        assert dataset[1].target.labels == ()
        assert dataset.notes == ("images without objects: 1",)
        assert dataset.category_ids == {label: 10 * i for i, label in enumerate(SHAPES, 1)}
        assert dataset.image_ids == {"1": 1, "2": 2}

    def test_size_from_the_header_where_the_file_has_none(self, tmp_path, coco):
        def change(content):
            del content["images"][0]["width"]
            content["annotations"][0]["bbox"] = [100, 80, 50, 50]

        coco(change)
        dataset = read_dataset(tmp_path)
        assert dataset[0].target.boxes[0].tolist() == [100, 80, 128, 96]
        assert dataset.notes == ("boxes that reached beyond their image, clipped: 1",)

    def test_a_parent_category_of_the_same_name(self, tmp_path, coco):
        def change(content):
            content["categories"].append({"id": 99, "name": "disc"})
            for annotation, number in zip(content["annotations"], (99, 20, 30), strict=False):
                annotation["category_id"] = number

        coco(change)
        assert read_dataset(tmp_path).category_ids == {"disc": 99, "square": 20, "triangle": 30}
        file = coco(lambda content: content["annotations"][1].update(category_id=10))
        assert (
            only_error(tmp_path) == f"{file}: found the categories 10 and 99 both named 'disc', expected one"
        )

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            (
                lambda c: c["annotations"][0].update(bbox=[5, 5, 0, 9]),
                "annotations[0] (id 1): bbox [5, 5, 0, 9] of",
            ),
            (lambda c: c["annotations"][0].update(bbox=[5, 5, -3, 9]), "is inverted or empty"),
            (lambda c: c["annotations"][0].update(bbox=[128, 5, 3, 9]), "lies outside the image of 128 x 96"),
            (lambda c: c["annotations"][0].update(bbox=[5, float("nan"), 3, 9]), "is inverted or empty"),
            (lambda c: c["annotations"][0].update(bbox=[5, 5, 3, 10**400]), "expected 4 numbers"),
            (lambda c: c["annotations"][0].update(bbox=[5, 5, 3]), "expected 4 numbers: x, y, width, height"),
            (lambda c: c["annotations"][0].update(bbox=[5, 5, 3, "x"]), "expected 4 numbers"),
            (lambda c: c["annotations"][0].pop("bbox"), "annotations[0] (id 1): found nothing as 'bbox'"),
            (lambda c: c["annotations"][0].update(image_id=77), "(id 1): found the image_id 77"),
            (lambda c: c["annotations"][0].update(category_id=7), "(id 1): found the category_id 7"),
            (
                lambda c: c["annotations"][0].update(category_id=[7]),
                "found [7] as 'category_id', expected int",
            ),
            (lambda c: c["images"][1].update(id=1), "images[1] (id 1): found the id 1 again"),
            (lambda c: c["images"][1].pop("file_name"), "images[1] (id 2): found nothing as 'file_name'"),
            (lambda c: c["categories"][1].update(id=10), "categories[1] (id 10): found the id 10 again"),
            (lambda c: c.pop("images"), "found no list of images"),
            (lambda c: c.update(annotations=[3]), "found no list of annotations"),
            (lambda c: c.update(images=[], annotations=[]), "found no image in split 'train'"),
        ],
    )
    def test_malformed(self, tmp_path, coco, change, found):
        file = coco(change)
        lines = errors(tmp_path)
        assert any(found in line for line in lines)
        assert str(tmp_path if "split" in found else file) in lines[-1]

    def test_no_json(self, tmp_path, coco):
        file = coco(lambda content: None)
        file.write_text('{"images": [],\n "annotations": [}')
        assert only_error(tmp_path).startswith(f"{file}:2: found no JSON")

    def test_other_json(self, tmp_path):
        file = write(tmp_path / "list.json", "[1, 2]")
        assert only_error(file).startswith(f"{file}: found no list of categories, expected images")


class TestYolo:
    def test_names_as_a_mapping_and_a_path(self, tmp_path):
        yolo_tree(tmp_path / "data")
        names = "\n".join(f"  {i}: {name}" for i, name in enumerate(SHAPES))
        (tmp_path / "data" / "data.yaml").unlink()
        file = write(
            tmp_path / "my.yaml", f"path: data\ntrain: [images/train, images/val]\nval:\nnames:\n{names}\n"
        )
        dataset = read_dataset(file)
        assert (len(dataset), dataset.split) == (6, "train")

    def test_list_of_images(self, yolo):
        write(yolo / "train.txt", "./images/train/000001.jpg\nimages/train/000002.jpg\n")
        write(yolo / "data.yaml", f"names: [{', '.join(SHAPES)}]\ntrain: train.txt\n")
        assert [s.name for s in read_dataset(yolo)] == ["images/train/000001", "images/train/000002"]
        write(yolo / "train.txt", "images/train/000001.jpg\nimages/train/000009.jpg\n")
        assert only_error(yolo).startswith(f"{yolo / 'train.txt'}:2: found no image file")

    def test_paths_one_folder_too_high(self, tmp_path):
        named = scenes({"train": 2})["train"]
        write(tmp_path / "data" / "data.yaml", "names: [disc]\ntrain: ../train/images\n")
        for name in named:
            save(tmp_path / "data" / "train" / "images" / f"{name}.jpg", named[name].image)
            write(tmp_path / "data" / "train" / "labels" / f"{name}.txt", "0 0.5 0.5 1 1\n")
        assert read_dataset(tmp_path / "data")[0].target.boxes.tolist() == [[0, 0, 128, 96]]

    @pytest.mark.parametrize("names", ["classes.txt", "obj.names", "labels/classes.txt"])
    def test_folders_without_a_description(self, yolo, names):
        (yolo / "data.yaml").unlink()
        assert "found 2 images and no annotations known here" in only_error(yolo)
        write(yolo / names, "\n".join(SHAPES))
        assert [sample.name for sample in read_dataset(yolo, "train")] == ["000001", "000002"]
        assert [sample.name for sample in read_dataset(yolo, "all")] == ["train/000001", "train/000002"]

    def test_flat_folders(self, tmp_path):
        write(tmp_path / "classes.txt", "disc\n")
        write(tmp_path / "labels" / "a.txt", "0 0.5 0.5 0.5 0.5\n")
        save(tmp_path / "images" / "a.png", scene(0).image)
        dataset = read_dataset(tmp_path)
        assert (dataset.split, dataset[0].target.boxes.tolist()) == ("all", [[32, 24, 96, 72]])

    def test_labels_beside_the_images(self, tmp_path):
        write(tmp_path / "data.yaml", "names: [disc]\ntrain: photos\n")
        write(tmp_path / "photos" / "a.txt", "0 0.5 0.5 0.5 0.5\n")
        save(tmp_path / "photos" / "a.png", scene(0).image)
        assert read_dataset(tmp_path)[0].target.labels == ("disc",)

    def test_rotated_images_are_measured_upright(self, yolo, label):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(scene(1).image).save(yolo / "images" / "train" / "000001.jpg", exif=exif)
        write(label, "0 0.5 0.5 1 1\n")
        assert read_dataset(yolo)[0].target.boxes.tolist() == [[0, 0, 96, 128]]

    def test_negative_images_are_kept_and_counted(self, yolo, label):
        label.unlink()
        dataset = read_dataset(yolo)
        assert dataset[0].target.labels == ()
        assert dataset.notes == (
            "images without a label file, taken as negatives: 1",
            "images without objects: 1",
        )
        write(label, "\n")
        assert read_dataset(yolo).notes == ("images without objects: 1",)

    def test_no_label_at_all(self, yolo, label):
        for path in label.parent.iterdir():
            path.unlink()
        assert f"{yolo}: found no label file for any image, expected for example {label}" in only_error(yolo)

    @pytest.mark.parametrize(
        ("line", "found"),
        [
            ("3 0.5 0.5 0.1 0.1", "found the class 3, expected one of the 3 named"),
            ("-1 0.5 0.5 0.1 0.1", "found the class -1"),
            ("0.5 0.5 0.5 0.1 0.1", "found the class 0.5"),
            ("disc 0.5 0.5 0.1 0.1", "found 'disc 0.5 0.5 0.1 0.1', expected 5 numbers"),
            ("0 0.5 0.5 0.1", "expected 5 numbers: class, centre x, centre y, width, height"),
            ("0 0.5 0.5 0.1 0.1 0.9", "expected 5 numbers"),
            ("0 0.1 0.1 0.9 0.1 0.9 0.9", "expected 5 numbers"),
            ("0 64 48 20 20", "expected coordinates from 0 to 1"),
            ("0 0.5 nan 0.1 0.1", "expected coordinates from 0 to 1"),
            ("0 0.5 0.5 0 0.1", "box 0.5 0.5 0 0.1 of 'disc' is inverted or empty"),
            ("\x00\xff\x01", "expected 5 numbers"),
        ],
    )
    def test_malformed_lines(self, yolo, label, line, found):
        write(label, f"0 0.5 0.5 0.1 0.1\n\n{line}\n")
        message = only_error(yolo)
        assert message.startswith(f"{label}:3: ")
        assert found in message

    def test_tolerance(self, yolo, label):
        write(label, "0 0.5 0.5 1.0005 1.0005\n1 0 0 0.5 0.5\n")
        dataset = read_dataset(yolo)
        assert dataset[0].target.boxes.tolist() == [[0, 0, 128, 96], [0, 0, 32, 24]]
        assert dataset.notes == ("boxes that reached beyond their image, clipped: 2",)

    def test_labels_of_no_image(self, yolo, label):
        write(label.with_name("000009.txt"), "")
        assert only_error(yolo).startswith(
            f"{label.with_name('000009.txt')}: found labels, expected an image"
        )

    def test_repeated_image(self, yolo):
        save(yolo / "images" / "train" / "000001.png", scene(1).image)
        assert "000001.png: found image '000001' again" in only_error(yolo)

    def test_image_that_cannot_be_read(self, yolo):
        path = yolo / "images" / "train" / "000001.jpg"
        path.write_bytes(b"")
        assert only_error(yolo).startswith(f"{path}: found an empty file")

    def test_empty_folder(self, yolo):
        for path in (yolo / "images" / "train").iterdir():
            path.unlink()
        assert f"{yolo / 'images' / 'train'}" in only_error(yolo)

    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("names: [a\ntrain: images/train\n", "data.yaml:2: found no YAML"),
            ("train: images/train\n", "data.yaml: found None as names, expected class names"),
            ("- 1\n", "data.yaml: found None as names"),
            ("names: [yes, no]\ntrain: images/train\n", "data.yaml: found [True, False] as names"),
            ("names: [a]\ntrain: photos\n", "data.yaml: found no "),
            ("names: [a]\n", "expected one of: (none)"),
            ("\x07", "data.yaml:1: found no YAML"),
        ],
    )
    def test_malformed_description(self, yolo, text, found):
        write(yolo / "data.yaml", text)
        assert found in only_error(yolo)


class TestCsv:
    def table(self, root, *rows, header="path,x1,y1,x2,y2,label,split"):
        for n in (1, 2):
            save(root / f"{n}.png", scene(n).image)
        return write(root / "boxes.csv", "\n".join([header, *rows]) + "\n")

    def test_boxes_as_they_are(self, tmp_path):
        rows = ("1.png,10,5.5,20,40,cat,train", '"2.png",0,0,128,96,dog,val', "1.png,1,2,3,4,dog,train")
        data = read_dataset(self.table(tmp_path, *rows))
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
            ("3.png,1,1,5,9,cat,", ":2: found no image file"),
            ("1.png,nan,1,5,9,cat,", "is inverted or empty"),
        ],
    )
    def test_bad_rows(self, row, says, tmp_path):
        assert says in only_error(self.table(tmp_path, row))

    def test_bad_files(self, tmp_path):
        file = self.table(tmp_path, "1.png,1,2", header="path,x1,y1")
        assert (
            "boxes.csv:1: found the columns 'path', 'x1', 'y1', expected path, x1, y1, x2 and y2 once"
            in only_error(file)
        )
        file = self.table(tmp_path, "1.png,1,2,30,40,cat,train")
        assert "found no split 'test', expected one of: train" in only_error(file, "test")
        assert "found no image, expected at least one" in only_error(self.table(tmp_path))
