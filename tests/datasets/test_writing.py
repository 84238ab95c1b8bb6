"""Data sets written in one format and read back, with the readers that all data sets go through."""

import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sppnet.boxes import Target
from sppnet.datasets import dataset_splits, read_dataset
from sppnet.datasets.records import Dataset, Sample
from sppnet.datasets.writing import convert, write_dataset
from sppnet.errors import DatasetError, SppnetError
from trees import coco_tree, save, scene, voc_tree, voc_xml, write, yolo_tree

FORMATS = ("voc", "coco", "yolo", "csv", "labelstudio")
DIFFICULT = ("voc", "coco", "csv")
CROWD = ("coco", "csv")
NAMES = ("a photo (1).jpg", "日本.x.jpg", "folder/sub folder/b.JPG", "folder/images/c.png", "ümlaut's.jpg")
CLASSES = ("Kuh & <Kälbchen>", "=1+1", "two words", "a")


def made(root, split=None, odd=True):
    """Return a data set of photos of odd names, sizes and boxes; the last one shows nothing."""
    samples = []
    for i, name in enumerate(NAMES):
        height, width = 90 + 7 * i, 120 + 11 * i
        save(root / name, scene(i, height, width).image)
        rng = np.random.default_rng(i)
        corners = np.sort(rng.uniform(0, 1, (3, 2, 2)), axis=1) * [width, height]
        boxes = np.float32(
            corners.reshape(3, 4) if odd else [[1, 2, 30, 40], [0, 0, width, height], [5, 6, 7, 8]]
        )
        labels = [CLASSES[(i + k) % len(CLASSES)] for k in range(3)]
        flags = np.array([[i % 2, k == 1] for k in range(3)], bool)
        target = Target.of(boxes, labels, flags[:, 0], flags[:, 1]) if i < 4 else Target.of([], [])
        samples.append(Sample(name, root / name, target, (height, width)))
    ids = {name: number for number, name in enumerate(CLASSES)}
    return Dataset(
        tuple(samples), tuple(sorted(CLASSES)), root, split, (), ids, {name: name for name in NAMES}, "csv"
    )


def by_photo(data):
    """Return what is annotated in each photo, by the pixels of that."""
    return {sample.path.read_bytes(): sample for sample in data}


def assert_equal(read, expected, format):
    """Hold boxes, labels and flags of two data sets against each other, bit for bit, photo by photo."""
    found = by_photo(read)
    assert len(found) == len(read) == len(expected)
    for content, sample in by_photo(expected).items():
        target, wanted = found[content].target, sample.target
        np.testing.assert_array_equal(target.boxes, wanted.boxes)
        assert target.labels == wanted.labels
        nothing = np.zeros(len(wanted.labels), bool)
        np.testing.assert_array_equal(target.difficult, wanted.difficult if format in DIFFICULT else nothing)
        np.testing.assert_array_equal(target.crowd, wanted.crowd if format in CROWD else nothing)
        assert found[content].size == sample.size


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("odd", [True, False], ids=["odd boxes", "whole boxes"])
class TestOneFormat:
    def test_what_was_written_is_read(self, format, odd, tmp_path):
        data = made(tmp_path / "in", odd=odd)
        written = write_dataset(data, tmp_path / "out", format)
        assert (written.root, written.format, written.splits) == (tmp_path / "out", format, ())
        assert (written.images, written.objects) == (5, 12)
        read = read_dataset(tmp_path / "out")
        assert read.format == format
        assert_equal(read, data, format)
        assert [n for n in read.notes if not n.startswith("images without objects")] == []

    def test_splits_are_kept(self, format, odd, tmp_path):
        parts = [made(tmp_path / split, split, odd) for split in ("train", "val")]
        parts[1] = replace(parts[1], samples=parts[1].samples[:2])
        written = write_dataset(parts, tmp_path / "out", format)
        assert (written.splits, written.images) == (("train", "val"), 7)
        assert dataset_splits(tmp_path / "out") == ("train", "val")
        for part in parts:
            assert_equal(read_dataset(tmp_path / "out", part.split), part, format)


class TestNotes:
    @pytest.mark.parametrize(
        ("format", "lost"),
        [
            ("voc", ["boxes marked crowd, written as ordinary ones, which voc cannot tell: 4"]),
            ("coco", []),
            ("csv", []),
            *(
                (
                    format,
                    [
                        f"boxes marked difficult, written as ordinary ones, which {format} cannot tell: 6",
                        f"boxes marked crowd, written as ordinary ones, which {format} cannot tell: 4",
                    ],
                )
                for format in ("yolo", "labelstudio")
            ),
        ],
    )
    def test_flags_that_are_lost_are_counted(self, format, lost, tmp_path):
        assert list(write_dataset(made(tmp_path / "in"), tmp_path / "out", format).notes) == lost


class TestPhotos:
    def test_copies_links_or_none(self, tmp_path):
        data = made(tmp_path / "in")
        for photos in ("copy", "link", "none"):
            out = tmp_path / photos
            write_dataset(data, out, "csv", photos)
            places = [out / "images" / name for name in NAMES]
            assert [p.is_file() for p in places] == [photos != "none"] * 5
            assert [p.is_symlink() for p in places] == [photos == "link"] * 5
        assert_equal(read_dataset(tmp_path / "link"), data, "csv")

    @pytest.mark.parametrize("format", [f for f in FORMATS if f != "yolo"])
    def test_annotations_without_photos_are_read_without_photos(self, format, tmp_path):
        data = made(tmp_path / "in")
        write_dataset(data, tmp_path / "out", format, "none")
        read = read_dataset(tmp_path / "out", photos=False)
        assert [s.target.labels for s in read] == [s.target.labels for s in data]
        for sample, expected in zip(read, data, strict=True):
            np.testing.assert_array_equal(sample.target.boxes, expected.target.boxes)

    @pytest.mark.parametrize("format", FORMATS)
    def test_photos_that_exif_turns(self, format, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        (tmp_path / "in").mkdir()
        Image.new("RGB", (128, 96), "red").save(tmp_path / "in/a.jpg", exif=exif)
        write(tmp_path / "in/a.xml", voc_xml([(10, 20, 30, 90)], ["disc"], (128, 96)))
        (before,) = read_dataset(tmp_path / "in")
        assert (before.size, before.target.boxes.tolist()) == ((128, 96), [[10, 20, 30, 90]])
        convert(tmp_path / "in", tmp_path / "out", format)
        (after,) = read_dataset(tmp_path / "out")
        assert (after.size, after.target.boxes.tolist()) == ((128, 96), [[10, 20, 30, 90]])
        assert after.path.read_bytes() == before.path.read_bytes()


TREES = {"voc": voc_tree, "coco": coco_tree, "yolo": yolo_tree}


class TestConvert:
    @pytest.mark.parametrize(("source", "format"), [*itertools.product(TREES, FORMATS)])
    def test_from_each_to_each(self, source, format, tmp_path):
        scenes = TREES[source](tmp_path / "in")
        written = convert(tmp_path / "in", tmp_path / "out", format)
        assert (written.splits, written.images) == (("train", "val"), 6)
        for split, named in scenes.items():
            read = {s.path.name: s.target for s in read_dataset(tmp_path / "out", split)}
            assert len(read) == len(named)
            for name, expected in named.items():
                target = read[f"{name}.jpg"]
                np.testing.assert_allclose(target.boxes, np.float32(expected.boxes), atol=1e-5)
                assert target.labels == tuple(expected.labels)

    @pytest.mark.parametrize("path", list(itertools.permutations(FORMATS, 3))[::7], ids="-".join)
    def test_round_trips(self, path, tmp_path):
        data = made(tmp_path / "in", "train")
        write_dataset(data, tmp_path / "0", path[0])
        for i, format in enumerate(path[1:]):
            convert(tmp_path / f"{i}", tmp_path / f"{i + 1}", format)
        read = by_photo(read_dataset(tmp_path / "2"))
        for content, sample in by_photo(data).items():
            np.testing.assert_array_equal(read[content].target.boxes, sample.target.boxes)
            assert read[content].target.labels == sample.target.labels

    def test_one_split(self, tmp_path):
        voc_tree(tmp_path / "in")
        written = convert(tmp_path / "in", tmp_path / "out", "coco", "val")
        assert (written.splits, written.images) == (("val",), 2)
        assert len(read_dataset(tmp_path / "out")) == 2

    def test_a_split_that_repeats_others_is_left_out_and_photos_in_none_are_counted(self, tmp_path):
        root = tmp_path / "in"
        voc_tree(root)
        sets = root / "ImageSets" / "Main"
        both = (sets / "train.txt").read_text() + (sets / "val.txt").read_text()
        (sets / "trainval.txt").write_text(both)
        save(root / "JPEGImages/000009.jpg", scene(9).image)
        write(root / "Annotations/000009.xml", voc_xml(scene(9).boxes, scene(9).labels))
        written = convert(root, tmp_path / "out", "yolo")
        assert written.splits == ("train", "val")
        assert "split trainval left out: it repeats images of other splits" in written.notes
        assert "images in no split, left out: 1" in written.notes

    def test_classes_keep_their_order_and_those_without_objects(self, tmp_path):
        yolo_tree(tmp_path / "in", {"train": 2})
        yaml = tmp_path / "in" / "data.yaml"
        yaml.write_text("names: [zebra, triangle, disc, square, ape]\ntrain: images/train\n")
        convert(tmp_path / "in", tmp_path / "out", "yolo")
        ids = read_dataset(tmp_path / "out").category_ids
        assert sorted(ids, key=ids.get) == ["zebra", "triangle", "disc", "square", "ape"]
        convert(tmp_path / "in", tmp_path / "coco", "coco")
        assert read_dataset(tmp_path / "coco").category_ids == {
            name: i for i, name in enumerate(("zebra", "triangle", "disc", "square", "ape"), 1)
        }

    def test_without_photos(self, tmp_path):
        coco_tree(tmp_path / "in")
        for photo in (tmp_path / "in").rglob("*.jpg"):
            photo.unlink()
        written = convert(tmp_path / "in", tmp_path / "out", "csv", photos="none")
        assert written.images == 6
        with pytest.raises(DatasetError, match="bad photos"):
            convert(tmp_path / "in", tmp_path / "copied", "csv")
        assert not (tmp_path / "copied").exists()


class TestBadInput:
    def test_places(self, tmp_path):
        data = made(tmp_path / "in")
        (tmp_path / "file").touch()
        for out, says in (
            (tmp_path / "in", "in: found a folder with files in it, expected an empty one, or nothing yet"),
            (tmp_path / "file", "file: found a file, expected a folder"),
            (tmp_path / "gone" / "out", r"out: cannot write \(No such file"),
        ):
            with pytest.raises(OSError, match=says):
                write_dataset(data, out, "voc")
            with pytest.raises(OSError, match=says):
                convert(tmp_path / "nothing that is read", out, "voc")
        (tmp_path / "empty").mkdir()
        write_dataset(data, tmp_path / "empty", "voc")

    def test_choices(self, tmp_path):
        data = made(tmp_path / "in")
        with pytest.raises(
            SppnetError, match="found the format 'tfrecord', expected one of voc, coco, yolo, csv"
        ):
            write_dataset(data, tmp_path / "out", "tfrecord")
        with pytest.raises(
            SppnetError, match="found the way with photos 'move', expected one of copy, link, none"
        ):
            write_dataset(data, tmp_path / "out", "voc", "move")

    def test_what_cannot_be_written_leaves_nothing(self, tmp_path):
        data = made(tmp_path / "in")
        memory = replace(data, samples=(Sample("a", scene(1).image, data[0].target, (96, 128)),))
        twice = replace(data, samples=data.samples[:1] * 2)
        save(tmp_path / "in" / "a photo (1).PNG", scene(1).image)
        twins = replace(
            data, samples=(*data.samples, replace(data[0], image=tmp_path / "in" / "a photo (1).PNG"))
        )
        odd = Target.of([[1, 2, 3, 4]], ["a\x01"])
        control = replace(data, samples=(replace(data[0], target=odd),), category_ids={"a\x01": 1})
        lines = replace(data, category_ids={**data.category_ids, "a\nb": 9})
        for bad, format, says in (
            (memory, "coco", "found an image in memory as 'a', expected a file"),
            (twice, "csv", r"found the photo a photo \(1\).jpg twice, expected it once"),
            (twins, "voc", "whose names VOC cannot tell apart"),
            (twins, "yolo", "whose names YOLO cannot tell apart"),
            (control, "voc", r"found the character '\\x01' in the name 'a\\x01', which VOC cannot hold"),
            (control, "labelstudio", "which Label Studio cannot hold"),
            (lines, "yolo", r"found the name 'a\\nb', which YOLO cannot hold, expected one line"),
            ([data, data], "coco", r"found the splits \[None, None\], expected each once"),
        ):
            with pytest.raises(SppnetError, match=says):
                write_dataset(bad, tmp_path / "out", format)
            assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]

    def test_a_photo_that_is_gone(self, tmp_path):
        data = made(tmp_path / "in")
        data[2].path.unlink()
        with pytest.raises(OSError, match=r"b\.JPG"):
            write_dataset(data, tmp_path / "out", "coco")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]

    def test_a_source_that_is_wrong(self, tmp_path):
        voc_tree(tmp_path / "in")
        write(tmp_path / "in" / "Annotations" / "000001.xml", "<annotation>")
        with pytest.raises(DatasetError, match=r"000001.xml:1: "):
            convert(tmp_path / "in", tmp_path / "out", "coco")
        with pytest.raises(FileNotFoundError):
            convert(tmp_path / "gone", tmp_path / "out", "coco")


def test_names_of_any_bytes(tmp_path):
    name = os.fsdecode(b"\xff\xe9.jpg")
    save(tmp_path / "in" / name, scene(1).image)
    path = tmp_path / "in" / name
    sample = Sample("a", path, Target.of([[1, 2, 30, 40]], ["cow"]), (96, 128))
    data = Dataset((sample,), ("cow",), tmp_path, None, (), {"cow": 1}, {"a": "a"}, "csv")
    for format in ("coco", "csv", "yolo", "labelstudio"):
        write_dataset(data, tmp_path / format, format)
        (read,) = read_dataset(tmp_path / format)
        assert os.fsencode(read.path.name) == b"\xff\xe9.jpg"
        assert read.target.boxes.tolist() == [[1, 2, 30, 40]]
    with pytest.raises(SppnetError, match=r"found the character '\\udcff' in the name"):
        write_dataset(data, tmp_path / "voc", "voc")


def test_predictions_are_read_as_data_sets(tmp_path, monkeypatch):
    from sppnet.boxes import Detections
    from sppnet.datasets.predictions import Prediction, write_predictions

    monkeypatch.chdir(tmp_path)
    data = made(Path("photos"))
    found = [
        Prediction(
            s.path,
            *s.size,
            Detections(
                s.target.boxes, np.linspace(1, 0, len(s.target.labels), dtype=np.float32), s.target.labels
            ),
        )
        for s in data
    ]
    plain = replace(
        data, samples=tuple(replace(s, target=Target.of(s.target.boxes, s.target.labels)) for s in data)
    )
    places = {"csv": "a.csv", "coco": "coco/a.json", "labelstudio": "ls/a.json", "voc": "voc", "yolo": "yolo"}
    for format, place in places.items():
        if "/" in place:
            Path(place).parent.mkdir()
        write_predictions(found, CLASSES, format, Path(place))
        root = Path(place) if format == "csv" else Path(place.split("/")[0])
        if format != "csv":
            for name in NAMES:
                (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
                (root / "images" / name).symlink_to(Path("photos", name).absolute())
        assert_equal(read_dataset(root), plain, "yolo")


@pytest.mark.parametrize("format", ["voc", "coco", "yolo"])
def test_another_library_reads_the_same(format, tmp_path):
    supervision = pytest.importorskip("supervision")
    coco_tree(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out", format)
    out, sets = tmp_path / "out", supervision.DetectionDataset
    for split in ("train", "val"):
        images = str(out / "images" / split)
        if format == "voc":
            theirs = sets.from_pascal_voc(str(out / "JPEGImages"), str(out / "Annotations"))
        elif format == "coco":
            theirs = sets.from_coco(images, str(out / "annotations" / f"instances_{split}.json"))
        else:
            theirs = sets.from_yolo(images, str(out / "labels" / split), str(out / "data.yaml"))
        found = {Path(path).name: detections for path, _, detections in theirs}
        for sample in read_dataset(tmp_path / "in", split):
            detections = found[sample.path.name]
            np.testing.assert_allclose(detections.xyxy, sample.target.boxes, atol=1e-4)
            assert [theirs.classes[i] for i in detections.class_id] == list(sample.target.labels)
