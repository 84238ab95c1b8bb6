"""Every layout that tools write opens with all its boxes: also nested, renamed, and among other files."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from layouts import (
    LAYOUTS,
    NAMES,
    STEMS,
    TRAIN,
    VALID,
    coco,
    jpeg,
    lines,
    placed,
    scene_of,
    write_files,
    xml,
    yaml,
)
from sppnet.datasets import dataset_splits, read_dataset
from trees import SHAPES, only_error

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


VOC, YOLO, COCO = LAYOUTS["voc"], LAYOUTS["yolo-folders"], LAYOUTS["coco-label-studio"]
FIRST = STEMS[0]
UTF_16 = '<?xml version="1.0" encoding="utf-16"?>'


def changed(change):
    """Return the COCO layout with other content in its file."""
    content = json.loads(COCO["result.json"])
    change(content)
    return COCO | {"result.json": json.dumps(content).encode()}


def as_text(content):
    for image in content["images"]:
        image["id"] = f"im{image['id']}"
    for annotation in content["annotations"]:
        annotation["image_id"] = f"im{annotation['image_id']}"


def as_polygons(content):
    for annotation in content["annotations"]:
        x, y, w, h = annotation.pop("bbox")
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h / 2], [x, y + h, x + w / 2, y + h / 2]]


def as_runs(content):
    for annotation in content["annotations"]:
        x, y, w, h = annotation.pop("bbox")
        mask = np.zeros((48, 64), bool)
        mask[y : y + h, x : x + w] = True
        values = mask.T.ravel()
        ends = [*np.flatnonzero(np.diff(values)) + 1, values.size]
        runs = ([0] if values[0] else []) + np.diff([0, *ends]).tolist()
        annotation["segmentation"] = {"counts": runs, "size": [48, 64]}


def as_supercategories(content):
    for category in content["categories"]:
        category["supercategory"] = category.pop("name")


def as_urls(content):
    for image in content["images"]:
        image["file_name"] = "/srv/My%20Data/images/" + image["file_name"][7:].replace(" ", "%20")


VARIED = {
    "masks beside the photos": VOC | {f"SegmentationClass/{stem}.png": jpeg(stem) for stem in STEMS},
    "XML names the photo": {f"img/{stem}.jpg": jpeg(stem) for stem in STEMS}
    | {
        f"xml/{i}.xml": xml(stem).replace(b"<size>", f"<filename>{stem}.jpg</filename><size>".encode())
        for i, stem in enumerate(STEMS)
    },
    "XML names another photo": VOC
    | {f"Annotations/{FIRST}.xml": xml(FIRST).replace(b"<size>", b"<filename>1.png</filename><size>")},
    "XML tells of two photos of its name": VOC
    | {f"JPEGImages/{FIRST}.png": b"no photo"}
    | {
        f"Annotations/{FIRST}.xml": xml(FIRST).replace(
            b"<size>", f"<filename>{FIRST}.jpg</filename><size>".encode()
        )
    },
    "XML in UTF-16": VOC
    | {f"Annotations/{stem}.xml": (UTF_16 + xml(stem).decode()).encode("utf-16") for stem in STEMS},
    "a list with a column": VOC
    | {"ImageSets/Main/train.txt": "".join(f"{stem}  1\n" for stem in STEMS).encode()},
    "a list of paths": VOC
    | {"ImageSets/Main/train.txt": "".join(f"JPEGImages/{stem}.jpg\n" for stem in STEMS).encode()},
    "classes in UTF-16": YOLO | {"classes.txt": NAMES.decode().encode("utf-16")},
    "labels with a mark": YOLO | {f"labels/{FIRST}.txt": b"\xef\xbb\xbf" + lines(FIRST)},
    "a YAML file of names alone": YOLO | {"data.yaml": yaml(names=list(SHAPES))},
    "paths of another disk": placed("train/images/", "train/labels/", ".txt", lines)
    | {"my.yml": yaml(train="/content/drive/set/train/images", names=list(SHAPES))},
    "key points": YOLO
    | {"data.yaml": yaml(train="images", names=list(SHAPES), kpt_shape=[2, 3])}
    | {f"labels/{FIRST}.txt": lines(FIRST).replace(b"\n", b" 0 0 2 1 1 2\n") + b" 0.5 0.5 2 1 0 1"},
    "ids of text": changed(as_text),
    "polygons": changed(as_polygons),
    "run lengths": changed(as_runs),
    "supercategories": changed(as_supercategories),
    "URLs": changed(as_urls),
    "JSON in UTF-16": COCO | {"result.json": COCO["result.json"].decode().encode("utf-16")},
    "JSON with a mark": COCO | {"result.json": b"\xef\xbb\xbf" + COCO["result.json"]},
    "suffixes that were changed": {name.replace(".jpg", ".jpeg"): content for name, content in COCO.items()},
}


@pytest.mark.parametrize("case", VARIED)
def test_as_it_is_met(tmp_path, case):
    data = read_dataset(write_files(tmp_path, VARIED[case]))
    assert_all_there(data, STEMS)


class TestSplits:
    def test_photos_of_equal_names(self, tmp_path):
        """Each photo is that of its split's folder; one in no such folder is left for the other split."""
        files = {"val/1.jpg": jpeg(FIRST), "images/1.jpg": jpeg(STEMS[1])}
        files |= {"annotations/instances_val.json": coco((FIRST,), lambda _: "1.jpg")}
        files |= {"annotations/instances_train.json": coco((STEMS[1],), lambda _: "1.jpg")}
        root = write_files(tmp_path, files)
        assert read_dataset(root, "val")[0].path == root / "val/1.jpg"
        assert read_dataset(root, "train")[0].path == root / "images/1.jpg"
        data = read_dataset(root, "all")
        assert [sample.name for sample in data] == ["images/1", "val/1"]
        assert data.image_ids == {"images/1": "images/1", "val/1": "val/1"}
        (root / "images/1.jpg").unlink()
        assert "found no image '1.jpg'" in only_error(root, "train")

    def test_xml_of_equal_names(self, tmp_path):
        files = placed("JPEGImages/a/", "Annotations/a/", ".xml", xml, TRAIN)
        files |= {name.replace("/a/", "/b/"): content for name, content in files.items()}
        data = read_dataset(write_files(tmp_path, files))
        assert sorted(sample.name for sample in data) == sorted(
            f"JPEGImages/{folder}/{stem}" for folder in "ab" for stem in TRAIN
        )
        for sample in data:
            folder = sample.name.split("/")[1]
            assert sample.path.parent == tmp_path / "JPEGImages" / folder

    def test_what_the_only_list_leaves_out(self, tmp_path):
        root = write_files(tmp_path, VOC | {"ImageSets/Main/default.txt": FIRST.encode()})
        data = read_dataset(root)
        assert (len(data), data.split) == (1, "default")
        assert data.notes == ("annotation files that default.txt does not list, left out: 3",)

    @pytest.mark.parametrize(("suffix", "content"), [(".xml", xml), (".txt", lines)])
    def test_the_only_split_of_more(self, tmp_path, suffix, content):
        """What lies outside the only split is not passed over in silence."""
        files = placed("", "", suffix, content, TRAIN) | placed("test/", "test/", suffix, content, VALID)
        root = write_files(tmp_path, files | ({"classes.txt": NAMES} if suffix == ".txt" else {}))
        expected = "found the split 'test' and more outside of it, none chosen, expected test or all"
        assert only_error(root) == f"{root}: {expected}"
        assert_all_there(read_dataset(root, "test"), VALID)
        assert_all_there(read_dataset(root, "all"), STEMS)

    def test_photos_that_nobody_annotated_outside_the_splits(self, tmp_path):
        files = placed("train/", "train/", ".txt", lines, TRAIN) | {
            "classes.txt": NAMES,
            "new/1.jpg": jpeg(FIRST),
        }
        root = write_files(tmp_path, files)
        assert_all_there(read_dataset(root), TRAIN)
        data = read_dataset(root, "all")
        assert_all_there(data, TRAIN)
        assert data.notes == ("1 file left out: 1 without annotation, first new/1.jpg",)

    def test_the_same_photo_again(self, tmp_path):
        root = write_files(tmp_path, VOC | {f"old/{FIRST}.xml": xml(FIRST)})
        data = read_dataset(root)
        assert_all_there(data, STEMS)
        count = len(scene_of(data[0].path).labels)
        assert "records of a photo that has one already, merged: 1" in data.notes
        assert any(note.startswith("objects annotated twice, merged: ") for note in data.notes), count

    def test_numbers_of_categories_that_disagree(self, tmp_path):
        files = LAYOUTS["coco-split-files"] | {"test.json": coco(VALID, start=1)}
        root = write_files(tmp_path, files)
        data = read_dataset(root, "all")
        assert_all_there(data, STEMS)
        assert data.category_ids == {"disc": 1, "square": 2, "triangle": 3}  # in their order
        assert data.notes == ("files that number the classes otherwise, numbers not kept: 1",)
        assert read_dataset(root, "train").category_ids == {label: i for i, label in enumerate(SHAPES)}

    def test_numbers_of_classes_are_those_of_the_file(self, tmp_path):
        expected = {label: number for number, label in enumerate(SHAPES)}
        assert read_dataset(write_files(tmp_path / "y", YOLO)).category_ids == expected
        assert read_dataset(write_files(tmp_path / "c", COCO)).category_ids == expected


class TestNoLuck:
    """Ties are errors, and the error of what was recognised is shown."""

    def test_two_photos_that_fit(self, tmp_path):
        root = write_files(tmp_path, VOC | {f"thumbs/{stem}.jpg": jpeg(stem) for stem in STEMS[:1]})
        places = f"(JPEGImages/{FIRST}.jpg and thumbs/{FIRST}.jpg), expected one"
        assert only_error(root).endswith(places)

    @pytest.mark.parametrize("files", [VOC, YOLO])
    def test_two_formats(self, tmp_path, files):
        root = write_files(tmp_path, files | {"derived/coco.json": coco(STEMS)})
        message = only_error(root)
        assert "coco data (derived/coco.json)" in message
        assert message.endswith("expected one: name its file or folder, or format=")
        assert_all_there(read_dataset(root, format="coco"), STEMS)
        assert_all_there(read_dataset(root / "derived/coco.json"), STEMS)

    @pytest.mark.parametrize(
        ("files", "says"),
        [
            (COCO | {"result.json": COCO["result.json"][:-30]}, "result.json:1: found no JSON"),
            (
                YOLO | {"classes.txt": "人\n车\n".encode("gbk")},
                "classes.txt:1: found bytes that are no text in UTF-8",
            ),
            (YOLO | {f"labels/{FIRST}.txt": b"0 0.5 0.5 0.1 0.1 0.9"}, f"{FIRST}.txt:1: found '0 0.5"),
            (
                {name: content for name, content in YOLO.items() if "classes" not in name},
                "no names of their classes",
            ),
            (VOC | {"ImageSets/Main/train.txt": b"other\n"}, "train.txt:1: found no annotation of 'other'"),
            (YOLO | {"data.yaml": b"nc: 3\ntrain: images\n"}, "data.yaml: found None as names"),
            (
                YOLO | {"a.yaml": yaml(names=["a"]), "b.yaml": yaml(names=["b"])},
                "found a.yaml and b.yaml, expected one",
            ),
            (
                YOLO | {"classes.txt": b"disc\n\nsquare\n"},
                "classes.txt:3: found",
            ),
            (LAYOUTS["yolo-darknet"] | {"valid/_darknet.labels": b"a"}, "found other classes than in"),
        ],
    )
    def test_what_is_wrong(self, tmp_path, files, says):
        assert says in only_error(write_files(tmp_path, files))

    @pytest.mark.skipif(os.name == "nt", reason="names of any bytes")
    def test_lists_of_names_that_are_no_text(self, tmp_path):
        root = write_files(tmp_path, LAYOUTS["yolo-list"])
        (root / "train.txt").write_bytes(b"images/train/\xe9.jpg\n")
        assert f"{root}/train.txt:1: found bytes that are no text in UTF-8" in only_error(root)
        folder = os.fsencode(root / "images/train") + b"/"
        os.rename(folder + os.fsencode(FIRST) + b".jpg", folder + b"\xe9.jpg")
        labels = os.fsencode(root / "labels/train") + b"/"
        os.rename(labels + os.fsencode(FIRST) + b".txt", labels + b"\xe9.txt")
        (sample,) = read_dataset(root)
        assert os.fsencode(sample.path) == folder + b"\xe9.jpg"
        assert len(sample.target.labels) > 0

    def test_photos_that_cannot_be_read_are_counted(self, tmp_path):
        root = write_files(tmp_path, VOC | {"JPEGImages/x.NEF": b"raw", "JPEGImages/y.jpg": jpeg(FIRST)})
        assert read_dataset(root).notes == (
            "2 files left out: 1 .nef, first JPEGImages/x.NEF; 1 without annotation, first JPEGImages/y.jpg",
        )

    def test_yaml_beside_the_working_directory(self, tmp_path, monkeypatch):
        write_files(tmp_path / "work" / "set", placed("images/", "labels/", ".txt", lines))
        write_files(tmp_path / "elsewhere", {"my.yaml": yaml(path="set", train="images", names=list(SHAPES))})
        monkeypatch.chdir(tmp_path / "work")
        assert_all_there(read_dataset(tmp_path / "elsewhere/my.yaml"), STEMS)
        assert_all_there(read_dataset(Path("../elsewhere")), STEMS)
