"""Predictions in every format, read back by hand: nothing of the writers judges itself."""

import csv
import io
import json
import os
import xml.etree.ElementTree as ET
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml

from sppnet.boxes import Detections
from sppnet.datasets.predictions import (
    Prediction,
    check_predictions,
    json_content,
    write_counts,
    write_predictions,
)
from sppnet.errors import SppnetError

CLASSES = ("cow", "Kuh & <Kälbchen>", "=1+1")
SCHEMA = Path(__file__).parents[2] / "docs" / "results.schema.json"
FORMATS = ("csv", "coco", "voc", "yolo", "labelstudio", "json")


def detections(*rows):
    """Return detections of ``x1, y1, x2, y2, score, label`` each."""
    boxes = np.array([row[:4] for row in rows], np.float32).reshape(-1, 4)
    return Detections(boxes, np.array([row[4] for row in rows], np.float32), tuple(row[5] for row in rows))


@pytest.fixture
def predictions(tmp_path):
    """Three photos, one of them below another folder, with odd names and odd numbers; one shows nothing."""
    photos = tmp_path / "photos"
    odd = np.float32([1 / 3, 100.1, 639.9, 479.99])
    return [
        Prediction(
            photos / "a photo (1).jpg",
            480,
            640,
            detections((*odd, 0.93, CLASSES[1]), (0, 0, 640, 480, 0.1, "cow")),
        ),
        Prediction(photos / "sub" / "日本.x.jpg", 100, 77, detections((10, 20, 30, 40, 0.5, "=1+1"))),
        Prediction(photos / "none.png", 50, 60, detections()),
    ]


def rows_of(predictions):
    """Return path and boxes of each prediction, as lists of (box, label)."""
    return [
        (p.image, list(zip(p.detections.boxes.tolist(), p.detections.labels, strict=True)))
        for p in predictions
    ]


def equal(found, expected):
    """Return whether boxes, read as doubles, are the float32 boxes that were written."""
    return np.array_equal(np.float32(found), np.float32(expected))


class TestJson:
    def test_it_is_what_the_schema_says(self, predictions, tmp_path):
        path = tmp_path / "found.json"
        video = Prediction(
            tmp_path / "clip.mp4", 9, 9, detections((1, 2, 3, 4, 1, "cow")), frame=25, seconds=1.0
        )
        assert write_predictions([*predictions, video], CLASSES, "json", path) == [path]
        content = json.loads(path.read_text())
        schema = json.loads(SCHEMA.read_text())
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(content, schema)
        assert content["version"] == schema["properties"]["version"]["const"] == 1
        for record, prediction in zip(content["images"], predictions, strict=False):
            assert record["image"] == str(prediction.image)
            assert (record["height"], record["width"]) == (prediction.height, prediction.width)
            assert [d["label"] for d in record["detections"]] == list(prediction.detections.labels)
            assert equal([d["score"] for d in record["detections"]], prediction.detections.scores)
            assert equal(
                [d["box"] for d in record["detections"]] or np.zeros((0, 4)), prediction.detections.boxes
            )
        assert (content["images"][3]["frame"], content["images"][3]["seconds"]) == (25, 1.0)
        assert "frame" not in content["images"][0]

    @pytest.mark.parametrize(
        "change",
        [
            {"version": 2},
            {"scores": "percent"},
            {"images": {}},
            {"more": 1},
            {"images": [{"image": "a"}]},
            {"images": [{"image": "a", "height": 0, "width": 1, "detections": []}]},
            {
                "images": [
                    {
                        "image": "a",
                        "height": 1,
                        "width": 1,
                        "detections": [{"label": "a", "score": 1, "box": [1]}],
                    }
                ]
            },
            {"images": [{"image": "a", "height": 1, "width": 1, "frame": 1, "detections": []}]},
        ],
        ids=str,
    )
    def test_the_schema_refuses_what_is_not_written(self, change):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(
                {"version": 1, "scores": "svm", "images": [], **change}, json.loads(SCHEMA.read_text())
            )

    def test_names_of_any_bytes(self, tmp_path):
        image = Path(os.fsdecode(b"photos/\xff\xe9.jpg"))
        write_predictions([Prediction(image, 1, 1, detections())], CLASSES, "json", tmp_path / "a.json")
        text = (tmp_path / "a.json").read_bytes()
        assert b"photos/\\udcff\\udce9.jpg" in text
        assert os.fsencode(json.loads(text)["images"][0]["image"]) == b"photos/\xff\xe9.jpg"

    def test_printed(self, predictions, capsys):
        assert write_predictions(predictions, CLASSES, "json", None) == []
        assert json.loads(capsys.readouterr().out) == json_content(predictions)


class TestCsv:
    def read(self, path):
        with path.open(encoding="utf-8-sig", newline="") as text:
            return list(csv.DictReader(text))

    def test_a_row_for_each_box_and_for_each_empty_image(self, predictions, tmp_path):
        (tmp_path / "out").mkdir()
        path = tmp_path / "out" / "boxes.csv"
        write_predictions(predictions, CLASSES, "csv", path)
        rows = self.read(path)
        assert list(rows[0]) == ["path", "x1", "y1", "x2", "y2", "label", "score", "width", "height"]
        assert [Path(row["path"]) for row in rows] == [predictions[i].image for i in (0, 0, 1, 2)]
        corners = [[float(row[c]) for c in ("x1", "y1", "x2", "y2")] for row in rows[:3]]
        assert equal(corners, np.concatenate([p.detections.boxes for p in predictions]))
        assert rows[0]["score"] == "0.93"
        assert (rows[1]["x1"], rows[1]["x2"]) == ("0", "640")
        assert rows[0]["x1"] == "0.33333334"
        assert [rows[3][name] for name in ("x1", "y2", "label", "score", "width")] == ["", "", "", "", "60"]

    def test_numbers_are_numbers(self, tmp_path):
        found = [Prediction(Path("a.jpg"), 9, 9, detections((-0.5, 0, 1e-6, 4, -0.25, "cow")))]
        write_predictions(found, CLASSES, "csv", tmp_path / "a.csv")
        (row,) = self.read(tmp_path / "a.csv")
        assert [row[name] for name in ("x1", "y1", "x2", "y2", "score")] == [
            "-0.5",
            "0",
            "1e-06",
            "4",
            "-0.25",
        ]

    def test_paths_are_relative_to_the_file(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("out").mkdir()
        found = [Prediction(Path("photos/a.jpg"), 9, 9, detections())]
        write_predictions(found, CLASSES, "csv", Path("out/boxes.csv"))
        assert self.read(Path("out/boxes.csv"))[0]["path"] == "../photos/a.jpg"
        write_predictions(found, CLASSES, "csv", Path("boxes.csv"))
        assert self.read(Path("boxes.csv"))[0]["path"] == "photos/a.jpg"

    @pytest.mark.parametrize("name", ["=1+1", "+a", "-a", "@a", "'=a", "\ta", "''@"])
    def test_nothing_is_a_formula(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        found = [Prediction(Path(f"{name}.jpg"), 9, 9, detections((1, 2, 3, 4, 0.5, name)))]
        write_predictions(found, [name], "csv", tmp_path / "boxes.csv")
        (row,) = self.read(tmp_path / "boxes.csv")
        assert row["label"] == f"'{name}"
        assert row["path"] == f"./{name}.jpg"
        write_counts(found, [name], tmp_path / "counts.csv")
        assert list(self.read(tmp_path / "counts.csv")[0]) == ["image", f"'{name}", "total"]

    def test_spreadsheets_are_told_of_utf_8_where_it_matters(self, tmp_path):
        for name, start in (("a", b"path"), ("é", b"\xef\xbb\xbfpath")):
            found = [Prediction(Path(f"{name}.jpg"), 9, 9, detections())]
            write_predictions(found, CLASSES, "csv", tmp_path / "boxes.csv")
            assert (tmp_path / "boxes.csv").read_bytes().startswith(start)

    def test_names_of_any_bytes_are_printed_as_they_are(self, capfdbinary):
        name = b'\xff, "x".jpg'
        write_predictions([Prediction(Path(os.fsdecode(name)), 1, 2, detections())], CLASSES, "csv", None)
        assert b'"\xff, ""x"".jpg",,,,,,,2,1\n' in capfdbinary.readouterr().out

    def test_frames(self, tmp_path):
        found = [Prediction(Path("/clip.mp4"), 9, 9, detections(), frame=i, seconds=i / 4) for i in (0, 1)]
        write_predictions(found, CLASSES, "csv", tmp_path / "boxes.csv")
        rows = self.read(tmp_path / "boxes.csv")
        assert [(row["path"], row["frame"], row["seconds"]) for row in rows] == [
            ("/clip.mp4", "0", "0.0"),
            ("/clip.mp4", "1", "0.25"),
        ]


class TestCounts:
    def test_a_row_for_each_image_and_sums(self, predictions, tmp_path):
        path = tmp_path / "counts.csv"
        write_counts(predictions, CLASSES, path)
        rows = list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"))))
        assert rows == [
            ["image", "cow", "Kuh & <Kälbchen>", "'=1+1", "total"],
            [str(predictions[0].image), "1", "1", "0", "2"],
            [str(predictions[1].image), "0", "0", "1", "1"],
            [str(predictions[2].image), "0", "0", "0", "0"],
            ["total", "1", "1", "1", "3"],
        ]

    def test_frames(self, tmp_path):
        found = [Prediction(Path("clip.mp4"), 9, 9, detections((1, 2, 3, 4, 1, "cow")), 50, 2.0)]
        write_counts(found, ["cow"], tmp_path / "c.csv")
        assert (
            tmp_path / "c.csv"
        ).read_text() == "image,frame,seconds,cow,total\nclip.mp4,50,2.0,1,1\ntotal,,,1,1\n"

    def test_bad_input(self, predictions, tmp_path):
        with pytest.raises(SppnetError, match=r"c.txt: found the suffix '.txt', expected .csv for counts$"):
            write_counts(predictions, CLASSES, tmp_path / "c.txt")
        with pytest.raises(SppnetError, match=r"found the label '=1.1', expected one of Kuh"):
            write_counts(predictions, CLASSES[:2], tmp_path / "c.csv")
        assert not (tmp_path / "c.csv").exists()


class TestCoco:
    def test_images_annotations_categories(self, predictions, tmp_path):
        path = tmp_path / "coco.json"
        assert write_predictions(predictions, CLASSES, "coco", path) == [path]
        content = json.loads(path.read_text())
        names = {c["id"]: c["name"] for c in content["categories"]}
        assert names == dict(enumerate(CLASSES, 1))
        images = [(i["id"], i["file_name"], i["height"], i["width"]) for i in content["images"]]
        assert images == [
            (1, "a photo (1).jpg", 480, 640),
            (2, "sub/日本.x.jpg", 100, 77),
            (3, "none.png", 50, 60),
        ]
        for i, (_, rows) in enumerate(rows_of(predictions), 1):
            own = [a for a in content["annotations"] if a["image_id"] == i]
            assert [names[a["category_id"]] for a in own] == [label for _, label in rows]
            for a, (box, _) in zip(own, rows, strict=True):
                x, y, w, h = a["bbox"]
                assert equal([x, y, x + w, y + h], box)
                assert a["area"] == pytest.approx(w * h)
        assert [a["score"] for a in content["annotations"]] == [0.93, 0.1, 0.5]
        assert [a["id"] for a in content["annotations"]] == [1, 2, 3]

    def test_the_coco_tools_open_it(self, predictions, tmp_path):
        coco = pytest.importorskip("pycocotools.coco")
        write_predictions(predictions, CLASSES, "coco", tmp_path / "coco.json")
        theirs = coco.COCO(str(tmp_path / "coco.json"))
        assert theirs.getImgIds() == [1, 2, 3]
        assert [len(theirs.getAnnIds(i)) for i in (1, 2, 3)] == [2, 1, 0]


class TestVoc:
    def test_an_xml_file_for_each_image(self, predictions, tmp_path):
        out = tmp_path / "voc"
        written = write_predictions(predictions, CLASSES, "voc", out)
        assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == [
            "Annotations/a photo (1).xml",
            "Annotations/none.xml",
            "Annotations/sub/日本.x.xml",
            "ImageSets/Main/default.txt",
        ]
        assert sorted(written) == sorted(p for p in out.rglob("*") if p.is_file())
        assert (out / "ImageSets/Main/default.txt").read_text("utf-8") == "a photo (1)\nsub/日本.x\nnone\n"
        for file, (image, rows), p in zip(written, rows_of(predictions), predictions, strict=False):
            top = ET.parse(file).getroot()
            about = [top.findtext(tag) for tag in ("folder", "filename", "path")]
            assert about == [image.parent.name, image.name, str(image)]
            assert [top.findtext(f"size/{tag}") for tag in ("width", "height", "depth")] == [
                str(p.width),
                str(p.height),
                "3",
            ]
            assert [o.findtext("name") for o in top.iter("object")] == [label for _, label in rows]
            for o, (box, _) in zip(top.iter("object"), rows, strict=True):
                x1, y1, x2, y2 = (
                    float(o.findtext(f"bndbox/{tag}")) for tag in ("xmin", "ymin", "xmax", "ymax")
                )
                assert equal([x1 - 1, y1 - 1, x2, y2], box)
        text = written[1].read_text("utf-8")
        assert "<xmin>11</xmin>" in text
        assert "<xmax>30</xmax>" in text

    @pytest.mark.parametrize("name", ["a\x01", os.fsdecode(b"\xff")])
    def test_what_xml_cannot_hold_is_refused_before_work(self, name, tmp_path):
        for images, classes in (([Path(f"{name}.jpg")], ["cow"]), ([Path("a.jpg")], [name])):
            with pytest.raises(SppnetError, match=r"found the character .* which voc cannot hold"):
                check_predictions(images, classes, "voc", tmp_path / "out")


class TestYolo:
    def test_a_text_file_for_each_image(self, predictions, tmp_path):
        out = tmp_path / "yolo"
        write_predictions(predictions, CLASSES, "yolo", out)
        content = yaml.safe_load((out / "data.yaml").read_text("utf-8"))
        assert content == {"train": "images", "names": dict(enumerate(CLASSES))}
        assert (out / "labels/classes.txt").read_text("utf-8").splitlines() == list(CLASSES)
        for name, (_, rows), p in zip(
            ("a photo (1)", "sub/日本.x", "none"), rows_of(predictions), predictions, strict=True
        ):
            lines = (out / "labels" / f"{name}.txt").read_text().splitlines()
            assert [CLASSES[int(line.split()[0])] for line in lines] == [label for _, label in rows]
            for line, (box, _) in zip(lines, rows, strict=True):
                x, y, w, h = map(float, line.split()[1:])
                assert equal(
                    np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]) * ([p.width, p.height] * 2), box
                )


class TestLabelStudio:
    def test_tasks_with_predictions(self, predictions, tmp_path):
        path = tmp_path / "tasks.json"
        assert write_predictions(predictions, CLASSES, "labelstudio", path) == [path, tmp_path / "tasks.xml"]
        tasks = json.loads(path.read_text())
        assert [t["data"]["image"] for t in tasks] == [
            "/data/local-files/?d=a%20photo%20%281%29.jpg",
            "/data/local-files/?d=sub/%E6%97%A5%E6%9C%AC.x.jpg",
            "/data/local-files/?d=none.png",
        ]
        for task, (_, rows), p in zip(tasks, rows_of(predictions), predictions, strict=True):
            (prediction,) = task["predictions"]
            assert [r["value"]["rectanglelabels"] for r in prediction["result"]] == [
                [label] for _, label in rows
            ]
            for region, (box, _) in zip(prediction["result"], rows, strict=True):
                assert (region["original_width"], region["original_height"]) == (p.width, p.height)
                assert (region["from_name"], region["to_name"], region["type"]) == (
                    "label",
                    "image",
                    "rectanglelabels",
                )
                v = region["value"]
                shares = np.array([v["x"], v["y"], v["x"] + v["width"], v["y"] + v["height"]]) / 100
                assert equal(shares * ([p.width, p.height] * 2), box)
                assert v["rotation"] == 0
        assert [r["score"] for r in tasks[0]["predictions"][0]["result"]] == [0.93, 0.1]
        assert tasks[0]["predictions"][0]["score"] == pytest.approx(0.515)

    def test_the_interface_offers_the_classes(self, predictions, tmp_path):
        write_predictions(predictions, CLASSES, "labelstudio", tmp_path / "tasks.json")
        view = ET.parse(tmp_path / "tasks.xml").getroot()
        labels = view.find("RectangleLabels")
        assert [label.get("value") for label in labels] == list(CLASSES)
        assert (labels.get("name"), labels.get("toName"), view.find("Image").get("value")) == (
            "label",
            "image",
            "$image",
        )


class TestBadInput:
    @pytest.mark.parametrize(
        ("format", "name", "says"),
        [
            (
                "pascal",
                "a.xml",
                "found the format 'pascal', expected one of csv, coco, voc, yolo, labelstudio, json",
            ),
            ("csv", "a.json", "a.json: found the suffix '.json', expected .csv for csv"),
            ("labelstudio", "a.xml", "a.xml: found the suffix '.xml', expected .json for labelstudio"),
            ("voc", None, "found no place for voc, which is many files, expected a folder"),
            ("yolo", None, "found no place for yolo, which is many files, expected a folder"),
            ("voc", "full", "full: found a folder with files in it, expected an empty one, or nothing yet"),
            ("yolo", "full/x", "full/x: found a file, expected a folder, or nothing yet"),
            ("json", "gone/a.json", r"gone/a.json: cannot write \(No such file or directory\)"),
            ("voc", "gone/a", r"gone/a: cannot write \(No such file or directory\)"),
        ],
    )
    def test_places(self, predictions, format, name, says, tmp_path):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "x").touch()
        path = name and tmp_path / name
        before = sorted(tmp_path.rglob("*"))
        for call in (
            lambda: check_predictions([p.image for p in predictions], CLASSES, format, path),
            lambda: write_predictions(predictions, CLASSES, format, path),
        ):
            with pytest.raises((SppnetError, OSError), match=says):
                call()
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("format", ["voc", "yolo"])
    def test_photos_that_differ_in_their_suffix(self, format, tmp_path):
        images = [Path("photos/a.jpg"), Path("photos/b.jpg"), Path("photos/A.png")]
        with pytest.raises(
            SppnetError, match=f"^found the photos a.jpg and A.png, whose names {format} cannot tell"
        ):
            check_predictions(images, CLASSES, format, tmp_path / "out")
        check_predictions([images[0], Path("other/a.jpg")], CLASSES, format, tmp_path / "out")

    @pytest.mark.parametrize("format", FORMATS)
    def test_content(self, format, tmp_path):
        path = tmp_path / {"csv": "a.csv", "voc": "a", "yolo": "a"}.get(format, "a.json")
        for row, classes, says in (
            ((1, 2, 3, 4, 0.5, "zebra"), ["cow"], "a.jpg: found the label 'zebra', expected one of cow"),
            ((1, 2, np.nan, 4, 0.5, "cow"), ["cow"], "a.jpg: found a box or score that is not finite"),
            ((1, 2, 3, 4, np.inf, "cow"), ["cow"], "a.jpg: found a box or score that is not finite"),
        ):
            with pytest.raises(SppnetError, match=says):
                write_predictions([Prediction(Path("a.jpg"), 9, 9, detections(row))], classes, format, path)
        assert not path.exists()

    @pytest.mark.parametrize("format", FORMATS)
    def test_nothing_at_all_is_written_as_well(self, format, tmp_path):
        path = tmp_path / {"csv": "a.csv", "voc": "a", "yolo": "a"}.get(format, "a.json")
        write_predictions([], CLASSES, format, path)
        assert path.exists()


def test_frames_are_named_as_images_of_them_would_be(tmp_path):
    found = [
        Prediction(tmp_path / "clip.mp4", 9, 9, detections((1, 2, 3, 4, 1, "cow")), i, i / 25)
        for i in (0, 25)
    ]
    write_predictions(found, CLASSES, "coco", tmp_path / "a.json")
    names = [i["file_name"] for i in json.loads((tmp_path / "a.json").read_text())["images"]]
    assert names == ["clip-000000.jpg", "clip-000025.jpg"]
    write_predictions(found, CLASSES, "voc", tmp_path / "voc")
    assert ET.parse(tmp_path / "voc/Annotations/clip-000025.xml").findtext("path") == str(
        tmp_path / "clip-000025.jpg"
    )
    write_predictions(found, CLASSES, "yolo", tmp_path / "yolo")
    assert (tmp_path / "yolo/labels/clip-000025.txt").read_text().startswith("0 0.2")
