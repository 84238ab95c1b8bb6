import pytest
from PIL import Image

from sppnet.datasets import dataset_splits, read_dataset
from sppnet.errors import DatasetError
from trees import SHAPES, only_error, save, scene, scenes, write, yolo_tree


@pytest.fixture
def yolo(tmp_path):
    yolo_tree(tmp_path, {"train": 2})
    return tmp_path


@pytest.fixture
def label(yolo):
    return yolo / "labels" / "train" / "000001.txt"


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

    @pytest.mark.parametrize("names", ["{'0': '7', '1': a, '2': b}", "[7, a, b]"])
    def test_names_and_numbers_as_text(self, yolo, names):
        write(yolo / "data.yaml", f"names: {names}\ntrain: images/train\n")
        assert read_dataset(yolo).category_ids == {"7": 0, "a": 1, "b": 2}

    def test_list_of_images(self, yolo):
        write(yolo / "train.txt", "./images/train/000001.jpg\nimages/train/000002.jpg\n")
        write(yolo / "data.yaml", f"names: [{', '.join(SHAPES)}]\ntrain: train.txt\n")
        assert [s.name for s in read_dataset(yolo)] == ["images/train/000001", "images/train/000002"]
        write(yolo / "train.txt", "images/train/000001.jpg\nimages/train/000009.jpg\n")
        assert only_error(yolo).startswith(f"{yolo / 'train.txt'}:2: found no image 'images/train/000009'")

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
        assert "train/000001.txt) and no names of their classes, expected data.yaml, " in only_error(yolo)
        write(yolo / names, "\n".join(SHAPES))
        assert [sample.name for sample in read_dataset(yolo, "train")] == ["000001", "000002"]
        assert [sample.name for sample in read_dataset(yolo, "all")] == ["000001", "000002"]

    def test_flat_folders(self, tmp_path):
        write(tmp_path / "classes.txt", "disc\n")
        write(tmp_path / "labels" / "a.txt", "0 0.5 0.5 0.5 0.5\n")
        save(tmp_path / "images" / "a.png", scene(0).image)
        dataset = read_dataset(tmp_path)
        assert (dataset.split, dataset[0].target.boxes.tolist()) == (None, [[32, 24, 96, 72]])

    @pytest.mark.parametrize(
        "names", [("yes", "no"), ("007", "12:30"), ("1", "1.0"), ("2020-01-01", "0x1F"), ("null", "On")]
    )
    def test_names_come_as_they_are_written(self, tmp_path, names):
        script = "download: |\n" + "  print('a long line of a script')\n" * 200
        nothing = "path: ~\nval: null\ntest:\n"
        write(tmp_path / "data.yaml", f"{nothing}{script}nc: 2\nnames: [{', '.join(names)}]\ntrain: photos\n")
        write(tmp_path / "photos" / "a.txt", "1 0.5 0.5 0.5 0.5\n0 0.5 0.5 0.25 0.5\n")
        save(tmp_path / "photos" / "a.png", scene(0).image)
        dataset = read_dataset(tmp_path)
        assert dataset[0].target.labels == names[::-1]
        assert dataset.notes == ()

    def test_data_without_a_list_of_classes(self, tmp_path):
        write(tmp_path / "a.txt", "0 0.5 0.5 0.5 0.5\n")
        write(tmp_path / "obj.data", "train = train.txt\nnames =\n")
        expected = f"{tmp_path / 'obj.data'}: found no file (names), expected a list of classes"
        assert only_error(tmp_path) == expected

    @pytest.mark.parametrize("key", ["names", "train", "path", "other"])
    def test_few_lines_that_stand_for_more_than_memory_holds(self, tmp_path, key):
        names = [f"a0: &a0 [{', '.join('x' * 9)}]"]
        names += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12)]
        named = "" if key == "names" else "names: [a, b]\n"
        write(tmp_path / "data.yaml", "\n".join(names) + f"\n{named}{key}: *a11\n")
        write(tmp_path / "a.txt", "1 0.5 0.5 0.5 0.5\n")
        save(tmp_path / "a.png", scene(0).image)
        if key == "names":
            assert len(only_error(tmp_path)) < 500
        else:
            assert read_dataset(tmp_path)[0].target.labels == ("b",)

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
            ("0 0.1 0.1 0.9 0.1 0.9 0.9 0.5", "expected 5 numbers"),
            ("0 64 48 20 20", "expected coordinates from 0 to 1"),
            ("0 0.5 nan 0.1 0.1", "expected coordinates from 0 to 1"),
            ("0 0.5 0.5 0 0.1", "box 0.5 0.5 0 0.1 of 'disc' is inverted or empty"),
            ("\x00\xff\x01", "found a byte of 0, expected text in UTF-8"),
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
            f"{label.with_name('000009.txt')}: found no image 'labels/train/000009.txt'"
        )

    def test_repeated_image(self, yolo):
        save(yolo / "images" / "train" / "000001.png", scene(1).image)
        assert f"{yolo}/labels/train/000001.txt: found 2 images for these labels" in only_error(yolo)

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
            ("names: [a, ' ']\ntrain: images/train\n", "data.yaml: found ['a', ' '] as names"),
            ("names: {0: a, '00': b}\ntrain: images/train\n", "found {'0': 'a', '00': 'b'} as names"),
            ("names: " + "[" * 5000, "data.yaml: found no YAML that can be read"),
            ("names: [[yes], no]\ntrain: images/train\n", "data.yaml: found [['yes'], 'no'] as names"),
            ("nc: 3\nnames: [a]\ntrain: images/train\n", "data.yaml: found 3 classes (nc) and 1 names"),
            (
                "names: [a, b, a]\ntrain: images/train\n",
                "data.yaml: found the classes 0 and 2 both named 'a'",
            ),
            ("names: [a]\ntrain: photos\n", "data.yaml: found no "),
            ("\x07", "data.yaml:1: found no YAML"),
        ],
    )
    def test_malformed_description(self, yolo, text, found):
        write(yolo / "data.yaml", text)
        assert found in only_error(yolo)

    def test_splits_of_a_description(self, yolo, label):
        write(label, "not read")
        assert dataset_splits(yolo) == ("train",)
        write(yolo / "data.yaml", "val: images/val\ntrain: images/train\ntest:\nnames: [a]\nother: x\n")
        assert dataset_splits(yolo) == ("train",)  # no images/val is there
        save(yolo / "images" / "val" / "1.jpg", scene(0).image)
        assert dataset_splits(yolo) == ("train", "val")
        write(yolo / "data.yaml", "names: [a\n")
        with pytest.raises(DatasetError, match=r"data.yaml:2: found no YAML"):
            dataset_splits(yolo)

    def test_splits_of_folders(self, yolo):
        (yolo / "data.yaml").unlink()
        write(yolo / "classes.txt", "disc\n")
        assert dataset_splits(yolo) == ("train",)
        (yolo / "images" / "train").rename(yolo / "images" / "trains")
        assert dataset_splits(yolo) == ()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_all_text_files_in_other_encodings(tmp_path, encoding):
    save(tmp_path / "images/a.jpg", scene(0).image)
    write(tmp_path / "classes.txt", "cat\r\nhömu\r\n")
    write(tmp_path / "labels/a.txt", "1 0.5 0.5 0.25 0.25\r\n")
    for file in tmp_path.rglob("*.txt"):
        file.write_bytes(file.read_text("utf-8").encode(encoding))
    assert read_dataset(tmp_path)[0].target.labels == ("hömu",)
