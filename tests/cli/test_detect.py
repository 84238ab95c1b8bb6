"""The commands end to end: what they write and say, and what they leave behind when something is wrong."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from commands import Outcome, content, fails, read_json, same, sppnet, succeeds
from sppnet import Backbone, Detector, Ensemble, read_dataset, read_image
from sppnet.boxes import Detections
from sppnet.datasets.coco import write_coco_results
from sppnet.datasets.voc import write_voc_results
from sppnet.detection.file import describe
from sppnet.features import backbone as backbones
from sppnet.features import windows as maps
from sppnet.proposals import parse, read_windows
from trees import SHAPES, coco_tree, save, scene, voc_tree, voc_xml, write, yolo_tree

TREES = {"voc": voc_tree, "coco": coco_tree, "yolo": yolo_tree}
SPLITS = {"train": 6, "val": 4}
QUICK = ("--scales", "64,96", "--levels", "1", "--proposals", "dense")


def one_image_tree(root, xml=None, image=None, name="000001"):
    """Write a VOC folder of one image."""
    drawn = scene(1)
    save(root / "JPEGImages" / f"{name}.jpg", drawn.image if image is None else image)
    write(root / "Annotations" / f"{name}.xml", xml or voc_xml(drawn.boxes, drawn.labels))


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    """Keep out of the user's cache, build and compile each backbone once, and fold no table."""
    build = cache(Backbone)

    def backbone(name, stages=("head",), output_stride=16, weights=None, device="cpu"):
        return build(name, tuple(stages), output_stride, weights, device)

    folder = tmp_path_factory.mktemp("windows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sppnet.proposals.cache_folder", lambda: folder)
        patch.setattr(backbones, "Backbone", backbone)
        patch.setattr("sppnet.detection.detector.Backbone", backbone)
        patch.setattr(backbones, "_compile_openvino", cache(backbones._compile_openvino))
        patch.setenv("COLUMNS", "200")
        yield


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A VOC folder, not to be changed."""
    root = tmp_path_factory.mktemp("data") / "voc"
    voc_tree(root, SPLITS)
    return root


@pytest.fixture(scope="module")
def model(surroundings, data, tmp_path_factory):
    """A detector trained on `data`, not to be changed."""
    path = tmp_path_factory.mktemp("model") / "shapes.safetensors"
    succeeds("detect", "train", data, "--split", "train", "--out", path, *QUICK)
    return path


@pytest.fixture(scope="module")
def second(surroundings, data, tmp_path_factory):
    """A detector of the same classes on another backbone, with other windows; not to be changed."""
    path = tmp_path_factory.mktemp("second") / "second.safetensors"
    options = ("--scales", "96", "--levels", "2,1", "--proposals", "edge-boxes", "--stages", "4")
    succeeds("detect", "train", data, "--split", "train", "--out", path, *options)
    return path


@pytest.fixture
def photos():
    """A folder ``photos`` of three pictures."""
    for i in (1, 2, 3):
        save(Path(f"photos/{i}.png"), scene(i).image)
    return Path("photos")


def expected_detections(model, path, threshold=-0.5, windows="dense"):
    """Return what `Detector` itself finds, as the commands write it."""
    return found_by(Detector.load(model), path, threshold, windows)


def found_by(detector, path, threshold=-0.5, windows="dense"):
    pixels = read_image(path)
    found = detector.predict(pixels, parse(windows)(pixels)[0], threshold=threshold)
    rows = zip(found.labels, found.scores.tolist(), found.boxes.tolist(), strict=True)
    return [{"label": label, "score": score, "box": box} for label, score, box in rows]


class TestProgram:
    def test_help_is_light(self):
        heavy = ("torch", "numba", "cv2", "timm", "matplotlib", "openvino", "sklearn")
        code = (
            "import sys, sppnet\nfrom sppnet.cli import main\nsys.argv = ['sppnet', '--help']\n"
            f"try:\n    main()\nfinally:\n    print([m for m in {heavy} if m in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0
        assert done.stdout.splitlines()[-1] == "[]"
        assert all(command in done.stdout for command in ("demo", "propose", "detect"))

    @pytest.mark.parametrize("command", ["train", "run", "evaluate", "score"])
    def test_help_of_commands(self, command):
        assert "--json" in succeeds("detect", command, "--help").out or command == "train"

    def test_usage_error(self):
        outcome = sppnet("detect", "train", "data")
        assert outcome.status == 2
        assert "--out" in outcome.err
        assert "Traceback" not in outcome.err


class TestTrain:
    @pytest.mark.parametrize("kind", TREES)
    def test_formats(self, model, kind):
        TREES[kind](Path("shapes"), SPLITS)
        before = content("shapes")
        outcome = succeeds("detect", "train", "shapes", "--split", "train", "--out", "m.safetensors", *QUICK)
        assert f"m.safetensors: {', '.join(sorted(SHAPES))} from 6 images" in outcome.out
        # The same boxes, settings and seed give the same bytes.
        assert same(model, "m.safetensors")
        assert content("shapes") == before
        assert {path.name for path in Path().iterdir()} == {"shapes", "m.safetensors"}

    def test_says_what_it_holds(self, model):
        facts = describe(model)
        assert facts["classes"] == sorted(SHAPES)
        assert facts["about"] == {"proposals": "dense", "images": 6}
        assert facts["settings"]["sides"] == [64, 96]
        assert facts["settings"]["levels"] == [1]

    def test_seed(self, data, model):
        succeeds("detect", "train", data, "--split", "train", "--out", "m.safetensors", *QUICK, "--seed", 1)
        assert describe("m.safetensors")["settings"]["seed"] == 1
        one, other = (load_file(path)["svms.weights"] for path in (model, "m.safetensors"))
        assert not torch.equal(one, other)

    def test_rules(self, data):
        rules = {"projection": "paper", "scale_rule": "paper", "negatives": "released"}
        options = [text for name, rule in rules.items() for text in (f"--{name.replace('_', '-')}", rule)]
        succeeds("detect", "train", data, "--split", "train", "--out", "m.safetensors", *QUICK, *options)
        settings = describe("m.safetensors")["settings"]
        assert settings.items() >= {**rules, "reference": 224}.items()

    @pytest.mark.parametrize("option", ["--projection", "--scale-rule", "--negatives"])
    def test_unknown_rule(self, data, option, monkeypatch):
        monkeypatch.setattr("sppnet.cli.detect._cached_windows", None)  # it is said before the long work
        command = ("detect", "train", data, "--split", "train", "--out", "m.safetensors", *QUICK)
        fails(*command, option, "best", says=["'best'", "expected one of", "released, paper"])

    def test_kept_cache(self, data, model, monkeypatch):
        options = ("--split", "train", "--out", "m.safetensors", *QUICK, "--cache", "maps")
        succeeds("detect", "train", data, *options)
        assert len(list(Path("maps").glob("*.safetensors"))) == 6
        monkeypatch.setattr(maps, "encode", None)
        Path("m.safetensors").unlink()
        succeeds("detect", "train", data, *options)
        assert same(model, "m.safetensors")

    def test_own_files_in_the_cache_folder_stay(self, data):
        mine = write(Path("m.safetensors.cache/notes.txt"), "mine")
        succeeds("detect", "train", data, "--split", "train", "--out", "m.safetensors", *QUICK)
        assert [str(p) for p in Path("m.safetensors.cache").iterdir()] == [str(mine)]

    def test_chosen_classes(self, data):
        outcome = succeeds(
            "detect", "train", data, "--out", "m.safetensors", "--classes", "square, disc", *QUICK
        )
        assert describe("m.safetensors")["classes"] == ["square", "disc"]
        assert "square, disc from 10 images" in outcome.out

    def test_difficult_objects_are_no_examples(self):
        drawn = scene(2)
        xml = voc_xml(drawn.boxes, drawn.labels).replace("<difficult>0", "<difficult>1")
        one_image_tree(Path("hard"), xml, drawn.image)
        fails(
            "detect",
            "train",
            "hard",
            "--out",
            "m.safetensors",
            *QUICK,
            says=["disc", "1 images", "difficult"],
        )

    def test_class_with_difficult_examples_only_is_left_out(self):
        drawn = next(s for s in map(scene, range(20)) if len(s.labels) == 2 == len(set(s.labels)))
        xml = voc_xml(drawn.boxes, drawn.labels).replace("<difficult>0", "<difficult>1", 1)
        one_image_tree(Path("half"), xml, drawn.image)
        outcome = succeeds("detect", "train", "half", "--out", "m.safetensors", *QUICK)
        assert describe("m.safetensors")["classes"] == [drawn.labels[1]]
        assert f"left out, all examples are difficult or crowds: {drawn.labels[0]}" in outcome.err

    @pytest.mark.parametrize("asked", ["unicorn", "disc,unicorn"])
    def test_class_without_examples(self, data, asked, monkeypatch):
        monkeypatch.setattr("sppnet.cli.detect._cached_windows", None)  # it is said before the long work
        says = [data, "unicorn", ", ".join(sorted(SHAPES))]
        fails("detect", "train", data, "--out", "m.safetensors", "--classes", asked, *QUICK, says=says)

    def test_no_objects_at_all(self):
        one_image_tree(Path("empty"), voc_xml([], []))
        fails("detect", "train", "empty", "--out", "m.safetensors", *QUICK, says=["empty", "no object"])

    def test_negative_image(self, data):
        voc_tree(Path("shapes"), {"train": 3})
        one_image_tree(Path("shapes"), voc_xml([], []), scene(0).image, "000000")
        outcome = succeeds("detect", "train", "shapes", "--out", "m.safetensors", *QUICK)
        assert "note: images without objects: 1" in outcome.err
        assert "from 4 images" in outcome.out

    def test_one_image(self):
        one_image_tree(Path("one"))
        succeeds("detect", "train", "one", "--out", "m.safetensors", *QUICK)
        outcome = succeeds("detect", "run", "m.safetensors", "one/JPEGImages", "--threshold=-2")
        assert "square" in outcome.out
        assert "triangle" in outcome.out

    def test_image_without_background(self):
        one_image_tree(
            Path("one"), voc_xml([(0, 0, 1, 1)], ["disc"], (1, 1)), np.full((1, 1, 3), 90, np.uint8)
        )
        fails(
            "detect",
            "train",
            "one",
            "--out",
            "m.safetensors",
            *QUICK,
            says=["no background for disc in 1 images"],
        )


class TestInterruption:
    def test_half_way(self, data, model, monkeypatch):
        command = ("detect", "train", data, "--split", "train", "--out", "m.safetensors", *QUICK)
        encode, calls = maps.encode, []

        def interrupted(*arguments):
            if len(calls) == 3:
                raise KeyboardInterrupt
            calls.append(arguments)
            return encode(*arguments)

        monkeypatch.setattr(maps, "encode", interrupted)
        outcome = sppnet(*command)
        assert outcome.status == 130
        assert "Traceback" not in outcome.err
        assert len(outcome.said) == 2
        assert "m.safetensors.cache" in outcome.said[0]
        assert outcome.said[1] == "sppnet: interrupted"
        assert {path.name for path in Path().iterdir()} == {"m.safetensors.cache"}
        assert len(list(Path("m.safetensors.cache").iterdir())) == 3

        def counted(*arguments):
            calls.append(arguments)
            return encode(*arguments)

        calls.clear()
        monkeypatch.setattr(maps, "encode", counted)
        succeeds(*command)
        assert len(calls) == 3
        assert {path.name for path in Path().iterdir()} == {"m.safetensors"}
        assert same(model, "m.safetensors")

    def test_damaged_map(self, data, model):
        options = ("--split", "train", "--out", "m.safetensors", *QUICK, "--cache", "maps")
        succeeds("detect", "train", data, *options)
        short, empty, *_ = sorted(Path("maps").iterdir())
        short.write_bytes(short.read_bytes()[:-1000])
        empty.write_bytes(b"")
        succeeds("detect", "train", data, *options)
        assert same(model, "m.safetensors")

    def test_old_model_stays(self, data, model, monkeypatch):
        write(Path("m.safetensors"), "the model of last week")
        monkeypatch.setattr(Detector, "fit", mock.Mock(side_effect=KeyboardInterrupt))
        outcome = sppnet("detect", "train", data, "--out", "m.safetensors", *QUICK)
        assert outcome.status == 130
        assert content() == {"m.safetensors": b"the model of last week"}

    def test_control_c(self):
        """A real signal, to a real process."""
        voc_tree(Path("shapes"), {"train": 60})
        options = ("--out", "m.safetensors", "--scales", "64,480", "--levels", "1", "--proposals", "dense")
        # A shell starts its jobs in the background deaf to Ctrl-C, and what they start.
        code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        code += "from sppnet.cli import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "detect", "train", "shapes", *options],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            folder, end = Path("m.safetensors.cache"), time.monotonic() + 200
            while not list(folder.glob("[!.]*")) and process.poll() is None and time.monotonic() < end:
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130
        assert "Traceback" not in err
        said = Outcome(130, "", err).said
        assert "m.safetensors.cache" in said[0]
        assert said[1:] == ["sppnet: interrupted"]
        assert {path.name for path in Path().iterdir()} == {"shapes", "cache", "m.safetensors.cache"}
        assert not list(folder.glob(".*"))


def environment():
    """Return the environment of a process that finds the same packages and leaves the user's cache alone."""
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(Path("cache").absolute())}


class TestRun:
    def test_file(self, model, photos):
        outcome = succeeds(
            "detect",
            "run",
            model,
            photos / "1.png",
            "--out",
            "found",
            "--json",
            "found.json",
            "--threshold=-1",
        )
        found = expected_detections(model, photos / "1.png", -1)
        assert found
        assert read_json("found.json") == [
            {"image": str(photos / "1.png"), "height": 96, "width": 128, "detections": found}
        ]
        assert f"{found[0]['label']} " in outcome.out
        assert "pictures in found" in outcome.out
        picture = read_image("found/1.png")
        assert picture.shape == (96, 128, 3)
        assert (picture != read_image(photos / "1.png")).any()

    def test_threshold(self, model, photos):
        outcome = succeeds(
            "detect", "run", model, photos / "1.png", "--threshold", "1000", "--json", "found.json"
        )
        assert "nothing scores 1000 or more" in outcome.out
        assert read_json("found.json")[0]["detections"] == []

    def test_folder_and_pattern(self, model, photos):
        succeeds("detect", "run", model, photos, "--json", "folder.json", "--out", "found")
        succeeds("detect", "run", model, "photos/[12].png", photos / "3.png", "--json", "pattern.json")
        assert read_json("folder.json") == read_json("pattern.json")
        assert [entry["image"] for entry in read_json("folder.json")] == [
            f"photos/{i}.png" for i in (1, 2, 3)
        ]
        assert sorted(p.name for p in Path("found").iterdir()) == ["1.png", "2.png", "3.png"]

    def test_names_in_brackets(self, model):
        """Rich would take them for markup."""
        for name in ("[bold]", "[/red]", ":cat:"):
            save(Path(f"photos/x{name.replace('/', '')}.png"), scene(1).image)
        outcome = succeeds("detect", "run", model, "photos")
        assert all(f"x{name}.png" in outcome.out for name in ("[bold]", "[red]", ":cat:"))

    def test_images_of_one_name(self, model):
        for folder in "ab":
            save(Path(folder) / "1.png", scene(1).image)
        save(Path("c/1-1.png"), scene(1).image)
        succeeds("detect", "run", model, "a", "b", "c", "--out", "found")
        assert len(list(Path("found").iterdir())) == 3

    @pytest.mark.parametrize("out", [".", "photos/.."])
    def test_pictures_never_replace_the_images(self, model, photos, out):
        save(Path("2.png"), scene(4).image)
        says = [f"{Path(out, '2.png')}: found a file that is to be read", "expected another"]
        fails("detect", "run", model, "photos/1.png", "2.png", "photos/3.png", "--out", out, says=says)

    def test_json_never_replaces_an_image(self, model, photos):
        fails("detect", "run", model, photos, "--json", "photos/1.png", says=["photos/1.png"])

    def test_json_never_replaces_the_model_or_the_data(self, model, data, photos):
        before = Path(model).read_bytes()
        says = [f"{model}: found a file that is to be read"]
        fails("detect", "run", model, photos, "--json", model, says=says)
        fails("detect", "evaluate", model, data, "--json", model, says=says)
        assert Path(model).read_bytes() == before
        Path("results.json").write_text("[]")
        fails("detect", "score", "results.json", data, "--json", "results.json", says=["results.json: found"])

    def test_windows_file(self, model, photos):
        succeeds("propose", photos, "--out", "windows.npz", "--proposals", "dense")
        succeeds("detect", "run", model, photos, "--json", "dense.json")
        succeeds("detect", "run", model, photos, "--json", "file.json", "--proposals", "windows.npz")
        assert read_json("file.json") == read_json("dense.json")
        save(Path("new.png"), scene(4).image)
        fails(
            "detect", "run", model, "new.png", "--proposals", "windows.npz", says=["new.png", "windows.npz"]
        )
        outcome = sppnet(
            "detect", "run", model, "new.png", photos, "--proposals", "windows.npz", "--json", "rest.json"
        )
        assert outcome.status == 1
        assert read_json("rest.json") == read_json("dense.json")

    def test_odd_images(self, model):
        sizes = odd_images(Path("odd"))
        succeeds("detect", "run", model, "odd", "--json", "odd.json", "--out", "found")
        entries = read_json("odd.json")
        assert {Path(e["image"]).name: (e["height"], e["width"]) for e in entries} == sizes
        for name, size in sizes.items():
            assert read_image(Path("found") / f"{Path(name).stem}.png").shape[:2] == size
        for entry in entries:
            for found in entry["detections"]:
                x1, y1, x2, y2 = found["box"]
                assert 0 <= x1 < x2 <= entry["width"]
                assert 0 <= y1 < y2 <= entry["height"]

    def test_rotated_image_is_upright(self, model, photos):
        turned = Image.open(photos / "1.png").transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6
        turned.save("turned.png", exif=exif)
        succeeds("detect", "run", model, photos / "1.png", "turned.png", "--json", "found.json")
        upright, turned = read_json("found.json")
        assert turned["detections"] == upright["detections"]


def odd_images(folder):
    """Write images of all kinds; return the height and width of each."""
    picture = Image.fromarray(scene(1).image)
    folder.mkdir()
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(scene(1).image[..., 0].astype(np.uint16) * 257).save(folder / "sixteen.png")
    picture.quantize(16).save(folder / "palette.png", transparency=0)
    picture.convert("RGBA").save(folder / "alpha.png")
    picture.convert("L").save(folder / "grey.png")
    picture.convert("1").save(folder / "bilevel.tif")
    picture.save(folder / "animated.gif", save_all=True, append_images=[picture.rotate(90)])
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "rotated.jpg", exif=exif)
    picture.resize((1, 1)).save(folder / "dot.png")
    picture.resize((30_000, 20)).save(folder / "strip.png")
    picture.resize((20, 3_000)).save(folder / "pole.png")
    Image.new("RGB", (100, 100)).save(folder / "black.png")
    return {path.name: (96, 128) for path in folder.iterdir()} | {
        "rotated.jpg": (128, 96),
        "dot.png": (1, 1),
        "strip.png": (20, 30_000),
        "pole.png": (3_000, 20),
        "black.png": (100, 100),
    }


def broken_images(folder):
    """Write files that are no images; return what is said of each."""
    folder.mkdir(exist_ok=True)
    save(folder / "truncated.jpg", scene(1).image)
    whole = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").touch()
    write(folder / "text.png", "not a picture")
    Image.new("1", (8_000, 7_000)).save(folder / "huge.png")
    return {
        "truncated.jpg": "damaged file",
        "empty.png": "an empty file",
        "text.png": "not a p",
        "huge.png": "8000 x 7000 = 56000000 pixels, expected at most 50000000",
    }


class TestBadImages:
    def test_one_by_one(self, model):
        for name, found in broken_images(Path("bad")).items():
            fails("detect", "run", model, f"bad/{name}", says=[f"bad/{name}", found, "expected"])

    def test_the_others_of_a_folder(self, model, photos):
        succeeds("detect", "run", model, photos, "--json", "good.json")
        bad = broken_images(photos)
        outcome = sppnet("detect", "run", model, photos, "--json", "found.json", "--out", "found")
        assert outcome.status == 1
        assert len(outcome.said) == len(bad) + 1
        for name, found in bad.items():
            assert any(f"photos/{name}" in line and found in line for line in outcome.said)
        assert "4 of 7 images" in outcome.said[-1]
        assert read_json("found.json") == read_json("good.json")
        assert sorted(p.name for p in Path("found").iterdir()) == ["1.png", "2.png", "3.png"]

    def test_propose(self, photos):
        bad = broken_images(photos)
        outcome = sppnet("propose", photos, "--out", "windows.npz", "--proposals", "dense")
        assert outcome.status == 1
        assert [any(name in line for line in outcome.said) for name in bad] == [True] * len(bad)
        assert "of 3 images" in outcome.out
        assert len(read_windows("windows.npz").windows) == 3

    def test_missing(self, model):
        Path("nothing").mkdir()
        for source in ("missing.jpg", "nothing", "*.jpg"):
            says = [source, "found no image", "expected"]
            fails("detect", "run", model, source, "--json", "found.json", "--out", "found", says=says)
            fails("propose", source, "--out", "windows.npz", says=says)

    def test_in_a_dataset(self, model):
        voc_tree(Path("shapes"), SPLITS)
        picture = Path("shapes/JPEGImages/000002.jpg")
        picture.write_bytes(picture.read_bytes()[:500])
        fails("detect", "train", "shapes", "--out", "m.safetensors", *QUICK, says=[picture, "damaged"])
        evaluate = ("detect", "evaluate", model, "shapes", "--json", "report.json")
        fails(*evaluate, says=[picture, "damaged"])


class TestEvaluate:
    def test_report(self, model, data):
        outcome = succeeds(
            "detect", "evaluate", model, data, "--split", "train", "--json", "report.json", "--out", "report"
        )
        report = read_json("report.json")
        assert set(report["AP"]) == set(SHAPES)
        assert report["mAP"] == pytest.approx(np.mean(list(report["AP"].values())))
        assert report["mAP_area"] == pytest.approx(np.mean(list(report["AP_area"].values())))
        assert report["mAP"] > 0.2  # on what it learnt from
        assert report["images"] == 6
        assert report["split"] == "train"
        assert report["model"] == str(model)
        assert {"proposals", "backbone", "pooling", "scoring"} <= set(report["seconds_per_image"])
        assert all(seconds > 0 for seconds in report["seconds_per_image"].values())
        assert f"{100 * report['mAP']:.1f}" in outcome.out
        assert sorted(p.name for p in Path("report").iterdir()) == [
            "best.png",
            "precision-recall.png",
            "worst.png",
        ]
        assert all(read_image(path).std() > 1 for path in Path("report").iterdir())

    def test_agrees_with_metrics(self, model, data):
        from sppnet.evaluation.detection import coco_detection, mean_average_precision, voc_detection

        dataset = read_dataset(data, "val")
        found = list(detections_of(model, dataset).values())
        truth = [sample.target for sample in dataset]
        results = voc_detection(found, truth, sorted(SHAPES))
        succeeds("detect", "evaluate", model, data, "--split", "val", "--json", "report.json")
        report = read_json("report.json")
        assert report["AP"] == {name: result.average_precision for name, result in results.items()}
        assert report["mAP"] == mean_average_precision(results)
        if "coco" in report:
            expected = coco_detection(found, truth, sorted(SHAPES))
            assert report["coco"] == {k: None if math.isnan(v) else v for k, v in expected.items()}

    def test_given_windows(self, model, data):
        succeeds("propose", data / "JPEGImages", "--out", "windows.npz", "--proposals", "dense")
        command = ("detect", "evaluate", model, data, "--split", "val", "--json")
        succeeds(*command, "own.json")
        succeeds(*command, "given.json", "--proposals", "windows.npz")
        own, given = read_json("own.json"), read_json("given.json")
        assert given["AP"] == own["AP"]
        assert "windows.npz" in given["proposals"]

    @pytest.mark.parametrize(("options", "regress"), [((), True), (("--no-regress",), False)])
    def test_regression(self, model, data, options, regress):
        with mock.patch.object(Detector, "predict", autospec=True, side_effect=Detector.predict) as predict:
            succeeds("detect", "evaluate", model, data, "--split", "val", "--json", "report.json", *options)
        assert read_json("report.json")["regress"] is regress
        assert [call.kwargs["regress"] for call in predict.call_args_list] == [regress] * 4

    def test_class_unseen_in_training(self, data):
        succeeds(
            "detect", "train", data, "--split", "train", "--out", "m.safetensors", "--classes", "disc", *QUICK
        )
        outcome = succeeds(
            "detect", "evaluate", "m.safetensors", data, "--split", "val", "--json", "report.json"
        )
        left_out = next(line for line in outcome.out.splitlines() if line.startswith("left out"))
        assert left_out.endswith("square, triangle")
        assert list(read_json("report.json")["AP"]) == ["disc"]

    def test_learnt_class_without_objects(self, model):
        drawn = scene(2)
        one_image_tree(Path("discs"), voc_xml(drawn.boxes, drawn.labels), drawn.image)
        outcome = succeeds("detect", "evaluate", model, "discs", "--json", "report.json", "--out", "report")
        report = read_json("report.json")
        assert report["AP"]["square"] is None
        assert report["AP_area"]["triangle"] is None
        assert report["AP"]["disc"] is not None
        assert report["mAP"] == report["AP"]["disc"]
        assert report["mAP_area"] == report["AP_area"]["disc"]
        assert "no objects" in outcome.out

    def test_no_objects_at_all(self, model):
        one_image_tree(Path("empty"), voc_xml([], []))
        succeeds("detect", "evaluate", model, "empty", "--json", "report.json", "--out", "report")
        report = read_json("report.json")
        assert report["mAP"] is None
        assert set(report["AP"].values()) == {None}
        assert len(list(Path("report").iterdir())) == 3

    def test_unwritable_json_is_said_at_once(self, model, data, monkeypatch):
        monkeypatch.setattr("sppnet.cli.detect._detected", None)
        evaluate = ("detect", "evaluate", model, data, "--split", "val")
        fails(*evaluate, "--json", "missing/report.json", says=["missing/report.json", "expected"])


def detections_of(model, dataset):
    """Return what evaluate judges, by sample name."""
    detector, windows = Detector.load(model), parse("dense")
    images = {sample.name: read_image(sample.path) for sample in dataset}
    return {name: detector.predict(image, windows(image)[0]) for name, image in images.items()}


class TestTogether:
    """Several detectors on the same images and windows."""

    def test_run(self, model, second, photos):
        together = Ensemble([Detector.load(model), Detector.load(second)])
        images = [f"photos/{i}.png" for i in (1, 2, 3)]
        run = ("detect", "run", model, photos, "--with", second, "--threshold=-1", "--json")
        outcome = succeeds(*run, "found.json", "--out", "found")
        entries = read_json("found.json")
        # The windows are those of the first detector, for both.
        assert [e["detections"] for e in entries] == [found_by(together, path, -1) for path in images]
        for alone in (model, second):
            assert any(e["detections"] != expected_detections(alone, e["image"], -1) for e in entries)
        assert f"{entries[0]['detections'][0]['label']} " in outcome.out
        assert sorted(p.name for p in Path("found").iterdir()) == ["1.png", "2.png", "3.png"]
        succeeds(*run, "other.json", "--proposals", "edge-boxes")
        found = [e["detections"] for e in read_json("other.json")]
        assert found == [found_by(together, path, -1, "edge-boxes") for path in images]

    def test_three(self, model, second, data, photos):
        train = ("detect", "train", data, "--split", "train", "--out", "third.safetensors", *QUICK)
        succeeds(*train, "--seed", 7)
        models = (model, second, "third.safetensors")
        together = Ensemble([Detector.load(path) for path in models])
        run = ("detect", "run", model, photos / "1.png", "--with", second, "--with", "third.safetensors")
        succeeds(*run, "--json", "found.json")
        assert read_json("found.json")[0]["detections"] == found_by(together, photos / "1.png")

    @pytest.mark.parametrize(("options", "regress"), [((), True), (("--no-regress",), False)])
    def test_evaluate(self, model, second, data, options, regress):
        from sppnet.evaluation.detection import voc_detection

        together, dense = Ensemble([Detector.load(model), Detector.load(second)]), parse("dense")
        dataset = read_dataset(data, "val")
        images = [read_image(sample.path) for sample in dataset]
        found = [together.predict(image, dense(image)[0], regress=regress) for image in images]
        results = voc_detection(found, [sample.target for sample in dataset], sorted(SHAPES))
        evaluate = ("detect", "evaluate", model, data, "--with", second, "--split", "val", *options)
        succeeds(*evaluate, "--json", "report.json", "--out", "report")
        report = read_json("report.json")
        assert report["AP"] == {name: result.average_precision for name, result in results.items()}
        assert (report["model"], report["with"]) == (str(model), [str(second)])
        assert report["proposals"] == dense.signature
        assert {"backbone", "pooling", "scoring"} <= set(report["seconds_per_image"])
        assert len(list(Path("report").iterdir())) == 3

    def refused(self, model, others, data, says):
        more = [text for other in others for text in ("--with", other)]
        fails("detect", "run", model, data / "JPEGImages", *more, "--out", "found", says=says)
        fails("detect", "evaluate", model, data, *more, "--json", "report.json", says=says)

    def test_the_same_twice(self, model, second, data):
        says = ["are the same, expected different ones"]
        self.refused(model, [model], data, [f"{model}, {model}: detectors 1 and 2", *says])
        twin = Path("twin.safetensors")
        twin.write_bytes(second.read_bytes())
        self.refused(model, [second, twin], data, [f"{model}, {second}, {twin}: detectors 2 and 3", *says])

    def test_other_classes(self, model, data):
        train = ("detect", "train", data, "--out", "discs.safetensors", "--classes", "disc", *QUICK)
        succeeds(*train)
        says = [f"{model}, discs.safetensors: detector 2 knows disc, expected", ", ".join(sorted(SHAPES))]
        self.refused(model, ["discs.safetensors"], data, says)

    def test_no_detector(self, model, second, data):
        self.refused(model, ["missing.safetensors"], data, ["missing.safetensors: found no such file"])
        save_file({"a": torch.zeros(3)}, "m.safetensors", {"format": "sppnet-classifier"})
        says = ["m.safetensors: found sppnet-classifier, expected sppnet-detector 2"]
        self.refused(model, ["m.safetensors"], data, says)
        self.refused("m.safetensors", [second], data, says)

    def test_results_replace_no_model(self, model, second, data):
        before = second.read_bytes()
        says = [f"{second}: found a file that is to be read"]
        fails("detect", "run", model, data / "JPEGImages", "--with", second, "--json", second, says=says)
        fails("detect", "evaluate", model, data, "--with", second, "--json", second, says=says)
        assert second.read_bytes() == before


class TestScore:
    @pytest.mark.parametrize("kind", ["voc", "coco"])
    def test_equals_evaluate(self, model, kind):
        TREES[kind](Path("shapes"), SPLITS)
        dataset = read_dataset("shapes", "val")
        found = detections_of(model, dataset)
        Path("results").mkdir()
        results = Path("results") if kind == "voc" else Path("results/val.json")
        if kind == "voc":
            write_voc_results(results, found, sorted(SHAPES), "val")
        else:
            write_coco_results(results, found, dataset)
        options = ("shapes", "--split", "val", "--json")
        succeeds("detect", "evaluate", model, *options, "evaluated.json")
        succeeds("detect", "score", results, *options, "scored.json", "--out", "report")
        evaluated, scored = read_json("evaluated.json"), read_json("scored.json")
        assert scored["results"] == str(results)
        for key in ("mAP", "AP", "mAP_area", "AP_area", "images", "split", "coco"):
            assert scored.get(key) == evaluated.get(key), key
        assert len(list(Path("report").iterdir())) == 3

    def test_class_that_the_split_does_not_show(self, model):
        drawn = scene(2)
        one_image_tree(Path("discs"), voc_xml(drawn.boxes, drawn.labels), drawn.image)
        dataset = read_dataset("discs")
        Path("results").mkdir()
        write_voc_results("results", detections_of(model, dataset), sorted(SHAPES), "val")
        fails(
            "detect", "score", "results", "discs", says=["comp4_det_val_square.txt", "unknown class", "disc"]
        )
        options = ("discs", "--json")
        succeeds("detect", "score", "results", *options, "scored.json", "--classes", "square,triangle")
        succeeds("detect", "evaluate", model, *options, "evaluated.json")
        assert read_json("scored.json")["AP"] == read_json("evaluated.json")["AP"]

    def test_bad_results(self, data):
        Path("empty").mkdir()
        write(Path("voc/comp4_det_val_disc.txt"), "000007 0.5 1 2 3\n")
        write(Path("no.json"), "{")
        write(
            Path("other.json"), '[{"image_id": "000099", "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]'
        )
        score = {
            "missing": ["missing", "no such file"],
            "empty": ["empty", "found no results", "comp<N>_det"],
            "voc": ["voc/comp4_det_val_disc.txt:1", "expected 5 numbers"],
            "no.json": ["no.json:1", "expected JSON"],
            "other.json": ["other.json: result 0", "'000099'"],
        }
        for results, says in score.items():
            fails("detect", "score", results, data, "--split", "val", "--json", "scored.json", says=says)


class TestPropose:
    def test_file(self, photos):
        outcome = succeeds("propose", photos, "--out", "windows.npz")
        with np.load("windows.npz") as file:
            assert file["names"].tolist() == ["1.png", "2.png", "3.png"]
            total = file["counts"].sum()
            assert file["boxes"].shape == (total, 4)
            assert file["scores"].shape == (total,)
        assert f"windows.npz: {total} windows of 3 images" in outcome.out
        image = read_image(photos / "2.png")
        for ours, theirs in zip(
            read_windows("windows.npz")(image), parse("selective-search+edge-boxes")(image), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)

    def test_odd_images(self):
        sizes = odd_images(Path("odd"))
        outcome = succeeds("propose", "odd", "--out", "windows.npz")
        assert f"of {len(sizes)} images" in outcome.out
        for name, (height, width) in sizes.items():
            boxes, _ = read_windows("windows.npz")(read_image(Path("odd") / name))
            np.testing.assert_array_equal(boxes[0], [0, 0, width, height])

    def test_suffix_is_said_at_once(self, photos, monkeypatch):
        monkeypatch.setattr("sppnet.images.read_image", None)
        fails("propose", photos, "--out", "windows.txt", says=["windows.txt", "'.txt'", "expected .npz"])

    def test_old_windows_stay_without_new_ones(self):
        write(Path("windows.npz"), "the windows of last week")
        write(Path("bad.png"), "not a picture")
        fails("propose", "bad.png", "--out", "windows.npz", says=["bad.png", "expected"])

    def test_unknown_method(self, photos, model):
        says = ["'sliding'", "expected", "selective-search", ".npz"]
        fails("propose", photos, "--out", "windows.npz", "--proposals", "sliding", says=says)
        fails("detect", "run", model, photos, "--proposals", "sliding", says=says)
        fails("detect", "run", model, photos, "--proposals", "none.npz", says=["none.npz"])
        write(Path("text.npz"), "no windows")
        fails("detect", "run", model, photos, "--proposals", "text.npz", says=["text.npz", "sppnet propose"])


def box_xml(x1, y1, x2, y2):
    """Return an annotation of one box, given as VOC writes it; the box begins at line 9."""
    return voc_xml([(x1 - 1, y1 - 1, x2, y2)], ["disc"])


class TestExport:
    def test_backbone(self):
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        options = ("--levels", "2,1", "--weights", "random", "--side", "64")
        outcome = succeeds("export", "resnet18", "--out", "a.onnx", *options)
        assert "a.onnx: image -> features of resnet18" in outcome.out
        assert Path("a.onnx").stat().st_size > 10**7

    def test_bad_places(self, model):
        fails("export", model, "--out", "a.bin", says=["a.bin", "'.bin'", ".onnx"])
        fails(
            "export",
            "missing.safetensors",
            "--out",
            "a.onnx",
            says=["missing.safetensors: found no such file"],
        )
        fails("export", "nonsense", "--out", "a.onnx", says=["unknown backbone 'nonsense'"])


class TestBadData:
    def test_missing_folder(self, model):
        for command in (("train", "missing", "--out", "m.safetensors"), ("evaluate", model, "missing")):
            fails("detect", *command, says=["missing", "no such folder", "expected a dataset"])

    def test_no_dataset(self, photos, model):
        Path("empty").mkdir()
        write(Path("notes.txt"), "no dataset")
        found = {
            "empty": "no dataset",
            "notes.txt": "no dataset",
            "photos": "images and no annotations known",
        }
        for folder, what in found.items():
            says = [folder, "found ", what, "Annotations/*.xml", "data.yaml"]
            fails("detect", "train", folder, "--out", "m.safetensors", says=says)
            fails("detect", "evaluate", model, folder, says=says)

    def test_unknown_split(self, model, data):
        says = [data, "'test'", "train, val"]
        fails("detect", "train", data, "--split", "test", "--out", "m.safetensors", says=says)
        fails("detect", "evaluate", model, data, "--split", "test", "--json", "report.json", says=says)
        fails("detect", "score", "missing", data, "--split", "test", says=says)

    @pytest.mark.parametrize(
        ("xml", "line", "says"),
        [
            ("<annotation>\n<object>\n<name>disc</annotation>", 3, "malformed XML"),
            ("", 1, "malformed XML"),
            ("<html/>", 1, "<html>"),
            (box_xml(200, 5, 300, 60), 9, "box 200 5 300 60 of 'disc' lies outside the image of 128 x 96"),
            (box_xml(60, 5, 20, 60), 9, "box 60 5 20 60 of 'disc' is inverted or empty"),
            (box_xml(21, 5, 20, 60), 9, "box 21 5 20 60 of 'disc' is inverted or empty"),
            (box_xml(1, 2, 3, 4).replace("<xmin>1<", "<xmin>one<"), 10, "'one' as <xmin>"),
            (voc_xml([(1, 2, 30, 40)], ["disc"]).replace("bndbox", "box"), 6, "<object> without <bndbox>"),
            (voc_xml([(1, 2, 30, 40)], [""]), 6, "an object without a name"),
        ],
    )
    def test_annotation(self, xml, line, says):
        one_image_tree(Path("shapes"))
        write(Path("shapes/Annotations/000001.xml"), xml)
        place = f"shapes/Annotations/000001.xml:{line}: "
        fails("detect", "train", "shapes", "--out", "m.safetensors", *QUICK, says=[place, says, "expected"])

    def test_several_errors(self):
        for i in range(12):
            one_image_tree(Path("shapes"), "<html/>", name=f"{i}")
        outcome = sppnet("detect", "train", "shapes", "--out", "m.safetensors")
        assert outcome.status == 1
        assert outcome.said[0] == "sppnet: shapes: found 12 errors, expected none"
        assert len(outcome.said) == 12
        assert outcome.said[-1] == "and 2 more"

    def test_missing_image(self):
        voc_tree(Path("shapes"), SPLITS)
        Path("shapes/JPEGImages/000003.jpg").unlink()
        says = ["train.txt:3", "no image for '000003'"]
        fails("detect", "train", "shapes", "--split", "train", "--out", "m.safetensors", says=says)

    def test_clipped_box_is_told(self):
        one_image_tree(Path("shapes"), box_xml(1, 1, 300, 60))
        outcome = succeeds("detect", "train", "shapes", "--out", "m.safetensors", *QUICK)
        assert "note: boxes that reached beyond their image, clipped: 1" in outcome.err


class TestBadModels:
    @pytest.fixture(autouse=True)
    def _photo(self):
        save(Path("1.png"), scene(1).image)

    def refused(self, path, *says):
        fails("detect", "run", path, "1.png", "--out", "found", "--json", "found.json", says=[path, *says])
        one_image_tree(Path("data"))
        fails("detect", "evaluate", path, "data", "--out", "report", says=[path, *says])

    def test_missing(self):
        self.refused("m.safetensors", "found no such file")
        Path("folder").mkdir()
        self.refused("folder", "found no such file")

    @pytest.mark.parametrize("kept", [0, 4, 100, -1])
    def test_truncated(self, model, kept):
        Path("m.safetensors").write_bytes(model.read_bytes()[:kept])
        self.refused("m.safetensors", "found no safetensors file")

    def test_something_else(self):
        self.refused("1.png", "found no safetensors file")
        save_file({"a": torch.zeros(3)}, "m.safetensors")
        self.refused("m.safetensors", "without a format mark", "expected sppnet-detector 2")
        save_file({"a": torch.zeros(3)}, "m.safetensors", {"format": "pt"})
        self.refused("m.safetensors", "found pt, expected sppnet-detector 2")

    def rewritten(self, model, tensors=None, **changes):
        with safe_open(model, "pt") as file:
            metadata = file.metadata() | changes
        known = {key: value for key, value in metadata.items() if value is not None}
        save_file(load_file(model) if tensors is None else tensors, "m.safetensors", known)

    def test_other_version(self, model):
        self.rewritten(model, version="1")
        self.refused("m.safetensors", "found sppnet-detector 1, expected sppnet-detector 2")

    def test_other_weights(self, model):
        facts = describe(model)
        facts["backbone"]["digest"] = "0" * 64
        self.rewritten(model, detector=json.dumps(facts))
        self.refused("m.safetensors", "0" * 16)

    @pytest.mark.parametrize("facts", [None, "{", "[]", "{}", '{"classes": []}'])
    def test_damaged_facts(self, model, facts):
        self.rewritten(model, detector=facts)
        self.refused("m.safetensors", "damaged")

    def test_missing_tensors(self, model):
        self.rewritten(model, {"weights": torch.zeros(3)})
        self.refused("m.safetensors", "damaged")

    def test_headers_are_sorted(self, model):
        """Or the bytes of equal models would differ from run to run."""
        raw = model.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        assert list(header["__metadata__"]) == sorted(header["__metadata__"])


class TestBadOptions:
    @pytest.mark.parametrize("option", ["--scales", "--levels"])
    @pytest.mark.parametrize("value", ["", "0", "64,,96", "64;96", "-3", "6.5", "big"])
    def test_integers(self, data, option, value):
        says = [f"{option} {value}:", "expected positive integers", "480,576"]
        fails("detect", "train", data, "--out", "m.safetensors", f"{option}={value}", says=says)

    @pytest.mark.parametrize("stages", ["9", "0", "", "head,head", "1;2", "tail"])
    def test_stages(self, data, stages):
        says = [f"stages {stages or '(none)'}", "expected", "1, 2, 3, 4, 5, head"]
        fails("detect", "train", data, "--out", "m.safetensors", *QUICK, "--stages", stages, says=says)

    def test_backbone(self, data):
        train = ("detect", "train", data, "--out", "m.safetensors", *QUICK, "--backbone")
        fails(*train, "resnet5000", says=["'resnet5000'", "expected a timm model name"])
        fails(*train, "resnet18", says=["'resnet18'", "give a weights file"])
        fails(*train, "resnet18", "--weights", "missing.pth", says=["missing.pth", "not found"])
        write(Path("text.pth"), "no weights")
        fails(*train, "resnet18", "--weights", "text.pth", says=["text.pth", "state dict"])
        write(Path("text.safetensors"), "no weights")
        fails(*train, "resnet18", "--weights", "text.safetensors", says=["text.safetensors"])

    def test_weights_of_another_network(self, data, model):
        train = ("detect", "train", data, "--out", "m.safetensors", *QUICK, "--weights", model)
        fails(*train, says=[model, "not weights of tf_efficientnet_lite0"])

    def test_backbone_without_maps(self, data):
        backbone = ("--backbone", "vit_tiny_patch16_224", "--weights", "random")
        fails(
            "detect",
            "train",
            data,
            "--out",
            "m.safetensors",
            *QUICK,
            *backbone,
            says=["vit_tiny_patch16_224"],
        )

    @pytest.mark.parametrize("device", ["gpu", "cuda", "meta", "cuda:99"])
    def test_device(self, data, model, photos, device, monkeypatch):
        if device == "cuda" and torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
        monkeypatch.setattr("sppnet.cli.detect._cached_windows", None)  # it is said before the long work
        fails(
            "detect",
            "train",
            data,
            "--out",
            "m.safetensors",
            *QUICK,
            "--device",
            device,
            says=[f"'{device}'"],
        )
        fails("detect", "run", model, photos, "--out", "found", "--device", device, says=[f"'{device}'"])


class TestBadPlaces:
    def test_folder_as_file(self, data, model, photos):
        Path("folder").mkdir()
        says = ["folder", "found a folder", "expected"]
        fails("detect", "train", data, "--out", "folder", *QUICK, says=says)
        fails("detect", "run", model, photos, "--json", "folder", says=says)
        fails("detect", "evaluate", model, data, "--json", "folder", says=says)
        Path("folder.npz").mkdir()
        fails("propose", photos, "--out", "folder.npz", says=["folder.npz", "found a folder", "expected"])

    def test_file_as_folder(self, data, model, photos):
        write(Path("file"), "mine")
        says = ["file", "found a file", "expected"]
        fails("detect", "run", model, photos, "--out", "file", says=says)
        fails("detect", "evaluate", model, data, "--out", "file", says=says)
        fails("detect", "train", data, "--out", "m.safetensors", *QUICK, "--cache", "file", says=says)

    def test_missing_folder(self, data, model, photos):
        for command in (
            ("detect", "train", data, "--out", "missing/m.safetensors"),
            ("detect", "run", model, photos, "--json", "missing/m.json"),
            ("propose", photos, "--out", "missing/m.npz"),
        ):
            fails(*command, says=["missing/m.", "cannot write", "expected an existing, writable folder"])

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
    def test_forbidden_folder(self, data, model, photos):
        folder = Path("mine")
        folder.mkdir(mode=0o500)
        for command in (
            ("detect", "train", data, "--out", "mine/m.safetensors", *QUICK),
            ("detect", "run", model, photos, "--json", "mine/m.json"),
            ("detect", "run", model, photos, "--out", "mine"),
            ("detect", "run", model, photos, "--out", "mine/found"),
            ("detect", "evaluate", model, data, "--out", "mine"),
            ("propose", photos, "--out", "mine/m.npz"),
        ):
            fails(*command, says=["mine"])

    def test_full_disk(self, model, photos, monkeypatch):
        """What fails while it is written leaves the old file and no other."""
        write(Path("found.json"), "[]")
        full = OSError(28, "No space left on device", "found.json")
        monkeypatch.setattr(Path, "write_text", mock.Mock(side_effect=full))
        fails("detect", "run", model, photos, "--json", "found.json", says=["No space left on device"])


def test_detections_are_plain(model, data):
    """The records between commands and library: see docs/conventions.md."""
    found = next(iter(detections_of(model, read_dataset(data, "val")).values()))
    assert isinstance(found, Detections)
    assert found.boxes.dtype == found.scores.dtype == np.float32
