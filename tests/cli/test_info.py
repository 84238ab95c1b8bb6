"""``sppnet info``."""

import json

import pytest

from commands import fails, read_json, succeeds
from sppnet import __version__


class TestInfo:
    def test_detector(self, model):
        outcome = succeeds("info", model, "--json", "info.json")
        for text in ("kind: detector", "classes: disc, square, triangle", "licence: apache-2.0", "On photos"):
            assert text in outcome.out
        facts = read_json("info.json")
        assert facts["bytes"] == model.stat().st_size
        assert facts["fitted_on"].startswith("6 photos, ")
        assert facts["sppnet"] == __version__
        assert facts["quality"].keys() == {"disc", "square", "triangle"}
        disc = facts["quality"]["disc"]
        assert 0 < disc["threshold"] < 1
        assert disc["folds"] == 6  # as many as photos
        assert disc["measured_photos"] == 6

    def test_json_to_be_read_by_another_program(self, model):
        outcome = succeeds("info", model, "--json", "-")
        assert json.loads(outcome.out)["kind"] == "detector"

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("animals", ["kind: detector", "1697 photos, 2871 objects", "pyramid-lite0"]),
            ("imagenet", ["kind: classifier", "(1000 in all)", "licence: apache-2.0"]),
            ("efficientnet-lite0", ["kind: backbone", "strides: 32, 16, 8", "licence: apache-2.0"]),
        ],
    )
    def test_what_is_shipped(self, name, says):
        outcome = succeeds("info", name)
        assert all(text in outcome.out for text in says)

    def test_vectors_index_and_exported_model(self, photos, model):
        succeeds("embed", photos, "--out", "v.safetensors", "--scales", "64")
        outcome = succeeds("info", "v.safetensors")
        assert "kind: vectors" in outcome.out
        assert "vectors: 3" in outcome.out
        succeeds("index", photos, "--out", "photos.index", "--scales", "64", "--pca", "16")
        outcome = succeeds("info", "photos.index")
        assert "kind: index" in outcome.out
        assert "photos: 3" in outcome.out
        succeeds("export", model, "--out", "d.onnx")
        outcome = succeeds("info", "d.onnx")
        assert "kind: exported model" in outcome.out
        assert "classes: disc, square, triangle" in outcome.out

    def test_what_is_none_of_sppnets(self, photos):
        fails("info", photos / "1.png", says=["1.png: found no mark of sppnet"])
        fails("info", "missing.safetensors", says=["missing.safetensors: found no such file"])
        fails("info", "animal", says=["did you mean animals?"])
