"""The program itself: its help, version, completion and errors; the options that commands share."""

import json
import os
import subprocess
import sys
from typing import get_args, get_type_hints
from unittest import mock

import pytest
import typer

import sppnet as library
from commands import environment, fails, sppnet, succeeds
from sppnet.cli import options
from sppnet.cli.main import app
from sppnet.detection.detector import Detector
from sppnet.detection.head import LAYERS
from sppnet.errors import ImageError
from sppnet.features.backbone import Backbone
from sppnet.images import MAX_PIXELS_VARIABLE
from sppnet.models import model_path
from sppnet.photos import demo_photo
from sppnet.proposals import METHODS

HEAVY = ("torch", "numpy", "numba", "cv2", "timm", "matplotlib", "openvino", "onnx", "sklearn", "PIL")
PANELS = {
    "--proposals": "Windows",
    "--backbone": "Network",
    "--stages": "Network",
    "--stride": "Network",
    "--weights": "Network",
    "--scales": "Network",
    "--levels": "Network",
    "--mode": "Network",
    "--flip": "Network",
    "--device": "Machine",
    "--max-bad": "Machine",
    "--max-pixels": "Machine",
    "--seed": "Machine",
    "--lr": "Training",
    "--epochs": "Training",
}
OTHER_SPELLINGS = {
    *("--with", "--sides", "--side", "--sizes", "--size", "--trunk", "--mirror", "--rate", "--drops"),
    *("--smoothing", "--reduce", "--output", "--json-file", "--class"),
}


def run_python(*arguments):
    """Run Python in a process of its own."""
    return subprocess.run(
        [sys.executable, *arguments], env=environment(), capture_output=True, text=True, timeout=60
    )


def commands(command=None, name=""):
    """Return all commands by their names."""
    command = command or typer.main.get_command(app)
    below = getattr(command, "commands", None)
    if below is None:
        return {name.strip(): command}
    return {key: found for n, c in below.items() for key, found in commands(c, f"{name} {n}").items()}


COMMANDS = commands()


class TestHelp:
    @pytest.mark.parametrize("arguments", [[], ["--help"], ["detect", "train", "--help"], ["--version"]])
    def test_imports_nothing_heavy(self, arguments):
        code = (
            f"import sys\nfrom sppnet.cli import main\nsys.argv = ['sppnet', *{arguments}]\n"
            f"try:\n    main()\nfinally:\n    print([m for m in {HEAVY} if m in sys.modules])"
        )
        done = run_python("-c", code)
        assert done.returncode == (0 if arguments else 2)
        assert done.stdout.splitlines()[-1] == "[]"
        assert not done.stderr

    def test_names_every_command(self):
        for outcome in (sppnet(), sppnet("--help")):
            assert all(f" {command.split()[0]} " in outcome.out for command in COMMANDS)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_of_commands(self, command):
        assert COMMANDS[command].help.splitlines()[0].rstrip(".") in succeeds(*command.split(), "--help").out

    @pytest.mark.parametrize("command", ["train", "run", "evaluate", "score"])
    def test_results_as_json(self, command):
        assert "--json" in succeeds("detect", command, "--help").out or command == "train"

    def test_few_options_stand_outside_the_panels(self):
        """What matters to everyone comes first; the rest has a panel."""
        for name, command in COMMANDS.items():
            first = [
                p
                for p in command.params
                if p.param_type_name == "option" and p.rich_help_panel is None and p.name != "help"
            ]
            assert len(first) <= 8, name

    def test_one_spelling_and_one_panel_for_one_thing(self):
        for name, command in COMMANDS.items():
            for parameter in command.params:
                assert not OTHER_SPELLINGS & set(parameter.opts), name
                for option in parameter.opts:
                    if option in PANELS:
                        assert parameter.rich_help_panel == PANELS[option], f"{name} {option}"

    def test_every_parameter_says_what_it_is(self):
        for name, command in COMMANDS.items():
            for parameter in command.params:
                text = "" if parameter.name == "help" else parameter.help
                assert text is None or parameter.name == "help" or text.endswith((".", ":")), (name, text)
                assert text is not None, (name, parameter.name)

    def test_choices_are_listed(self):
        text = succeeds("detect", "train", "--help").out
        assert "<pool|fc6|fc7>" in text
        assert "<all|released|paper>" in text


class TestChoices:
    def test_are_those_of_the_library(self):
        assert set(options.METHODS) == METHODS.keys()
        assert get_args(get_args(options.Mode)[0]) == ("max", "average")
        assert choices("detect train", "layer") == set(LAYERS)
        for name in options.SHIPPED:
            assert model_path(name).is_file()
        assert options.PIXELS == MAX_PIXELS_VARIABLE

    def test_defaults_are_those_of_the_library(self):
        defaults = Detector().get_params()
        given = {p.name: p.default for p in COMMANDS["detect train"].params}
        for name in (
            "proposals",
            "negatives",
            "projection",
            "scale_rule",
            "backbone",
            "layer",
            "seed",
        ):
            assert given[name] == defaults[name], name
        assert given["stride"] == defaults["output_stride"]
        for name in ("stages", "scales", "levels"):
            assert given[name] == ",".join(map(str, defaults[name]))


def choices(command, parameter):
    """Return what an option of a command may be."""
    return set(get_args(get_type_hints(COMMANDS[command].callback)[parameter]))


class TestCompletion:
    def complete(self, words):
        """Return what the shell offers for the last of some words."""
        variables = {
            "_SPPNET_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split())),
        }
        with mock.patch.dict(os.environ, variables):
            return sppnet().out.split()

    def test_commands(self):
        assert {"detect", "classify", "embed"} <= set(self.complete("sppnet "))

    def test_choices(self):
        assert self.complete("sppnet detect train --layer ") == ["pool", "fc6", "fc7"]
        assert self.complete("sppnet embed --mode ") == ["max", "average"]

    def test_proposals_and_models(self):
        assert set(self.complete("sppnet propose --proposals ")) == METHODS.keys()
        assert options.methods("dense+e") == ["dense+edge-boxes"]
        assert "animals" in self.complete("sppnet detect run ")

    def test_is_installed_by_an_option(self):
        assert "--install-completion" in succeeds("--help").out


class TestDoors:
    def test_version(self):
        assert succeeds("--version").out == f"sppnet {library.__version__}\n"

    def test_python_m(self):
        done = run_python("-m", "sppnet", "--version")
        assert done.stdout == f"sppnet {library.__version__}\n"
        done = run_python("-m", "sppnet", "detect", "trian")
        assert done.returncode == 2
        assert (
            done.stderr == "sppnet: No such command 'trian'. Did you mean 'train'; see sppnet detect --help\n"
            or (done.stderr.startswith("sppnet: No such command 'trian'") and done.stderr.count("\n") == 1)
        )


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("detect", "train", "data"), ["Missing option '--out'", "see sppnet detect train --help"]),
            (("detect", "run"), ["Missing argument", "see sppnet detect run --help"]),
            (("detect", "fly"), ["No such command 'fly'", "see sppnet detect --help"]),
            (("detect", "run", "animals", "a.jpg", "--with", "b"), ["No such option: --with"]),
            (("search", "photos.index", "--image", "a.jpg", "--top", "0"), ["--top"]),
            (("search", "photos.index", "--image", "a.jpg", "--top", "many"), ["--top", "integer"]),
            (("detect", "run", "animals", "a.jpg", "--threshold", "low"), ["--threshold", "number"]),
        ],
    )
    def test_wrong_options_are_one_line(self, arguments, says):
        fails(*arguments, says=says, status=2)

    def test_what_the_user_can_mend_is_one_line(self):
        with mock.patch("sppnet.images.find_images", side_effect=ImageError("a.jpg: found nothing")):
            fails("detect", "run", "animals", "a.jpg", says=["sppnet: a.jpg: found nothing"])

    @pytest.mark.parametrize("arguments", [["--verbose", "detect"], ["detect", "--verbose"]])
    @pytest.mark.parametrize("error", [ImageError, FileNotFoundError])
    def test_verbose_shows_where_it_comes_from(self, arguments, error):
        with mock.patch("sppnet.images.find_images", side_effect=error("a.jpg")), pytest.raises(error):
            sppnet(*arguments, "run", "animals", "a.jpg")

    def test_verbose_after_the_command(self):
        done = run_python("-m", "sppnet", "detect", "run", "animals", "none.jpg", "--verbose")
        assert done.returncode == 1
        assert done.stderr.startswith("Traceback")
        assert "none.jpg: found no such file or folder" in done.stderr.splitlines()[-1]

    @pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError])
    def test_a_bug_shows_its_traceback(self, error):
        with mock.patch("sppnet.images.find_images", side_effect=error("zip")), pytest.raises(error):
            sppnet("detect", "run", "animals", "a.jpg")

    def test_a_bug_in_a_process(self):
        code = (
            "import sys\nfrom unittest import mock\nfrom sppnet.cli import main\n"
            "sys.argv = ['sppnet', 'detect', 'run', 'animals', 'a.jpg']\n"
            "with mock.patch('sppnet.images.find_images', side_effect=ValueError('zip')):\n    main()"
        )
        done = run_python("-c", code)
        assert done.returncode == 1
        assert done.stderr.startswith("Traceback")
        assert done.stderr.splitlines()[-1] == "ValueError: zip"

    @pytest.mark.parametrize(
        ("arguments", "near"),
        [
            (("detect", "run", "animls", "."), "animals"),
            (("detect", "evaluate", "animls", "."), "animals"),
            (("detect", "compress", "animls", "--out", "m.safetensors"), "animals"),
            (("classify", "run", "imagnet", "."), "imagenet"),
            (("classify", "evaluate", "imagnet", "."), "imagenet"),
        ],
    )
    def test_a_missing_model_is_said_before_anything_slow(self, arguments, near):
        code = (
            f"import sys\nfrom sppnet.cli import main\nsys.argv = ['sppnet', *{arguments}]\n"
            "try:\n    main()\nfinally:\n    print('torch' in sys.modules)"
        )
        done = run_python("-c", code)
        assert done.returncode == 2
        assert done.stdout == "False\n"
        assert f"did you mean {near}?" in done.stderr
        assert done.stderr.count("\n") == 1

    def test_wrong_numbers_are_said_before_anything_slow(self):
        code = (
            "import sys\nfrom sppnet.cli import main\n"
            "sys.argv = 'sppnet detect train data --out m.safetensors --scales 64,,96'.split()\n"
            "try:\n    main()\nfinally:\n    print('torch' in sys.modules)"
        )
        done = run_python("-c", code)
        assert (done.returncode, done.stdout) == (2, "False\n")
        assert done.stderr.startswith("sppnet: --scales 64,,96: expected positive integers")
        assert json.dumps(done.stderr).count("\\n") == 1


def test_demo(tmp_path):
    outcome = succeeds("demo")
    assert outcome.out.count(" cow ") == 3
    assert "sppnet detect run animals PHOTO... --out found" in outcome.out
    assert (tmp_path / "out" / "cows.jpg").is_file()


def test_what_a_user_is_warned_of_is_a_note(monkeypatch, tmp_path):
    from sppnet.features import inference

    inference._warn_of_cache.cache_clear()
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(inference, "graph_cache", lambda: tmp_path / "file" / "graphs")
    monkeypatch.setattr(Backbone, "shared", lambda *arguments: Backbone(*arguments))
    outcome = sppnet("embed", str(demo_photo()), "--out", "vectors.safetensors")
    assert outcome.status == 0
    (line,) = [line for line in outcome.err.splitlines() if "cannot keep compiled graphs there" in line]
    assert line.startswith("note: ")
    assert "warnings.warn" not in outcome.err
