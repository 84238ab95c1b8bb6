"""Drives the page of ``sppnet serve`` in Chromium: a server, and a person with mouse and keys."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from sppnet.boxes import iou
from sppnet.images import write_image

ROOT = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDE, NARROW = {"width": 1440, "height": 900}, {"width": 400, "height": 800}
SCREENS = ("photos", "label", "fit", "results", "quality", "search", "export")


def browser_path():
    """Return the path of Chromium; skip where there is none, or nothing to drive it."""
    pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium")
    return found


def draw_scenes(folder, count):
    """Write scenes of the demonstration; return the faces in each by its file's name."""
    from sppnet.serve.demo import scene

    folder.mkdir()
    truth = {}
    for number in range(count):
        name = f"scene-{number + 1:02d}.jpg"
        drawn = scene(number)
        write_image(folder / name, drawn.pixels)
        truth[name] = drawn.target
    return truth


def boxes_of(target, label):
    """Return the boxes of one class."""
    return [
        list(map(float, box)) for box, name in zip(target.boxes, target.labels, strict=True) if name == label
    ]


def is_one(target, label, box, least=0.4):
    """Say whether a box lies on a face of that class."""
    faces = boxes_of(target, label)
    return bool(faces) and bool(iou(np.float32([box]), np.float32(faces)).max() >= least)


class Server:
    """``sppnet serve`` in a process of its own, which can be killed and started again at the same port."""

    def __init__(self, folder, *options):
        self.folder, self.options, self.port, self.process = folder, options, 0, None

    def start(self):
        command = [
            sys.executable,
            "-m",
            "sppnet",
            "serve",
            str(self.folder),
            "--no-open",
            "--port",
            str(self.port),
        ]
        self.process = subprocess.Popen(
            [*command, *self.options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        said = self.process.stdout.readline()
        match = re.search(r"http://[^:]+:(\d+)/", said)
        assert match, said + self.process.stdout.read()
        self.port = int(match[1])
        return self

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/"

    def get(self, path):
        with urllib.request.urlopen(f"{self.url}api/v1/{path}") as answer:
            return answer.read()

    def kill(self):
        """Take the process and its children away at once, as a power cut would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        self.kill()


_STILL = """() => new Promise(done => {
    const place = () => JSON.stringify(document.querySelector(".stage .photo")?.getBoundingClientRect());
    const before = place();
    requestAnimationFrame(() => requestAnimationFrame(() => done(before && before === place())));
})"""


class Person:
    """Someone at the page: knows places of photos rather than of the screen."""

    def __init__(self, page, url):
        self.page, self.url, self.troubles = page, url.rstrip("/") + "/", []
        page.on("console", lambda message: message.type in ("error", "warning") and self.note(message.text))
        page.on("pageerror", lambda error: self.note(str(error)))

    def note(self, words):
        self.troubles.append(words)

    def open(self, screen="photos", photo=None):
        self.page.goto(f"{self.url}#/{screen}" + (f"/{photo}" if photo else ""))
        return self

    def see(self, selector):
        found = self.page.locator(selector).first
        found.wait_for(timeout=60_000)
        return found

    def photo_shown(self):
        """Wait until the photo is there, and where it stays."""
        self.see(".stage img.shown")
        self.page.wait_for_timeout(100)
        self.page.wait_for_function(_STILL)

    def place(self, x, y):
        """Return the pixel of the screen at a pixel of the photo."""
        photo = self.page.locator(".stage .photo")
        shown, size = photo.bounding_box(), photo.evaluate("node => [node.offsetWidth, node.offsetHeight]")
        return shown["x"] + x / size[0] * shown["width"], shown["y"] + y / size[1] * shown["height"]

    def drag(self, start, end):
        """Press at a place of the photo, let go at another."""
        (x1, y1), (x2, y2), mouse = self.place(*start), self.place(*end), self.page.mouse
        mouse.move(x1, y1)
        mouse.down()
        mouse.move((x1 + x2) / 2, (y1 + y2) / 2, steps=2)
        mouse.move(x2, y2, steps=2)
        mouse.up()

    def draw(self, box):
        self.drag(box[:2], box[2:])

    def click(self, x, y):
        self.page.mouse.click(*self.place(x, y))

    def name(self, label):
        self.see(".naming input").fill(label)
        self.page.keyboard.press("Enter")

    def saved(self):
        """Wait until every box is with the server."""
        self.page.wait_for_function(
            "() => document.querySelector('.saved')?.textContent.trim() === 'Saved'", timeout=60_000
        )

    def text(self, selector):
        return self.see(selector).inner_text()


def label_faces(person, truth, label, least):
    """Draw the first face of a class, then answer what looks like it by the truth until there are enough."""
    wait_until_read(person)
    name, target = next((name, target) for name, target in truth.items() if boxes_of(target, label))
    person.see(f'.strip button[title="{name}"]').click()
    person.see(f'.bar .title[title="{name}"]')
    person.photo_shown()
    with person.page.expect_response("**/api/v1/search") as answer:
        person.draw(boxes_of(target, label)[0])
        if (
            person.page.locator(".naming input").count()
            or not person.page.locator(f'.class:has-text("{label}")').count()
        ):
            person.name(label)
    names = {photo["id"]: photo["name"] for photo in photos_of(person)}
    yes = 1
    for region in answer.value.json()["regions"]:
        if yes >= least:
            break
        right = is_one(truth[names[region["photo"]]], label, region["box"])
        person.page.keyboard.press("y" if right else "n")
        yes += right
    person.saved()
    return yes


def wait_until_read(person):
    """Wait until the server has read all photos, and searches them."""
    for _ in range(300):
        project = person.page.evaluate("() => fetch('api/v1/project').then(answer => answer.json())")
        if project["encoded"] == project["photos"]:
            return
        person.page.wait_for_timeout(200)
    pytest.fail(
        f"{project['encoded']} of {project['photos']} photos were read in a minute: {project['notes']}"
    )


def photos_of(person):
    return person.page.evaluate("() => fetch('api/v1/photos?limit=1000').then(answer => answer.json())")[
        "photos"
    ]


def boxes_kept(person):
    """Return all boxes that the server keeps, by the photo's name."""
    kept = {}
    for photo in photos_of(person):
        fetched = f"() => fetch('api/v1/photos/{photo['id']}/boxes').then(answer => answer.json())"
        kept[photo["name"]] = person.page.evaluate(fetched)["boxes"]
    return kept


def wait_for_results(person):
    person.page.wait_for_url("**/#/results", timeout=120_000)
    person.see("h1:has-text('found')")


def add_dogs_and_fit(person, truth):
    """Make a second class of the faces of dogs, and fit."""
    person.see('button:has-text("Add class")').click()
    person.see('[aria-label="Name of the new class"]').fill("dog")
    person.page.keyboard.press("Enter")
    label_faces(person, truth, "dog", 6)
    person.see("header .fit").click()
    wait_for_results(person)


def open_with_all_found(person):
    """Lower all thresholds on the screen of results, and open the most doubtful photo."""
    person.see(".thresholds input")
    for slider in person.page.locator(".thresholds input").all():
        slider.fill("0.05")
    person.see("a.photo").click()
    person.photo_shown()
