"""Commands run in this process, what they leave behind, and the good and bad files that they are given."""

import contextlib
import io
import json
import os
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from sppnet.cli import main
from sppnet.detection.detector import Detector
from sppnet.images import read_image
from sppnet.proposals import parse
from trees import save, scene, voc_xml, write

# Options of a training that takes a second.
QUICK = ("--scales", "64,96", "--levels", "1", "--proposals", "dense")
# The splits of the data set that the fixture ``data`` draws.
SPLITS = {"train": 6, "val": 4}

PROGRESS = (
    "Proposing windows",
    "Computing feature maps",
    "Fitting box regression",
    "Mining hard negatives",
    "Looking into the photos",
    "Scoring photos not learned from",
    "Detecting",
    "Reading",
    "Training",
    "Classifying",
    "Embedding",
    "Sampling",
    "Indexing",
    "Fitting SVMs",
    "Exporting",
    "Building the network",
    "Deriving where its cells lie",
    "Writing the graph",
    "Learning the projection",
    "Calibrating",
)


class Outcome(NamedTuple):
    """How a command ended: its exit status and what it wrote."""

    status: int
    out: str
    err: str

    @property
    def said(self):
        """The lines on stderr, but for the progress bars, notes and warnings."""
        others = (*PROGRESS, "note: ", "warning: ")
        return [line for line in self.err.splitlines() if line and not line.startswith(others)]


def sppnet(*arguments):
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["sppnet", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main()
    return Outcome(end.value.code, out.getvalue(), err.getvalue())


def succeeds(*arguments):
    outcome = sppnet(*arguments)
    assert outcome.status == 0, outcome.err
    assert not outcome.said
    return outcome


def fails(*arguments, says, status=2):
    """Run a command that must fail, say one line that holds each of `says`, and change no file."""
    before = content()
    outcome = sppnet(*arguments)
    assert outcome.status == status
    assert len(outcome.said) == 1, outcome.err
    line = outcome.said[0]
    assert line.startswith("sppnet: ")
    for text in says:
        assert str(text) in line
    assert content() == before


def content(folder="."):
    """Return what lies in a folder, the current one by default: bytes of files, None for folders."""
    return {
        str(path): path.read_bytes() if path.is_file() else None for path in sorted(Path(folder).rglob("*"))
    }


def same(*paths):
    """Return whether files are equal byte by byte."""
    return len({Path(path).read_bytes() for path in paths}) == 1


def read_json(path):
    """Read JSON as its standard has it, without NaN."""

    def refuse(name):
        raise AssertionError(f"{path} holds {name}")

    return json.loads(Path(path).read_text(), parse_constant=refuse)


def one_image_tree(root, xml=None, image=None, name="000001"):
    """Write a VOC folder of one image."""
    drawn = scene(1)
    save(root / "JPEGImages" / f"{name}.jpg", drawn.image if image is None else image)
    write(root / "Annotations" / f"{name}.xml", xml or voc_xml(drawn.boxes, drawn.labels))


def expected_detections(model, path, threshold=None, windows="dense"):
    """Return what `Detector` itself finds, as the commands write it."""
    return found_by(Detector.load(model), path, threshold, windows)


def found_by(detector, path, threshold=None, windows="dense"):
    pixels = read_image(path)
    found = detector.predict(pixels, parse(windows)(pixels)[0], threshold=threshold)
    rows = zip(found.labels, found.scores.tolist(), found.boxes.tolist(), strict=True)
    return [{"label": label, "score": score, "box": box} for label, score, box in rows]


def environment():
    """Return the environment of a process that finds the same packages and leaves the user's cache alone."""
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(Path("cache").absolute())}


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


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(folder, handler=_Quiet):
    """Serve a folder on the web; lends its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


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
        "truncated.jpg": "truncated JPEG",
        "empty.png": "an empty file",
        "text.png": "not a p",
        "huge.png": "8000 x 7000 = 56000000 pixels, expected at most 50000000",
    }


def detections_of(model, dataset, threshold=0):
    """Return what evaluate judges, by sample name."""
    detector, windows = Detector.load(model), parse("dense")
    images = {sample.name: read_image(sample.path) for sample in dataset}
    return {
        name: detector.predict(image, windows(image)[0], threshold=threshold)
        for name, image in images.items()
    }


def box_xml(x1, y1, x2, y2):
    """Return an annotation of one box, given as VOC writes it; the box begins at line 9."""
    return voc_xml([(x1 - 1, y1 - 1, x2, y2)], ["disc"])
