"""The commands on classifiers end to end: what they write and say, and what they leave behind on errors."""

import csv
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from commands import content, environment, fails, read_json, same, sppnet, succeeds
from sppnet.classification.classifier import Classifier
from sppnet.classification.file import load_network
from sppnet.classification.views import VIEWS, probabilities
from sppnet.datasets.image_folder import read_image_folder
from sppnet.images import read_image
from trees import SHAPES, class_tree

TINY = ("--network", "zf5", "--width", "0.03", "--scales", "64,48", "--batch", "9", "--epochs", "2")
CLASSES = tuple(sorted(SHAPES))


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Class folders in two splits, not to be changed."""
    root = tmp_path_factory.mktemp("data")
    class_tree(root / "train", 6)
    class_tree(root / "val", 2, seed=100)
    return root


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "shapes.safetensors"
    succeeds("classify", "train", data, "--out", path, *TINY)
    return path


class TestTrain:
    def test_writes_a_network_and_its_curves(self, data, model):
        settings = load_network(model).scorer.settings
        assert settings.classes == CLASSES
        assert (settings.name, settings.levels, settings.width, settings.size) == (
            "zf5",
            (6, 3, 2, 1),
            0.03,
            64,
        )
        rows = list(csv.DictReader(model.with_suffix(".csv").open()))
        assert [row["epoch"] for row in rows] == ["0", "1"]
        assert [row["side"] for row in rows] == ["64", "48"]
        assert all(0 <= float(row["validation_error"]) <= 1 for row in rows)
        assert Image.open(model.with_suffix(".png")).width > 400
        assert {path.name for path in model.parent.iterdir()} == {
            f"shapes.{suffix}" for suffix in ("safetensors", "csv", "png")
        }

    def test_says_what_each_epoch_gave(self, data):
        outcome = succeeds("classify", "train", data, "--out", "m.safetensors", *TINY[:-1], "1")
        assert "epoch 1: side 64, lr 0.01" in outcome.out
        assert "validation" in outcome.out
        assert "m.safetensors: 3 classes from 18 images" in outcome.out

    def test_a_seed_gives_a_network(self, data, model):
        succeeds("classify", "train", data, "--out", "again.safetensors", *TINY)
        assert same("again.safetensors", model) or all(
            np.array_equal(a, b)
            for a, b in zip(load_file("again.safetensors").values(), load_file(model).values(), strict=True)
        )

    def test_without_a_pyramid(self, data):
        options = (*TINY[:4], "--scales", "64", "--batch", "9", "--epochs", "1", "--levels", "none")
        succeeds("classify", "train", data, "--out", "m.safetensors", *options)
        outcome = succeeds("classify", "evaluate", "m.safetensors", data, "--split", "val")
        assert "views one" in outcome.out
        fails(
            "classify",
            "evaluate",
            "m.safetensors",
            data,
            "--split",
            "val",
            "--views",
            "full",
            says=["pyramid"],
        )

    def test_a_side_drawn_for_each_epoch(self, data):
        succeeds("classify", "train", data, "--out", "m.safetensors", *TINY, "--uniform")
        sides = [int(row["side"]) for row in csv.DictReader(Path("m.csv").read_text().splitlines())]
        assert all(48 <= side <= 64 for side in sides)
        assert not set(sides) <= {48, 64}

    def test_options_reach_the_classifier(self, data):
        options = ("--lr", "0.02", "--backbone-lr", "0.5", "--milestones", "1", "--weight-decay", "0.1")
        options += ("--label-smoothing", "0.2", "--frozen", "2", "--accumulate", "2", "--mode", "average")
        succeeds("classify", "train", data, "--out", "m.safetensors", *TINY, *options, "--seed", "3")
        classifier = Classifier.load("m.safetensors")
        expected = Classifier(
            "zf5",
            mode="average",
            scales=(64, 48),
            epochs=2,
            lr=0.02,
            backbone_lr=0.5,
            milestones=(1,),
            weight_decay=0.1,
            batch_size=9,
            accumulate=2,
            frozen=2,
            label_smoothing=0.2,
            width=0.03,
            seed=3,
        )
        assert classifier.get_params() == expected.get_params()
        rows = csv.DictReader(Path("m.csv").read_text().splitlines())
        assert [row["lr"] for row in rows] == ["0.02", "0.002"]

    def test_without_splits_it_learns_from_everything_and_says_so(self, data):
        outcome = succeeds("classify", "train", data / "train", "--out", "m.safetensors", *TINY[:-1], "1")
        assert (
            f"note: {data}/train: learning from everything, as there is no split for training: 18 photos"
            in outcome.err
        )
        assert "validation" not in outcome.out

    def test_a_pretrained_backbone(self, data):
        options = ("--scales", "64", "--epochs", "1", "--batch", "9", "--validation", "none")
        outcome = succeeds("classify", "train", data, "--out", "m.safetensors", *options)
        assert "validation" not in outcome.out
        settings = load_network("m.safetensors").scorer.settings
        assert (settings.name, settings.levels) == ("efficientnet-lite0", (3, 2, 1))

    def test_the_file_of_a_backbone(self, data, backbone_file):
        options = ("--scales", "64", "--epochs", "1", "--batch", "9", "--network")
        succeeds("classify", "train", data, "--out", "m.safetensors", *options, backbone_file("test_resnet"))
        succeeds("classify", "evaluate", "m.safetensors", data, "--split", "val")

    def test_one_line_says_that_pytorch_is_missing(self, data, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch", None)
        outcome = sppnet("classify", "train", "nowhere", "--out", "none/m.safetensors")
        assert outcome.status == 2
        assert outcome.said == ['sppnet: training a network needs PyTorch: pip install "sppnet[torch]"']

    def test_goes_on_after_a_kill(self, data, model):
        arguments = ["classify", "train", str(data), "--out", "killed.safetensors", *TINY]
        code = f"import sys\nsys.argv = ['sppnet', *{arguments!r}]\nfrom sppnet.cli import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdout.readline().startswith(b"epoch 1")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert Path("killed.safetensors.checkpoint").exists()
        assert not Path("killed.safetensors").exists()
        succeeds(*arguments)
        found, expected = load_file("killed.safetensors"), load_file(model)
        assert all(np.array_equal(found[name], value) for name, value in expected.items())
        assert not Path("killed.safetensors.checkpoint").exists()

    @pytest.mark.long
    def test_two_processes_write_one_network(self, data):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--no-python", sys.executable, "-m", "sppnet", "classify", "train", str(data)]
        command += ["--out", "two.safetensors", *TINY, "--batch", "8"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment())
        assert done.returncode == 0, done.stderr[-3000:]
        assert [
            line.split(":")[0] for line in done.stdout.splitlines() if line.startswith(("epoch", "two"))
        ] == [
            "epoch 1",
            "epoch 2",
            "two.safetensors",
        ]
        # Each process numbered its share of the photos.
        assert Classifier.load("two.safetensors").seen(read_image_folder(data, "train")) == 18
        assert not Path("two.safetensors.checkpoint").exists()


class TestRun:
    def test_five_best_classes(self, data, model):
        image = data / "val" / CLASSES[0] / "000001.jpg"
        outcome = succeeds("classify", "run", model, image, "--json", "found.json")
        (record,) = read_json("found.json")
        expected = probabilities(load_network(model).scorer, read_image(image), "full")
        order = np.argsort(-expected).tolist()
        assert [entry["class"] for entry in record["classes"]] == [CLASSES[i] for i in order]
        assert [entry["probability"] for entry in record["classes"]] == pytest.approx(
            expected[order].tolist()
        )
        assert CLASSES[order[0]] in outcome.out

    @pytest.mark.parametrize("views", sorted(VIEWS))
    def test_views(self, data, model, views):
        succeeds("classify", "run", model, data / "val" / CLASSES[0], "--views", views)

    def test_imagenet_out_of_the_box(self, shepherd):
        succeeds("classify", "run", "imagenet", shepherd, "--json", "found.json")
        (record,) = read_json("found.json")
        assert record["classes"][0]["title"].startswith("German shepherd")
        assert record["classes"][0]["class"] == "n02106662"

    def test_an_unreadable_image_is_named_and_the_rest_is_done(self, data, model):
        Path("photos").mkdir()
        Path("photos/1.jpg").write_bytes(b"no picture")
        Image.new("RGB", (90, 70)).save("photos/2.png")
        outcome = sppnet("classify", "run", model, "photos", "--json", "found.json")
        assert outcome.status == 1
        assert "photos/1.jpg" in outcome.said[0]
        assert outcome.said[1] == "sppnet: 1 of 2 images failed"
        assert [record["image"] for record in read_json("found.json")] == ["photos/2.png"]


class TestEvaluate:
    def test_measures(self, data, model):
        arguments = (
            "classify",
            "evaluate",
            model,
            data,
            "--split",
            "val",
            "--json",
            "m.json",
            "--out",
            "report",
        )
        outcome = succeeds(*arguments)
        found = read_json("m.json")
        scorer = load_network(model).scorer
        right = dict.fromkeys(CLASSES, 0)
        for label, name in enumerate(CLASSES):
            for path in sorted((data / "val" / name).iterdir()):
                right[name] += int(probabilities(scorer, read_image(path), "full").argmax()) == label
        assert found["classes"] == {name: {"images": 2, "right": right[name]} for name in CLASSES}
        assert found["top1"] == pytest.approx(sum(right.values()) / 6)
        assert found["top5"] == 1
        assert sum(map(sum, found["confusion"])) == 6
        assert f"{100 * found['top1']:.2f} %" in outcome.out
        assert Image.open("report/confusion.png").width > 300

    def test_a_csv_of_paths_and_labels(self, data, model):
        with Path("list.csv").open("w") as file:
            file.write("path,label\n")
            for name in CLASSES:
                file.write(f"{data}/val/{name}/000001.jpg,{name}\n")
        succeeds("classify", "evaluate", model, "list.csv", "--json", "m.json")
        assert read_json("m.json")["images"] == 3

    def test_it_says_that_the_network_was_fitted_on_these_photos(self, data, model):
        outcome = succeeds("classify", "evaluate", model, data, "--split", "train", "--json", "m.json")
        assert "warning: the network was fitted on 18 of these 18 photos" in outcome.err
        assert read_json("m.json")["seen"] == 18
        outcome = succeeds("classify", "evaluate", model, data, "--split", "val")
        assert "fitted on" not in outcome.err

    def test_an_unreadable_image_is_named_and_the_rest_is_measured(self, data, model):
        shutil.copytree(data / "val", "mine")
        Path("mine", CLASSES[0], "000001.jpg").write_bytes(b"nothing")
        outcome = sppnet("classify", "evaluate", model, "mine", "--json", "m.json")
        assert outcome.status == 1
        assert "000001.jpg" in outcome.said[0]
        assert outcome.said[1] == "sppnet: 1 of 6 images failed"
        found = read_json("m.json")
        assert (found["images"], len(found["unreadable"])) == (5, 1)


def test_export(data, model):
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime to run what was exported")
    outcome = succeeds("export", model, "--out", "m.onnx")
    assert "m.onnx: image -> probabilities of 3 classes" in outcome.out
    image = read_image(data / "val" / CLASSES[0] / "000001.jpg")
    (found,) = runtime.InferenceSession("m.onnx").run(None, {"image": image})
    expected = probabilities(load_network(model).scorer, image, "full")
    assert found == pytest.approx(expected, abs=2e-4)


class TestBadInput:
    def test_no_data(self):
        fails("classify", "train", "nowhere", "--out", "m.safetensors", *TINY, says=["nowhere"])

    def test_an_empty_class(self, data):
        class_tree(Path("mine"), 4)
        Path("mine/empty").mkdir()
        fails("classify", "train", "mine", "--out", "m.safetensors", *TINY, says=["mine/empty"])

    def test_sizes_too_small(self, data):
        options = (*TINY[:4], "--scales", "64,4")
        fails("classify", "train", data, "--out", "m.safetensors", *options, says=["4 x 4", "too small"])

    @pytest.mark.parametrize("text", ["0", "a", "80,", "-3"])
    def test_sizes_that_are_none(self, data, text):
        fails("classify", "train", data, "--out", "m.safetensors", "--scales", text, says=["--scales", text])

    def test_several_sizes_without_a_pyramid(self, data):
        fails(
            "classify", "train", data, "--out", "m.safetensors", *TINY, "--levels", "none", says=["one size"]
        )

    def test_unknown_network(self, data):
        options = ("--network", "zf6", "--scales", "64")
        fails("classify", "train", data, "--out", "m.safetensors", *options, says=["zf6"])

    def test_a_checkpoint_of_another_run(self, data, model):
        shutil.copy(model, "m.safetensors.checkpoint")
        fails("classify", "train", data, "--out", "m.safetensors", *TINY, says=["m.safetensors.checkpoint"])

    def test_more_gpus_than_there_are(self, data):
        if torch.cuda.is_available():
            pytest.skip("there are GPUs")
        fails(
            "classify",
            "train",
            data,
            "--out",
            "m.safetensors",
            *TINY,
            "--device",
            "cuda",
            says=["found 0 GPUs", "expected the 1"],
        )

    def test_no_folder_to_write_to(self, data):
        fails("classify", "train", data, "--out", "none/m.safetensors", *TINY, says=["none/m.safetensors"])

    def test_too_many_unreadable_images(self, data):
        class_tree(Path("mine"), 12)
        for path in sorted(Path("mine").rglob("*.jpg"))[:11]:
            path.write_bytes(b"nothing")
        outcome = sppnet("classify", "train", "mine", "--out", "m.safetensors", *TINY)
        assert outcome.status == 2
        assert "could not be read" in outcome.said[0]
        assert not Path("m.safetensors").exists()

    def test_a_few_unreadable_images(self, data):
        class_tree(Path("mine"), 12)
        Path("mine", CLASSES[0], "000003.jpg").write_bytes(b"nothing")
        train = ("classify", "train", "mine", "--out", "m.safetensors", *TINY)
        for status, share in ((1, ()), (0, ("--max-bad", "3"))):
            outcome = sppnet(*train, *share)
            assert outcome.status == status
            assert "000003.jpg: found a file that starts with b'nothing'" in outcome.said[0]
            assert outcome.said[1] == "sppnet: 1 of 36 images failed"
            assert Path("m.safetensors").exists()

    def test_no_network(self, data):
        Path("m.safetensors").write_bytes(b"nothing")
        fails("classify", "run", "m.safetensors", data / "val" / CLASSES[0], says=["m.safetensors"])
        fails("classify", "evaluate", "absent.safetensors", data, says=["absent.safetensors"])

    def test_classes_that_the_network_does_not_know(self, model):
        class_tree(Path("mine"), 1)
        Path("mine", CLASSES[0]).rename(Path("mine/otter"))
        fails("classify", "evaluate", model, "mine", says=["otter"])

    @pytest.mark.parametrize(
        ("option", "value", "choices"),
        [
            ("--views", "eleven", "maps10"),
            ("--mode", "median", "average"),
            ("--precision", "8", "bf16-mixed"),
        ],
    )
    def test_choices_that_there_are_not(self, data, model, option, value, choices):
        given = (
            ("run", model, data / "val" / CLASSES[0])
            if option == "--views"
            else ("train", data, "--out", "m")
        )
        fails("classify", *given, option, value, says=[option, value, choices], status=2)

    def test_names_that_no_network_has(self, data):
        image = data / "val" / CLASSES[0]
        fails("classify", "run", "imagnet", image, says=["imagnet", "did you mean imagenet?"])
        fails("classify", "run", "animals", image, says=["sppnet-detector", "expected sppnet-network"])

    def test_results_never_replace_what_is_read(self, data, model):
        fails("classify", "evaluate", model, data, "--split", "val", "--json", model, says=[model])

    def test_interrupted(self, data, monkeypatch):
        def stop(*_, **__):
            raise KeyboardInterrupt
            yield  # training yields its epochs

        monkeypatch.setattr("sppnet.classification.fit.train", stop)
        outcome = sppnet("classify", "train", data, "--out", "m.safetensors", *TINY)
        assert outcome.status == 130
        assert "the same command goes on" in outcome.err
        assert not content()
