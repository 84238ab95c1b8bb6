import json
import os

import numpy as np
import pytest

from sppnet.boxes import Detections
from sppnet.datasets import read_dataset
from sppnet.datasets.coco import write_coco_results
from sppnet.datasets.results import read_results
from sppnet.datasets.voc import write_voc_results
from trees import SHAPES, coco_tree, voc_tree, yolo_tree

TREES = {"voc": voc_tree, "coco": coco_tree, "yolo": yolo_tree}


@pytest.fixture(params=TREES)
def dataset(request, tmp_path):
    TREES[request.param](tmp_path / "data")
    return read_dataset(tmp_path / "data", "train")


@pytest.fixture
def voc(tmp_path):
    voc_tree(tmp_path / "data")
    return read_dataset(tmp_path / "data", "train")


def detections(dataset, seed=0):
    """Return random detections in all images but the last."""
    rng = np.random.default_rng(seed)
    found = {}
    for sample in dataset[:-1]:
        corners = rng.uniform(0, 40, (5, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(1, 40, (5, 2))], axis=1).astype(np.float32)
        scores = -np.sort(-rng.normal(0, 3, 5)).astype(np.float32)
        found[sample.name] = Detections(boxes, scores, tuple(rng.choice(dataset.classes, 5).tolist()))
    return found


def assert_same(read, written, dataset, atol):
    assert list(read) == [sample.name for sample in dataset]
    assert read[dataset[-1].name].boxes.shape == (0, 4)
    for name, expected in written.items():
        np.testing.assert_allclose(read[name].boxes, expected.boxes, atol=atol, rtol=0)
        np.testing.assert_array_equal(read[name].scores, expected.scores)
        assert read[name].labels == expected.labels


def test_voc_round_trip(tmp_path, dataset):
    found = detections(dataset)
    write_voc_results(tmp_path, found, dataset.classes, "val_2012")
    names = sorted(path.name for path in tmp_path.glob("*.txt"))
    assert names == sorted(f"comp4_det_val_2012_{name}.txt" for name in dataset.classes)
    assert_same(read_results(tmp_path, dataset), found, dataset, atol=1e-5)


def test_coco_round_trip(tmp_path, dataset):
    found = detections(dataset)
    write_coco_results(tmp_path / "results.json", found, dataset)
    assert_same(read_results(tmp_path / "results.json", dataset), found, dataset, atol=1e-5)


def test_voc_lines_are_1_based_and_inclusive(tmp_path, voc):
    found = {
        "000001": Detections(np.array([[0, 1, 10, 20]], np.float32), np.array([0.5], np.float32), ("disc",))
    }
    write_voc_results(tmp_path, found, SHAPES, "test", task="comp3_det")
    text = (tmp_path / "comp3_det_test_disc.txt").read_text()
    assert text == "000001 0.5 1.000000 2.000000 10.000000 20.000000\n"
    assert (tmp_path / "comp3_det_test_square.txt").read_text() == ""


def test_coco_results_carry_the_ids_of_the_dataset(tmp_path):
    coco_tree(tmp_path)
    dataset = read_dataset(tmp_path, "val")
    found = {
        "5": Detections(np.array([[1, 2, 11, 22]], np.float32), np.array([0.5], np.float32), ("square",))
    }
    write_coco_results(tmp_path / "r.json", found, dataset)
    entry = {"image_id": 5, "category_id": 20, "bbox": [1, 2, 10, 20], "score": 0.5}
    assert json.loads((tmp_path / "r.json").read_text()) == [entry]


@pytest.mark.parametrize("image", ["000001", 1])
@pytest.mark.parametrize("category", [1, "disc"])
def test_names_stems_and_positions_stand_for_ids(tmp_path, image, category):
    yolo_tree(tmp_path, {"train": 6})
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "classes.txt").write_text("\n".join(SHAPES))
    dataset = read_dataset(tmp_path, "all")
    category = category if isinstance(category, str) else dataset.category_ids[dataset.classes[0]]
    entry = {"image_id": image, "category_id": category, "bbox": [1, 2, 10, 20], "score": 0.5}
    (tmp_path / "r.json").write_text(json.dumps([entry]))
    read = read_results(tmp_path / "r.json", dataset)["000001"]
    assert (read.boxes.tolist(), read.labels) == ([[1, 2, 11, 22]], (dataset.classes[0],))


def test_detections_come_by_falling_score(tmp_path, voc):
    (tmp_path / "comp4_det_val_disc.txt").write_text(
        "000001 -2 1 1 9 9\n000001 3 2 2 9 9\n\n000001 1e-3 3 3 9 9\n"
    )
    read = read_results(tmp_path, voc)["000001"]
    np.testing.assert_allclose(read.scores, [3, 1e-3, -2])
    assert read.boxes[:, 0].tolist() == [1, 2, 0]


def test_classes_that_the_split_does_not_show(tmp_path, voc):
    (tmp_path / "comp4_det_val_zebra.txt").write_text("000001 1 1 1 9 9\n")
    with pytest.raises(
        ValueError, match=r"comp4_det_val_zebra.txt: found results of an unknown class, expected"
    ):
        read_results(tmp_path, voc)
    assert read_results(tmp_path, voc, ["zebra"])["000001"].labels == ("zebra",)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("009999 1 1 1 9 9", "found the image '009999'"),
        ("000001 1 1 1 9", "expected 5 numbers"),
        ("000001 high 1 1 9 9", "expected 5 numbers"),
        ("000001 nan 1 1 9 9", "expected 5 numbers"),
        ("000001 1 1 1 9 9 9", "found the image '000001 1'"),
    ],
)
def test_malformed_lines(tmp_path, voc, line, found):
    path = tmp_path / "comp4_det_val_disc.txt"
    path.write_text(f"000001 1 1 1 9 9\n{line}\n")
    with pytest.raises(ValueError, match=f"{path.name}:2: ") as caught:
        read_results(tmp_path, voc)
    assert found in str(caught.value)


def test_one_file_a_class(tmp_path, voc):
    for task in ("comp3", "comp4"):
        (tmp_path / f"{task}_det_val_disc.txt").write_text("")
    with pytest.raises(ValueError, match=r"found class 'disc' again after comp3_det_val_disc.txt"):
        read_results(tmp_path, voc)


def test_folder_without_results(tmp_path, voc):
    with pytest.raises(ValueError, match=r"found no results, expected files comp<N>_det_"):
        read_results(tmp_path, voc)
    with pytest.raises(FileNotFoundError, match="gone: found no such file or folder"):
        read_results(tmp_path / "gone", voc)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"image_id": 9}, "result 1: found the unknown image_id 9"),
        ({"image_id": [9]}, "result 1: found the unknown image_id"),
        ({"category_id": 0}, "result 1: found the unknown category_id 0"),
        ({"category_id": "dog"}, "result 1: found the unknown category_id 'dog'"),
        ({"bbox": [1, 2, 3]}, "expected 5 numbers"),
        ({"bbox": 3}, "expected 5 numbers"),
        ({"bbox": [1, 2, 3, None]}, "expected 5 numbers"),
        ({"score": float("nan")}, "expected 5 numbers"),
        ({"score": 10**400}, "expected 5 numbers"),
    ],
)
def test_malformed_entries(tmp_path, voc, change, found):
    entry = {"image_id": "000001", "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}
    (tmp_path / "r.json").write_text(json.dumps([entry, entry | change]))
    with pytest.raises(ValueError, match=r"r.json: result 1: ") as caught:
        read_results(tmp_path / "r.json", voc)
    assert found in str(caught.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[\n{]", r"r.json:2: found no JSON"),
        ("{}", "r.json: found a JSON dict, expected a list of COCO results"),
        ("[1]", "r.json: result 0: found 1, expected image_id, category_id, bbox and score"),
        ('[{"image_id": 1}]', "r.json: result 0: found {'image_id': 1}"),
    ],
)
def test_other_json(tmp_path, voc, text, found):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=found):
        read_results(tmp_path / "r.json", voc)


def test_nothing_unknown_is_written(tmp_path, voc):
    odd = Detections(np.array([[0, 0, 9, 9]], np.float32), np.array([1], np.float32), ("zebra",))
    with pytest.raises(
        ValueError, match="image 000001: found the label 'zebra', expected one of disc, square"
    ):
        write_voc_results(tmp_path, {"000001": odd}, SHAPES, "val")
    with pytest.raises(ValueError, match="image 000001: found the label 'zebra', expected one of "):
        write_coco_results(tmp_path / "r.json", {"000001": odd}, voc)
    with pytest.raises(ValueError, match="found detections in 'other', expected an image of"):
        write_coco_results(tmp_path / "r.json", {"other": odd}, voc)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_no_folder(tmp_path, voc):
    with pytest.raises(OSError, match=r"cannot write \(No such file or directory\)"):
        write_voc_results(tmp_path / "gone", {}, SHAPES, "val")
    with pytest.raises(OSError, match=r"r.json: cannot write"):
        write_coco_results(tmp_path / "gone" / "r.json", {}, voc)


def test_one_name_is_no_list_of_classes(tmp_path, voc):
    message = "found the str 'disc', expected a list of class names"
    with pytest.raises(ValueError, match=message):
        write_voc_results(tmp_path, {}, "disc", "val")
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path, voc, "disc")


class TestOwnJson:
    """What ``sppnet detect run --json`` writes, in both versions."""

    def file(self, tmp_path, dataset, found, versioned, name=lambda path: str(path)):
        images = [
            {"image": name(sample.path), "height": 96, "width": 128, "detections": found[sample.name].facts()}
            for sample in dataset
            if sample.name in found
        ]
        content = {"version": 1, "images": images} if versioned else images
        (tmp_path / "r.json").write_text(json.dumps(content))
        return tmp_path / "r.json"

    @pytest.mark.parametrize("versioned", [True, False])
    def test_round_trip(self, tmp_path, dataset, versioned):
        found = detections(dataset)
        file = self.file(tmp_path, dataset, found, versioned)
        assert_same(read_results(file, dataset), found, dataset, atol=0)

    @pytest.mark.parametrize(
        "name",
        [
            lambda path: path.name,
            lambda path: f"elsewhere/{path.name}",
            lambda path: f"C:\\x\\{path.stem}.png",
            lambda path: os.path.relpath(path),
        ],
    )
    def test_names_of_images(self, tmp_path, voc, name):
        found = detections(voc)
        assert_same(read_results(self.file(tmp_path, voc, found, True, name), voc), found, voc, atol=0)

    def test_nothing_found(self, tmp_path, voc):
        (tmp_path / "r.json").write_text('{"version": 1, "images": []}')
        assert all(len(found) == 0 for found in read_results(tmp_path / "r.json", voc).values())

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"image": "other.jpg"}, "image 0: found the image 'other.jpg', expected an image of "),
            ({"image": None}, "image 0: found the image 'None'"),
            ({"detections": 3}, "image 0: found {'image': "),
            ({"detections": [3]}, "image 0: found 3, expected label, score and box"),
            (
                {"detections": [{"label": "cow", "score": 1, "box": [1, 2, 3, 4]}]},
                "found the label 'cow', expected one of disc",
            ),
            ({"detections": [{"label": "disc", "score": 1, "box": [1, 2, 3]}]}, "expected 5 numbers"),
        ],
    )
    def test_malformed(self, tmp_path, voc, change, says):
        image = {"image": "000001.jpg", "detections": []} | change
        (tmp_path / "r.json").write_text(json.dumps([image]))
        with pytest.raises(ValueError, match=r"r.json: image 0: ") as caught:
            read_results(tmp_path / "r.json", voc)
        assert says in str(caught.value)
