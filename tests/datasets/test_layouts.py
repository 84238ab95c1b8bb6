"""Every layout that tools write opens with all its boxes: also nested, renamed, and among other files."""

from pathlib import Path

import numpy as np
import pytest

from layouts import LAYOUTS, STEMS, TRAIN, VALID, scene_of, write_files
from sppnet.datasets import dataset_splits, read_dataset

SPLITS = {
    **dict.fromkeys(("voc-cvat", "coco-cvat"), ("default",)),
    "voc-sets": ("disc_train", "train", "val"),
    **dict.fromkeys(("yolo-cvat", "yolo-list", "yolo-windows", "yolo-path"), ("train",)),
    **dict.fromkeys(("voc-roboflow", "yolo-darknet", "coco-roboflow"), ("train", "valid")),
    **dict.fromkeys(("yolo-splits", "yolo-roboflow"), ("train", "val")),
    "coco-2017": ("train2017", "val2017"),
    "coco-split-files": ("test", "train"),
}
OTHERS = {
    "README.txt": b"Exported in 2024.\n1 2 3\n",
    "README.dataset.txt": b"0 thanks\n",
    "requirements.txt": b"numpy==1.26\n",
    "notes.json": b'{"categories": [{"id": 0, "name": "a"}], "info": {}}',
    "package.json": b'{"name": "x"}',
    "environment.yml": b"name: x\ndependencies: [python]\n",
    "pom.xml": b"<project/>",
    "table.csv": b"a,b\n1,2\n",
    ".cache/x.xml": b"<annotation>",
    "results/run/args.yaml": b"lr: 1\n",
}
RENAMED = {
    **{
        "images": "my photos",
        "JPEGImages": "my photos",
        "labels": "boxes (new)",
        "annotations": "boxes (new)",
    },
    **{"Annotations": "boxes (new)", "annots": "boxes (new)", "obj_train_data": "data 1", "photos": "p h"},
}


def moved(files, change):
    return {"/".join(change(part) for part in name.split("/")): content for name, content in files.items()}


VARIANTS = {
    "as it is": lambda files: files,
    "deeper": lambda files: {f"my data/v 1.0/{name}": content for name, content in files.items()},
    "among others": lambda files: OTHERS | files,
    "other letters": lambda files: moved(
        files,
        lambda part: part.replace(".jpg", ".JPG").replace(".xml", ".XML").replace(".json", ".JSON"),
    ),
    "renamed": lambda files: moved(files, lambda part: RENAMED.get(part, part)),
    "in another order": lambda files: {
        "/".join([*reversed(name.split("/")[:-1]), name.split("/")[-1]]): content
        for name, content in files.items()
    },
}


def in_this_variant(layout, variant):
    if variant == "renamed":  # what a YAML file names must be there
        return layout not in ("yolo-roboflow", "yolo-path")
    if variant == "in another order":
        return layout in ("voc-batches", "yolo-splits", "coco-cvat", "coco-apart")
    return True


def assert_all_there(data, stems):
    assert sorted(sample.path.stem for sample in data) == sorted(stems)
    for sample in data:
        expected = scene_of(sample.path)
        assert sample.size == expected.image.shape[:2]
        assert sample.target.labels == tuple(expected.labels)
        np.testing.assert_allclose(sample.target.boxes, expected.boxes, atol=1e-4)


@pytest.mark.parametrize(
    ("layout", "variant"),
    [(layout, variant) for layout in LAYOUTS for variant in VARIANTS if in_this_variant(layout, variant)],
)
def test_all_boxes(tmp_path, layout, variant):
    root = write_files(tmp_path / "root", VARIANTS[variant](LAYOUTS[layout]))
    splits = SPLITS.get(layout, ())
    assert dataset_splits(root) == splits
    data = read_dataset(root, "all" if len(splits) > 1 else None)
    assert_all_there(data, STEMS)
    assert data.format == layout.split("-")[0]
    if len(splits) > 1:
        first = next(name for name in ("train", "train2017") if name in splits)
        assert_all_there(read_dataset(root, first), TRAIN)
        assert_all_there(read_dataset(root, next(n for n in splits if "train" not in n)), VALID)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_noted_where_nothing_is_odd(tmp_path, layout):
    root = write_files(tmp_path, LAYOUTS[layout])
    notes = read_dataset(root, "all" if len(SPLITS.get(layout, ())) > 1 else None).notes
    expected = {
        "yolo-roboflow": (
            "1 file left out: 1 named in data.yaml and not there, first ../test/images (test)",
        ),
        "coco-2017": (
            "1 file left out: 1 beside instances_*.json, first annotations/person_keypoints_val2017.json",
        ),
    }
    assert notes == expected.get(layout, ())


@pytest.mark.parametrize(
    "layout", ["voc-beside", "voc-kaggle", "yolo-folders", "coco-apart", "coco-label-studio"]
)
def test_from_the_folder_itself(tmp_path, layout, monkeypatch):
    monkeypatch.chdir(write_files(tmp_path, LAYOUTS[layout]))
    assert_all_there(read_dataset("."), STEMS)
    assert all(not sample.path.is_absolute() for sample in read_dataset("."))


@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("coco-label-studio", "result.json"),
        ("coco-apart", "json/labels.json"),
        ("coco-cvat", "annotations/instances_default.json"),
        ("yolo-path", "my.yaml"),
        ("yolo-list", "data.yaml"),
    ],
)
def test_a_file_named(tmp_path, layout, file):
    root = write_files(tmp_path / "a", LAYOUTS[layout])
    if layout == "coco-apart":
        (root / "photos").rename(root / "json" / "photos")
    assert_all_there(read_dataset(root / file), STEMS)


@pytest.mark.parametrize("layout", ["voc", "voc-kaggle"])
def test_the_folder_of_the_annotations_named(tmp_path, layout):
    root = write_files(tmp_path / "a", LAYOUTS[layout])
    assert_all_there(read_dataset(root / Path(list(LAYOUTS[layout])[-1]).parent), STEMS)
    (xml,) = root.rglob(f"{STEMS[0]}.xml")
    assert_all_there(read_dataset(xml), STEMS[:1])
