"""How quick `sppnet serve` is, and how it stands many clients; on loopback, with drawn scenes. Run as::

    python benchmarks/serve.py [--only WORD] [--minutes 60] [--json FILE]

Each part starts a server of its own, as people start it. ``--minutes`` is how long mixed traffic goes on, by
default one minute. `detect run` is measured in a process of its own, as the seconds that it takes for many
photos less those that it takes for few.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
from PIL import Image

from common import commit, machine, table, write_json
from sppnet.features.backbone import Backbone
from sppnet.features.graph import STAGES, STRIDES
from sppnet.parallel import thread_count
from sppnet.serve import regions
from sppnet.serve.demo import scene
from sppnet.serve.settings import NETWORK, SIDE

JPEG = {"Content-Type": "image/jpeg"}
Row = tuple[str, str, str]


class Client:
    """A server in a process of its own, and what a page would ask it.

    Parameters
    ----------
    folder : Path
        Its photos.
    more : str
        Other arguments of the command.
    """

    def __init__(self, folder: Path, *more: str) -> None:
        self.begun = time.perf_counter()
        line = [sys.executable, "-m", "sppnet", "serve", str(folder), "--no-open", "--port", "0", *more]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        found = re.search(r"http://\S+", self.process.stdout.readline())
        assert found is not None
        url = found[0].rstrip("/")
        limits = httpx.Limits(max_connections=400, max_keepalive_connections=400)
        self.http = httpx.Client(
            base_url=f"{url}/api/v1/", headers={"Origin": url}, timeout=600, limits=limits
        )

    def get(self, path: str) -> Any:
        answer = self.http.get(path)
        answer.raise_for_status()
        return answer.json()

    def send(self, method: str, path: str, **content: Any) -> Any:
        answer = self.http.request(method, path, **content)
        answer.raise_for_status()
        return answer.json()

    def wait(self, ready: Callable[[dict[str, Any]], bool]) -> float:
        """Wait until something is true of the project, and return the seconds since the server's start."""
        while not ready(self.get("project")):
            time.sleep(0.02)
        return time.perf_counter() - self.begun

    def encoded(self, count: int) -> float:
        return self.wait(lambda project: project["encoded"] == count)

    def label(self, count: int, kinds: Sequence[str] = ("cat", "dog", "panda")) -> int:
        """Draw the true boxes of some classes in the first photos, and return how many."""
        drawn = 0
        for photo in self.get("photos?limit=1000")["photos"][:count]:
            target = scene(int(Path(photo["name"]).stem)).target
            rows = zip(target.boxes.tolist(), target.labels, strict=True)
            boxes = [{"box": box, "label": label} for box, label in rows if label in kinds]
            revision = self.get(f"photos/{photo['id']}/boxes")["revision"]
            content = {"revision": revision, "boxes": boxes, "reviewed": True}
            self.send("PUT", f"photos/{photo['id']}/boxes", json=content)
            drawn += len(boxes)
        return drawn

    def fit(self) -> float:
        """Fit, and return the seconds until it is done."""
        begun = time.perf_counter()
        fit = self.send("POST", "fits", json={})["id"]
        while True:
            state = self.get(f"fits/{fit}")
            if state["state"] not in ("waiting", "running"):
                assert state["state"] == "done", state
                return time.perf_counter() - begun
            time.sleep(0.02)

    def memory(self) -> float:
        """Return the memory of the server and its processes, in MB: what each holds for itself alone."""
        return sum(private_megabytes(pid) for pid in family(self.process.pid))

    def close(self) -> None:
        self.http.close()
        self.process.terminate()
        self.process.wait(30)


def family(pid: int) -> list[int]:
    """Return a process and all that it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    below = [int(child) for child in children.read_text().split()] if children.exists() else []
    return [pid, *(other for child in below for other in family(child))]


def private_megabytes(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    kinds = ("Private_Clean:", "Private_Dirty:")
    return sum(int(line.split()[1]) for line in lines if line.startswith(kinds)) / 1024


@contextmanager
def server(count: int, *more: str) -> Iterator[Client]:
    """Lend a server of so many scenes."""
    with TemporaryDirectory() as place:
        folder = Path(place) / "photos"
        draw(folder, count)
        client = Client(folder, *more)
        try:
            yield client
        finally:
            client.close()


def draw(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(scene(number).pixels).save(folder / f"{number:04d}.jpg", quality=88)


def start(args: argparse.Namespace) -> list[Row]:
    """From the command to the list of photos, of those that were never opened before."""
    seconds = []
    for _ in range(3):
        with server(40) as client:
            client.http.get(str(client.http.base_url).replace("/api/v1/", "/"))
            seconds.append(client.wait(lambda project: project["photos"] == 40))
    return [("from the command to the page and its list of 40 photos", f"{max(seconds):.2f} s", "2 s")]


def search(args: argparse.Namespace) -> list[Row]:
    """Regions that are like a box just drawn, 40 photos encoded."""
    with server(40) as client:
        ready = client.encoded(40)
        photos = client.get("photos")["photos"]
        seconds = []
        for photo in photos:
            box = scene(int(Path(photo["name"]).stem)).target.boxes[0].tolist()
            begun = time.perf_counter()
            client.send("POST", "search", json={"photo": photo["id"], "box": box})
            seconds.append(time.perf_counter() - begun)
    first, median = 1000 * seconds[0], 1000 * statistics.median(seconds)
    shown = f"{first:.0f} ms the first, {median:.0f} ms the median, {1000 * max(seconds):.0f} ms at most"
    return [
        ("similar regions in 40 photos", shown, "100 ms"),
        ("40 photos encoded after", f"{ready:.1f} s", ""),
    ]


def many_regions(args: argparse.Namespace) -> list[Row]:
    """Regions that are like one, of 10,000 photos: the index by itself, with vectors drawn at random."""
    random = np.random.default_rng(0)
    count, length = 10_000, regions.LENGTH
    with TemporaryDirectory() as place:
        index = regions.RegionIndex(Path(place) / "regions.sqlite")
        for photo in range(count):
            vectors = random.standard_normal((regions.WINDOWS, length)).astype(np.float16)
            boxes = np.sort(random.integers(0, 480, (regions.WINDOWS, 2, 2)), axis=1).reshape(-1, 4)
            index._append(f"{photo}", "", f"{photo}", boxes.astype(np.float32), vectors)
        seconds = []
        for _ in range(6):
            query = random.standard_normal((1, length)).astype(np.float32)
            begun = time.perf_counter()
            index.nearest(query / np.linalg.norm(query), "0", (0, 0, 50, 50), 50)
            seconds.append(time.perf_counter() - begun)
    shown = f"{seconds[0]:.2f} s the first, {statistics.median(seconds[1:]):.2f} s the median"
    return [(f"similar regions in {count:,} photos, {count * regions.WINDOWS:,} vectors", shown, "")]


def fits(args: argparse.Namespace) -> list[Row]:
    """A first fit, whose process is to be started, and a second one to the same photos."""
    with server(40) as client:
        client.encoded(40)
        drawn = client.label(40)
        first, second = client.fit(), client.fit()
    title = f"fit of 40 photos, {drawn} boxes, 3 classes, encoded before"
    return [(title, f"{first:.1f} s, again {second:.1f} s", "10 s")]


def large(args: argparse.Namespace) -> list[Row]:
    """A fit to many photos."""
    with server(500) as client:
        ready = client.encoded(500)
        drawn = client.label(500)
        seconds = client.fit()
    title = f"fit of 500 photos, {drawn} boxes, 3 classes, encoded before"
    return [(title, f"{seconds:.1f} s", "60 s"), ("500 photos encoded after", f"{ready:.1f} s", "")]


def detect(args: argparse.Namespace) -> list[Row]:
    """Images of 16 clients, against the same images by the command line."""
    with TemporaryDirectory() as place, server(40) as client:
        client.encoded(40)
        client.label(40)
        client.fit()
        client.wait(lambda project: project["model"] is not None)
        model = client.get("models")[-1]["id"]
        file = Path(place) / "model.safetensors"
        file.write_bytes(client.http.get(f"models/{model}/file").content)
        draw(Path(place) / "photos", args.images)
        images = [path.read_bytes() for path in sorted((Path(place) / "photos").iterdir())]
        time.sleep(3)  # The photos of the project are looked at first.
        one, _ = many(client, images[: len(images) // 4], 1)
        rate, seconds = many(client, images, 16)
        again, _ = many(client, images, 16)
        command = command_rate(file, Path(place) / "photos", args.images)
    slowest, mean = float(np.percentile(seconds, 99)), 1 / max(rate, again)
    return [
        ("images a second by POST /detect, 1 client", f"{one:.1f}", ""),
        (
            "images a second by POST /detect, 16 clients",
            f"{rate:.1f}, again {again:.1f}",
            f"{0.95 * command:.1f}",
        ),
        ("images a second by `sppnet detect run`", f"{command:.1f}", ""),
        ("99 of 100 answers to 16 clients within", f"{slowest:.2f} s", f"{1.5 * 16 * mean:.2f} s"),
    ]


def many(client: Client, images: Sequence[bytes], clients: int) -> tuple[float, list[float]]:
    """Detect in images with so many clients at once; return images a second, and each one's seconds."""

    def ask(image: bytes) -> float:
        begun = time.perf_counter()
        client.send("POST", "detect", content=image, headers=JPEG)
        return time.perf_counter() - begun

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        seconds = list(pool.map(ask, images))
    return len(images) / (time.perf_counter() - begun), seconds


def command_rate(model: Path, folder: Path, count: int) -> float:
    """Return how many images a second the command line looks at, its start left out."""
    few = max(1, count // 8)
    paths = sorted(folder.iterdir())

    def seconds(photos: Sequence[Path]) -> float:
        line = [sys.executable, "-m", "sppnet", "detect", "run", str(model), *map(str, photos)]
        begun = time.perf_counter()
        subprocess.run(
            [*line, "--format", "json"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        return time.perf_counter() - begun

    seconds(paths[:few])
    return (count - few) / (seconds(paths) - seconds(paths[:few]))


def uploads(args: argparse.Namespace) -> list[Row]:
    """Two hundred images sent at the same moment."""
    image = noisy_jpeg()
    with server(1) as client:
        client.encoded(1)
        before = client.memory()
        peak, stop = [before], threading.Event()
        watcher = threading.Thread(target=watch, args=(client, peak, stop))
        watcher.start()
        begun = time.perf_counter()
        with ThreadPoolExecutor(200) as pool:
            statuses = Counter(
                pool.map(
                    lambda _: client.http.post("photos", content=image, headers=JPEG).status_code, range(200)
                )
            )
        seconds = time.perf_counter() - begun
        stop.set()
        watcher.join()
    said = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    return [
        (
            f"200 uploads of {len(image) / 1e6:.1f} MB at once",
            f"{said} in {seconds:.1f} s",
            "201 and 429 only",
        ),
        ("memory before, and at most", f"{before:.0f} MB, {max(peak):.0f} MB", "bounded"),
    ]


def noisy_jpeg() -> bytes:
    """Return a photo of 12 megapixels of a few megabytes."""
    with TemporaryDirectory() as place:
        path = Path(place) / "large.jpg"
        large = Image.fromarray(scene(3).pixels).resize((4000, 3000))
        large.save(path, quality=95)
        return path.read_bytes()


def watch(client: Client, seen: list[float], stop: threading.Event) -> None:
    while not stop.wait(0.2):
        seen.append(client.memory())


def traffic(args: argparse.Namespace) -> list[Row]:
    """Mixed traffic, and the memory that the server has after a warming up and at the end."""
    with server(40) as client:
        client.encoded(40)
        client.label(40)
        client.fit()
        photos = client.get("photos")["photos"]
        image = (Path(args.photo) if args.photo else None) or None
        content = image.read_bytes() if image else client.http.get(f"photos/{photos[0]['id']}/image").content
        end, asked = time.monotonic() + 60 * args.minutes, Counter[str]()
        seen: list[tuple[float, float]] = []
        random = np.random.default_rng(0)
        last = 0.0
        while time.monotonic() < end:
            mixed(client, photos[int(random.integers(len(photos)))], content, asked)
            if asked["requests"] % 600 == 0:
                client.fit()
            if time.monotonic() - last > 60 * args.minutes / 120:
                last = time.monotonic()
                seen.append((60 * args.minutes - (end - last), client.memory()))
    # The first third warms up: kernels, buffers and caches come as they are first used.
    warm = [memory for _, memory in seen[len(seen) // 3 :]]
    half = len(warm) // 2
    before, after = statistics.median(warm[:half]), statistics.median(warm[half:])
    title = f"memory in {args.minutes:g} minutes of {asked['requests']} mixed requests"
    return [(title, f"{before:.0f} MB, then {after:.0f} MB ({100 * (after / before - 1):+.1f} %)", "5 %")]


def mixed(client: Client, photo: dict[str, Any], image: bytes, asked: Counter[str]) -> None:
    """Do what pages and programs do."""
    boxes = client.get(f"photos/{photo['id']}/boxes")
    client.http.get(f"photos/{photo['id']}/image?side=800")
    client.send(
        "PUT", f"photos/{photo['id']}/boxes", json={k: boxes[k] for k in ("revision", "boxes", "reviewed")}
    )
    client.send("POST", "search", json={"photo": photo["id"], "box": [50, 50, 200, 200]})
    client.send("POST", "detect", content=image, headers=JPEG)
    client.send("POST", "embed?box=10,10,90,90", content=image, headers=JPEG)
    client.get("results")
    client.get("photos?order=doubt")
    asked["requests"] += 8


def batches(args: argparse.Namespace) -> list[Row]:
    """Photos in batches of one size, which requests at one moment might be put in, and one by one."""
    threads = thread_count()
    backbone = Backbone(NETWORK, STAGES, max(STRIDES)).for_threads(threads)
    height, width = SIDE, -(-SIDE * 4 // 3 // backbone.multiple) * backbone.multiple
    photo = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)
    paces: dict[int, list[float]] = {count: [] for count in (1, 2, 4, 8)}
    with ThreadPoolExecutor(threads) as pool:
        for turn in range(6):
            for count, seen in paces.items():
                batch = np.repeat(photo, count, axis=0)
                calls = threads * 48 // count
                begun = time.perf_counter()
                list(pool.map(backbone.maps, [batch] * calls))
                # The first turn compiles and allocates.
                seen += [calls * count / (time.perf_counter() - begun)] * (turn > 0)
    middle = {count: statistics.median(seen) for count, seen in paces.items()}
    shown = ", ".join(f"{pace:.1f} by {count}" for count, pace in middle.items())
    return [
        (f"the network alone, {height} x {width} pixels, {threads} threads, photos/s in batches", shown, "")
    ]


def session(args: argparse.Namespace) -> list[Row]:
    """What the machine takes of the time in which a person makes a detector of two classes from 30 photos."""
    with server(30) as client:
        waited = client.wait(lambda project: project["photos"] == 30)
        photos = client.get("photos")["photos"]
        begun = time.perf_counter()
        for photo in photos[:10]:
            client.http.get(f"photos/{photo['id']}/image")
        target = scene(0).target
        client.send("POST", "search", json={"photo": photos[0]["id"], "box": target.boxes[0].tolist()})
        client.label(12, ("cat", "dog"))
        client.fit()
        client.label(20, ("cat", "dog"))
        client.fit()
        client.wait(lambda project: project["model"] is not None)
        client.http.get("export?what=detections&format=csv")
        client.http.get("export/counts.csv")
        seconds = waited + time.perf_counter() - begun
    title = "the machine's share of making a detector: 30 photos, 2 classes, two fits"
    return [(title, f"{seconds:.1f} s", "40 s")]


_WATCH = """() => {
    window.tasks = []; window.frames = []; let last = performance.now();
    new PerformanceObserver(list => window.tasks.push(...list.getEntries().map(task => task.duration)))
        .observe({ type: "longtask" });
    const frame = now => { window.frames.push(now - last); last = now; requestAnimationFrame(frame); };
    requestAnimationFrame(frame);
}"""


def smooth(args: argparse.Namespace) -> list[Row]:
    """How the page keeps up in Chromium while somebody draws boxes and a fit to 60 photos runs."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with server(60) as client, sync_playwright() as playwright:
        client.encoded(60)
        client.label(60)
        client.fit()
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto(str(client.http.base_url).replace("/api/v1/", "/#/label"))
        page.locator(".stage img.shown").wait_for()
        shown = page.locator(".stage .photo").bounding_box()
        assert shown is not None
        page.evaluate(_WATCH)
        fit, drawn = client.send("POST", "fits", json={})["id"], 0
        while client.get(f"fits/{fit}")["state"] in ("waiting", "running"):
            x, y = shown["x"] + 10 + 37 * (drawn % 12), shown["y"] + 10 + 31 * (drawn // 12 % 12)
            page.mouse.move(x, y)
            page.mouse.down()
            page.mouse.move(x + 25, y + 20, steps=5)
            page.mouse.up()
            page.keyboard.press("Escape")
            drawn += 1
        tasks, frames = page.evaluate("() => window.tasks"), page.evaluate("() => window.frames")
        browser.close()
    late = float(np.mean(np.array(frames) > 1000 / 60 * 1.5))
    shown_frames = f"{100 * (1 - late):.1f} % of {len(frames)} frames in time, {drawn} boxes drawn"
    return [
        (
            "longest task of the page while a fit to 60 photos runs",
            f"{max(tasks, default=0):.0f} ms",
            "100 ms",
        ),
        ("the page's frames meanwhile, at 60 a second", shown_frames, ""),
    ]


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "start": start,
    "search": search,
    "many": many_regions,
    "fits": fits,
    "large": large,
    "detect": detect,
    "uploads": uploads,
    "batches": batches,
    "session": session,
    "smooth": smooth,
    "traffic": traffic,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=sorted(PARTS), action="append", help="measure these parts alone")
    parser.add_argument("--images", type=int, default=200, help="images to detect in")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long mixed traffic goes on")
    parser.add_argument("--photo", type=Path, help="what programs send in mixed traffic; default: a scene")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[Row] = []
    for name in args.only or PARTS:
        rows += PARTS[name](args)
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    threads = os.environ.get("OMP_NUM_THREADS", "as many threads as cores")
    print(f"{machine()}, {threads}, commit {commit()}\n")
    print(table(("what", "measured", "wanted"), rows))
    write_json(args.json, {"machine": machine(), "commit": commit(), "rows": rows})


if __name__ == "__main__":
    main()
