"""Exports of labelling tools: the scenes that were drawn come back, wherever and however the files lie."""

import shutil

import numpy as np
import pytest

from sppnet.datasets import dataset_splits, read_dataset
from tools import MORE, TOOLS
from trees import only_error, scene

WRITERS = [(format, writer) for format, writer in TOOLS.items()]
WRITERS += [(format, writer) for format, writers in MORE.items() for writer in writers]
IDS = [writer.__name__ for _, writer in WRITERS]
# These cannot tell of an image that there is nothing in it.
WITHOUT_EMPTY = ("tensorflow", "deepforest", "open_images")


def named(*numbers, name="{}"):
    return {name.format(f"p{n}"): scene(n, 96 + n, 128) for n in numbers}


def assert_drawn(data, scenes):
    """Hold the boxes of a data set against those that were drawn."""
    found = {sample.path.stem: sample.target for sample in data}
    assert found.keys() == scenes.keys()
    assert len(found) == len(data)
    for name, drawn in scenes.items():
        np.testing.assert_allclose(found[name].boxes, np.float32(drawn.boxes).reshape(-1, 4), atol=1e-4)
        assert found[name].labels == tuple(drawn.labels)


@pytest.mark.parametrize(("format", "writer"), WRITERS, ids=IDS)
class TestEachTool:
    def test_as_it_exports(self, format, writer, tmp_path):
        scenes = named(1, 2, 3, 4)
        writer(tmp_path, "export", scenes)
        data = read_dataset(tmp_path)
        assert (data.format, data.split) == (format, None)
        assert_drawn(data, scenes)
        assert not data.notes
        assert dataset_splits(tmp_path) == ()

    def test_deeper_and_with_odd_names(self, format, writer, tmp_path):
        scenes = named(1, 3, name="日本 {} (1).x")
        writer(tmp_path, "a b/ü", scenes)
        assert_drawn(read_dataset(tmp_path), scenes)

    def test_split_folders(self, format, writer, tmp_path):
        parts = {"train": named(1, 2, 3), "valid": named(5, 6)}
        for split, scenes in parts.items():
            writer(tmp_path, split, scenes)
        assert dataset_splits(tmp_path) == ("train", "valid")
        assert "found 2 splits and none chosen" in only_error(tmp_path)
        for split, scenes in parts.items():
            assert_drawn(read_dataset(tmp_path, split), scenes)
        assert_drawn(read_dataset(tmp_path, "all"), {**parts["train"], **parts["valid"]})

    def test_photos_elsewhere(self, format, writer, tmp_path):
        if format == "supervisely":
            pytest.skip("has a folder for its photos")
        scenes = named(1, 3)
        writer(tmp_path, "labels of mine", scenes)
        (tmp_path / "pictures").mkdir()
        for photo in (tmp_path / "labels of mine").glob("*.png"):
            shutil.move(photo, tmp_path / "pictures")
        assert_drawn(read_dataset(tmp_path), scenes)

    def test_images_without_objects(self, format, writer, tmp_path):
        if writer.__name__ in WITHOUT_EMPTY:
            pytest.skip("its tables have no rows of them")
        scenes = named(1, 3)
        scenes["p3"] = scenes["p3"]._replace(boxes=[], labels=[])
        writer(tmp_path, ".", scenes)
        data = read_dataset(tmp_path)
        assert_drawn(data, scenes)
        assert data.notes == ("images without objects: 1",)

    def test_a_photo_that_is_missing(self, format, writer, tmp_path):
        writer(tmp_path, ".", named(1, 3))
        next(tmp_path.rglob("p3.png")).unlink()
        line = only_error(tmp_path)
        assert "found no image" in line
        assert "p3" in line

    def test_renamed_files(self, format, writer, tmp_path):
        if format in ("labelme", "supervisely"):
            pytest.skip("its files are named after photos")
        scenes = named(1, 3)
        writer(tmp_path, ".", scenes)
        (file,) = (path for path in tmp_path.iterdir() if path.suffix != ".png")
        file.rename(file.with_name(f"my own name{file.suffix.upper()}"))
        assert_drawn(read_dataset(tmp_path), scenes)
        assert_drawn(read_dataset(tmp_path / f"my own name{file.suffix.upper()}"), scenes)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize(("format", "writer"), WRITERS, ids=IDS)
def test_encodings(format, writer, encoding, tmp_path):
    scenes = {name: drawn._replace(labels=["猫"] * len(drawn.labels)) for name, drawn in named(1, 3).items()}
    writer(tmp_path, ".", scenes)
    name = encoding.removesuffix("-sig")
    for file in tmp_path.rglob("*"):
        if file.suffix in (".json", ".csv", ".xml"):
            text = file.read_text("utf-8").replace('encoding="utf-8"', f'encoding="{name}"')
            file.write_bytes(text.encode(encoding))
    assert_drawn(read_dataset(tmp_path), scenes)


def test_several_tools_in_one_folder(tmp_path):
    for format in ("labelme", "cvat"):
        TOOLS[format](tmp_path, ".", named(1))
    line = only_error(tmp_path)
    assert "found labelme data (p1.json) and cvat data (annotations.xml), expected one: name its file" in line
    assert read_dataset(tmp_path, format="cvat").format == "cvat"
