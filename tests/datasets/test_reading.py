import numpy as np
import pytest

from sppnet.datasets import dataset_splits, read_dataset
from sppnet.datasets.reading import dataset_format
from sppnet.errors import DatasetError, SppnetError
from sppnet.images import read_image
from trees import SPLITS, class_tree, coco_tree, only_error, voc_tree, write, yolo_tree

TREES = {"voc": voc_tree, "coco": coco_tree, "yolo": yolo_tree}


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

    @pytest.mark.parametrize("format", TREES)
    def test_unknown_split_lists_the_others(self, tmp_path, format):
        TREES[format](tmp_path)
        assert only_error(tmp_path, "test").endswith(
            "found no single split 'test', expected one of: train, val; or all"
        )

    @pytest.mark.parametrize("format", TREES)
    def test_missing_image(self, tmp_path, format):
        TREES[format](tmp_path, {"train": 3})
        next(tmp_path.rglob("000002.jpg")).unlink()
        assert "000002" in only_error(tmp_path)

    @pytest.mark.parametrize("format", TREES)
    def test_a_split_must_be_chosen(self, tmp_path, format):
        TREES[format](tmp_path)
        assert only_error(tmp_path).endswith(
            "found 2 splits and none chosen, expected one of: train, val; or all"
        )

    def test_unrecognised(self, tmp_path):
        message = only_error(tmp_path)
        for part in (str(tmp_path), "no dataset", "boxes in one of voc, coco, yolo, csv, labelme"):
            assert part in message
        message = f"{tmp_path}: found no dataset, expected voc: XML files of <annotation>, one for each photo"
        assert only_error(tmp_path, format="voc") == message

    def test_two_formats_at_once(self, tmp_path):
        voc_tree(tmp_path, {"train": 2})
        yolo_tree(tmp_path, {"train": 3})
        assert (
            "found voc data (Annotations/000001.xml) and yolo data (data.yaml), expected one: name"
            in only_error(tmp_path)
        )
        assert len(read_dataset(tmp_path, format="voc")) == 2
        assert len(read_dataset(tmp_path, format="yolo")) == 3

    def test_unknown_format(self, tmp_path):
        with pytest.raises(ValueError, match="found the format 'xml', expected one of voc, coco, yolo"):
            read_dataset(tmp_path, format="xml")

    def test_no_root(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="gone: found no such folder or file"):
            read_dataset(tmp_path / "gone")

    @pytest.mark.parametrize("format", TREES)
    def test_splits_are_listed(self, tmp_path, format):
        TREES[format](tmp_path)
        assert dataset_splits(tmp_path) == dataset_splits(str(tmp_path), format=format) == ("train", "val")

    def test_splits_of_nothing(self, tmp_path):
        with pytest.raises(DatasetError, match="found no dataset, expected boxes in one of voc, "):
            dataset_splits(tmp_path)
        with pytest.raises(FileNotFoundError, match="gone: found no such folder or file"):
            dataset_splits(tmp_path / "gone")
        with pytest.raises(SppnetError, match="found the format 'xml'"):
            dataset_splits(tmp_path, format="xml")

    def test_photos_without_annotations(self, tmp_path):
        class_tree(tmp_path, 4)
        write(tmp_path / ".hidden.jpg", "")
        message = only_error(tmp_path)
        assert message.startswith(
            f"{tmp_path}: found 12 images and no annotations known here, expected boxes in one of voc, "
        )
        assert message.endswith(
            "annotate them with a tool that writes one of these, such as LabelImg, CVAT or Label Studio"
        )
        photo = next(tmp_path.glob("*/000001.jpg"))
        assert only_error(photo).startswith(f"{photo}: found an image, expected boxes in one of voc, ")
        assert "annotate" not in only_error(write(tmp_path / "a.txt", ""))


def test_format_that_is_met(tmp_path):
    class_tree(tmp_path / "classes", 2)
    assert dataset_format(tmp_path / "classes") is None
    for format, tree in TREES.items():
        tree(tmp_path / format)
        assert dataset_format(tmp_path / format) == format
    with pytest.raises(DatasetError, match=r"found voc data .* and coco data .* and yolo data"):
        dataset_format(tmp_path)
    with pytest.raises(FileNotFoundError, match="gone: found no such folder or file"):
        dataset_format(tmp_path / "gone")
