import csv
import io
import json
import zipfile
from collections import Counter
from xml.etree import ElementTree

import httpx
import jsonschema
import numpy as np
import pytest
from PIL import Image

from serving import draw, events, jpeg, label_all, serving
from sppnet import Detector, read_dataset
from sppnet.boxes import iou
from sppnet.images import read_image

COUNT = 16


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    return folder, draw(folder, COUNT)


@pytest.fixture(scope="module")
def served(scenes, tmp_path_factory):
    with serving(scenes[0], tmp_path_factory.mktemp("project"), processes=True) as found:
        found.encoded()
        yield found


@pytest.fixture(scope="module")
def fitted(served, scenes):
    """The server after a fit to all photos but the last four."""
    label_all(served, scenes[1], list(scenes[1])[:-4])
    fit = served.fit()
    assert fit["state"] == "done", fit
    served.results(COUNT)
    return fit


def test_photos_are_listed_by_name_in_pages(served):
    whole = served.get("photos")
    assert whole["total"] == COUNT
    assert [photo["name"] for photo in whole["photos"]] == [f"{i:02d}.jpg" for i in range(COUNT)]
    assert {(photo["width"], photo["height"], photo["state"]) for photo in whole["photos"]} == {
        (640, 480, "encoded")
    }
    part = served.get("photos?offset=5&limit=3")
    assert part["photos"] == whole["photos"][5:8]
    assert served.get("photos?text=1")["total"] == sum("1" in f"{i:02d}" for i in range(COUNT))


def test_pictures_are_small_upright_and_fresh_only_when_they_changed(served):
    photo = served.ids()["00.jpg"]
    answer = served.client.get(f"photos/{photo}/thumbnail")
    assert answer.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(answer.content)).size == (256, 192)
    assert answer.headers["cache-control"].startswith("private")
    again = served.client.get(f"photos/{photo}/thumbnail", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    large = Image.open(io.BytesIO(served.client.get(f"photos/{photo}/image").content))
    assert large.size == (640, 480)  # never enlarged
    small = served.client.get(f"photos/{photo}/image?side=100").content
    assert Image.open(io.BytesIO(small)).size == (100, 75)


def test_boxes_are_kept_and_written_as_voc(served, scenes):
    photo = served.ids()["15.jpg"]
    put = served.put(photo, [([10.5, 20, 110, 90], "cat"), ([0, 0, 30, 30], "dog")])
    assert [box["label"] for box in put["boxes"]] == ["cat", "dog"]
    assert put["warning"] is None
    assert served.get(f"photos/{photo}/boxes")["boxes"] == put["boxes"]
    path = served.studio.opened.project / "annotations" / "15.xml"
    root = ElementTree.parse(path).getroot()
    assert [one.findtext("name") for one in root.iter("object")] == ["cat", "dog"]
    assert root.findtext("filename") == "15.jpg"
    # VOC counts from 1, and the last pixel is inside.
    assert [root.findtext(f"object/bndbox/{side}") for side in ("xmin", "ymax")] == ["11.5", "90"]
    served.put(photo, [])


def test_boxes_are_cut_at_the_borders_and_refused_outside(served):
    photo = served.ids()["15.jpg"]
    put = served.put(photo, [([-10, -5, 20, 30], "cat")])
    assert put["boxes"][0]["box"] == [0, 0, 20, 30]
    given = {"revision": put["revision"], "boxes": [{"box": [700, 10, 800, 20], "label": "cat"}]}
    answer = served.client.put(f"photos/{photo}/boxes", json=given)
    assert answer.status_code == 422
    assert "640 x 480" in answer.json()["error"]["message"]
    served.put(photo, [])


def test_two_tabs_do_not_undo_each_other(served):
    photo = served.ids()["14.jpg"]
    revision = served.get(f"photos/{photo}/boxes")["revision"]
    given = {"revision": revision, "boxes": [{"box": [1, 2, 30, 40], "label": "cat"}]}
    first = served.client.put(f"photos/{photo}/boxes", json=given)
    second = served.client.put(f"photos/{photo}/boxes", json=given | {"boxes": []})
    assert (first.status_code, second.status_code) == (200, 409)
    assert second.json()["current"] == first.json()
    assert served.get(f"photos/{photo}/boxes")["boxes"] == first.json()["boxes"]
    served.put(photo, [])


def test_similar_regions_are_those_of_the_same_kind(served, scenes):
    ids = served.ids()
    names = {photo: name for name, photo in ids.items()}
    shares = []
    for name, target in scenes[1].items():
        for box, label in zip(target.boxes.tolist(), target.labels, strict=True):
            asked = {"photo": ids[name], "box": box, "limit": 5}
            answer = served.client.post("search", json=asked).json()
            regions = answer["regions"]
            assert [one["score"] for one in regions] == sorted((r["score"] for r in regions), reverse=True)
            assert max(Counter(region["photo"] for region in regions).values()) <= 3
            same = 0
            for region in regions:
                other = scenes[1][names[region["photo"]]]
                overlaps = iou(np.array([region["box"]], np.float32), other.boxes)[0]
                same += bool(overlaps.max() >= 0.5 and other.labels[int(overlaps.argmax())] == label)
                if region["photo"] == ids[name]:
                    assert iou(np.array([region["box"]], np.float32), np.array([box], np.float32)) < 0.5
            shares.append(same / 5)
    # A region at random is of the same kind in one case of twenty.
    assert np.mean(shares) > 0.6


def test_a_fit_needs_boxes(tmp_path):
    draw(tmp_path / "photos", 2)
    with serving(tmp_path / "photos", tmp_path / "project") as served:
        served.wait(lambda project: project["photos"] == 2)
        answer = served.client.post("fits", json={})
        assert answer.status_code == 422
        assert "5 boxes" in answer.json()["error"]["message"]
        photo = next(iter(served.ids().values()))
        served.put(photo, [([10 * i, 10, 10 * i + 50, 60], "cat") for i in range(4)])
        assert served.get("project")["can_fit"] == {"ok": False, "reason": "Too few boxes: cat has 4 of 5."}


def test_a_fit_tells_how_far_it_is_and_how_good_it_became(served, fitted, scenes):
    quality = fitted["quality"]
    assert quality["photos"] == COUNT - 4
    counts = Counter(label for name in list(scenes[1])[:-4] for label in scenes[1][name].labels)
    assert {name: one["objects"] for name, one in quality["classes"].items()} == counts
    assert quality["mean_ap"] > 0.4
    assert any(words.startswith("cat: finds ") for words in quality["words"])
    assert served.get("quality")["fits"][-1] == quality
    project = served.get("project")
    assert project["model"]["classes"] == [one["name"] for one in project["classes"]]


def test_results_find_objects_in_photos_that_were_not_labelled(served, fitted, scenes):
    results, ids = served.get("results"), served.ids()
    hits = total = 0
    for name in list(scenes[1])[-4:]:
        target = scenes[1][name]
        shown = [
            one
            for one in results["photos"].get(ids[name], [])
            if one["score"] >= results["thresholds"][one["label"]]
        ]
        for box, label in zip(target.boxes, target.labels, strict=True):
            overlaps = [iou(np.array([one["box"]], np.float32), box[None])[0, 0] for one in shown]
            hits += any(o >= 0.5 and one["label"] == label for o, one in zip(overlaps, shown, strict=True))
            total += 1
    assert hits >= 0.5 * total
    assert all(one["score"] >= 0.05 for found in results["photos"].values() for one in found)


def test_a_judged_detection_is_new_training_data(served, fitted, scenes):
    name = list(scenes[1])[-1]
    photo = served.ids()[name]
    best, *others = served.get("results")["photos"][photo]
    wrong = next(one for one in others if one["label"] != best["label"] or one["box"][0] > best["box"][2])
    review = {
        "accept": [{"box": best["box"], "label": best["label"]}],
        "reject": [{"box": wrong["box"], "label": wrong["label"]}],
    }
    boxes = served.client.post(f"photos/{photo}/review", json=review).json()
    assert [(box["origin"], box["label"]) for box in boxes["boxes"]] == [("accepted", best["label"])]
    assert boxes["rejected"][0]["label"] == wrong["label"]
    states = {tuple(one["box"]): one["state"] for one in served.get("results")["photos"][photo]}
    assert states[tuple(best["box"])] == "accepted"
    assert states[tuple(wrong["box"])] == "rejected"
    served.put(photo, [])


def test_thresholds_decide_what_counts(served, fitted):
    before = served.get("results")["thresholds"]
    low = served.client.patch("results/thresholds", json={"cat": 0.06}).json()
    assert low == {**before, "cat": pytest.approx(0.06)}
    many = sum(photo["found"] for photo in served.get("photos")["photos"])
    served.client.patch("results/thresholds", json={"cat": 0.99})
    few = sum(photo["found"] for photo in served.get("photos")["photos"])
    assert few < many
    assert served.client.patch("results/thresholds", json={"cow": 0.5}).status_code == 422
    assert served.client.patch("results/thresholds", json={"cat": 1.5}).status_code == 422
    served.client.patch("results/thresholds", json=before)


def test_the_most_doubtful_photo_comes_first(served, fitted):
    doubts = [photo["doubt"] for photo in served.get("photos?order=doubt")["photos"]]
    assert doubts == sorted(doubts, reverse=True)
    assert 0 < doubts[0] <= 1


def test_detect_says_what_the_detector_says(served, fitted, scenes, tmp_path):
    path = scenes[0] / "00.jpg"
    answer = served.client.post(
        "detect", content=path.read_bytes(), headers={"Content-Type": "image/jpeg"}
    ).json()
    model = served.get("models")[-1]["id"]
    file = tmp_path / "model.safetensors"
    file.write_bytes(served.client.get(f"models/{model}/file").content)
    found = Detector.load(file).predict(read_image(path))
    assert answer["images"][0]["detections"] == found.facts()
    assert (answer["images"][0]["width"], answer["images"][0]["height"]) == (640, 480)
    everything = served.client.post(
        "detect?threshold=0", content=path.read_bytes(), headers={"Content-Type": "image/jpeg"}
    ).json()
    assert len(everything["images"][0]["detections"]) > len(found)


def test_detect_gives_the_json_of_the_command_line(served, fitted, scenes, request):
    schema = json.loads((request.config.rootpath / "docs" / "results.schema.json").read_text())
    answer = served.client.post("detect", content=jpeg(), headers={"Content-Type": "image/jpeg"})
    jsonschema.validate(answer.json(), schema)


def test_vectors_of_equal_regions_are_equal(served, scenes):
    content = (scenes[0] / "00.jpg").read_bytes()
    asked = {"content": content, "headers": {"Content-Type": "image/jpeg"}}
    whole = served.client.post("embed", **asked).json()
    boxes = served.client.post("embed?box=0,0,640,480&box=10,20,300,400", **asked).json()
    assert len(whole["vectors"][0]) == whole["length"] == 256
    assert boxes["vectors"][0] == pytest.approx(whole["vectors"][0], abs=1e-5)
    assert np.linalg.norm(boxes["vectors"][1]) == pytest.approx(1, abs=1e-3)
    assert served.client.post("embed?box=nonsense", **asked).status_code == 422
    assert served.client.post("embed?box=700,0,800,10", **asked).status_code == 422


@pytest.mark.parametrize("format", ["csv", "coco", "voc", "yolo", "labelstudio"])
def test_exported_boxes_are_read_again(served, fitted, scenes, format, tmp_path):
    answer = served.client.get(f"export?what=boxes&format={format}&photos=true")
    assert answer.status_code == 200, answer.text
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        archive.extractall(tmp_path)
    found = {sample.path.name: sample.target for sample in read_dataset(tmp_path)}
    assert found.keys() == set(list(scenes[1])[:-4])
    for name, target in found.items():
        truth = scenes[1][name]
        assert sorted(target.labels) == sorted(truth.labels)
        order = [np.abs(truth.boxes - box).sum(axis=1).argmin() for box in target.boxes]
        np.testing.assert_allclose(target.boxes, truth.boxes[order], atol=0.01)


def test_exported_detections_are_read_again(served, fitted, scenes, tmp_path):
    answer = served.client.get("export?what=detections&format=csv")
    assert answer.headers["content-disposition"].startswith("attachment")
    (tmp_path / "found.csv").write_bytes(answer.content)
    data = {sample.path.name: sample for sample in read_dataset(tmp_path / "found.csv")}
    results, ids = served.get("results"), served.ids()
    for name in scenes[1]:
        shown = [
            one
            for one in results["photos"].get(ids[name], [])
            if one["score"] >= results["thresholds"][one["label"]] and one["state"] != "rejected"
        ]
        assert sorted(data[name].target.labels) == sorted(one["label"] for one in shown)
    for format in ("coco", "voc", "yolo", "labelstudio", "json"):
        assert served.client.get(f"export?what=detections&format={format}").status_code == 200


def test_the_spreadsheet_counts_what_is_shown(served, fitted):
    text = served.client.get("export/counts.csv").content.decode("utf-8-sig")
    rows = list(csv.reader(io.StringIO(text)))
    total = sum(photo["found"] for photo in served.get("photos")["photos"])
    assert rows[-1][-1] == str(total)


def test_the_report_is_a_page_that_says_what_it_measured(served, fitted):
    page = served.client.get("export/report.html").text
    assert "<html" in page
    assert "not learned from" in page
    assert "cat" in page


def test_the_model_runs_as_onnx(served, fitted, scenes, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = served.get("models")[-1]["id"]
    path = tmp_path / "model.onnx"
    path.write_bytes(served.client.get(f"models/{model}/onnx").content)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    pixels = read_image(scenes[0] / "00.jpg")
    boxes = session.run(["boxes"], {"image": pixels})[0]
    answer = served.client.post(
        "detect", content=(scenes[0] / "00.jpg").read_bytes(), headers={"Content-Type": "image/jpeg"}
    ).json()["images"][0]["detections"]
    assert len(boxes) == len(answer)


def test_a_refit_says_what_changed(served, fitted, scenes):
    label_all(served, scenes[1])
    fit = events_of_fit(served)
    changed = fit["quality"]["changed"]
    assert f"learned from {COUNT} photos, 4 more than before" in changed
    assert len(served.get("models")) == 2
    assert [model["used"] for model in served.get("models")] == [False, True]
    first = served.get("models")[0]["id"]
    used = served.client.post(f"models/{first}/use").json()
    assert [model["used"] for model in used] == [True, False]
    assert served.results(COUNT)["model"] == first


def events_of_fit(served):
    """Fit, and return the last of the events that tell of it, which go on until it is done."""
    fit = served.client.post("fits", json={}).json()
    told = events(served, f"fits/{fit['id']}/events", lambda event: event["state"] == "done")
    shares = [event["share"] for event in told]
    assert shares == sorted(shares)
    assert len({event["stage"] for event in told}) >= 4
    return told[-1]


def test_pages_are_told_of_changes(served):
    photo = served.ids()["13.jpg"]
    with served.client.stream("GET", "events") as answer:
        served.put(photo, [([10, 10, 40, 40], "cat")])
        data = next(line for line in answer.iter_lines() if line.startswith("data:"))
    assert json.loads(data[5:])["what"] == "boxes"
    assert json.loads(data[5:])["photo"] == photo
    served.put(photo, [])


def test_classes_are_renamed_ordered_and_removed(tmp_path):
    draw(tmp_path / "photos", 2)
    with serving(tmp_path / "photos", tmp_path / "project") as served:
        served.wait(lambda project: project["photos"] == 2)
        photo = served.ids()["00.jpg"]
        served.put(photo, [([1, 1, 50, 50], "cta"), ([60, 60, 90, 90], "dog")])
        swapped = served.client.patch("project", json={"rename": {"cta": "dog", "dog": "cat"}}).json()
        assert [one["name"] for one in swapped["classes"]] == ["dog", "cat"]
        assert [box["label"] for box in served.get(f"photos/{photo}/boxes")["boxes"]] == ["dog", "cat"]
        xml = (tmp_path / "project" / "annotations" / "00.xml").read_text()
        assert "cta" not in xml
        ordered = served.client.patch("project", json={"classes": ["bird", "cat", "dog"]}).json()
        assert [(one["name"], one["boxes"]) for one in ordered["classes"]] == [
            ("bird", 0),
            ("cat", 1),
            ("dog", 1),
        ]
        assert served.client.patch("project", json={"classes": ["cat"]}).status_code == 422
        assert served.client.patch("project", json={"rename": {"cow": "dog"}}).status_code == 422


def test_models_and_what_they_found_follow_a_new_name(served, fitted):
    label = served.get("results")["classes"][0]
    objects = labels_of(served.get("results"))
    assert objects[label]
    served.client.patch("results/thresholds", json={label: 0.31})
    assert served.client.patch("project", json={"rename": {label: "beast"}}).status_code == 200
    renamed = served.get("results")
    assert "beast" in renamed["classes"]
    assert label not in renamed["classes"]
    assert renamed["thresholds"]["beast"] == 0.31
    assert labels_of(renamed)["beast"] == objects[label]
    found = served.client.post(
        "detect?threshold=0.05", content=jpeg(), headers={"Content-Type": "image/jpeg"}
    )
    assert "beast" in {one["label"] for one in found.json()["images"][0]["detections"]}
    model = served.get("project")["model"]["id"]
    assert len([path for path in served.studio.results.folder.iterdir() if path.stem.startswith(model)]) == 1
    assert served.client.patch("project", json={"rename": {"beast": label}}).status_code == 200
    assert labels_of(served.get("results")) == objects


def labels_of(results):
    """Return how often each class was found."""
    return Counter(one["label"] for photo in results["photos"].values() for one in photo)


def test_dropped_photos_land_in_the_project(served):
    before = served.get("project")["photos"]
    headers = {"Content-Type": "image/jpeg", "X-Name": "..%2F..%2Fmy%20photo%3Cb%3E.jpg"}
    first = served.client.post("photos", content=jpeg(), headers=headers)
    second = served.client.post("photos", content=jpeg(), headers=headers)
    assert [first.status_code, second.status_code] == [201, 201]
    assert {first.json()["name"], second.json()["name"]} == {"my photo_b_.jpg", "my photo_b_ (1).jpg"}
    lie = sorted(path.name for path in (served.studio.opened.project / "photos").iterdir())
    assert lie == ["my photo_b_ (1).jpg", "my photo_b_.jpg"]
    served.wait(lambda project: project["encoded"] == before + 2)
    assert not list((served.studio.opened.project / "incoming").iterdir())


def test_label_studio_gets_predictions_and_gives_annotations(served, fitted):
    url = f"{served.url}/label-studio"
    task = {"id": 7, "data": {"image": "/data/upload/3/0123abcd-12.jpg"}}
    config = '<View><Image name="im" value="$image"/><RectangleLabels name="bx" toName="im"/></View>'
    with httpx.Client(auth=("any", served.token), timeout=60) as program:
        assert program.get(f"{url}/health").json()["status"] == "UP"
        assert program.post(f"{url}/setup", json={"project": "1"}).json()["model_version"]
        asked = {"tasks": [task, {"id": 8, "data": {"image": "unknown.jpg"}}], "label_config": config}
        known, unknown = program.post(f"{url}/predict", json=asked).json()["results"]
        assert unknown["result"] == []
        region = known["result"][0]
        assert (region["from_name"], region["to_name"], region["type"]) == ("bx", "im", "rectanglelabels")
        submitted = {"action": "ANNOTATION_CREATED", "task": task, "annotation": {"result": known["result"]}}
        answer = program.post(f"{url}/webhook", json=submitted)
        assert answer.json() == {"taken": True, "boxes": len(known["result"]), "fits": True}
    photo = served.ids()["12.jpg"]
    boxes = served.get(f"photos/{photo}/boxes")
    assert [box["label"] for box in boxes["boxes"]] == [
        one["value"]["rectanglelabels"][0] for one in known["result"]
    ]
    served.wait(lambda project: project["fit"]["state"] == "done")


def test_metrics_count_requests(served):
    served.get("project")
    text = served.client.get("metrics").text
    assert 'sppnet_requests_total{method="GET",path="/api/v1/project",status="200"}' in text
    assert f"sppnet_photos {served.get('project')['photos']}.0" in text
    assert not any(photo in text for photo in served.ids().values())
