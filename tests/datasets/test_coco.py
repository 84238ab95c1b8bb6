import json
from dataclasses import replace

import pytest

from sppnet.datasets import dataset_splits, read_dataset, read_results
from sppnet.errors import SppnetError
from sppnet.images import read_image
from trees import SHAPES, SPLITS, coco_json, coco_tree, errors, only_error, save, scenes, write


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
        assert len(read_dataset(file)) == 1
        assert "found no split 'mine', expected none" in only_error(file, "mine")

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
        file = write(tmp_path / "instances_val.json", "[1, 2]")
        assert only_error(file).startswith(f"{file}: found no list of categories, expected images")
        file = write(tmp_path / "list.json", "[1, 2]")
        assert only_error(file).startswith(f"{file}: found a .json file of none of the formats known here")

    def test_splits(self, tmp_path):
        coco_tree(tmp_path, {"val2017": 1, "train2017": 1})
        file = write(tmp_path / "annotations" / "instances_test.json", "no JSON")
        assert dataset_splits(tmp_path) == ("test", "train2017", "val2017")
        assert dataset_splits(file) == ("test",)

    def test_images_in_memory_have_no_stem(self, tmp_path, coco):
        coco(lambda content: None)
        dataset = read_dataset(tmp_path)
        samples = (replace(dataset[0], image=read_image(dataset[0].path)), dataset[1])
        dataset = replace(dataset, samples=samples)
        results = {"category_id": "disc", "bbox": [1, 2, 3, 4], "score": 1}
        file = write(tmp_path / "r.json", json.dumps([{"image_id": 1, **results}]))
        assert len(read_results(file, dataset)["1"].scores) == 1
        write(file, json.dumps([{"image_id": "000001", **results}]))
        with pytest.raises(SppnetError, match="found the unknown image_id '000001'"):
            read_results(file, dataset)


@pytest.mark.parametrize(("rotation", "box"), [(90.0, [30, 20, 50, 60]), (180, [20, 30, 60, 50]), ("", None)])
def test_boxes_that_cvat_turned(coco, rotation, box):
    def turn(content):
        content["annotations"][0] |= {"bbox": [20, 30, 40, 20], "attributes": {"rotation": rotation}}

    data = read_dataset(coco(turn))
    assert data[0].target.boxes[0].tolist() == (box or [20, 30, 60, 50])


def test_a_size_in_fractions_counts(coco):
    def enlarge(content):
        content["images"][0] |= {"width": 256.0, "height": 192.0}
        content["annotations"][0]["bbox"] = [20, 30, 40, 20]

    assert read_dataset(coco(enlarge))[0].target.boxes[0].tolist() == [10, 15, 30, 25]


def test_a_class_with_half_a_letter(coco):
    coco_file = coco(lambda content: content["categories"][0].update(name="a\ud83d"))
    assert only_error(coco_file) == f"{coco_file}: found the class 'a\\ud83d', expected letters"


def test_a_class_without_a_name(coco):
    path = coco(lambda content: content["categories"][0].update(name=" "))
    assert errors(path)[1].startswith(f"{path}: categories[0] (id ")
    assert errors(path)[1].endswith("found an empty name, expected a class name")


def test_a_data_set_inside_another_one_is_left_out(tmp_path):
    coco_tree(tmp_path, {"train": 3, "val": 2})
    coco_tree(tmp_path / "old", {"val": 4})
    data = read_dataset(tmp_path, "val")
    assert len(data) == 2
    assert all("old" not in sample.path.parts for sample in data)
    left = "1 of a data set inside this one, first old/annotations/instances_val.json"
    assert any(left in note for note in data.notes)
    assert len(read_dataset(tmp_path / "old")) == 4
