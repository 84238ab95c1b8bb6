import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from sppnet.boxes import Target
from sppnet.datasets import Contents, Dataset, Sample, read_dataset
from sppnet.datasets.records import class_names
from sppnet.errors import SppnetError
from sppnet.images import pixels_of
from trees import scene, voc_tree, write


@pytest.fixture
def dataset(tmp_path):
    voc_tree(tmp_path)
    return read_dataset(tmp_path, "train")


def changed(dataset, index, **values):
    """Return a data set with one sample replaced."""
    samples = list(dataset.samples)
    samples[index] = replace(samples[index], **values)
    return replace(dataset, samples=tuple(samples))


def test_path_of_a_file_and_of_an_image_in_memory(tmp_path):
    image, boxes, labels = scene(1)
    target = Target.of(boxes, labels)
    assert Sample("a", tmp_path / "a.png", target).path == tmp_path / "a.png"
    sample = Sample("a", image, target)
    assert pixels_of(sample.image) is image
    with pytest.raises(SppnetError, match=r"^found an image in memory as 'a', expected a file$"):
        _ = sample.path


def test_data_set_is_a_sequence(dataset):
    part = dataset[1:3]
    assert isinstance(part, Dataset)
    assert [sample.name for sample in part] == [dataset[1].name, dataset[2].name]
    assert (part.classes, part.root, part.split) == (dataset.classes, dataset.root, "train")
    assert dataset[-1] in dataset


class TestFingerprint:
    def test_is_16_hex_digits_of_what_was_read(self, dataset, tmp_path):
        assert len(dataset.fingerprint) == 16
        assert int(dataset.fingerprint, 16) >= 0
        assert read_dataset(tmp_path, "train").fingerprint == dataset.fingerprint
        assert pickle.loads(pickle.dumps(dataset)).fingerprint == dataset.fingerprint
        contents = dataset.contents
        assert contents.images == 4
        assert contents.objects == sum(len(sample.target.labels) for sample in dataset)
        assert Contents(*json.loads(json.dumps(contents))).difference(contents) == ""

    def test_does_not_depend_on_the_place(self, dataset, tmp_path):
        voc_tree(tmp_path / "copy" / "of" / "it")
        assert read_dataset(tmp_path / "copy", "train").fingerprint == dataset.fingerprint

    def test_what_differs_is_said(self, dataset, tmp_path):
        def difference(other):
            assert other.fingerprint != dataset.fingerprint
            return dataset.contents.difference(other.contents)

        image, name, target = dataset[1].image, dataset[1].name, dataset[0].target
        boxes, labels = target.boxes, target.labels
        assert len(labels) == 2
        assert difference(changed(dataset, 1, name=f"{name}x")) == "other names of images"
        for other in (
            Target.of(boxes + np.float32(0.25), labels),
            Target.of(boxes, [f"{label}x" for label in labels]),
            Target.of(boxes, ["".join(labels), ""]),
            Target.of(boxes, labels, difficult=[False, True]),
            Target.of(boxes, labels, crowd=[False, True]),
        ):
            assert difference(changed(dataset, 0, target=other)) == "other annotations"
        assert difference(dataset[:1]).startswith("1 images instead of 4, ")
        none = Target.of([], [])
        few = dataset.contents.objects - 2
        assert difference(changed(dataset, 0, target=none)) == f"{few} objects instead of {few + 2}"
        swapped = replace(dataset, samples=dataset.samples[::-1])
        assert difference(swapped).startswith("other names of images and ")
        longer = tmp_path / "longer.jpg"
        longer.write_bytes(image.read_bytes() + b" ")
        assert difference(changed(dataset, 1, image=longer)) == "other sizes of image files"
        assert difference(changed(dataset, 1, image=tmp_path / "gone.jpg")) == "other sizes of image files"

    def test_names_and_labels_are_kept_apart(self, dataset):
        first = changed(changed(dataset, 0, name="a"), 1, name="bc")
        second = changed(changed(dataset, 0, name="ab"), 1, name="c")
        assert first.fingerprint != second.fingerprint

    def test_pixels_in_memory_count(self, dataset):
        image = scene(1).image
        first = changed(dataset, 0, image=image)
        assert changed(dataset, 0, image=image.copy()).fingerprint == first.fingerprint
        other = image.copy()
        other[5, 5, 1] += 1
        assert changed(dataset, 0, image=other).fingerprint != first.fingerprint
        turned = np.ascontiguousarray(image.reshape(image.shape[1], image.shape[0], 3))
        assert changed(dataset, 0, image=turned).fingerprint != first.fingerprint

    def test_files_are_asked_once_and_never_opened(self, dataset):
        for sample in dataset:
            write(sample.path, "x" * sample.path.stat().st_size)
        before = dataset.fingerprint
        for sample in dataset:
            sample.path.unlink()
        assert dataset.fingerprint == before
        assert dataset[:].fingerprint != before


def test_class_names():
    assert class_names(["a", "b"]) == ("a", "b")
    assert class_names(()) == ()
    with pytest.raises(SppnetError, match=r"^found the str 'cat', expected a list .*, such as \['cat'\]$"):
        class_names("cat")
    with pytest.raises(SppnetError, match=r"^found 3 in a list of class names, expected only str$"):
        class_names(["cat", 3])
