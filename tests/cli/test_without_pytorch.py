"""The commands of the main job where PyTorch, torchvision and timm are not installed."""

import json
import sys
from pathlib import Path

import pytest

from commands import QUICK, fails, read_json
from processes import BARRED, without_pytorch

# Runs the commands of a JSON list; ends at the first that fails.
PROGRAM = """
import json, sys
from sppnet.cli import main
for command in json.loads(sys.argv[1]):
    sys.argv[1:] = command
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
print(sorted(name for name in sys.modules if name.partition(".")[0] in ("torch", "torchvision", "timm")))
"""


def run(*commands):
    """Run commands one after another in a process without PyTorch; return what they printed."""
    printed = without_pytorch(PROGRAM, json.dumps([[str(part) for part in line] for line in commands]))
    assert printed.endswith("\n[]\n"), "a package was imported that is not there"
    return printed


def test_the_demo_and_the_classes_of_a_photo():
    printed = run(
        ["demo", "--out", "out"], ["classify", "run", "imagenet", "out/cows.jpg", "--json", "a.json"]
    )
    assert printed.count("cow ") >= 2
    assert Path("out/cows.jpg").is_file()
    (record,) = read_json("a.json")
    assert len(record["classes"]) == 5


def test_a_detector_from_photos_to_figures(data):
    run(
        ["detect", "train", data, "--split", "train", "--out", "a.safetensors", *QUICK],
        ["detect", "run", "a.safetensors", data / "JPEGImages", "--json", "found.json", "--threshold", "0"],
        [
            "detect",
            "evaluate",
            "a.safetensors",
            data,
            "--split",
            "val",
            "--json",
            "b.json",
            "--out",
            "report",
        ],
        ["propose", data / "JPEGImages", "--proposals", "dense", "--out", "windows.npz"],
    )
    assert any(record["detections"] for record in read_json("found.json")["images"])
    assert read_json("b.json")["images"] == 4
    assert Path("report").is_dir()


def test_vectors_and_an_index_of_photos(photos):
    run(
        ["embed", photos, "--out", "vectors.safetensors", "--pca", "2"],
        ["index", photos, "--out", "index", "--proposals", "dense", "--windows", "5", "--pca", "3"],
        ["search", "index", "--image", photos / "1.png", "--box", "0,0,60,60", "--json", "hits.json"],
    )
    assert read_json("hits.json")["hits"]


@pytest.mark.parametrize(
    ("command", "purpose"),
    [
        (["detect", "train", "DATA", "--layer", "fc7"], "training layers"),
        (["detect", "train", "DATA", "--minutes", "1"], "training the network"),
        (["detect", "train", "DATA", "--proposals", "maps"], "learning to propose windows from maps"),
        (["detect", "train", "DATA", "--device", "cuda"], "the device cuda"),
        (["classify", "train", "DATA"], "training a network"),
    ],
)
def test_what_needs_pytorch_says_so_before_any_work(command, purpose, data, monkeypatch):
    for name in BARRED:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("sppnet.errors.find_spec", lambda name: None if name in BARRED else object())
    monkeypatch.setattr("sppnet.proposals.cache.propose_each", lambda *_: pytest.fail("that is work"))
    given = [data if part == "DATA" else part for part in command]
    fails(*given, "--out", "a.safetensors", says=(purpose, 'pip install "sppnet[torch]"'))
