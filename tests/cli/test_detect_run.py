"""``sppnet detect run``: of good and bad images, by good and bad models."""

import json
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from commands import (
    QUICK,
    SPLITS,
    broken_images,
    expected_detections,
    fails,
    odd_images,
    one_image_tree,
    read_json,
    sppnet,
    succeeds,
)
from sppnet.detection.file import read_facts
from sppnet.images import read_image
from sppnet.proposals import read_windows
from trees import save, scene, voc_tree, write


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
        self.refused("m.safetensors", "without a format mark", "expected sppnet-detector 4")
        save_file({"a": torch.zeros(3)}, "m.safetensors", {"format": "pt"})
        self.refused("m.safetensors", "found pt, expected sppnet-detector 4")

    def rewritten(self, model, tensors=None, **changes):
        with safe_open(model, "pt") as file:
            metadata = file.metadata() | changes
        known = {key: value for key, value in metadata.items() if value is not None}
        save_file(load_file(model) if tensors is None else tensors, "m.safetensors", known)

    def test_other_version(self, model):
        self.rewritten(model, version="1")
        self.refused("m.safetensors", "found sppnet-detector 1, expected sppnet-detector 4")

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
