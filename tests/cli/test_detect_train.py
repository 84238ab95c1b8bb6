"""``sppnet detect train``: what it writes and says, and what it leaves behind when something is wrong."""

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from commands import (
    QUICK,
    SPLITS,
    Outcome,
    box_xml,
    content,
    environment,
    fails,
    one_image_tree,
    same,
    sppnet,
    succeeds,
)
from sppnet.detection.detector import Detector
from sppnet.detection.file import read_facts
from sppnet.features.backbone import Backbone
from trees import SHAPES, coco_tree, scene, voc_tree, voc_xml, write, yolo_tree

TREES = {"voc": voc_tree, "coco": coco_tree, "yolo": yolo_tree}


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

    @pytest.mark.parametrize("kind", TREES)
    def test_the_split_train_is_the_default(self, model, kind):
        TREES[kind](Path("shapes"), SPLITS)
        outcome = succeeds("detect", "train", "shapes", "--out", "m.safetensors", *QUICK)
        objects = "9 objects: disc 4, triangle 3, square 2"
        told = f"note: shapes ({kind}): learning from the split train: 6 photos, {objects}"
        assert outcome.err.splitlines()[0] == told
        assert same(model, "m.safetensors")

    def test_another_split(self, data):
        outcome = succeeds("detect", "train", data, "--split", "val", "--out", "m.safetensors", *QUICK)
        assert "from 4 images" in outcome.out
        assert f"note: {data} (voc): learning from the split val: 4 photos, " in outcome.err

    def test_all_is_learned_from_without_splits(self):
        for name in "123":
            one_image_tree(Path("shapes"), name=name)
        outcome = succeeds("detect", "train", "shapes", "--out", "m.safetensors", *QUICK)
        said = "note: shapes (voc): learning from everything, as there is no split for training: 3 photos, "
        assert outcome.err.startswith(said)
        assert "from 3 images" in outcome.out

    def test_says_what_it_holds(self, model):
        facts = read_facts(model)
        assert facts["classes"] == sorted(SHAPES)
        assert facts["settings"]["proposals"] == "dense"
        assert facts["settings"]["scales"] == [64, 96]
        assert facts["settings"]["levels"] == [1]
        assert len(load_file(model)["photos"]) == 6

    def test_seed(self, data, model):
        succeeds("detect", "train", data, "--split", "train", "--out", "m.safetensors", *QUICK, "--seed", 1)
        assert read_facts("m.safetensors")["settings"]["seed"] == 1
        one, other = (load_file(path)["svms.weights"] for path in (model, "m.safetensors"))
        assert not torch.equal(one, other)

    def test_rules(self, data):
        rules = {"projection": "paper", "scale_rule": "paper", "negatives": "released"}
        options = [text for name, rule in rules.items() for text in (f"--{name.replace('_', '-')}", rule)]
        succeeds("detect", "train", data, "--split", "train", "--out", "m.safetensors", *QUICK, *options)
        settings = read_facts("m.safetensors")["settings"]
        assert {name: settings[name] for name in rules} == rules

    def test_moved_twice(self, data):
        succeeds("detect", "train", data, "--moves", 2, "--out", "m.safetensors", *QUICK)
        assert Detector.load("m.safetensors").moves == 2
        assert "moved 2 times" in succeeds("info", "m.safetensors").out
        says = ["found --moves beside --minutes"]
        fails("detect", "train", data, "--moves", 2, "--minutes", 1, "--out", "m.safetensors", says=says)

    @pytest.mark.parametrize("option", ["--projection", "--scale-rule", "--negatives"])
    def test_unknown_rule(self, data, option, monkeypatch):
        monkeypatch.setattr("sppnet.detection.detector.propose_each", None)  # it is said before the long work
        command = ("detect", "train", data, "--split", "train", "--out", "m.safetensors", *QUICK)
        says = [option, "'best' is not one of", "'released', 'paper'", "see sppnet detect train --help"]
        fails(*command, option, "best", says=says, status=2)

    def test_kept_cache(self, data, model, monkeypatch):
        options = ("--split", "train", "--out", "m.safetensors", *QUICK, "--cache", "maps")
        succeeds("detect", "train", data, *options)
        assert len(list(Path("maps").glob("*.safetensors"))) == 6
        monkeypatch.setattr(Backbone, "encode", None)
        Path("m.safetensors").unlink()
        succeeds("detect", "train", data, *options)
        assert same(model, "m.safetensors")

    def test_in_rounds_over_shards(self, data, model):
        """Other windows are drawn for the first SVMs, so it is another detector, of the same photos."""
        options = ("--split", "train", *QUICK)
        succeeds("detect", "train", data, "--out", "one.safetensors", *options, "--shards", 1)
        succeeds("detect", "train", data, "--out", "four.safetensors", *options, "--shards", 4)
        assert same("one.safetensors", "four.safetensors")
        one, plain = load_file("one.safetensors"), load_file(model)
        assert torch.equal(one["photos"], plain["photos"])
        assert not torch.equal(one["svms.weights"], plain["svms.weights"])
        assert {path.name for path in Path().iterdir()} == {"one.safetensors", "four.safetensors"}

    def test_memory_and_rounds_of_nothing(self, data):
        command = ("detect", "train", data, "--out", "m.safetensors", *QUICK)
        fails(*command, "--memory", 0.2, says=["found a memory of 0.2 GB, expected at least "])
        fails(*command, "--memory", 0, says=["found 0 as memory, expected more than 0"])
        fails(*command, "--rounds", 0, says=["--rounds"])
        fails(*command[:-6], "--minutes", 1, "--shards", 2, says=["found --shards beside --minutes"])

    def test_own_files_in_the_cache_folder_stay(self, data):
        mine = write(Path("m.safetensors.cache/notes.txt"), "mine")
        succeeds("detect", "train", data, "--split", "train", "--out", "m.safetensors", *QUICK)
        assert [str(p) for p in Path("m.safetensors.cache").iterdir()] == [str(mine)]

    def test_chosen_classes(self, data):
        outcome = succeeds(
            "detect", "train", data, "--out", "m.safetensors", "--classes", "square, disc", *QUICK
        )
        assert read_facts("m.safetensors")["classes"] == ["square", "disc"]
        assert "square, disc from 6 images" in outcome.out

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
        assert read_facts("m.safetensors")["classes"] == [drawn.labels[1]]
        assert f"left out, all examples are difficult or crowds: {drawn.labels[0]}" in outcome.err

    @pytest.mark.parametrize("asked", ["unicorn", "disc,unicorn"])
    def test_class_without_examples(self, data, asked, monkeypatch):
        monkeypatch.setattr("sppnet.detection.detector.propose_each", None)  # it is said before the long work
        says = [data, "unicorn", ", ".join(sorted(SHAPES))]
        fails("detect", "train", data, "--out", "m.safetensors", "--classes", asked, *QUICK, says=says)

    def test_no_objects_at_all(self):
        one_image_tree(Path("empty"), voc_xml([], []))
        fails("detect", "train", "empty", "--out", "m.safetensors", *QUICK, says=["empty", "no object"])

    def test_negative_image(self, data):
        voc_tree(Path("shapes"), {"train": 3})
        one_image_tree(Path("shapes"), voc_xml([], []), scene(0).image, "000000")
        write(Path("shapes/ImageSets/Main/train.txt"), "000000\n000001\n000002\n000003\n")
        outcome = succeeds("detect", "train", "shapes", "--out", "m.safetensors", *QUICK)
        assert "note: images without objects: 1" in outcome.err
        assert "from 4 images" in outcome.out

    def test_one_image(self):
        one_image_tree(Path("one"))
        succeeds("detect", "train", "one", "--out", "m.safetensors", *QUICK)
        outcome = succeeds("detect", "run", "m.safetensors", "one/JPEGImages", "--threshold=0")
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
        encode, calls = Backbone.encode, []

        def interrupted(*arguments):
            if len(calls) == 3:
                raise KeyboardInterrupt
            calls.append(arguments)
            return encode(*arguments)

        monkeypatch.setattr(Backbone, "encode", interrupted)
        outcome = sppnet(*command)
        assert outcome.status == 130
        assert "Traceback" not in outcome.err
        assert outcome.said == ["sppnet: interrupted"]
        assert "note: feature maps so far are kept in m.safetensors.cache" in outcome.err
        assert {path.name for path in Path().iterdir()} == {"m.safetensors.cache"}
        assert len(list(Path("m.safetensors.cache").iterdir())) == 3

        def counted(*arguments):
            calls.append(arguments)
            return encode(*arguments)

        calls.clear()
        monkeypatch.setattr(Backbone, "encode", counted)
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
            # A signal that arrives while Python clears up an object is lost: one presses once more.
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=3)
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130
        assert "Traceback" not in err
        assert Outcome(130, "", err).said == ["sppnet: interrupted"]
        assert "note: feature maps so far are kept in m.safetensors.cache" in err
        assert {path.name for path in Path().iterdir()} == {"shapes", "cache", "m.safetensors.cache"}
        assert not list(folder.glob(".*"))


class TestBadData:
    def test_missing_folder(self, model):
        for command in (("train", "missing", "--out", "m.safetensors"), ("evaluate", model, "missing")):
            fails("detect", *command, says=["missing", "no such folder", "expected a dataset"])

    def test_no_dataset(self, photos, model):
        Path("empty").mkdir()
        write(Path("notes.txt"), "no dataset")
        known = ["expected boxes in one of voc, coco, yolo"]
        found = {
            "empty": ["found no dataset", *known],
            "notes.txt": ["found a .txt file of none of the formats known here", *known],
            "photos": ["found 3 images and no annotations known here", *known, "annotate them with a tool"],
        }
        for folder, told in found.items():
            says = [folder, *told]
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
        assert outcome.status == 2
        assert outcome.said[0] == "sppnet: shapes: found 12 errors, expected none"
        assert len(outcome.said) == 12
        assert outcome.said[-1] == "and 2 more"

    def test_missing_image(self):
        voc_tree(Path("shapes"), SPLITS)
        Path("shapes/JPEGImages/000003.jpg").unlink()
        says = ["shapes/Annotations/000003.xml: found no image '000003' in shapes, expected one"]
        fails("detect", "train", "shapes", "--split", "train", "--out", "m.safetensors", says=says)

    def test_clipped_box_is_told(self):
        one_image_tree(Path("shapes"), box_xml(1, 1, 300, 60))
        outcome = succeeds("detect", "train", "shapes", "--out", "m.safetensors", *QUICK)
        assert "note: boxes that reached beyond their image, clipped: 1" in outcome.err


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

    def test_backbone(self, data, lite0):
        train = ("detect", "train", data, "--out", "m.safetensors", *QUICK, "--backbone")
        fails(*train, "resnet18", says=["no backbone 'resnet18'", "sppnet backbone make NAME --out FILE"])
        fails(*train, "missing.onnx", says=["missing.onnx: found no such file, expected a backbone file"])
        write(Path("text.onnx"), "no graph")
        fails(*train, "text.onnx", says=["text.onnx: found no"])
        whole = lite0.graph.to_bytes()
        Path("half.onnx").write_bytes(whole[: len(whole) // 2])
        fails(*train, "half.onnx", says=["half.onnx: found no whole ONNX file"])

    @pytest.mark.parametrize("device", ["gpu", "cuda", "meta", "cuda:99"])
    def test_device(self, data, model, photos, device, monkeypatch):
        if device == "cuda" and torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
        monkeypatch.setattr("sppnet.detection.detector.propose_each", None)  # it is said before the long work
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
