"""Servers that run in this process, on a port of their own, and clients that talk to them."""

import contextlib
import io
import json
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import pytest
from PIL import Image

from sppnet.serve.app import make_app
from sppnet.serve.demo import scene
from sppnet.serve.errors import Busy
from sppnet.serve.running import server_of
from sppnet.serve.security import Rules
from sppnet.serve.studio import Opened, Studio
from sppnet.serve.workers import URGENT, _plain

# A process of the server's takes so many seconds to start where others run beside it.
PATIENCE = 120


class Served(NamedTuple):
    """A server that runs, and a client that is to it what its page is."""

    studio: Studio
    client: httpx.Client
    url: str
    token: str

    def ids(self):
        """Return the ids of the photos by their names."""
        return {photo["name"]: photo["id"] for photo in self.get("photos?limit=1000")["photos"]}

    def get(self, path):
        """Return the JSON at a path of the API."""
        answer = self.client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def put(self, photo, boxes, **more):
        """Give a photo these boxes, each with its label."""
        revision = self.get(f"photos/{photo}/boxes")["revision"]
        content = {"revision": revision, "boxes": [{"box": b, "label": label} for b, label in boxes], **more}
        answer = self.client.put(f"photos/{photo}/boxes", json=content)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait(self, ready):
        """Wait until something is true of the project, and return the project."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            project = self.get("project")
            if ready(project):
                return project
            time.sleep(0.05)
        raise AssertionError(f"never came: {project}")

    def encoded(self):
        """Wait until all photos are encoded."""
        return self.wait(lambda project: project["photos"] and project["encoded"] == project["photos"])

    def fit(self):
        """Fit, wait for the end, and return it."""
        answer = self.client.post("fits", json={})
        assert answer.status_code == 202, answer.text
        self.wait(lambda project: project["fit"]["state"] not in ("waiting", "running"))
        return self.get(f"fits/{answer.json()['id']}")

    def results(self, count):
        """Wait until the model in use was asked about so many photos, and return the results."""
        end = time.monotonic() + PATIENCE
        while self.studio.store.row("SELECT count(*) FROM results")[0] < count:
            assert time.monotonic() < end, "no results came"
            time.sleep(0.05)
        return self.get("results")


class Here:
    """A worker without a process of its own, which starts at once: it answers in threads of this one."""

    alive = True

    def __init__(self, kind, told=lambda event: None):
        self.kind, self.told, self.ready = kind, told, False
        self.lock, self.making, self.load, self.handler = threading.Lock(), threading.Lock(), 0, None
        self.pool = ThreadPoolExecutor(kind.threads)

    def start(self):
        self.pool.submit(self.made)

    def made(self):
        with self.making:
            if self.handler is None:
                module, name = self.kind.make.split(":")
                self.handler = getattr(import_module(module), name)(*self.kind.arguments)
                self.handler.tell = self.told
                self.ready = True
            return self.handler

    def ask(self, method, *arguments, rank=URGENT, limit=None):
        if rank == URGENT and self.load >= self.kind.capacity:
            raise Busy(self.load)
        self.count(rank == URGENT)
        answer = self.pool.submit(self.answered, method, arguments)
        answer.add_done_callback(lambda _: self.count(-(rank == URGENT)))
        return answer

    def count(self, more):
        with self.lock:
            self.load += more

    def answered(self, method, arguments):
        try:
            return getattr(self.made(), method)(*arguments)
        except Exception as error:
            raise _plain(error) from None

    def kill(self):
        self.pool.shutdown(cancel_futures=True)
        self.pool = ThreadPoolExecutor(self.kind.threads)

    def close(self):
        self.pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def serving(folder, project, rules=None, *, processes=False, **more):
    """Lend a server of a folder; with processes of its own, as people have it, if asked."""
    if not processes:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sppnet.serve.studio.Worker", Here)
            studio = Studio(Opened(folder, project, **more))
    else:
        studio = Studio(Opened(folder, project, **more))
    with running(studio, rules or Rules()) as served:
        yield served


@contextlib.contextmanager
def running(studio, rules):
    """Lend the server of a project."""
    place = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    place.bind(("127.0.0.1", 0))
    place.listen(1024)
    server = server_of(make_app(studio, rules), studio.hub.end)
    thread = threading.Thread(target=server.run, args=([place],))
    thread.start()
    url = f"http://127.0.0.1:{place.getsockname()[1]}"
    try:
        with httpx.Client(base_url=f"{url}/api/v1/", headers={"Origin": url}, timeout=PATIENCE) as client:
            yield Served(studio, client, url, rules.token)
    finally:
        server.should_exit = True
        thread.join(30)
        place.close()
        assert not thread.is_alive()


def draw(folder, count, start=0):
    """Write scenes of the demonstration as photos, and return their targets by name."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = {}
    for number in range(start, start + count):
        drawn = scene(number)
        Image.fromarray(drawn.pixels).save(folder / f"{number:02d}.jpg", quality=88)
        targets[f"{number:02d}.jpg"] = drawn.target
    return targets


def label_all(served, targets, names=None):
    """Draw all boxes of photos, as a person would who labels them."""
    ids = served.ids()
    for name in names or targets:
        target = targets[name]
        served.put(ids[name], list(zip(target.boxes.tolist(), target.labels, strict=True)), reviewed=True)


def jpeg(pixels=None, **more):
    """Return the bytes of a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(scene(0).pixels if pixels is None else pixels).save(file, "JPEG", **more)
    return file.getvalue()


def noise(seed=0, height=48, width=64):
    """Return a small picture of noise."""
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def events(served, path, until):
    """Return the data of server-sent events until one of them satisfies a condition."""
    found = []
    with served.client.stream("GET", path) as answer:
        for line in answer.iter_lines():
            if line.startswith("data:"):
                found.append(json.loads(line[5:]))
                if until(found[-1]):
                    return found
    return found


def copied(source, place):
    """Return a copy of a folder."""
    return Path(shutil.copytree(source, place))
