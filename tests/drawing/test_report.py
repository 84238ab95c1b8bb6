import base64
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from sppnet.boxes import Detections, Target
from sppnet.datasets.records import Sample
from sppnet.drawing.report import class_rows, headline, write_detection_report
from sppnet.evaluation.detection import evaluate_detections

NAMES = ["cat", "dog"]
ABOUT = {"detector": "mine.safetensors", "data": "photos & more", "split": "val"}


def detections(*rows):
    """Make detections of ``(x1, y1, x2, y2, score, label)``."""
    return Detections(
        np.array([r[:4] for r in rows], np.float32).reshape(-1, 4),
        np.array([r[4] for r in rows], np.float32),
        tuple(r[5] for r in rows),
    )


HIT, OTHER = (30, 60, 80, 100), (90, 10, 120, 40)
# A hit; a miss and a false alarm; a hit and a duplicate that is not shown; a dog where nothing is, a cat that
# scores too little to be shown.
FOUND = [
    detections((*HIT, 0.9, "cat")),
    detections((*OTHER, 0.85, "cat")),
    detections((*HIT, 0.8, "cat"), (*HIT, 0.3, "cat")),
    detections((*OTHER, 0.7, "dog"), (*HIT, 0.2, "cat")),
]


def samples(count=4, labels=("cat",), noise=None):
    rng = np.random.default_rng(0)
    return [
        Sample(
            f"image {i}",
            np.full((120, 160, 3), 128, np.uint8) if noise is None else rng.integers(0, 256, noise, np.uint8),
            Target.of([HIT], [labels[i % len(labels)]]),
        )
        for i in range(count)
    ]


def report_of(found=FOUND, data=None, names=NAMES, **options):
    data = samples(len(found)) if data is None else data
    stored = options.pop("stored", dict.fromkeys(names, 0.5))
    return evaluate_detections(found, [s.target for s in data], names, stored=stored, **options)


class Page(HTMLParser):
    """The parts of a page: its text by tag, its pictures, its rows of tables; checks that tags are closed."""

    EMPTY = ("meta", "img", "br", "path", "use", "rect")

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.images, self.rows, self.links = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.links += [v for k, v in attributes if k in ("href", "src", "xlink:href") and v]
        if tag == "img":
            self.images.append(values)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)
        if any(tag in ("td", "th") for tag in self.open):
            self.rows[-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def page_of(tmp_path, report, data, **options):
    path = tmp_path / "report.html"
    write_detection_report(report, data, path, about=ABOUT, **options)
    return Page(path.read_text())


def pictures(page):
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))))
        for image in page.images
    ]


def test_a_page_says_what_was_measured_and_needs_nothing_else(tmp_path):
    page = page_of(tmp_path, report_of(), samples(), notes=["2 boxes left out"])
    for text in (
        "mine.safetensors",
        "photos & more",
        "val",
        "2 boxes left out",
        "4, with 4 objects of 2 classes",
    ):
        assert text in page.text
    assert all(link.startswith(("data:", "#")) for link in page.links)
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"@import|<script|<link", text)
    assert set(re.findall(r"https?://[^\"' >]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
        *re.findall(r"http://(?:purl\.org|creativecommons|www\.w3\.org/1999/02|matplotlib)[^\"' >]*", text),
        *re.findall(r"https://matplotlib[^\"' >]*", text),
    }
    assert "fitted on" not in page.text
    first = (tmp_path / "report.html").read_bytes()
    page_of(tmp_path, report_of(), samples(), notes=["2 boxes left out"])
    assert (tmp_path / "report.html").read_bytes() == first


def test_numbers(tmp_path):
    report = report_of()
    page = page_of(tmp_path, report, samples())
    ap = f"{100 * report.classes['cat'].average_precision:.1f}"
    area = f"{100 * report.classes['cat'].area:.1f}"
    assert ["cat", "4", ap, area, "50 %", "66.7", "50.0", "57.1", "0.25"] in page.rows
    assert ["dog", "0", "–", "–", "50 %", "0.0", "–", "0.0", "0.25"] in page.rows
    assert ["all", "4", ap, area, "", "50.0", "50.0", "50.0", "0.50"] in page.rows
    # Cats are 40 x 50 pixels.
    assert ["medium size", "4", "2", "50.0"] in page.rows
    assert ["cat", "2", "", "2"] in page.rows
    assert ["nothing there", "1", "1", ""] in page.rows
    assert "Finds 2 of 4 objects." in page.text
    assert "Of the 6 detections of 5 % and more" in page.text
    assert "stored in the detector" in page.text


def test_what_no_one_takes_for_objects_does_not_make_errors_small(tmp_path):
    """One detection of two is right; a hundred of background say nothing of whether 90 % are 90 %."""
    background = [(*OTHER, 0.01 + i / 10000, "cat") for i in range(100)]
    found = [detections((*HIT, 0.9, "cat"), *background[::-1]), detections((*OTHER, 0.9, "cat"))]
    page = page_of(tmp_path, report_of(found), samples(2))
    assert "Of the 2 detections of 5 % and more a score is 40.0 points off on the mean" in page.text
    page = page_of(tmp_path, report_of([detections(*background[::-1])]), samples(1))
    assert "There is no detection of 5 % or more." in page.text


def test_mistakes_and_photos_are_shown(tmp_path):
    page = page_of(tmp_path, report_of(), samples())
    titles = [image["alt"] for image in page.images]
    assert titles == [
        "cat in image 1",
        "cat in image 3",
        "cat 85 % in image 1",
        "dog 70 % in image 3",
        "F1 0.00 in image 3",
        "F1 0.00 in image 1",
        "F1 1.00 in image 0",
        "F1 1.00 in image 2",
    ]
    assert "2 of 2 missed objects" in page.text
    assert "scores 20 %, shown from 50 % on" in page.text
    assert "not seen" in page.text
    assert "2 of 2 false alarms" in page.text
    for picture in pictures(page):
        assert picture.ndim == 3
        assert picture.std() > 3


def test_photos_of_the_fit_are_told_in_red(tmp_path):
    page = page_of(tmp_path, report_of(seen=3), samples())
    assert "3 of these 4 photos are among those that the detector was fitted on" in page.text
    assert '<p class="seen">' in (tmp_path / "report.html").read_text()
    assert re.search(r"\.seen \{[^}]*color: var\(--bad\)", (tmp_path / "report.html").read_text())


def test_without_photos_there_are_numbers(tmp_path):
    from pathlib import Path

    data = [Sample(s.name, Path("absent.jpg"), s.target) for s in samples()]
    page = page_of(tmp_path, report_of(), data, photos=False)
    assert not page.images
    assert "no photos here" in page.text
    assert ["medium size", "4", "2", "50.0"] in page.rows
    # Where some are expected, one that is gone has a tile that says so.
    page = page_of(tmp_path, report_of(), data)
    assert page.images


def test_scores_of_svms_are_no_probabilities(tmp_path):
    found = [detections(*((*row.box, 2 * row.score - 1, row.label) for row in each)) for each in FOUND]
    page = page_of(tmp_path, report_of(found, stored=dict.fromkeys(NAMES, 0.0)), samples())
    assert "Are scores probabilities" not in page.text
    assert "cat 0.70" in page.text
    assert "scores -0.60, shown from 0.00 on" in page.text


def test_thresholds_that_are_not_stored(tmp_path):
    page = page_of(tmp_path, report_of(stored=None), samples())
    assert "best F1 on these very photos" in page.text


def test_nothing_at_all(tmp_path):
    empty = detections()
    nothing = [Sample("x", np.zeros((1, 1, 3), np.uint8), Target.of([], []))]
    page = page_of(tmp_path, report_of([empty], nothing), nothing)
    assert "There is no object to find" in page.text
    assert "No object is missed" in page.text
    assert "There is no false alarm" in page.text
    page = page_of(tmp_path, report_of([], [], []), [])
    assert "no object to find" in page.text


def test_names_come_through_whole(tmp_path):
    names = ["$5 or $10", "_other", "猫", "<b>bold</b>", "{{ 7 * 7 }}", "[red]x[/red]"]
    data = samples(6, names)
    data[0] = Sample("caf\udce9 <i>.jpg", data[0].image, data[0].target)
    found = [detections((*HIT, 0.9, names[(i + 1) % 6])) for i in range(6)]
    page = page_of(tmp_path, report_of(found, data, names), data)
    for name in names:
        assert any(row and row[0] == name for row in page.rows), name
    assert "<i>.jpg" in page.text
    assert "caf\\xe9" in page.text


def test_photos_that_were_left_out_are_named(tmp_path):
    from dataclasses import replace

    data = samples(5)
    kept = [data[i] for i in (0, 1, 3, 4)]
    page = page_of(tmp_path, replace(report_of(data=kept), left_out=(2,)), data)
    assert "left out, unreadable: image 2" in page.text
    assert not any("image 2" in image["alt"] for image in page.images)


def test_a_page_of_noise_and_many_mistakes_is_bounded(tmp_path):
    names = [f"class {i:02}" for i in range(60)]
    data = samples(60, names, noise=(700, 900, 3))
    rng = np.random.default_rng(0)
    found = []
    for i in range(60):
        corner = rng.uniform(0, 600, (100, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(20, 90, (100, 2))], axis=1)
        rows = zip(boxes, np.sort(rng.random(100))[::-1], strict=True)
        found.append(detections(*((*box, score, names[(i + k) % 60]) for k, (box, score) in enumerate(rows))))
    report = report_of(found, data, names)
    page = page_of(tmp_path, report, data)
    assert (tmp_path / "report.html").stat().st_size < 10_000_000
    assert len(page.images) == 24 + 24 + 6 + 6
    assert "Left out are 30 classes" in page.text
    assert "the 16 classes of most objects" in page.text
    assert "24 of 60 missed" in page.text
    for picture in pictures(page):
        assert max(picture.shape) <= 480


@pytest.mark.parametrize(
    ("hits", "alarms", "objects", "photos", "says"),
    [
        (
            8,
            5,
            10,
            60,
            "Finds 8 of 10 objects. One false alarm in 12 photos: 62 % of what it shows",
        ),
        (80, 0, 100, 60, "Finds 8 of 10 objects (80 of 100). No false alarm."),
        (99, 150, 100, 50, "Finds 9.9 of 10 objects (99 of 100). 3.0 false alarms a photo: 40 %"),
        (999, 1, 1000, 1, "Finds 9.9 of 10 objects (999 of 1000). One false alarm a photo: 100 %"),
        (40, 0, 40, 60, "Finds all objects (40 of 40). No false alarm."),
        (0, 3, 4, 2, "None of the 4 objects is found."),
    ],
)
def test_in_words(hits, alarms, objects, photos, says):
    targets = [
        Target.of([HIT] if i < objects else [], ["cat"] if i < objects else [])
        for i in range(max(objects, photos))
    ]
    found = [[] for _ in targets]
    for i in range(hits):
        found[i].append((*HIT, 0.9, "cat"))
    for i in range(alarms):
        found[i % len(found)].append((*OTHER, 0.8, "cat"))
    report = evaluate_detections([detections(*rows) for rows in found], targets, ["cat"], stored={"cat": 0.5})
    object.__setattr__(report, "detections", report.detections[:photos])
    assert " ".join(headline(report)).startswith(says)


def test_rows_are_by_falling_precision():
    rows = class_rows(report_of(names=["dog", "cat"]))
    assert [row["name"] for row in rows] == ["cat", "dog"]
    assert math.isnan(rows[1]["result"].average_precision)
    assert rows[0]["alarms"] == 0.25
