"""``sppnet detect evaluate`` and ``score``, of one detector and of ensembles."""

import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from commands import (
    QUICK,
    SPLITS,
    detections_of,
    expected_detections,
    fails,
    found_by,
    one_image_tree,
    read_json,
    sppnet,
    succeeds,
)
from sppnet.boxes import Detections
from sppnet.datasets import read_dataset
from sppnet.datasets.coco import write_coco_results
from sppnet.datasets.voc import write_voc_results
from sppnet.detection.detector import Detector
from sppnet.detection.ensemble import Ensemble
from sppnet.images import read_image
from sppnet.proposals import parse
from trees import SHAPES, coco_tree, scene, voc_tree, voc_xml, write

TREES = {"voc": voc_tree, "coco": coco_tree}


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
        assert [path.name for path in Path("report").iterdir()] == ["report.html"]
        page = Path("report/report.html").read_text()
        assert "6 of these 6 photos are among those that the detector was fitted on" in page
        assert str(data) in page
        assert f"{100 * report['mAP']:.1f}" in page
        assert "Finds " in outcome.out
        assert "Finds " in page
        confusion = report["confusion"]
        assert confusion["classes"] == [*sorted(SHAPES), "background"]
        assert np.sum(confusion["counts"][:3]) == sum(report["objects"].values())

    @pytest.mark.parametrize(
        ("options", "seen", "of"), [(("--split", "train"), 6, 6), (("--split", "all"), 6, 10)]
    )
    def test_photos_of_the_fit_are_told_first(self, model, data, options, seen, of):
        outcome = succeeds("detect", "evaluate", model, data, *options, "--json", "report.json")
        warning = (
            f"warning: the detector was fitted on {seen} of these {of} photos: on new ones it finds less"
        )
        assert outcome.err.splitlines()[0] == warning
        assert read_json("report.json")["seen"] == seen

    def test_photos_of_the_fit_are_told_in_red(self, model, data, monkeypatch):
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
        outcome = sppnet("detect", "evaluate", model, data, "--split", "train")
        assert outcome.status == 0
        assert outcome.err.startswith("\x1b[1;31mwarning: the detector was fitted on 6 of these 6 photos")

    def test_the_commands_of_the_readme_measure_on_new_photos(self, data):
        """Train and evaluate as README has it, on data with the splits train and val."""
        succeeds("detect", "train", data, "--out", "my.safetensors", *QUICK)
        evaluate = ("detect", "evaluate", "my.safetensors", data, "--split", "val", "--out", "report")
        outcome = succeeds(*evaluate, "--json", "report.json")
        assert "warning" not in outcome.err
        assert read_json("report.json")["seen"] == 0

    def test_an_ensemble_has_seen_what_any_has_seen(self, model, data):
        options = ("--split", "val", "--out", "val.safetensors", *QUICK)
        succeeds("detect", "train", data, *options)
        evaluate = ("detect", "evaluate", model, data, "--ensemble", "val.safetensors", "--split", "val")
        outcome = succeeds(*evaluate, "--json", "report.json")
        assert outcome.err.startswith("warning: the detector was fitted on 4 of these 4 photos")
        assert read_json("report.json")["seen"] == 4

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
        row = next(line for line in outcome.out.splitlines() if "square" in line)
        assert [cell.strip() for cell in row.strip("│ ").split("│")][1:4] == ["0", "–", "–"]

    def test_no_objects_at_all(self, model):
        one_image_tree(Path("empty"), voc_xml([], []))
        outcome = succeeds("detect", "evaluate", model, "empty", "--json", "report.json", "--out", "report")
        report = read_json("report.json")
        assert report["mAP"] is None
        assert set(report["AP"].values()) == {None}
        assert "no object to find" in Path("report/report.html").read_text()
        assert "no object to find" in outcome.out

    def test_photos_that_cannot_be_read_are_left_out_up_to_a_share(self, model):
        voc_tree(Path("shapes"), {"val": 4})
        broken = Path("shapes/JPEGImages/000003.jpg")
        broken.write_bytes(broken.read_bytes()[:600])
        evaluate = ("detect", "evaluate", model, "shapes", "--json", "report.json")
        fails(*evaluate, says=[broken])
        outcome = succeeds(*evaluate, "--out", "report", "--max-bad", "25")
        assert str(broken) in outcome.err
        assert read_json("report.json")["images"] == 3
        assert "left out" in Path("report/report.html").read_text()
        fails(*evaluate, "--max-bad", "24", says=[broken])

    def test_what_cannot_be_written_is_said_at_once(self, model, data, monkeypatch):
        monkeypatch.setattr(Detector, "evaluate", None)
        evaluate = ("detect", "evaluate", model, data, "--split", "val")
        fails(*evaluate, "--json", "missing/report.json", says=["missing/report.json", "expected"])
        Path("report/report.html").mkdir(parents=True)
        fails(*evaluate, "--out", "report", says=["report/report.html: found a folder"])


class TestTogether:
    """Several detectors on the same images and windows."""

    def test_run(self, model, second, photos):
        together = Ensemble([Detector.load(model), Detector.load(second)])
        images = [f"photos/{i}.png" for i in (1, 2, 3)]
        run = ("detect", "run", model, photos, "--ensemble", second, "--threshold=0", "--json")
        outcome = succeeds(*run, "found.json", "--out", "found")
        entries = read_json("found.json")["images"]
        # The windows are those of the first detector, for both.
        assert [e["detections"] for e in entries] == [found_by(together, path, 0) for path in images]
        for alone in (model, second):
            assert any(e["detections"] != expected_detections(alone, e["image"], 0) for e in entries)
        assert f"{entries[0]['detections'][0]['label']} " in outcome.out
        assert sorted(p.name for p in Path("found").iterdir()) == ["1.jpg", "2.jpg", "3.jpg"]
        succeeds(*run, "other.json", "--proposals", "edge-boxes")
        found = [e["detections"] for e in read_json("other.json")["images"]]
        assert found == [found_by(together, path, -1, "edge-boxes") for path in images]

    def test_three(self, model, second, data, photos):
        train = ("detect", "train", data, "--split", "train", "--out", "third.safetensors", *QUICK)
        succeeds(*train, "--seed", 7)
        models = (model, second, "third.safetensors")
        together = Ensemble([Detector.load(path) for path in models])
        run = (
            "detect",
            "run",
            model,
            photos / "1.png",
            "--ensemble",
            second,
            "--ensemble",
            "third.safetensors",
        )
        succeeds(*run, "--json", "found.json")
        assert read_json("found.json")["images"][0]["detections"] == found_by(together, photos / "1.png")

    @pytest.mark.parametrize(("options", "regress"), [((), True), (("--no-regress",), False)])
    def test_evaluate(self, model, second, data, options, regress):
        from sppnet.evaluation.detection import voc_detection

        together, dense = Ensemble([Detector.load(model), Detector.load(second)]), parse("dense")
        dataset = read_dataset(data, "val")
        images = [read_image(sample.path) for sample in dataset]
        found = [together.predict(image, dense(image)[0], regress=regress, threshold=0) for image in images]
        results = voc_detection(found, [sample.target for sample in dataset], sorted(SHAPES))
        evaluate = ("detect", "evaluate", model, data, "--ensemble", second, "--split", "val", *options)
        succeeds(*evaluate, "--json", "report.json", "--out", "report")
        report = read_json("report.json")
        assert report["AP"] == {name: result.average_precision for name, result in results.items()}
        assert (report["model"], report["ensemble"]) == (str(model), [str(second)])
        assert report["proposals"] == dense.signature
        assert {"backbone", "pooling", "scoring"} <= set(report["seconds_per_image"])
        page = Path("report/report.html").read_text()
        assert f"{model} with {second}" in page
        assert ">dense<" in page
        assert dense.signature not in page

    def refused(self, model, others, data, says):
        more = [text for other in others for text in ("--ensemble", other)]
        fails("detect", "run", model, data / "JPEGImages", *more, "--out", "found", says=says)
        fails("detect", "evaluate", model, data, "--split", "val", *more, "--json", "report.json", says=says)

    def test_scores_of_svms_do_not_compare(self, model, second, photos, monkeypatch):
        """That is said before any detector is read."""
        monkeypatch.setattr(Detector, "load", None)
        options = ("--ensemble", second, "--scores", "svm")
        fails("detect", "run", model, photos, *options, says=["--scores svm", "do not compare"])

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
        says = ["m.safetensors: found sppnet-classifier, expected sppnet-detector 6"]
        self.refused(model, ["m.safetensors"], data, says)
        self.refused("m.safetensors", [second], data, says)

    def test_results_replace_no_model(self, model, second, data):
        before = second.read_bytes()
        says = [f"{second}: found a file that is to be read"]
        fails("detect", "run", model, data / "JPEGImages", "--ensemble", second, "--json", second, says=says)
        fails("detect", "evaluate", model, data, "--ensemble", second, "--json", second, says=says)
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
        page = Path("report/report.html").read_text()
        assert str(results) in page
        assert "data:image/jpeg" in page

    def test_images_without_detections_are_counted(self, model):
        coco_tree(Path("shapes"), SPLITS)
        first = read_dataset("shapes", "val")[0].path
        succeeds("detect", "run", model, first, "--threshold=0", "--json", "found.json")
        outcome = succeeds("detect", "score", "found.json", "shapes", "--split", "val")
        assert "note: found.json: found no detection in 3 of the 4 images" in outcome.err

    @pytest.mark.parametrize("absent", [1, 4])
    def test_photos_need_not_be_there(self, model, absent):
        coco_tree(Path("shapes"), SPLITS)
        dataset = read_dataset("shapes", "val")
        write_coco_results(Path("val.json"), detections_of(model, dataset), dataset)
        score = ("detect", "score", "val.json", "shapes", "--split", "val", "--json")
        succeeds(*score, "with.json")
        for sample in dataset[:absent]:
            sample.path.unlink()
        outcome = succeeds(*score, "without.json", "--out", "report")
        assert read_json("with.json") == read_json("without.json")
        assert f"note: {absent} of 4 photos are not there" in outcome.err
        page = Path("report/report.html").read_text()
        assert "no photos here" in page
        assert "<img" not in page

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
        write(Path("names.json"), '{"names": []}')
        write(
            Path("other.json"), '[{"image_id": "000099", "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]'
        )
        score = {
            "missing": ["missing", "no such file"],
            "empty": ["empty", "found no results", "comp<N>_det"],
            "voc": ["voc/comp4_det_val_disc.txt:1", "expected 5 numbers"],
            "no.json": ["no.json:1", "expected JSON"],
            "other.json": ["other.json: result 0", "'000099'"],
            "names.json": ["names.json", "found a JSON dict", "or what sppnet detect run --json wrote"],
        }
        for results, says in score.items():
            fails("detect", "score", results, data, "--split", "val", "--json", "scored.json", says=says)


def test_detections_are_plain(model, data):
    """The records between commands and library: see docs/conventions.md."""
    found = next(iter(detections_of(model, read_dataset(data, "val")).values()))
    assert isinstance(found, Detections)
    assert found.boxes.dtype == found.scores.dtype == np.float32
