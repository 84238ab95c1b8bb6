"""``sppnet detect run``: of good and bad images, by good and bad models."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from commands import (
    QUICK,
    SPLITS,
    broken_images,
    environment,
    expected_detections,
    fails,
    odd_images,
    one_image_tree,
    read_json,
    serving,
    sppnet,
    succeeds,
)
from sppnet.datasets import read_dataset
from sppnet.detection.augmented import Augmented
from sppnet.detection.detector import Detector
from sppnet.detection.file import read_facts
from sppnet.drawing import draw_detections
from sppnet.images import read_image
from sppnet.photos import demo_photo
from sppnet.proposals import parse, read_windows
from sppnet.video import Video, video_writer
from trees import save, scene, voc_tree, write


def results(path):
    """Return what the JSON says of the images."""
    content = read_json(path)
    assert (content["version"], content["scores"]) == (1, "probability")
    return content["images"]


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
            "--threshold=0",
        )
        found = expected_detections(model, photos / "1.png", 0)
        assert found
        assert results("found.json") == [
            {"image": str(photos / "1.png"), "height": 96, "width": 128, "detections": found}
        ]
        assert f"{found[0]['label']} " in outcome.out
        assert "pictures in found" in outcome.out
        picture = read_image("found/1.jpg")
        assert picture.shape == (96, 128, 3)
        assert (picture != read_image(photos / "1.png")).any()

    @pytest.mark.parametrize("scores", ["probability", "svm"])
    def test_pictures_show_the_scores_asked_for(self, model, photos, scores):
        run = ("detect", "run", model, photos / "1.png", "--threshold=0", "--scores", scores)
        with mock.patch("sppnet.drawing.draw_detections", side_effect=draw_detections) as drawn:
            succeeds(*run, "--out", "found")
        assert drawn.call_args.kwargs == {"percent": scores == "probability"}

    def test_threshold(self, model, photos):
        outcome = succeeds(
            "detect", "run", model, photos / "1.png", "--threshold", "100", "--json", "found.json"
        )
        assert "nothing is likely enough" in outcome.out
        assert results("found.json")[0]["detections"] == []

    def test_photos_of_one_name_are_told_apart(self, model):
        long = f"{'long' * 30}.png"
        for file in ("a/x.png", "b/x.png", "b/y.png", f"b/{long}"):
            save(Path(file), scene(1).image)
        outcome = succeeds("detect", "run", model, "a", "b")
        assert "a/x.png" in outcome.out
        assert "b/x.png" in outcome.out
        assert "b/y.png" not in outcome.out
        rows = [line.split("│")[1].strip() for line in outcome.out.splitlines() if "│" in line]
        assert long in "".join(rows)

    def test_scores_of_svms_are_called_so(self, model, photos):
        outcome = succeeds(
            "detect", "run", model, photos / "1.png", "--scores", "svm", "--json", "found.json"
        )
        assert read_json("found.json")["scores"] == "svm"
        assert "SVM score" in outcome.out
        assert " %" not in outcome.out

    def test_folder_and_pattern(self, model, photos):
        succeeds("detect", "run", model, photos, "--json", "folder.json", "--out", "found")
        succeeds("detect", "run", model, "photos/[12].png", photos / "3.png", "--json", "pattern.json")
        assert read_json("folder.json") == read_json("pattern.json")
        assert [entry["image"] for entry in results("folder.json")] == [f"photos/{i}.png" for i in (1, 2, 3)]
        assert sorted(p.name for p in Path("found").iterdir()) == ["1.jpg", "2.jpg", "3.jpg"]

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
        save(Path("2.jpg"), scene(4).image)
        says = [f"{Path(out, '2.jpg')}: found a file that is to be read", "expected another"]
        fails("detect", "run", model, "photos/1.png", "2.jpg", "photos/3.png", "--out", out, says=says)

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
        entries = results("odd.json")
        assert {Path(e["image"]).name: (e["height"], e["width"]) for e in entries} == sizes
        for name, size in sizes.items():
            assert read_image(Path("found") / f"{Path(name).stem}.jpg").shape[:2] == size
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
        upright, turned = results("found.json")
        assert turned["detections"] == upright["detections"]


class TestManyPhotos:
    def test_are_counted_and_not_listed(self, model):
        for i in range(21):
            save(Path(f"photos/{i}.png"), scene(i).image)
        outcome = succeeds("detect", "run", model, "photos", "--json", "found.json")
        labels = [[d["label"] for d in entry["detections"]] for entry in results("found.json")]
        rows = [line.replace("│", " ").split() for line in outcome.out.splitlines() if "│" in line]
        classes = {label for of_photo in labels for label in of_photo}
        expected = [
            [n, str(sum(of.count(n) for of in labels)), str(sum(n in of for of in labels))] for n in classes
        ]
        assert sorted(row for row in rows if row[0] != "nothing") == sorted(expected)
        assert [row for row in rows if row[0] == "nothing"] == [["nothing", str(labels.count([]))]]
        assert "21 photos" in outcome.out
        assert "--format csv" in outcome.out


class TestFormats:
    @pytest.mark.parametrize(
        ("kind", "files"),
        [
            ("csv", ["detections.csv"]),
            ("coco", ["coco.json"]),
            ("labelstudio", ["labelstudio.json"]),
            ("json", ["detections.json"]),
            ("voc", ["voc/Annotations/1.xml", "voc/Annotations/3.xml"]),
            ("yolo", ["yolo/data.yaml", "yolo/labels/1.txt", "yolo/labels/3.txt"]),
        ],
    )
    def test_beside_the_pictures(self, model, photos, kind, files):
        run = ("detect", "run", model, photos, "--out", "found", "--format", kind, "--json", "found.json")
        outcome = succeeds(*run, "--pictures", "png")
        assert "results in " in outcome.out
        assert set(files) <= {path.relative_to("found").as_posix() for path in Path("found").rglob("*")}
        assert sorted(path.name for path in Path("found").glob("*.png")) == ["1.png", "2.png", "3.png"]
        if kind == "json":
            assert read_json("found/detections.json") == read_json("found.json")

    @pytest.mark.parametrize("kind", ["csv", "coco", "labelstudio", "json"])
    def test_printed_in_place_of_the_table(self, model, photos, kind):
        name = {"csv": "detections.csv"}.get(kind, f"{'detections' if kind == 'json' else kind}.json")
        succeeds("detect", "run", model, photos, "--out", ".", "--format", kind)
        outcome = succeeds("detect", "run", model, photos, "--format", kind)
        assert outcome.out == Path(name).read_bytes().decode()

    @pytest.mark.parametrize("kind", ["voc", "yolo"])
    def test_folders_need_a_place(self, model, photos, kind):
        says = [f"--format {kind}: found no place for its files, expected --out FOLDER"]
        fails("detect", "run", model, photos, "--format", kind, says=says)
        write(Path("found", kind, "mine.txt"), "")
        fails("detect", "run", model, photos, "--format", kind, "--out", "found", says=[f"found/{kind}"])

    def test_counts(self, model, photos):
        succeeds("detect", "run", model, photos, "--counts", "counts.csv", "--json", "found.json")
        rows = list(csv.DictReader(Path("counts.csv").read_text("utf-8-sig").splitlines()))
        assert [row["image"] for row in rows] == ["photos/1.png", "photos/2.png", "photos/3.png", "total"]
        for row, entry in zip(rows, results("found.json"), strict=False):
            labels = [found["label"] for found in entry["detections"]]
            assert int(row["total"]) == len(labels)
            assert all(int(row[label]) == labels.count(label) for label in labels)
        fails("detect", "run", model, photos, "--counts", "counts.txt", says=["counts.txt", "expected .csv"])
        fails(
            "detect", "run", model, photos, "--counts", model, says=[f"{model}: found a file that is to be"]
        )

    def test_json_ends_so(self, model, photos):
        fails("detect", "run", model, photos, "--json", "found.txt", says=["found.txt", "expected .json"])


@pytest.fixture
def clip():
    """A video of six frames: the pictures of a scene moved step by step."""
    path, picture = Path("clip.mp4"), np.asarray(scene(1).image)
    with video_writer(path, 10) as add:
        for i in range(6):
            add(np.roll(picture, 4 * i, axis=1), i / 10)
    return path


class TestVideos:
    def test_file(self, model, clip):
        run = ("detect", "run", model, clip, "--every", "2", "--out", "found", "--threshold=0")
        outcome = succeeds(*run, "--json", "found.json", "--counts", "counts.csv")
        with Video(clip) as video:
            frames = list(video.frames(2))
        entries = results("found.json")
        assert [(e["image"], e["frame"], e["seconds"]) for e in entries] == [
            ("clip.mp4", number, number / 10) for number in (0, 2, 4)
        ]
        detector = Detector.load(model)
        for entry, frame in zip(entries, frames, strict=True):
            found = detector.predict(frame.pixels, parse("dense")(frame.pixels).boxes, threshold=0)
            assert entry["detections"] == json.loads(json.dumps(found.facts()))
        assert "clip.mp4: 10 frames per second; 3 of 6 frames looked at" in outcome.out
        with Video("found/clip.mp4") as video:
            drawn = list(video.frames())
            assert (video.fps, video.count) == (10, 5)  # each picture until the next, the last one once
        assert [frame.pixels.shape for frame in drawn] == [(96, 128, 3)] * 5
        assert np.abs(drawn[0].pixels.astype(int) - frames[0].pixels).max() > 100
        rows = list(csv.DictReader(Path("counts.csv").read_text("utf-8-sig").splitlines()))
        assert [row["frame"] for row in rows[:3]] == ["0", "2", "4"]

    def test_results_are_printed_alone(self, model, clip):
        outcome = succeeds("detect", "run", model, clip, "--every", "3", "--format", "json")
        assert [entry["frame"] for entry in json.loads(outcome.out)["images"]] == [0, 3]
        assert "note: clip.mp4: 10 frames per second; 2 of 6 frames looked at" in outcome.err

    def test_beside_photos(self, model, clip, photos):
        outcome = succeeds("detect", "run", model, photos, clip, "--out", "found", "--every", "3")
        assert sorted(p.name for p in Path("found").iterdir()) == ["1.jpg", "2.jpg", "3.jpg", "clip.mp4"]
        assert "3.png" in outcome.out

    def test_told_by_content(self, model, clip):
        clip.rename("photo.jpg")
        succeeds("detect", "run", model, "photo.jpg", "--every", "6", "--json", "found.json")
        assert [entry["frame"] for entry in results("found.json")] == [0]

    def test_in_folders_they_are_counted(self, model, clip, photos):
        clip.rename("photos/clip.mp4")
        outcome = succeeds("detect", "run", model, photos)
        assert "note: photos: 1 file left out: 1 .mp4, first clip.mp4" in outcome.err

    def test_damaged(self, model, clip, photos):
        clip.write_bytes(clip.read_bytes()[:2000])
        says = ["clip.mp4: found no frame that can be read, expected a video"]
        fails("detect", "run", model, clip, says=says)
        outcome = sppnet("detect", "run", model, clip, photos)
        assert (outcome.status, outcome.said[1]) == (1, "sppnet: 1 of 4 images failed")
        assert says[0] in outcome.said[0]
        assert "3.png" in outcome.out

    def test_with_fewer_frames_than_it_states(self, model, monkeypatch):
        picture = np.asarray(scene(1).image)
        monkeypatch.setattr("sppnet.video.cv2.VideoCapture", camera([picture] * 5, count=20))
        write(Path("clip.avi"), "RIFF....AVI LIST")
        outcome = succeeds("detect", "run", model, "clip.avi")
        assert "note: clip.avi: found fewer than the 20 frames that it states, it is damaged" in outcome.err

    def test_webcam_until_it_is_stopped(self, model, monkeypatch):
        picture = np.asarray(scene(1).image)
        monkeypatch.setattr("sppnet.video.cv2.VideoCapture", camera([picture] * 5, stopped=True))
        outcome = succeeds("detect", "run", model, "webcam:1", "--json", "found.json", "--out", "found")
        assert "note: stopped; what was found so far is written" in outcome.err
        assert 1 <= len(results("found.json")) <= 5
        assert results("found.json")[0]["image"] == "webcam:1"
        with Video("found/webcam-1.mp4") as video:
            assert next(video.frames()).pixels.shape == (96, 128, 3)

    def test_no_webcam(self, model, monkeypatch):
        monkeypatch.setattr("sppnet.video.cv2.VideoCapture", camera([]))
        fails("detect", "run", model, "webcam", says=["webcam: found no webcam that gives a picture"])


def camera(pictures, count=0, stopped=False):
    """Return what stands for a capture of OpenCV that gives pictures, and then nothing, or Ctrl-C."""

    class Capture:
        def __init__(self, *source):
            self.left = list(pictures)

        def isOpened(self):
            return bool(pictures)

        def read(self):
            if self.left:
                return True, self.left.pop()
            if stopped:
                raise KeyboardInterrupt
            return False, None

        grab = read

        def get(self, what):
            return {cv2.CAP_PROP_FRAME_COUNT: count, cv2.CAP_PROP_FPS: 10}.get(what, 0)

        def release(self):
            pass

    return Capture


@pytest.fixture
def server(tmp_path_factory):
    """A folder, and the address under which it is served."""
    folder = tmp_path_factory.mktemp("served")
    with serving(folder) as address:
        yield folder, address


class TestAddresses:
    def test_photos_on_the_web(self, model, photos, server):
        folder, address = server
        shutil.copy(photos / "1.png", folder / "a photo.png")
        url = f"{address}/a%20photo.png"
        succeeds("detect", "run", model, url, photos / "1.png", "--json", "found.json", "--out", "found")
        fetched, own = results("found.json")
        assert fetched["image"] == f"{address.removeprefix('http://')}/a photo.png"
        assert fetched["detections"] == own["detections"]
        assert sorted(p.name for p in Path("found").iterdir()) == ["1.jpg", "a photo.jpg"]

    def test_what_cannot_be_fetched(self, model, photos, server):
        folder, address = server
        fails("detect", "run", model, f"{address}/1.png", says=[f"{address}/1.png: cannot fetch it (404"])
        write(folder / "text.png", "not a picture")
        outcome = sppnet("detect", "run", model, f"{address}/text.png", f"{address}/2.png", photos)
        assert outcome.status == 1
        assert outcome.said[0].startswith(f"sppnet: {address}/2.png: cannot fetch it (404")
        assert outcome.said[1].startswith(f"sppnet: {address.removeprefix('http://')}/text.png: found a file")
        assert outcome.said[2] == "sppnet: 2 of 5 images failed"


class TestBadImages:
    def test_one_by_one(self, model):
        for name, found in broken_images(Path("bad")).items():
            run = ("detect", "run", model, f"bad/{name}", "--json", "found.json", "--counts", "found.csv")
            fails(*run, says=[f"bad/{name}", found, "expected"])

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
        assert sorted(p.name for p in Path("found").iterdir()) == ["1.jpg", "2.jpg", "3.jpg"]

    def test_propose(self, photos):
        bad = broken_images(photos)
        outcome = sppnet("propose", photos, "--out", "windows.npz", "--proposals", "dense")
        assert outcome.status == 1
        assert [any(name in line for line in outcome.said) for name in bad] == [True] * len(bad)
        assert "of 3 images" in outcome.out
        assert len(read_windows("windows.npz").windows) == 3

    def test_missing(self, model):
        Path("nothing").mkdir()
        for source, found in (("missing.jpg", "such file"), ("nothing", "image"), ("*.jpg", "image")):
            says = [source, f"found no {found}", "expected"]
            fails("detect", "run", model, source, "--json", "found.json", "--out", "found", says=says)
            fails("propose", source, "--out", "windows.npz", says=says)

    def test_in_a_dataset(self, model):
        voc_tree(Path("shapes"), SPLITS)
        picture = Path("shapes/JPEGImages/000002.jpg")
        picture.write_bytes(picture.read_bytes()[:500])
        fails("detect", "train", "shapes", "--out", "m.safetensors", *QUICK, says=[picture, "truncated"])
        evaluate = ("detect", "evaluate", model, "shapes", "--split", "all", "--json", "report.json")
        fails(*evaluate, says=[picture, "truncated"])


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
        self.refused("folder", "found no model", "expected a model file, or one of animals")
        self.refused("animal", "found no model 'animal'", "did you mean animals?")
        self.refused("-", "found no model '-'")

    @pytest.mark.parametrize("kept", [0, 4, 100, -1])
    def test_truncated(self, model, kept):
        Path("m.safetensors").write_bytes(model.read_bytes()[:kept])
        self.refused("m.safetensors", "found no safetensors file")

    def test_something_else(self):
        self.refused("1.png", "found no safetensors file")
        save_file({"a": torch.zeros(3)}, "m.safetensors")
        self.refused("m.safetensors", "without a format mark", "expected sppnet-detector 6")
        save_file({"a": torch.zeros(3)}, "m.safetensors", {"format": "pt"})
        self.refused("m.safetensors", "found pt, expected sppnet-detector 6")

    def rewritten(self, model, tensors=None, **changes):
        with safe_open(model, "pt") as file:
            metadata = file.metadata() | changes
        known = {key: value for key, value in metadata.items() if value is not None}
        save_file(load_file(model) if tensors is None else tensors, "m.safetensors", known)

    def test_other_version(self, model):
        self.rewritten(model, version="1")
        self.refused("m.safetensors", "found sppnet-detector 1, expected sppnet-detector 6")

    def test_other_weights(self, model):
        facts = read_facts(model)
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


class TestBadPlaces:
    def test_a_model_ends_so_and_never_replaces_its_source(self, data, model):
        says = ["m.pt: found", "expected .safetensors"]
        fails("detect", "train", data, "--out", "m.pt", *QUICK, says=says)
        fails("detect", "compress", model, "--out", "m.pt", says=says)
        shutil.copy(model, "m.safetensors")
        says = ["m.safetensors: found a file that is to be read"]
        fails("detect", "compress", "m.safetensors", "--out", "./m.safetensors", says=says)

    def test_folder_as_file(self, data, model, photos):
        Path("folder").mkdir()
        Path("folder.safetensors").mkdir()
        says = ["folder", "found a folder", "expected"]
        fails("detect", "train", data, "--out", "folder.safetensors", *QUICK, says=says)
        fails("detect", "run", model, photos, "--json", "folder", says=says)
        fails("detect", "evaluate", model, data, "--json", "folder", says=says)
        Path("folder.npz").mkdir()
        fails("propose", photos, "--out", "folder.npz", says=["folder.npz", "found a folder", "expected"])

    def test_file_as_folder(self, data, model, photos):
        write(Path("file"), "mine")
        says = ["file", "found a file", "expected"]
        fails("detect", "run", model, photos, "--out", "file", says=says)
        fails("detect", "evaluate", model, data, "--out", "file", says=says)
        fails("detect", "evaluate", model, data, "--out", "file/report", says=says)
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


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
class TestNames:
    NAMES = (b"\xff\xfe.png", "猫 (1).png".encode(), b'it\'s "quoted".png', "ü.png".encode())

    @pytest.fixture
    def folder(self):
        folder = Path(os.fsdecode(b"caf\xe9 x"))
        for name in self.NAMES:
            save(folder / os.fsdecode(name), scene(1).image)
        return folder

    def test_come_through_whole(self, model, folder):
        succeeds("detect", "run", model, folder, "--out", "found", "--json", "found.json", "--format", "csv")
        images = [os.fsencode(entry["image"]) for entry in results("found.json")]
        assert images == sorted(os.fsencode(folder) + b"/" + name for name in self.NAMES)
        drawn = {name.replace(b".png", b".jpg") for name in self.NAMES}
        assert set(os.listdir(b"found")) == drawn | {b"detections.csv"}
        dataset = read_dataset("found/detections.csv")
        assert sorted(os.fsencode(os.path.normpath(sample.path)) for sample in dataset) == images

    @pytest.mark.parametrize("settings", [{}, {"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}])
    def test_are_shown_by_any_terminal(self, model, folder, settings):
        (folder / "x.t\udcff").touch()
        command = [sys.executable, "-m", "sppnet", "detect", "run", model, folder, "--threshold", "100"]
        shown = environment() | settings
        done = subprocess.run(command, capture_output=True, env=shown)
        assert done.returncode == 0, done.stderr
        assert b"\\udcff\\udcfe.png" in done.stdout
        assert b"1 .t\\xff, first x.t\\xff" in done.stderr
        cat = "猫 (1)" if not settings.get("PYTHONIOENCODING") else r"\u732b (1)"
        assert cat in done.stdout.decode()


class TestLookingSeveralTimes:
    """``--augment``: views of a photo, fused."""

    def test_is_what_python_gives(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        succeeds("detect", "run", "animals", demo_photo(), "--augment", "--json", "a.json")
        (found,) = results("a.json")
        expected = Augmented(Detector.load("animals")).predict(demo_photo())
        assert [d["label"] for d in found["detections"]] == list(expected.labels)
        np.testing.assert_allclose([d["score"] for d in found["detections"]], expected.scores, atol=1e-3)

    def test_takes_a_network_that_proposes_windows(self, model):
        save(Path("a.png"), scene(3).image)
        says = [f"{model}: found a detector with windows of another source"]
        fails("detect", "run", model, "a.png", "--augment", says=says)

    def test_is_for_one_detector(self, model):
        save(Path("a.png"), scene(3).image)
        says = ["found --augment with --ensemble"]
        fails("detect", "run", "animals", "a.png", "--augment", "--ensemble", model, says=says)
