"""The commands on vectors end to end: what they write and say, and what they leave behind on errors."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import trees
from commands import content, environment, fails, read_json, sppnet, succeeds
from sppnet.datasets import read_dataset
from sppnet.images import read_image
from sppnet.retrieval.embedder import Embedder
from sppnet.retrieval.index import Index
from sppnet.retrieval.vectors import read_vectors

SMALL = ("--scales", "64", "--levels", "1")
INDEX = (*SMALL, "--stride", "32", "--pca", "8", "--windows", "6")


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eight pictures, two of them in a folder below; not to be changed."""
    root = tmp_path_factory.mktemp("photos")
    for n in range(1, 9):
        trees.save(root / ("more" if n > 6 else "") / f"{n}.png", trees.scene(n).image)
    return root


@pytest.fixture
def own(photos, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(photos, tmp_path / "own")


@pytest.fixture(scope="module")
def index(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "index"
    succeeds("index", photos, "--out", folder, *INDEX)
    return folder


class TestEmbed:
    def test_images(self, photos):
        outcome = succeeds("embed", photos, "--out", "v.safetensors", *SMALL)
        assert "8 vectors of 1280 numbers" in outcome.out
        found, embed = read_vectors("v.safetensors"), Embedder.load("v.safetensors")
        names = [*(f"{n}.png" for n in range(1, 7)), "more/7.png", "more/8.png"]
        assert found.names == tuple(str(photos / name) for name in names)
        for name, vector, box in zip(found.names, found.vectors, found.boxes, strict=True):
            assert np.array_equal(vector, embed(read_image(name)))
            assert box.tolist() == [0, 0, 128, 96]

    def test_class_folders_give_labels(self):
        drawn = trees.class_tree(trees.Path("data"))
        succeeds("embed", "data", "--out", "v.safetensors", *SMALL)
        found = read_vectors("v.safetensors")
        assert sorted(zip(found.names, found.labels, strict=True)) == sorted((str(p), s) for p, s in drawn)

    @pytest.mark.parametrize("kind", ["voc", "coco", "yolo", "csv"])
    def test_boxes(self, kind):
        root = trees.Path("data")
        drawn = trees.yolo_tree(root) if kind == "csv" else getattr(trees, f"{kind}_tree")(root)
        place, split = root, ("--split", "train")
        if kind == "csv":
            rows = [
                f"images/train/{name}.jpg,{','.join(map(str, box))},{label}"
                for name, scene in drawn["train"].items()
                for box, label in zip(scene.boxes, scene.labels, strict=True)
            ]
            place, split = trees.write(root / "boxes.csv", "\n".join(["path,x1,y1,x2,y2,label", *rows])), ()
        succeeds("embed", "--boxes", place, *split, "--out", "v.safetensors", *SMALL)
        found = read_vectors("v.safetensors")
        scenes = drawn["train"].values()
        assert found.labels == tuple(label for scene in scenes for label in scene.labels)
        np.testing.assert_allclose(found.boxes, [b for scene in scenes for b in scene.boxes], atol=0.01)
        sample = read_dataset(place, *split[1:])[0]
        embed = Embedder.load("v.safetensors")
        count = len(sample.target.boxes)
        assert np.array_equal(found.vectors[:count], embed(sample.path, sample.target.boxes))

    def test_appending_does_what_is_missing(self, photos):
        plain = ("--out", "v.safetensors", *SMALL, "--pca", "3")
        succeeds("embed", f"{photos}/*.png", *plain)
        before = read_vectors("v.safetensors")
        outcome = succeeds("embed", photos, *plain, "--append")
        assert "note: 6 of 8 images are there already" in outcome.err
        after = read_vectors("v.safetensors")
        assert len(after) == 8
        assert np.array_equal(after.vectors[:6], before.vectors)

    def test_like_takes_settings_and_projection(self, photos):
        succeeds("embed", photos, "--out", "a.safetensors", *SMALL, "--pca", "3", "--mode", "average")
        succeeds("embed", photos / "more", "--out", "b.safetensors", "--like", "a.safetensors")
        assert Embedder.load("a.safetensors").signature == Embedder.load("b.safetensors").signature

    def test_half_precision(self, photos):
        succeeds("embed", photos, "--out", "v.safetensors", *SMALL, "--half")
        assert read_vectors("v.safetensors").vectors.dtype == np.float16

    def test_unreadable_images_are_named_and_left_out(self, own):
        (own / "3.png").write_bytes(b"broken")
        outcome = sppnet("embed", own, "--out", "v.safetensors", *SMALL)
        assert outcome.status == 1
        assert "3.png" in outcome.said[0]
        assert outcome.said[1] == "sppnet: 1 of 8 images failed"
        assert len(read_vectors("v.safetensors")) == 7

    def test_a_stopped_run_goes_on(self, photos, monkeypatch):
        from sppnet.retrieval import vectors

        plain = vectors.VectorWriter.add

        def stopped(self, name, *rest):
            if name.endswith("5.png"):
                self.flush()
                raise KeyboardInterrupt
            plain(self, name, *rest)

        arguments = ("embed", photos, "--out", "v.safetensors", *SMALL, "--pca", "3")
        with monkeypatch.context() as patch:
            patch.setattr(vectors.VectorWriter, "add", stopped)
            assert sppnet(*arguments).status == 130
        outcome = succeeds(*arguments)
        assert "note: 4 of 8 images are there already" in outcome.err
        assert len(read_vectors("v.safetensors")) == 8
        assert not os.path.exists("v.safetensors.parts")

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("--out", "v.npz"), ["v.npz", "expected .safetensors"]),
            (("--out", "nowhere/v.safetensors"), ["nowhere"]),
            (("--out", "v.safetensors", "--pca", "50"), ["found 8 vectors to learn 50 components"]),
            (("--out", "v.safetensors", "--backbone", "nonsense"), ["nonsense"]),
            (("--out", "v.safetensors", "--boxes", "none"), ["none"]),
            (("--out", "v.safetensors", "--like", "none.safetensors"), ["none.safetensors"]),
        ],
    )
    def test_refused(self, arguments, says, photos):
        fails("embed", photos, *arguments, says=says)

    @pytest.mark.parametrize(
        ("option", "choices"),
        [("--view", "'full', 'crop', 'warp'"), ("--mode", "'max', 'average'"), ("--norm", "'l2', 'none'")],
    )
    def test_unknown_choice(self, option, choices, photos):
        says = [option, "'half' is not one of", choices, "see sppnet embed --help"]
        fails("embed", photos, "--out", "v.safetensors", option, "half", says=says, status=2)

    def test_other_settings_are_not_appended(self, photos):
        succeeds("embed", photos, "--out", "v.safetensors", *SMALL)
        arguments = ("--out", "v.safetensors", "--scales", "96", "--levels", "1", "--append")
        fails("embed", photos, *arguments, says=['"scales": [64]', '"scales": [96]'])
        arguments = ("--out", "v.safetensors", *SMALL, "--flip", "--append")
        fails("embed", photos, *arguments, says=['"flip": false', '"flip": true'])

    def test_flip(self, photos):
        succeeds("embed", photos, "--out", "v.safetensors", *SMALL, "--flip")
        found, embed = read_vectors("v.safetensors"), Embedder(scales=(64,), levels=(1,), flip=True)
        for name, vector in zip(found.names, found.vectors, strict=True):
            assert np.array_equal(vector, embed(name))
        arguments = ("--out", "w.safetensors", "--like", "v.safetensors", "--flip")
        fails("embed", photos, *arguments, says=["--like", "expected it alone"])

    def test_join_scales(self, photos):
        arguments = ("--scales", "64,96", "--levels", "1", "--join-scales")
        outcome = succeeds("embed", photos, "--out", "v.safetensors", *arguments)
        assert "of 2560 numbers" in outcome.out
        found, embed = read_vectors("v.safetensors"), Embedder(scales=(64, 96), levels=(1,), join_scales=True)
        for name, vector in zip(found.names, found.vectors, strict=True):
            assert np.array_equal(vector, embed(name))
        fails(
            *("embed", photos, "--out", "v.safetensors", *arguments[:-1], "--append"),
            says=['"scales": [64, 96]', '"join_scales": true'],
        )

    def test_a_dataset_gives_whole_images(self):
        trees.voc_tree(trees.Path("data"))
        succeeds("embed", "data", "--split", "val", "--out", "v.safetensors", *SMALL)
        assert len(read_vectors("v.safetensors")) == 2

    def test_other_boxes_of_an_image_that_is_there(self, photos):
        succeeds("embed", photos / "1.png", "--out", "v.safetensors", *SMALL)
        trees.write(trees.Path("b.csv"), f"path,x1,y1,x2,y2\n{photos}/1.png,5,5,50,90\n")
        arguments = ("--boxes", "b.csv", "--out", "v.safetensors", *SMALL, "--append")
        before = content()["v.safetensors"]
        outcome = sppnet("embed", *arguments)
        assert (outcome.status, content()["v.safetensors"]) == (2, before)
        assert "found other boxes of" in outcome.said[0]

    def test_like_stands_alone(self, photos):
        succeeds("embed", photos, "--out", "a.safetensors", *SMALL)
        arguments = ("--out", "b.safetensors", "--like", "a.safetensors", "--scales", "96")
        fails("embed", photos, *arguments, says=["--like", "expected it alone"])

    def test_nothing_stays_where_nothing_could_be_read(self, own):
        for path in own.rglob("*.png"):
            path.write_bytes(b"")
        before = content()
        assert sppnet("embed", own, "--out", "v.safetensors", *SMALL).status == 2
        assert content() == before

    def test_zero_area_and_duplicate_boxes(self, photos):
        trees.write(trees.Path("b.csv"), f"path,x1,y1,x2,y2\n{photos}/1.png,5,5,5,9\n")
        fails("embed", "--boxes", "b.csv", "--out", "v.safetensors", says=["b.csv:2", "inverted or empty"])

    def test_the_same_file_twice(self, photos):
        os.symlink(photos / "1.png", "again.png")
        fails("embed", photos, "again.png", "--out", "v.safetensors", says=["again.png", "the same file as"])


class TestProtocol:
    def test_caltech101(self):
        trees.class_tree(trees.Path("data/101_ObjectCategories"), 32)
        outcome = succeeds(
            *("protocol", "caltech101", "data", "--splits", "2", "--json", "r.json"),
            *("--scales", "64", "--levels", "1"),
        )
        found = read_json("r.json")
        assert found["mean"] > 0.8
        assert len(found["splits"]) == 2
        assert found["cross_validation"] > 0.8
        assert found["mean"] == pytest.approx(np.mean([s["accuracy"] for s in found["splits"]]))
        assert f"{100 * found['mean']:.2f} % mean class accuracy" in outcome.out
        assert '"flip": false' in found["embedder"]

    def test_flip_reaches_the_vectors(self):
        trees.class_tree(trees.Path("data"), 32)
        trees.voc_tree(trees.Path("voc"), {"train": 24, "val": 12})
        small = ("--levels", "1", "--flip", "--json", "r.json")
        succeeds("protocol", "caltech101", "data", "--splits", "1", "--scales", "64", *small)
        assert '"flip": true' in read_json("r.json")["embedder"]
        splits = ("--train-split", "train", "--test-split", "val")
        succeeds("protocol", "voc", "voc", *splits, "--scales", "64", *small)
        assert '"flip": true' in read_json("r.json")["embedder"]

    def test_caltech101_joins_scales(self):
        trees.class_tree(trees.Path("data"), 32)
        small = ("--splits", "1", "--levels", "1", "--json", "r.json")
        succeeds("protocol", "caltech101", "data", "--scales", "64,96", *small)
        found = read_json("r.json")["embedder"]
        assert '"scales": [64, 96]' in found
        assert '"join_scales": true' in found

    def test_too_few_images(self):
        trees.class_tree(trees.Path("data"), 8)
        fails(
            *("protocol", "caltech101", "data", "--json", "r.json", "--scales", "64"),
            says=["classes of 8", "expected"],
        )

    def test_voc(self):
        trees.voc_tree(trees.Path("data"), {"train": 24, "val": 12})
        outcome = succeeds(
            *("protocol", "voc", "data", "--train-split", "train", "--test-split", "val"),
            *("--scales", "64,96", "--levels", "1", "--json", "r.json"),
        )
        found = read_json("r.json")
        assert set(found["classes"]) == set(trees.SHAPES)
        assert found["scale"] in (64, 96)
        assert found["cross_validation"][str(found["scale"])] == max(found["cross_validation"].values())
        assert found["mAP"] == pytest.approx(np.mean([c["AP"] for c in found["classes"].values()]))
        assert "shorter side 64" in outcome.out


class TestSearch:
    def test_finds_an_image_by_a_region_of_it(self, index, photos):
        scene = trees.scene(3)
        box = ",".join(map(str, scene.boxes[0]))
        outcome = succeeds(
            *("search", index, "--image", photos / "3.png", "--box", box, "--top", "4"),
            *("--out", "found", "--json", "r.json"),
        )
        found = read_json("r.json")
        assert found["query"]["box"] == list(scene.boxes[0])
        assert len(found["hits"]) == 4
        scores = [hit["score"] for hit in found["hits"]]
        assert scores == sorted(scores, reverse=True)
        assert found["hits"][0]["image"] in outcome.out
        assert Image.open("found/search.png").width > 1000

    def test_the_whole_image_finds_itself(self, index, photos):
        succeeds("search", index, "--image", photos / "more" / "7.png", "--json", "r.json")
        best = read_json("r.json")["hits"][0]
        assert best["image"] == os.path.join("more", "7.png")
        assert best["box"] == [0, 0, 128, 96]
        assert best["score"] == pytest.approx(1, abs=1e-2)

    def test_is_brought_up_to_date(self, own):
        assert "8 new, 0 changed, 0 gone" in succeeds("index", own, "--out", "index", *INDEX).out
        (own / "1.png").unlink()
        trees.save(own / "2.png", trees.scene(20).image)
        trees.save(own / "9.png", trees.scene(21).image)
        assert "1 new, 1 changed, 1 gone" in succeeds("index", own, "--out", "index", *INDEX).out
        assert set(Index.open(trees.Path("index")).images) == {
            *(f"{n}.png" for n in (2, 3, 4, 5, 6, 9)),
            *(os.path.join("more", f"{n}.png") for n in (7, 8)),
        }

    def test_another_embedder_is_refused(self, index, photos):
        shutil.copytree(index, "index")
        other = ("--scales", "96", *INDEX[2:])
        fails("index", photos, "--out", "index", *other, says=['"scales": [64]', '"scales": [96]'])
        fails("index", photos, "--out", "index", *INDEX, "--flip", says=['"flip": false', '"flip": true'])

    def test_other_regions_and_other_folders_are_refused(self, index, photos):
        shutil.copytree(index, "index")
        fails("index", photos, "--out", "index", *INDEX[:-1], "9", says=["at most 6", "at most 9"])
        trees.class_tree(trees.Path("elsewhere"))
        fails("index", "elsewhere", "--out", "index", *INDEX, says=["the index of", "elsewhere"])

    def test_a_folder_that_moved_is_followed(self, index, own):
        shutil.copytree(index, "index")
        assert "0 gone" in succeeds("index", own, "--out", "index", *INDEX).out
        assert Index.open(trees.Path("index")).source == str(own)

    def test_what_was_done_stays_when_it_is_stopped(self, photos, monkeypatch):
        plain = Index.add

        def stopped(self, name, *rest):
            if name == "4.png":
                raise KeyboardInterrupt
            plain(self, name, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(Index, "add", stopped)
            assert sppnet("index", photos, "--out", "index", *INDEX).status == 130
        assert "5 new" in succeeds("index", photos, "--out", "index", *INDEX).out

    def test_damage_is_told(self, index, photos):
        shutil.copytree(index, "index")
        (vectors,) = trees.Path("index").glob("*.vectors.safetensors")
        vectors.write_bytes(vectors.read_bytes()[:-9])
        fails("search", "index", "--image", photos / "1.png", says=["damaged or missing file"])

    def test_unreadable_images_are_named(self, own):
        (own / "4.png").write_bytes(b"")
        outcome = sppnet("index", own, "--out", "index", *INDEX)
        assert outcome.status == 1
        assert "4.png" in outcome.said[0]
        assert len(Index.open(trees.Path("index")).images) == 7

    def test_images_that_went_are_told(self, own):
        succeeds("index", own, "--out", "index", *INDEX)
        query = shutil.move(own / "3.png", "query.png")
        outcome = sppnet("search", "index", "--image", query, "--out", "found")
        assert outcome.status == 1
        assert "3.png" in outcome.said[0]
        assert Image.open("found/search.png")

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("--box", "1,2,3"), ["--box 1,2,3", "expected four numbers"]),
        ],
    )
    def test_bad_boxes(self, arguments, says, index, photos):
        fails("search", index, "--image", photos / "1.png", *arguments, says=says)

    def test_a_backbone_file_that_moved(self, backbone_file, photos):
        shutil.copy(backbone_file("test_efficientnet"), "first.onnx")
        succeeds("index", photos, "--out", "index", *INDEX, "--backbone", "first.onnx")
        succeeds("embed", photos, "--out", "a.safetensors", *SMALL, "--backbone", "first.onnx")
        os.rename("first.onnx", "second.onnx")
        query, like = ("search", "index", "--image", photos / "1.png"), ("--like", "a.safetensors")
        says = ["first.onnx: found no such file", "backbone"]
        fails(*query, says=["index", *says])
        fails("embed", photos, "--out", "b.safetensors", *like, says=["a.safetensors", *says])
        succeeds(*query, "--backbone", "second.onnx")
        succeeds("embed", photos, "--out", "b.safetensors", *like, "--backbone", "second.onnx")
        assert np.array_equal(read_vectors("a.safetensors").vectors, read_vectors("b.safetensors").vectors)
        succeeds("index", photos, "--out", "index", *INDEX, "--backbone", "second.onnx")
        says = ["found efficientnet-lite0", "expected the same backbone"]
        fails(*query, "--backbone", "efficientnet-lite0", says=says)

    def test_no_index_and_no_image(self, index, photos):
        fails("search", photos, "--image", photos / "1.png", says=["found no index.json"])
        fails("search", index, "--image", "none.png", says=["none.png"])
        fails("index", "nowhere", "--out", "index", says=["nowhere"])


WITHOUT_TORCH = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from sppnet.cli import main
try:
    main()
finally:
    print("scikit-learn" if "sklearn" in sys.modules else "no scikit-learn")
"""


@pytest.mark.parametrize("command", ["embed", "index", "search", "protocol"])
def test_needs_no_torch(command, photos, index):
    trees.class_tree(trees.Path("data"), 31)
    arguments = {
        "embed": (photos, "--out", "v.safetensors", "--flip", "--join-scales", "--scales", "64,96"),
        "index": (photos, "--out", "index", *INDEX),
        "search": (index, "--image", photos / "1.png", "--box", "9,9,60,60", "--out", "found"),
        "protocol": ("caltech101", "data", "--splits", "1", *SMALL),
    }[command]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, command, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    # What learns, a projection or SVMs, is scikit-learn's.
    learns = command in ("index", "protocol")
    assert done.stdout.splitlines()[-1] == ("scikit-learn" if learns else "no scikit-learn")


def test_manifest_is_plain(photos):
    succeeds("index", photos, "--out", "index", *INDEX, "--proposals", "none")
    about = json.loads(trees.Path("index/index.json").read_text())
    assert (about["images"], about["count"]) == (8, 8)
    assert set(content("index")) == {f"index/{name}" for name in ("index.json", *about["files"])}


class TestBox:
    def test_is_cut_at_the_edges_with_a_note(self, photos, index):
        search = ("search", index, "--image", photos / "1.png", "--json")
        outcome = succeeds(*search, "cut.json", "--box=-5,10,900,60")
        assert "note: --box -5,10,900,60 reaches beyond the image of 128 x 96 pixels, cut to 0,10,128,60" in (
            outcome.err
        )
        assert read_json("cut.json")["query"]["box"] == [0, 10, 128, 60]
        assert "note" not in succeeds(*search, "whole.json", "--box", "0,0,128,96").err

    @pytest.mark.parametrize("box", ["900,0,950,50", "60,60,0,0", "0,0,nan,5", "5,5,5,9", "-9,0,0,9"])
    def test_of_nothing_is_refused(self, photos, index, box):
        says = [f"--box {box}: expected x1 < x2 and y1 < y2, in the image of 128 x 96 pixels"]
        fails("search", index, "--image", photos / "1.png", f"--box={box}", says=says)
