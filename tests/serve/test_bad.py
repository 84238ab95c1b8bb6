"""What goes wrong around a server: nothing is lost, and whoever asks is told in one line."""

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image

from serving import draw, jpeg, label_all, noise, serving
from sppnet.cli.serve import serve
from sppnet.datasets import read_dataset
from sppnet.datasets.tree import PROJECT
from sppnet.errors import DatasetError, SppnetError
from sppnet.serve import annotations, media
from sppnet.serve.studio import Opened, Studio

JPEG = {"Content-Type": "image/jpeg"}


@contextmanager
def command(*arguments, **more):
    """Lend a server in a process of its own, as people start it; with a client."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    line = [sys.executable, "-m", "sppnet", "serve", "--no-open", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment, **more)
    try:
        url = re.search(r"http://\S+", process.stdout.readline())[0].rstrip("/")
        with httpx.Client(base_url=f"{url}/api/v1/", headers={"Origin": url}, timeout=60) as client:
            wait(lambda: health(client))
            yield process, client
    finally:
        process.kill()
        process.wait()


def health(client):
    try:
        return client.get("health").status_code == 200
    except httpx.TransportError:
        return False


def wait(ready, seconds=60):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def test_a_server_killed_in_mid_fit_loses_no_box(tmp_path):
    targets = draw(tmp_path / "photos", 10)
    given = {}
    with command(tmp_path / "photos") as (process, client):
        wait(lambda: client.get("project").json()["encoded"] == 10)
        for photo in client.get("photos").json()["photos"]:
            target = targets[photo["name"]]
            rows = zip(target.boxes.tolist(), target.labels, strict=True)
            boxes = [{"box": box, "label": label, "origin": "drawn"} for box, label in rows]
            content = {"revision": 0, "boxes": boxes, "reviewed": True}
            assert client.put(f"photos/{photo['id']}/boxes", json=content).status_code == 200
            given[photo["id"]] = boxes
        fit = client.post("fits", json={}).json()["id"]
        wait(lambda: client.get(f"fits/{fit}").json()["state"] == "running")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with command(tmp_path / "photos") as (_, client):
        wait(lambda: client.get("project").json()["photos"] == 10)
        for photo, boxes in given.items():
            assert client.get(f"photos/{photo}/boxes").json()["boxes"] == boxes
        lost = client.get(f"fits/{fit}").json()
        assert lost["state"] == "failed"
        assert "no box was lost" in lost["error"]
        again = client.post("fits", json={}).json()["id"]
        wait(lambda: client.get(f"fits/{again}").json()["state"] == "done")
    assert len(list((tmp_path / "photos" / "sppnet-project" / "annotations").glob("*.xml"))) == 10


def test_processes_end_with_a_server_that_is_killed(tmp_path):
    draw(tmp_path / "photos", 2)
    with command(tmp_path / "photos") as (process, client):
        wait(lambda: client.get("project").json()["encoded"] == 2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert children
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    wait(lambda: not any(alive(child) for child in children), 20)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_server_ends_at_once_though_a_page_listens(tmp_path):
    draw(tmp_path / "photos", 1)
    with (
        command(tmp_path / "photos", stderr=subprocess.STDOUT) as (process, client),
        client.stream("GET", "events") as events,
    ):
        process.send_signal(signal.SIGINT)
        assert list(events.iter_lines()) is not None
        said, _ = process.communicate(timeout=60)
    # Seen once without a word: the status tells then whether it crashed.
    assert (process.returncode, "interrupted" in said) == (130, True)
    assert "Traceback" not in said
    assert "ERROR" not in said


def test_a_port_that_is_taken_says_by_whom(tmp_path):
    with serving(None, tmp_path / "first") as served:
        port = int(served.url.rpartition(":")[2])
        with pytest.raises(SppnetError, match=rf"--port {port}: found sppnet serve .* 'first' there"):
            serve(project=tmp_path / "second", port=port)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SppnetError, match="found another program there, expected a free port"):
            serve(project=tmp_path / "second", port=port)


def test_a_project_is_open_in_one_server_alone(tmp_path):
    held = pytest.raises(SppnetError, match="found it open in another server")
    with serving(None, tmp_path / "project"), held:
        Studio(Opened(None, tmp_path / "project"))
    with serving(None, tmp_path / "project") as served:
        assert served.get("project")["photos"] == 0


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"host": "0.0.0.0"}, "found no token"),
        ({"token": "short"}, "expected 8 or more"),
        ({"folder": Path("nowhere")}, "no such folder"),
        ({"model": "nothing-like-it"}, "nothing-like-it"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(tmp_path, monkeypatch, asked, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SppnetError, FileNotFoundError), match=words):
        serve(**asked)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_photos_waits_for_dropped_ones(tmp_path):
    (tmp_path / "empty").mkdir()
    with serving(tmp_path / "empty", tmp_path / "project") as served:
        assert served.get("project")["photos"] == 0
        assert served.get("results")["photos"] == {}
        answer = served.client.post("photos", content=jpeg(), headers=JPEG)
        assert answer.status_code == 201
        assert served.encoded()["photos"] == 1


def test_a_photo_that_vanishes_is_told_of_and_its_boxes_are_kept(tmp_path):
    draw(tmp_path / "photos", 3)
    with serving(tmp_path / "photos", tmp_path / "project") as served:
        served.encoded()
        photo = served.ids()["01.jpg"]
        served.put(photo, [([10, 10, 60, 60], "cat")])
        (tmp_path / "photos" / "01.jpg").unlink()
        answer = served.client.get(f"photos/{photo}/image")
        assert answer.status_code == 404
        assert "01.jpg" in answer.json()["error"]["message"]
        assert served.client.post("search", json={"photo": photo, "box": [0, 0, 9, 9]}).status_code == 404
        assert len(served.get(f"photos/{photo}/boxes")["boxes"]) == 1
    draw(tmp_path / "photos", 1, start=4)
    with serving(tmp_path / "photos", tmp_path / "project") as served:
        served.wait(lambda project: project["photos"] == 3)
        assert sorted(served.ids()) == ["00.jpg", "02.jpg", "04.jpg"]
    draw(tmp_path / "photos", 2)
    with serving(tmp_path / "photos", tmp_path / "project") as served:
        served.wait(lambda project: project["photos"] == 4)
        assert served.ids()["01.jpg"] == photo
        assert len(served.get(f"photos/{photo}/boxes")["boxes"]) == 1


def test_a_photo_that_vanishes_is_left_out_of_a_fit(tmp_path):
    targets = draw(tmp_path / "photos", 8)
    with serving(tmp_path / "photos", tmp_path / "project") as served:
        served.encoded()
        label_all(served, targets)
        (tmp_path / "photos" / "03.jpg").unlink()
        fit = served.fit()
        assert fit["state"] == "done", fit
        assert fit["quality"]["photos"] == 7


def test_a_photo_that_cannot_be_read_is_marked(tmp_path):
    draw(tmp_path / "photos", 1)
    (tmp_path / "photos" / "broken.jpg").write_bytes(jpeg()[:5000])
    (tmp_path / "photos" / "text.png").write_text("no image")
    with serving(tmp_path / "photos", tmp_path / "project") as served:
        served.wait(lambda project: project["encoded"] == 1)
        ids = served.ids()
        for name in ("broken.jpg", "text.png"):
            served.wait(lambda _, name=name: served.get(f"photos/{ids[name]}")["state"] == "failed")
            assert served.get(f"photos/{ids[name]}")["error"]
            assert served.client.get(f"photos/{ids[name]}/thumbnail").status_code == 422
        assert served.get("photos")["total"] == 3


def test_an_engine_that_cannot_start_is_told_of_and_boxes_are_saved(tmp_path, monkeypatch):
    draw(tmp_path / "photos", 1)
    monkeypatch.setattr("sppnet.serve.studio.ENGINE", "sppnet.serve.engine:Nothing")
    with serving(tmp_path / "photos", tmp_path / "project", processes=True) as served:
        (note,) = served.wait(lambda project: project["notes"])["notes"]
        assert "nothing can be computed" in note
        photo = served.ids()["00.jpg"]
        assert served.put(photo, [([1, 1, 20, 20], "cat")])["boxes"]


def test_a_full_disk_saves_nothing_and_says_so(tmp_path):
    draw(tmp_path / "photos", 1)
    with serving(tmp_path / "photos", tmp_path / "project") as served:
        served.encoded()
        photo = served.ids()["00.jpg"]
        before = served.put(photo, [([1, 1, 50, 50], "cat")])
        store = served.studio.store
        (pages,) = store.row("PRAGMA page_count")
        store.rows(f"PRAGMA max_page_count = {pages}")
        many = [{"box": [i, 1, i + 40, 60], "label": f"class {i}"} for i in range(500)]
        content = {"revision": before["revision"], "boxes": many}
        answer = served.client.put(f"photos/{photo}/boxes", json=content)
        assert answer.status_code == 507
        assert "full" in answer.json()["error"]["message"]
        assert served.get(f"photos/{photo}/boxes")["boxes"] == before["boxes"]
        store.rows("PRAGMA max_page_count = 1000000")
        assert served.client.put(f"photos/{photo}/boxes", json=content).status_code == 200


def test_an_xml_file_that_cannot_be_written_is_written_later(tmp_path, monkeypatch):
    draw(tmp_path / "photos", 2)
    with serving(tmp_path / "photos", tmp_path / "project", annotations="beside") as served:
        served.encoded()
        first, second = served.ids().values()

        def full(path, entry):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(annotations, "write_annotation", full)
            put = served.put(first, [([1, 1, 50, 50], "cat")])
        assert "No space left" in put["warning"]
        assert not (tmp_path / "photos" / "00.xml").exists()
        assert served.put(second, [([1, 1, 50, 50], "cat")])["warning"] is None
        assert (tmp_path / "photos" / "01.xml").exists()
    assert (tmp_path / "photos" / "00.xml").exists()


def test_a_file_of_someone_else_is_put_aside_and_not_lost(tmp_path):
    draw(tmp_path / "photos", 1)
    (tmp_path / "photos" / "00.xml").write_text("<notes>mine</notes>")
    with serving(tmp_path / "photos", tmp_path / "project", annotations="beside") as served:
        served.encoded()
        served.put(served.ids()["00.jpg"], [([1, 1, 50, 50], "cat")])
        assert "<annotation>" in (tmp_path / "photos" / "00.xml").read_text()
    assert (tmp_path / "project" / "replaced" / "00.xml").read_text() == "<notes>mine</notes>"


def test_annotations_beside_photos_are_taken_in_once(tmp_path):
    targets = draw(tmp_path / "photos", 3)
    with serving(tmp_path / "photos", tmp_path / "first", annotations="beside") as served:
        served.encoded()
        label_all(served, targets)
    with serving(tmp_path / "photos", tmp_path / "second") as served:
        project = served.wait(lambda project: any("3 photos taken in" in note for note in project["notes"]))
        assert project["boxes"] == sum(len(target.labels) for target in targets.values())
        served.put(served.ids()["00.jpg"], [])
    with serving(tmp_path / "photos", tmp_path / "second") as served:
        served.encoded()
        assert served.get(f"photos/{served.ids()['00.jpg']}/boxes")["boxes"] == []


def test_boxes_that_were_put_right_are_not_mixed_with_those_they_were_made_of(tmp_path):
    photos = tmp_path / "photos"
    targets = draw(photos, 3)
    with serving(photos, tmp_path / "first", annotations="beside") as served:
        served.encoded()
        label_all(served, targets)
    with serving(photos, photos / PROJECT) as served:
        served.wait(lambda project: any("3 photos taken in" in note for note in project["notes"]))
        served.put(served.ids()["00.jpg"], [])
    assert len(read_dataset(photos / PROJECT)[0].target.labels) == 0
    with pytest.raises(DatasetError, match=r"found the boxes of sppnet serve .* and others \(00.xml\)"):
        read_dataset(photos)
    assert sum(len(sample.target.labels) for sample in read_dataset(photos, pages=False)) == sum(
        len(target.labels) for target in targets.values()
    )
    # Whoever opens the photos anew takes in what lies beside them, not what another page made of it.
    with serving(photos, tmp_path / "third") as served:
        served.wait(lambda project: any("3 photos taken in" in note for note in project["notes"]))
    for path in photos.glob("*.xml"):
        path.unlink()
    (photos / "classes.txt").write_text("cup\n")
    assert len(read_dataset(photos)) == 3
    (photos / "00.txt").write_text("0 .5 .5 .2 .2\n")
    with pytest.raises(DatasetError, match=f"name {photos / PROJECT} for those of the page"):
        read_dataset(photos)


def test_what_is_computed_may_be_removed(tmp_path):
    draw(tmp_path / "photos", 2)
    with serving(tmp_path / "photos", tmp_path / "project", processes=True) as served:
        served.encoded()
    for path in tmp_path.glob("project/regions.sqlite*"):
        path.unlink()
    shutil.rmtree(tmp_path / "project" / "maps")
    with serving(tmp_path / "photos", tmp_path / "project") as served:
        served.wait(lambda _: len(list((tmp_path / "project" / "maps").glob("*.safetensors"))) == 2)
        served.encoded()
        asked = {"photo": served.ids()["00.jpg"], "box": [10, 10, 90, 90]}
        assert served.client.post("search", json=asked).json()["regions"]
        assert served.get("project")["notes"] == []


def test_the_demonstration_opens_its_scenes():
    with command("--demo") as (_, client):
        wait(lambda: client.get("project").json()["photos"] == 40)
        project = client.get("project").json()
        assert (project["demo"], project["name"], project["notes"]) == (True, "Demo", [])
        place = Path(project["project_folder"])
        assert place.is_dir()


def test_names_with_markup_are_names(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    name = "<img src=x onerror=alert(1)> & \"quoted\" 'ö'.jpg"
    Image.fromarray(noise()).save(folder / name)
    label = "<b>cat</b>"
    with serving(folder, tmp_path / "project") as served:
        served.encoded()
        photo = served.ids()[name]
        assert served.put(photo, [([1, 1, 40, 40], label)])["warning"] is None
        assert served.get("project")["classes"][0]["name"] == label
        answer = served.client.get(f"photos/{photo}")
        assert answer.headers["content-type"] == "application/json"
        for format in ("csv", "coco", "voc", "yolo", "labelstudio", "json"):
            assert served.client.get(f"export?what=boxes&format={format}").status_code == 200


def test_names_that_are_no_text_are_served(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(noise()).save(folder / "a.jpg")
    os.rename(folder / "a.jpg", os.path.join(os.fsencode(folder), b"caf\xe9.jpg"))
    with serving(folder, tmp_path / "project") as served:
        served.encoded()
        ((name, photo),) = served.ids().items()
        assert name == "caf\\xe9.jpg"
        assert served.client.get(f"photos/{photo}/thumbnail").status_code == 200
        served.put(photo, [([1, 1, 40, 40], "cat")])


def test_ten_thousand_photos_are_listed_quickly(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    content = jpeg(noise())
    for i in range(10_000):
        (folder / f"{i:05d}.jpg").write_bytes(content)
    begun = time.monotonic()
    with serving(folder, tmp_path / "project") as served:
        served.wait(lambda project: project["photos"] == 10_000)
        assert time.monotonic() - begun < 10
        for query in ("", "?offset=9800", "?text=99", "?order=doubt&show=unlabelled"):
            begun = time.monotonic()
            page = served.get(f"photos{query}")
            assert time.monotonic() - begun < 2
            assert 0 < len(page["photos"]) <= 200
            assert page["photos"][0]["width"] == 64


def test_a_model_of_another_version_is_not_used(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "old.safetensors"
    save_file({"a": noise()}, path, {"format": "sppnet-detector", "version": "1"})
    draw(tmp_path / "photos", 1)
    with serving(tmp_path / "photos", tmp_path / "project", model=path) as served:
        project = served.wait(lambda project: any("model not used" in note for note in project["notes"]))
        assert "made by another version of sppnet" in " ".join(project["notes"])
        assert project["model"] is None
        served.encoded()


def test_a_given_model_finds_objects_at_once(tmp_path):
    from sppnet.models import model_path

    draw(tmp_path / "photos", 2)
    with serving(tmp_path / "photos", tmp_path / "project", model=model_path("animals")) as served:
        served.wait(lambda project: project["model"] is not None)
        assert served.results(2)["classes"] == ["cat", "cow", "dog", "horse", "person", "sheep"]


def test_a_model_file_that_vanishes_leaves_new_photos_to_be_encoded(tmp_path):
    from sppnet.models import model_path

    draw(tmp_path / "photos", 1)
    with serving(tmp_path / "photos", tmp_path / "project", model=model_path("animals")) as served:
        served.results(1)
        for path in (tmp_path / "project" / "models").iterdir():
            path.unlink()
        waiting = "SELECT 1 FROM photos WHERE state = 'waiting'"
        for number in (1, 2):
            served.client.post("photos", content=jpeg(noise(number, 96, 128)), headers=JPEG)
            wait(lambda: served.studio.store.row(waiting) is None)


def test_a_project_of_another_version_is_refused(tmp_path):
    with serving(None, tmp_path / "project") as served:
        served.studio.store.rows("PRAGMA user_version = 99")
    with pytest.raises(SppnetError, match="found a project of version 99"):
        Studio(Opened(None, tmp_path / "project"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "project.sqlite").write_text("no database at all, only text" * 100)
    with pytest.raises(SppnetError, match="found no project file"):
        Studio(Opened(None, tmp_path / "other"))


def test_who_goes_away_in_the_middle_leaves_nothing(tmp_path):
    with serving(None, tmp_path / "project") as served:
        host, port = served.url[7:].split(":")
        content = jpeg()
        head = f"POST /api/v1/photos HTTP/1.1\r\nHost: {host}:{port}\r\nOrigin: {served.url}\r\n"
        head += f"Content-Type: image/jpeg\r\nContent-Length: {len(content)}\r\n\r\n"
        incoming = tmp_path / "project" / "incoming"
        with socket.create_connection((host, int(port))) as line:
            line.sendall(head.encode() + content[:1000])
            wait(lambda: any(incoming.iterdir()))
        wait(lambda: not any(incoming.iterdir()))
        assert served.get("photos")["total"] == 0
        assert served.client.post("photos", content=content, headers=JPEG).status_code == 201


def test_too_many_at_once_are_told_to_come_again(tmp_path):
    draw(tmp_path / "photos", 1)
    content = jpeg()
    with serving(tmp_path / "photos", tmp_path / "project") as served:
        served.encoded()
        with ThreadPoolExecutor(100) as pool:
            answers = list(
                pool.map(lambda _: served.client.post("embed", content=content, headers=JPEG), range(100))
            )
        assert {answer.status_code for answer in answers} == {200, 429}
        refused = [answer for answer in answers if answer.status_code == 429]
        assert all(answer.headers["retry-after"] == "1" for answer in refused)
        assert sum(answer.status_code == 200 for answer in answers) >= 20
        assert served.client.post("embed", content=content, headers=JPEG).status_code == 200
        assert not list((tmp_path / "project" / "incoming").iterdir())


def test_who_sends_nothing_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "_PATIENCE", 0.5)
    with serving(None, tmp_path / "project") as served:
        host, port = served.url[7:].split(":")
        head = f"POST /api/v1/photos HTTP/1.1\r\nHost: {host}:{port}\r\nOrigin: {served.url}\r\n"
        head += "Content-Type: image/jpeg\r\nContent-Length: 1000\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=20) as line:
            line.sendall(head.encode())
            assert b" 408 " in line.recv(1000).partition(b"\r\n")[0]


def test_one_fit_goes_on_at_a_time_and_can_be_ended(tmp_path):
    targets = draw(tmp_path / "photos", 12)
    with serving(tmp_path / "photos", tmp_path / "project", processes=True) as served:
        served.encoded()
        label_all(served, targets)
        fit = served.client.post("fits", json={}).json()["id"]
        assert served.client.post("fits", json={}).status_code == 409
        ended = served.client.delete(f"fits/{fit}").json()
        assert ended["state"] == "cancelled"
        assert served.get("models") == []
        assert served.fit()["state"] == "done"
        assert served.client.delete("fits/unknown").status_code == 404


@pytest.mark.long
def test_labelling_and_search_go_on_while_a_fit_runs(tmp_path):
    targets = draw(tmp_path / "photos", 12)
    with serving(tmp_path / "photos", tmp_path / "project", processes=True) as served:
        served.encoded()
        label_all(served, targets)
        photo = served.ids()["00.jpg"]
        served.client.post("fits", json={})
        times = []
        while served.get("project")["fit"]["state"] in ("waiting", "running"):
            begun = time.monotonic()
            boxes = served.get(f"photos/{photo}/boxes")
            served.client.put(f"photos/{photo}/boxes", json={k: boxes[k] for k in ("revision", "boxes")})
            assert (
                served.client.post("search", json={"photo": photo, "box": [9, 9, 99, 99]}).status_code == 200
            )
            times.append(time.monotonic() - begun)
        assert len(times) >= 3
        assert sorted(times)[len(times) // 2] < 1


def test_a_fit_of_which_no_photo_can_be_read_fails_and_is_told(tmp_path):
    targets = draw(tmp_path / "photos", 6)
    with serving(tmp_path / "photos", tmp_path / "project") as served:
        served.encoded()
        label_all(served, targets)
        for name in targets:
            (tmp_path / "photos" / name).write_bytes(b"no image any more")
        fit = served.fit()
        assert fit["state"] == "failed"
        assert "cannot be read" in fit["error"]
        assert served.get("project")["model"] is None
