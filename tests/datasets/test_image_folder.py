import gc
import os
import pickle
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sppnet.datasets.image_folder import LabelledImages, image_folder_splits, read_image_folder
from sppnet.errors import SppnetError
from sppnet.images import read_image
from trees import SHAPES, class_tree, write


def fill(root, *names):
    """Make files: empty ones, as no image is opened."""
    for name in names:
        write(root / name, "")
    return root


def names(images, root=None):
    return [path.relative_to(root or images.root).as_posix() for path, _ in images]


def error(root, split=None, classes=None, kind=ValueError):
    """Return the one line of the error that reading must end in."""
    with pytest.raises(kind) as caught:
        read_image_folder(root, split, classes)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()
    return str(caught.value)


def csv(tmp_path, *lines):
    """Write a list of images; those that it may name are cat/1.jpg, cat/2.jpg, dog/1.jpg, dog/2.jpg."""
    fill(tmp_path, "cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg")
    return write(tmp_path / "list.csv", "".join(f"{line}\n" for line in lines))


class TestFolders:
    def test_lists_what_was_drawn(self, tmp_path):
        drawn = class_tree(tmp_path)
        images = read_image_folder(tmp_path)
        assert images.classes == tuple(sorted(SHAPES))
        assert images.labels.dtype == np.int32
        assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert (images.root, images.notes) == (tmp_path, ())
        assert [(path, images.classes[label]) for path, label in images] == drawn
        assert all(read_image(path).shape == (32, 40, 3) for path, _ in images)

    def test_root_may_be_a_string_or_relative(self, tmp_path, monkeypatch):
        fill(tmp_path, "data/cat/1.jpg")
        assert read_image_folder(str(tmp_path / "data"))[0] == (tmp_path / "data/cat/1.jpg", 0)
        monkeypatch.chdir(tmp_path)
        assert read_image_folder("data")[0] == (Path("data/cat/1.jpg"), 0)
        monkeypatch.chdir(tmp_path / "data")
        assert read_image_folder(".")[0] == (Path("cat/1.jpg"), 0)

    def test_images_lie_at_any_depth(self, tmp_path):
        fill(tmp_path, "cat/b/c/1.jpg", "cat/a.jpg", "cat/b/2.jpg", "dog/x.jpg/1.jpg")
        images = read_image_folder(tmp_path)
        assert names(images) == ["cat/a.jpg", "cat/b/2.jpg", "cat/b/c/1.jpg", "dog/x.jpg/1.jpg"]
        assert images.labels.tolist() == [0, 0, 0, 1]

    @pytest.mark.parametrize("name", ["1.JPEG", "1.jpg", "1.Png", "a.b.tiff", "ü ö.webp"])
    def test_suffixes_of_any_case(self, tmp_path, name):
        assert names(read_image_folder(fill(tmp_path, f"cat/{name}"))) == [f"cat/{name}"]

    def test_hidden_files_and_folders_are_ignored(self, tmp_path):
        fill(tmp_path, "cat/1.jpg", "cat/._1.jpg", "cat/.thumbnails/1.jpg", ".git/1.jpg", ".hidden.jpg")
        images = read_image_folder(tmp_path)
        assert (names(images), images.classes, images.notes) == (["cat/1.jpg"], ("cat",), ())

    def test_other_files_are_counted(self, tmp_path):
        fill(tmp_path, "cat/1.jpg", "cat/b/list.txt", "cat/a.xml", "cat/jpg", "cat/2.jpg.part", "README.md")
        fill(tmp_path, "2.jpg", "1.jpg")
        images = read_image_folder(tmp_path)
        assert names(images) == ["cat/1.jpg"]
        assert images.notes == (
            "7 files left out: 2 outside the class folders, first 1.jpg; 1 .md, first README.md; "
            "1 .part, first cat/2.jpg.part; 1 .txt, first cat/b/list.txt; 1 .xml, first cat/a.xml; "
            "1 without a suffix, first cat/jpg",
        )

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_devices_are_counted_not_opened(self, tmp_path):
        fill(tmp_path, "cat/1.jpg")
        os.mkfifo(tmp_path / "cat" / "2.jpg")
        notes = read_image_folder(tmp_path).notes
        assert notes == ("1 file left out: 1 neither file nor folder, first cat/2.jpg",)

    def test_order_is_that_of_classes_then_bytes(self, tmp_path, monkeypatch):
        fill(tmp_path, "b/10.jpg", "b/2.jpg", "B/1.jpg", "é/1.jpg", "b c/1.jpg", "b/A.jpg", "b/a/1.jpg")
        images = read_image_folder(tmp_path)
        assert images.classes == ("B", "b", "b c", "é")
        expected = ["B/1.jpg", "b/10.jpg", "b/2.jpg", "b/A.jpg", "b/a/1.jpg", "b c/1.jpg", "é/1.jpg"]
        assert names(images) == expected

        class Backwards:
            """The entries of a folder in another order than that of the file system."""

            def __init__(self, path, scan=os.scandir):
                with scan(path) as entries:
                    self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

            def __enter__(self):
                return self.entries

            def __exit__(self, *error):
                pass

        monkeypatch.setattr(os, "scandir", Backwards)
        assert names(read_image_folder(tmp_path)) == expected

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
    def test_names_that_are_not_utf8(self, tmp_path):
        folder = os.fsencode(tmp_path) + b"/caf\xe9"
        os.mkdir(folder)
        for name in (b"\xff\xfe.jpg", b"\xff.txt"):
            with open(folder + b"/" + name, "wb") as file:
                file.write(b"content")
        images = read_image_folder(tmp_path)
        path, label = pickle.loads(pickle.dumps(images))[0]
        assert os.fsencode(path) == folder + b"/\xff\xfe.jpg"
        assert path.read_bytes() == b"content"
        assert label == images.classes.index(os.fsdecode(b"caf\xe9"))
        assert images.notes == (r"1 file left out: 1 .txt, first caf\xe9/\xff.txt",)
        os.remove(path)
        assert error(tmp_path) == rf"{tmp_path}/caf\xe9: found no image, expected some in each class folder"

    def test_given_classes_set_the_labels_not_the_order(self, tmp_path):
        fill(tmp_path, "cat/1.jpg", "dog/1.jpg")
        images = read_image_folder(tmp_path, classes=["dog", "cow", "cat"])
        assert images.classes == ("dog", "cow", "cat")
        assert images.labels.tolist() == [2, 0]
        assert names(images) == ["cat/1.jpg", "dog/1.jpg"]

    def test_folders_must_be_among_given_classes(self, tmp_path):
        fill(tmp_path, "cat/1.jpg", "dog/1.jpg", "cow/1.jpg")
        assert error(tmp_path, classes=["dog"]) == (
            f"{tmp_path}: found the classes 'cat', 'cow', expected only the 1 given: 'dog'"
        )
        assert "found the classes 'dog' more than once" in error(tmp_path, classes=["dog", "cat", "dog"])

    def test_no_classes(self, tmp_path):
        assert error(tmp_path) == f"{tmp_path}: found no class folder, expected <class>/*.jpg in it"
        fill(tmp_path, "1.jpg", "2.jpg")
        assert "found 2 images but no class folder, expected <class>/*.jpg in it; move the" in error(tmp_path)

    @pytest.mark.parametrize("content", ["dog/.hidden.jpg", "dog/list.txt", "dog/deeper/list.txt"])
    def test_class_without_images(self, tmp_path, content):
        fill(tmp_path, "cat/1.jpg", content)
        expected = f"{tmp_path / 'dog'}: found no image, expected some in each class folder"
        assert error(tmp_path) == expected
        assert error(tmp_path, classes=["cat", "dog"]) == expected

    def test_missing_root(self, tmp_path):
        place = tmp_path / "nothing"
        assert error(place, kind=FileNotFoundError) == (
            f"{place}: found no such folder or file, expected labelled images"
        )

    @pytest.mark.parametrize("name", ["images.txt", "images.zip", "images", "1.jpg"])
    def test_file_of_another_type(self, tmp_path, name):
        fill(tmp_path, name)
        expected = "expected a folder of class folders or a .csv file"
        assert error(tmp_path / name) == f"{tmp_path / name}: found a file of unknown type, {expected}"

    def test_parquet_is_refused_by_name(self, tmp_path):
        fill(tmp_path, "flat/a.parquet", "hub/README.md", "hub/data/train-0.parquet")
        assert "found a Parquet file, expected" in error(tmp_path / "flat" / "a.parquet")
        for place in (tmp_path / "flat", tmp_path / "hub"):
            for split in (None, "train"):
                assert error(place, split) == (
                    f"{place}: found Parquet files, expected class folders of image files"
                )

    def test_parquet_beside_class_folders_is_left_out(self, tmp_path):
        images = read_image_folder(fill(tmp_path, "cat/1.jpg", "index.parquet"))
        assert images.notes == ("1 file left out: 1 .parquet, first index.parquet",)

    def test_unreadable_folder(self, tmp_path, monkeypatch):
        fill(tmp_path, "cat/1.jpg", "dog/1.jpg")

        def scan(path, scan=os.scandir):
            if path.endswith(b"dog/"):
                raise PermissionError(13, "Permission denied", path)
            return scan(path)

        monkeypatch.setattr(os, "scandir", scan)
        assert error(tmp_path, kind=PermissionError) == (
            f"{tmp_path / 'dog'}: cannot list (Permission denied), expected a readable folder"
        )


class TestSplits:
    def test_split_is_chosen(self, tmp_path):
        fill(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/cat/a/2.jpg")
        images = read_image_folder(tmp_path, "val")
        assert (images.classes, images.root) == (("cat",), tmp_path)
        assert names(images) == ["val/cat/a/2.jpg"]
        assert names(read_image_folder(tmp_path, "train")) == ["train/cat/1.jpg", "train/dog/1.jpg"]

    def test_split_must_be_chosen(self, tmp_path):
        fill(tmp_path, "train/cat/1.jpg", "val/cat/2.jpg", "docs/1.txt")
        assert error(tmp_path) == (
            f"{tmp_path}: found the splits 'train', 'val', none chosen; "
            "expected split= to name one, or split='.' if these are classes"
        )

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_only_split_is_taken(self, tmp_path, split):
        images = read_image_folder(fill(tmp_path, f"{split}/cat/1.jpg", f"{split}/dog/1.jpg"))
        assert images.classes == ("cat", "dog")

    @pytest.mark.parametrize("split", ["test", "", "..", "train/cat"])
    def test_unknown_split(self, tmp_path, split):
        fill(tmp_path, "train/cat/1.jpg", "val/cat/2.jpg")
        assert error(tmp_path, split) == (
            f"{tmp_path}: found no split {split!r}, expected one of 'train', 'val'"
        )
        assert "expected one of (none)" in error(tmp_path / "val" / "cat", "test")

    def test_many_splits_are_not_all_listed(self, tmp_path):
        fill(tmp_path, *(f"n{i:02d}/1.jpg" for i in range(12)))
        assert error(tmp_path, "train").endswith("'n08', 'n09', and 2 more")

    def test_class_named_like_a_split(self, tmp_path):
        fill(tmp_path, "bus/1.jpg", "train/1.jpg")
        assert read_image_folder(tmp_path).classes == ("bus", "train")
        fill(tmp_path, "train/steam/1.jpg")
        assert "found the splits 'train', none chosen" in error(tmp_path)
        assert names(read_image_folder(tmp_path, ".")) == ["bus/1.jpg", "train/1.jpg", "train/steam/1.jpg"]

    def test_imagenet_as_published(self, tmp_path):
        home = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
        fill(home, "train/n01440764/n01440764_10026.JPEG", "train/n01443537/n01443537_2.JPEG")
        fill(home, "val/ILSVRC2012_val_00000001.JPEG", "test/ILSVRC2012_test_00000001.JPEG")
        fill(tmp_path, "ILSVRC/Annotations/CLS-LOC/1.xml", "LOC_val_solution.csv")
        for root in (home, tmp_path / "ILSVRC", tmp_path):
            images = read_image_folder(root, "train")
            assert images.root == home
            assert images.classes == ("n01440764", "n01443537")
            assert names(images)[0] == "train/n01440764/n01440764_10026.JPEG"
            assert "found the splits 'train', none chosen" in error(root)
            assert error(root, "val").startswith(
                f"{home / 'val'}: found 1 image but no class folder, expected <class>/*.jpg in it; move the"
            )


class TestListingSplits:
    @pytest.mark.parametrize(
        ("files", "expected"),
        [
            (["train/cat/1.jpg", "val/cat/2.jpg", "docs/1.txt"], ("train", "val")),
            (["train/cat/1.jpg"], ("train",)),
            (["cat/1.jpg", "dog/a/1.jpg"], ()),
            (["train/1.jpg", "bus/1.jpg"], ()),
            (["1.jpg"], ()),
            ([], ()),
        ],
    )
    def test_of_folders(self, tmp_path, files, expected):
        assert image_folder_splits(fill(tmp_path, *files)) == expected

    def test_of_published_data(self, tmp_path):
        fill(tmp_path, "ILSVRC/Data/CLS-LOC/train/n1/1.JPEG", "ILSVRC/Data/CLS-LOC/val/1.JPEG")
        assert image_folder_splits(str(tmp_path)) == ("train",)

    def test_of_a_list(self, tmp_path):
        file = csv(tmp_path, "path,label,split", "gone.jpg,cat,val", "cat/1.jpg,,train", "cat/2.jpg,cat,val")
        assert image_folder_splits(file) == ("train", "val")
        assert image_folder_splits(csv(tmp_path, "path,label", "cat/1.jpg,cat")) == ()

    def test_of_something_else(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nothing: found no such folder or file"):
            image_folder_splits(tmp_path / "nothing")
        fill(tmp_path, "a.parquet", "a.txt")
        with pytest.raises(SppnetError, match="found Parquet files"):
            image_folder_splits(tmp_path)
        with pytest.raises(SppnetError, match=r"a.txt: found a file of unknown type"):
            image_folder_splits(tmp_path / "a.txt")


class TestFingerprint:
    def test_is_that_of_names_sizes_and_labels(self, images):
        def difference(other):
            assert other.fingerprint != images.fingerprint
            return images.contents.difference(other.contents)

        assert len(images.fingerprint) == 16
        assert images.contents[:2] == (6, 6)
        assert read_image_folder(images.root).fingerprint == images.fingerprint
        assert images[:].fingerprint == pickle.loads(pickle.dumps(images)).fingerprint == images.fingerprint
        assert difference(images[:4]) == "4 images instead of 6, 4 objects instead of 6"
        assert difference(images[::-1]) == "other names of images and annotations"
        assert difference(images.relabelled(["b", "a", "c"])) == "other annotations"
        assert difference(images.relabelled(["a", "b", "c", "d"])) == "other annotations"
        write(images[0][0], "longer")
        assert difference(read_image_folder(images.root)) == "other sizes of image files"
        images[0][0].rename(images.root / "a" / "other.jpg")
        assert difference(images[:]) == "other sizes of image files"  # one is absent
        assert "names of images" in difference(read_image_folder(images.root))

    def test_does_not_depend_on_the_place(self, images, tmp_path):
        files = [f"copy/{path.relative_to(images.root)}" for path, _ in images]
        assert read_image_folder(fill(tmp_path, *files) / "copy").fingerprint == images.fingerprint


class TestLinks:
    @pytest.fixture(autouse=True)
    def _needs_links(self, tmp_path):
        try:
            (tmp_path / "link").symlink_to("nothing")
        except OSError:
            pytest.skip("links may not be made here")
        (tmp_path / "link").unlink()

    def test_are_followed(self, tmp_path):
        root = fill(tmp_path, "store/cat/1.jpg", "data/dog/1.jpg") / "data"
        (root / "cat").symlink_to("../store/cat")
        (root / "dog" / "2.jpg").symlink_to("../../store/cat/1.jpg")
        images = read_image_folder(root)
        assert names(images) == ["cat/1.jpg", "dog/1.jpg", "dog/2.jpg"]
        assert images.notes == ()

    def test_that_lead_nowhere_are_counted(self, tmp_path):
        fill(tmp_path, "cat/1.jpg")
        (tmp_path / "cat" / "b.jpg").symlink_to("nothing.jpg")
        (tmp_path / "cat" / "a.jpg").symlink_to("a.jpg")
        (tmp_path / "dog").symlink_to("nothing")
        images = read_image_folder(tmp_path)
        assert (names(images), images.classes) == (["cat/1.jpg"], ("cat",))
        assert images.notes == ("3 files left out: 3 leading nowhere, first cat/a.jpg",)

    def test_class_of_nothing_else(self, tmp_path):
        fill(tmp_path, "cat/.keep")
        (tmp_path / "cat" / "1.jpg").symlink_to("nothing.jpg")
        assert error(tmp_path).startswith(f"{tmp_path / 'cat'}: found no image")

    @pytest.mark.parametrize("target", [".", "..", "../..", "../../.."])
    def test_in_a_circle(self, tmp_path, target):
        root = fill(tmp_path, "data/cat/a/1.jpg") / "data"
        (root / "cat" / "a" / "again").symlink_to(target)
        expected = "expected no link to a folder that holds the link"
        assert error(root) == f"{root / 'cat' / 'a' / 'again'}: found a circle, {expected}"

    def test_in_a_circle_of_two(self, tmp_path):
        fill(tmp_path, "data/cat/1.jpg", "store/1.jpg")
        (tmp_path / "data" / "cat" / "there").symlink_to("../../store")
        (tmp_path / "store" / "back").symlink_to("../data/cat")
        assert f"{tmp_path / 'data' / 'cat' / 'there' / 'back'}: found a circle" in error(tmp_path / "data")


class TestCsv:
    def test_equals_the_folder_it_lists(self, tmp_path):
        drawn = class_tree(tmp_path / "data")
        rows = [f"data/{path.parent.name}/{path.name},{shape}" for path, shape in reversed(drawn)]
        listed = read_image_folder(csv(tmp_path, "path,label", *rows))
        folder = read_image_folder(tmp_path / "data")
        assert list(listed) == list(folder) == [(path, folder.classes.index(shape)) for path, shape in drawn]
        assert (listed.classes, listed.notes) == (folder.classes, ())
        assert listed.root == tmp_path

    def test_paths_are_absolute_or_start_at_the_file(self, tmp_path, monkeypatch):
        file = csv(tmp_path, "path,label", "cat/1.jpg,a", f"{tmp_path}/dog/1.jpg,b")
        assert list(read_image_folder(file)) == [(tmp_path / "cat/1.jpg", 0), (tmp_path / "dog/1.jpg", 1)]
        monkeypatch.chdir(tmp_path / "cat")
        assert read_image_folder("../list.csv")[0][0].samefile(tmp_path / "cat/1.jpg")
        monkeypatch.chdir(tmp_path)
        assert read_image_folder("list.csv")[0] == (Path("cat/1.jpg"), 0)

    def test_quotes_byte_order_mark_blank_lines_and_further_columns(self, tmp_path):
        fill(tmp_path, 'a, "b".jpg')
        text = '\ufeff"label", path ,size\r\n\r\n" cat ","a, ""b"".jpg",7\r\ndog, cat/1.jpg,\r\n'
        csv(tmp_path).write_bytes(text.encode())
        images = read_image_folder(tmp_path / "list.csv")
        assert images.classes == ("cat", "dog")
        assert names(images) == ['a, "b".jpg', "cat/1.jpg"]

    def test_suffix_of_the_list_may_be_large(self, tmp_path):
        file = csv(tmp_path, "path,label", "cat/1.jpg,cat").rename(tmp_path / "LIST.CSV")
        assert len(read_image_folder(file)) == 1

    def test_files_count_whatever_their_suffix(self, tmp_path):
        fill(tmp_path, "picture.dat")
        assert len(read_image_folder(csv(tmp_path, "path,label", "picture.dat,cat"))) == 1

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
    def test_names_that_are_not_utf8(self, tmp_path):
        path = os.fsencode(tmp_path) + b"/\xe9.jpg"
        os.mknod(path)
        csv(tmp_path).write_bytes(b"path,label\n\xe9.jpg,cat\n")
        images = read_image_folder(tmp_path / "list.csv")
        assert os.fsencode(images[0][0]) == path
        csv(tmp_path).write_bytes(b"path,label\n\xe9.jpg,caf\xe9\n")
        assert "list.csv:2: found bytes that are no text in UTF-8" in error(tmp_path / "list.csv")
        os.remove(path)
        csv(tmp_path).write_bytes(b"path,label\n\xe9.jpg,cat\n")
        assert "list.csv:2: found bytes that are no text in UTF-8" in error(tmp_path / "list.csv")

    def test_given_classes(self, tmp_path):
        file = csv(tmp_path, "path,label", "cat/1.jpg,cat", "dog/1.jpg,dog")
        assert read_image_folder(file, classes=["dog", "cow", "cat"]).labels.tolist() == [2, 0]
        assert "found the classes 'dog', expected only the 1 given: 'cat'" in error(file, classes=["cat"])

    def test_splits(self, tmp_path):
        lines = ["path,split,label", "cat/1.jpg,train,cat", "dog/1.jpg, val ,dog", "cat/1.jpg,val,cat"]
        file = csv(tmp_path, *lines, "nothing.jpg,test,")
        assert names(read_image_folder(file, "val")) == ["cat/1.jpg", "dog/1.jpg"]
        assert read_image_folder(file, "train").classes == ("cat",)
        found = "found the splits 'test', 'train', 'val', none chosen; expected split= to name one"
        assert error(file) == f"{file}: {found}"
        expected = "expected one of 'test', 'train', 'val'"
        assert error(file, "trainval") == f"{file}: found no split 'trainval', {expected}"

    def test_only_split_is_taken(self, tmp_path):
        file = csv(tmp_path, "path,split,label", "cat/1.jpg,train,cat")
        assert len(read_image_folder(file)) == len(read_image_folder(file, "train")) == 1

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ([], ":1: found the columns (none), expected path and label once each"),
            (["file,label"], ":1: found the columns 'file', 'label', expected path and label"),
            (["path;label", "cat/1.jpg;cat"], ":1: found the columns 'path;label', expected path and label"),
            (["path,label,path"], ":1: found the columns 'path', 'label', 'path', expected path and label"),
            (["path,split,label,split"], ", and split at most once"),
            (["path,label"], ": found no row, expected at least one image"),
            (["path,label", "", "cat/1.jpg"], ":3: found a row of length 1, expected 2 as in line 1"),
            (["path,label", "cat/1.jpg,cat,1"], ":2: found a row of length 3, expected 2 as in line 1"),
            (["path,label", "cat/1.jpg, "], ":2: found an empty label, expected a class name"),
            (["path,label", ",cat"], ":2: found no file '', expected the path of an image"),
            (["path,label", "cat/1.jpg,cat", "cat/3.jpg,cat"], ":3: found no file 'cat/3.jpg', expected"),
            (["path,label", "cat,cat"], ":2: found no file 'cat', expected the path of an image"),
            (["path,label", "cat\0.jpg,cat"], r":2: found bytes that are no text in UTF-8"),
            (
                ["path,label", "cat/1.jpg,a", "cat/1.jpg,b"],
                ":3: found 'cat/1.jpg' as in line 2, expected each",
            ),
            (["path,label", "cat/1.jpg,a", "./dog/../cat/1.jpg,a"], ":3: found './dog/../cat/1.jpg' as in"),
            (["path,label,split", "cat/1.jpg,cat,"], ":2: found an empty split, expected a name"),
            (["path,label", '"cat/1.jpg,cat', "dog/1.jpg,dog"], ":3: found no CSV (unexpected end of data)"),
            (["path,label", '"cat"/1.jpg,cat'], ":2: found no CSV ("),
            (["path,label", "x" * 200_000 + ",cat"], ":2: found no CSV (field larger than"),
        ],
    )
    def test_bad_rows(self, tmp_path, lines, message):
        file = csv(tmp_path, *lines)
        assert error(file).startswith(str(file))
        assert message in error(file)

    def test_split_without_a_column(self, tmp_path):
        file = csv(tmp_path, "path,label", "cat/1.jpg,cat")
        assert error(file, "train") == f"{file}: found no split 'train', expected a column 'split'"

    def test_image_named_by_absolute_path_again(self, tmp_path):
        file = csv(tmp_path, "path,label", "cat/1.jpg,cat", f"{tmp_path}/cat/1.jpg,cat")
        assert "list.csv:3: found" in error(file)

    def test_utf16(self, tmp_path):
        file = csv(tmp_path)
        file.write_bytes("path,label\ncat/1.jpg,cat\n".encode("utf-16"))
        assert [path for path, _ in read_image_folder(file)] == [tmp_path / "cat/1.jpg"]
        file.write_bytes("path,label\ncat/1.jpg,cat\n".encode("utf-16")[:-1])
        assert "list.csv:2: found bytes that are no text in UTF-16" in error(file)


@pytest.fixture
def images(tmp_path):
    return read_image_folder(fill(tmp_path, *(f"{c}/{i}.jpg" for c in "abc" for i in range(2))))


class TestSequence:
    def test_items(self, images):
        assert len(images) == 6
        path, label = images[3]
        assert (path, label, type(label)) == (images.root / "b/1.jpg", 1, int)
        assert images[-1] == images[5] == images[np.int64(5)]
        assert images[0] in images
        assert list(reversed(images)) == [images[i] for i in range(5, -1, -1)]

    @pytest.mark.parametrize("index", [6, -7])
    def test_out_of_range(self, images, index):
        with pytest.raises(IndexError):
            images[index]

    @pytest.mark.parametrize(
        ("indices", "expected"),
        [
            (slice(1, 5, 2), [1, 3]),
            (slice(None, None, -1), [5, 4, 3, 2, 1, 0]),
            (slice(2, 2), []),
            ([5, 0, 0, -1], [5, 0, 0, 5]),
            ([], []),
            (np.array([2, 1], np.uint8), [2, 1]),
            ([True, False, False, False, True, False], [0, 4]),
        ],
    )
    def test_subset(self, images, indices, expected):
        part = images.subset(indices)
        assert isinstance(part, LabelledImages)
        assert list(part) == [images[i] for i in expected]
        assert (part.classes, part.root, part.notes) == (images.classes, images.root, images.notes)
        assert part.labels.dtype == np.int32
        assert part._names is images._names
        if isinstance(indices, slice):
            assert list(images[indices]) == list(part)

    def test_subset_of_a_subset(self, images):
        assert list(images[1:].subset([0, 2])[1:]) == [images[3]]

    @pytest.mark.parametrize("indices", [3, [[0, 1]], [0.0, 1.0], ["a"]])
    def test_bad_subset(self, images, indices):
        with pytest.raises(ValueError, match=r"found .*-dimensional indices of type .*, expected a slice"):
            images.subset(indices)

    @pytest.mark.parametrize("indices", [[6], [True, False]])
    def test_subset_out_of_range(self, images, indices):
        with pytest.raises(IndexError):
            images.subset(indices)

    def test_relabelled(self, images):
        other = images.relabelled(["c", "x", "a", "b"])
        assert other.classes == ("c", "x", "a", "b")
        assert other.labels.tolist() == [2, 2, 3, 3, 0, 0]
        assert other.labels.dtype == np.int32
        assert names(other) == names(images)
        assert list(other.relabelled(images.classes)) == list(images)

    def test_relabelled_by_unknown_classes(self, images):
        with pytest.raises(
            ValueError, match=r"found the classes 'a', 'c', expected only the 2 given: 'b', 'x'$"
        ):
            images.relabelled(["b", "x"])
        with pytest.raises(ValueError, match=r"found the classes 'b' more than once"):
            images.relabelled(["a", "b", "b", "b", "c"])

    def test_one_name_is_no_list(self, images):
        with pytest.raises(SppnetError, match="found the str 'abc', expected a list of class names"):
            images.relabelled("abc")
        with pytest.raises(SppnetError, match="found the str 'abc', expected a list of class names"):
            read_image_folder(images.root, classes="abc")

    def test_classes_without_images_may_be_unknown(self, images):
        assert images[2:4].relabelled(["x", "b"]).labels.tolist() == [1, 1]
        assert len(images[:0].relabelled([])) == 0

    def test_is_frozen(self, images):
        with pytest.raises(AttributeError):
            images.root = Path()

    def test_repr_is_short(self, images):
        assert repr(images) == f"LabelledImages(6 images, 3 classes, {str(images.root)!r})"

    def test_pickle(self, images):
        again = pickle.loads(pickle.dumps(images))
        assert list(again) == list(images)
        assert (again.classes, again.notes, again.root) == (images.classes, images.notes, images.root)


class TestMemory:
    @pytest.fixture
    def lists(self, tmp_path_factory):
        """A list of 20 and one of 2000 images, of the same classes."""
        roots = [tmp_path_factory.mktemp("images") for _ in range(2)]
        for root, count in zip(roots, (10, 1000), strict=True):
            fill(root, *(f"{label}/{i:06d}.jpg" for label in ("cat", "dog") for i in range(count)))
        return [read_image_folder(root) for root in roots]

    def test_no_object_is_held_for_an_image(self, lists):
        """Python counts references in the objects themselves: a worker that reads one copies its page."""

        def held(images):
            """Count what can be reached by type, short of classes and modules."""
            met, waiting = {}, [images]
            while waiting:
                found = waiting.pop()
                if id(found) not in met and not isinstance(found, type):
                    met[id(found)] = found
                    waiting += gc.get_referents(found)
            return Counter(type(found).__name__ for found in met.values())

        few, many = map(held, lists)
        assert few == many
        assert many["bytes"] == 1
        list(lists[1])
        assert held(lists[1]) == many

    def test_pickle_is_names_and_numbers(self, lists):
        for images in lists:
            size = len(images) * (len("cat/000000.jpg") + 1 + 8 + 4)
            assert size < len(pickle.dumps(images)) < size + 1000


def test_caltech101_as_its_archive_unpacks(tmp_path):
    drawn = class_tree(tmp_path / "101_ObjectCategories")
    assert [path for path, _ in read_image_folder(tmp_path)] == [path for path, _ in drawn]
