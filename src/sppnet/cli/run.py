"""The command that finds objects in photos and videos."""

from __future__ import annotations

import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import sppnet.cli.console as console
import sppnet.cli.options as opt
from sppnet.errors import ImageError, SppnetError

if TYPE_CHECKING:
    from sppnet.arrays import Pixels
    from sppnet.boxes import Detections
    from sppnet.cluster import Cluster
    from sppnet.datasets.predictions import Prediction
    from sppnet.detection.augmented import Augmented
    from sppnet.detection.detector import Detector
    from sppnet.detection.ensemble import Ensemble
    from sppnet.video import Frame, Video

Format = Literal["csv", "coco", "voc", "yolo", "labelstudio", "json"]
# The name in the folder of --out of each format's file, or folder of files.
_PLACES = {
    "csv": "detections.csv",
    "coco": "coco.json",
    "voc": "voc",
    "yolo": "yolo",
    "labelstudio": "labelstudio.json",
    "json": "detections.json",
}
# A video with less than this share of the frames that it states is damaged; some state them roughly.
_WHOLE = 0.95
# The objects of more photos are counted and not listed.
_LISTED = 20

_SOURCES = (
    "Photos, folders or patterns of photos, videos, webcam or webcam:1, addresses of photos on the web."
)
_PICTURES = "What photos are drawn as in the folder of --out; videos become mp4."
_FORMAT = "Format of the results, in the folder of --out, or printed; voc and yolo need --out."
_COUNTS = "File for the number of objects of each class in each photo (.csv)."
_EVERY = "Look at one of so many frames of a video."


def run(
    model: opt.Model,
    images: Annotated[list[str], typer.Argument(metavar="PHOTO", help=_SOURCES)],
    out: opt.Out = None,
    pictures: Annotated[Literal["jpg", "png"], opt.results(help=_PICTURES)] = "jpg",
    result_format: Annotated[Format | None, opt.results("--format", help=_FORMAT)] = None,
    counts: Annotated[Path | None, opt.results(help=_COUNTS)] = None,
    json_file: opt.Json = None,
    threshold: opt.Threshold = None,
    scores: opt.Scores = "probability",
    ensemble: opt.Ensemble = None,
    every: Annotated[int, typer.Option(min=1, help=_EVERY)] = 1,
    proposals: opt.OtherProposals = None,
    augment: opt.Augment = False,
    max_bad: opt.MaxBad = opt.BAD,
    max_pixels: opt.MaxPixels = None,
    cluster: opt.Cluster = None,
    workers: opt.Workers = None,
    device: opt.Device = "cpu",
) -> None:
    """Find objects in photos and videos, by one detector or several; print, draw, count or write them."""
    files = console.model_files([model, *(ensemble or [])])
    if out is None and result_format in ("voc", "yolo"):
        raise SppnetError(f"--format {result_format}: found no place for its files, expected --out FOLDER")
    if ensemble and scores == "svm":
        raise SppnetError("--scores svm: found several detectors, whose scores do not compare, expected one")
    with tempfile.TemporaryDirectory(prefix="sppnet-") as folder:
        given = _given(images, Path(folder))
        drawn = given.drawn(out, pictures)
        for file in (json_file, counts):
            console.check_places(file, out, [*given.photos, *given.videos, *files], drawn)

        from sppnet.detection.detector import Detector

        detector = console.together([Detector.load(file, device=device) for file in files], files, augment)
        written = _Written(detector.classes_, out, result_format, counts, json_file)
        written.check(given)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        options = {
            "proposals": proposals,
            "threshold": None if threshold is None else opt.share(threshold),
            "scores": scores,
        }
        tell = console.note if written.to_stdout else print
        found = _Found(detector, options, keep=written.asked, tell=tell)
        with console.cluster_of(cluster, workers) as runner:
            _detect_photos(found, given, drawn[: len(given.photos)], runner)
        for i, source in enumerate(given.videos, len(given.photos)):
            _detect_video(found, source, drawn[i] if drawn else None, every)
    if found.seen:
        if not written.to_stdout:
            _print_found(found, len(given.photos), scores)
        written.write(found.predictions, scores)
        if out is not None:
            print(f"pictures in {out}")
    failures = [*given.failures, *found.failures]
    console.end(failures, len(given.photos) + len(given.videos) + len(given.failures), max_bad)


@dataclass
class _Given:
    """What is to be looked at, and what of it cannot be opened.

    `folder` holds what was fetched from the web; its photos are named by what comes below it.
    """

    folder: Path
    photos: list[Path] = field(default_factory=list)
    videos: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def name(self, photo: Path) -> Path:
        """Return the name of a photo in results."""
        return photo.relative_to(self.folder) if photo.is_relative_to(self.folder) else photo

    def drawn(self, out: Path | None, suffix: str) -> list[Path]:
        """Return where each photo and then each video is to be drawn; nothing without a folder for them."""
        from sppnet.drawing import picture_paths

        if out is None:
            return []
        videos = [Path(name.replace(":", "-")) if ":" in name else Path(name) for name in self.videos]
        paths = picture_paths(out, [*self.photos, *videos])
        suffixes = [f".{suffix}"] * len(self.photos) + [".mp4"] * len(videos)
        return [path.with_suffix(suffix) for path, suffix in zip(paths, suffixes, strict=True)]


def _given(sources: Sequence[str], folder: Path) -> _Given:
    """Tell addresses, videos and photos apart; fetch, open or find them."""
    from sppnet.fetching import fetch, is_address
    from sppnet.images import find_images
    from sppnet.video import Video, is_video

    given, local = _Given(folder), []
    for source in dict.fromkeys(sources):
        try:
            if is_address(source):
                given.photos.append(fetch(source, folder))
            elif is_video(source):
                Video(source).close()
                given.videos.append(source)
            else:
                local.append(source)
        except ImageError as error:
            given.failures.append(str(error))
    if local:
        given.photos += console.notes_of(find_images(local)).paths
    if not given.photos and not given.videos:
        console.end(given.failures, len(given.failures))
    return given


@dataclass
class _Written:
    """The files of results that are asked for."""

    classes: tuple[str, ...]
    out: Path | None
    format: Format | None
    counts: Path | None
    json_file: Path | None

    @property
    def asked(self) -> bool:
        """Whether any file is."""
        return (self.format or self.counts or self.json_file) is not None

    @property
    def to_stdout(self) -> bool:
        """Whether results are printed in place of the table."""
        return self.format is not None and self.out is None

    @property
    def place(self) -> Path | None:
        """Where the format's file or files go."""
        return None if self.out is None or self.format is None else self.out / _PLACES[self.format]

    def check(self, given: _Given) -> None:
        """Raise now, before long work, what could not be written after it."""
        from sppnet.datasets.predictions import check_predictions
        from sppnet.storage import check_suffix

        if self.counts is not None:
            check_suffix(self.counts, ".csv", " for counts")
        if self.json_file is not None:
            check_predictions([], self.classes, "json", self.json_file)
        if self.format is not None:
            names = [*map(given.name, given.photos), *map(Path, given.videos)]
            # A folder that is yet to be made is as empty as the one that is lent.
            made = self.out is None or self.out.is_dir()
            place = self.place if made else given.folder / _PLACES[self.format]
            check_predictions(names, self.classes, self.format, place)

    def write(self, predictions: Sequence[Prediction], scores: opt.ScoreKind) -> None:
        """Write them, and say where."""
        from sppnet.datasets.predictions import write_counts, write_predictions

        if self.json_file is not None:
            write_predictions(predictions, self.classes, "json", self.json_file, scores=scores)
        if self.counts is not None:
            write_counts(predictions, self.classes, self.counts)
        if self.format is not None:
            write_predictions(predictions, self.classes, self.format, self.place, scores=scores)
            if self.place is not None:
                print(f"results in {self.place}")


@dataclass
class _Found:
    """What was found so far.

    Of videos the detections are kept only if they are to be written, as memory is not to grow with them.
    `tell` prints a line, beside results that are printed.
    """

    detector: Detector | Ensemble | Augmented
    options: dict[str, Any]
    keep: bool
    tell: Callable[[str], None]
    predictions: list[Prediction] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    rows: list[tuple[str, ...]] = field(default_factory=list)
    seen: int = 0

    def draw(self, pixels: Pixels, detections: Detections) -> Pixels:
        """Return a picture of what was found in one."""
        from sppnet.drawing import draw_detections

        percent = self.options["scores"] == "probability"
        return draw_detections(pixels, detections, self.detector.classes_, percent=percent)


def _detect_photos(found: _Found, given: _Given, drawn: Sequence[Path], cluster: Cluster | None) -> None:
    """Detect in photos, and draw them."""
    from sppnet.datasets.predictions import Prediction
    from sppnet.images import write_image

    if not given.photos:
        return
    stream = found.detector.stream(given.photos, **found.options, cluster=cluster)
    for i, result in enumerate(console.track(stream, "Detecting", len(given.photos))):
        if isinstance(result, Exception):
            found.failures.append(str(result).replace(f"{given.folder}/", ""))
            continue
        pixels, detections = result
        found.seen += 1
        height, width = pixels.shape[:2]
        found.predictions.append(Prediction(given.name(given.photos[i]), height, width, detections))
        if drawn:
            write_image(drawn[i], found.draw(pixels, detections), quality=90)


def _detect_video(found: _Found, source: str, target: Path | None, every: int) -> None:
    """Detect in the frames of a video or webcam, and draw them as another video."""
    from sppnet.video import Video, video_writer

    number, counts, frames = 0, Counter[str](), Counter[str]()
    with Video(source) as video, nullcontext() if target is None else video_writer(target, video.fps) as add:
        total = None if video.count is None else -(-video.count // every)
        stream = console.track(_frames(found, video, every), f"Detecting in {Path(source).name}", total)
        start = time.perf_counter()
        try:
            for frame, pixels, detections in stream:
                number += 1
                counts.update(detections.labels)
                frames.update(set(detections.labels))
                if add is not None:
                    add(found.draw(pixels, detections), frame.seconds)
        except KeyboardInterrupt:
            if not video.live:
                raise
            console.note("stopped; what was found so far is written")
        speed = number / (time.perf_counter() - start)
    found.seen += 1
    names = [name for name in found.detector.classes_ if counts[name]] or ["-"]
    found.rows += [(Path(source).name, name, str(counts[name]), str(frames[name])) for name in names]
    _tell_speed(found, video, number, every, speed)


def _frames(found: _Found, video: Video, every: int) -> Iterator[tuple[Frame, Pixels, Detections]]:
    """Yield frames of a video with what was found in each; the next one is decoded meanwhile."""
    from sppnet.datasets.predictions import Prediction

    waiting: deque[Frame] = deque()

    def pixels() -> Iterator[Pixels]:
        for frame in video.frames(every):
            waiting.append(frame)
            yield frame.pixels

    for result in found.detector.stream(pixels(), **found.options):
        if isinstance(result, Exception):
            raise result
        frame, (seen, detections) = waiting.popleft(), result
        if found.keep:
            (height, width), seconds = seen.shape[:2], round(frame.seconds, 3)
            place = Path(video.name)
            found.predictions.append(Prediction(place, height, width, detections, frame.number, seconds))
        yield frame, seen, detections


def _tell_speed(found: _Found, video: Video, number: int, every: int, speed: float) -> None:
    """Say how many frames a video has, how many of them were looked at, and how fast."""
    of = "" if video.count is None else f" of {video.count}"
    which = f"{number}{of} frames looked at, {speed:.3g} in a second"
    found.tell(f"{video.name}: {video.fps:.4g} frames per second; {which}")
    if video.count is not None and number * every < _WHOLE * video.count - every:
        console.note(f"{video.name}: found fewer than the {video.count} frames that it states, it is damaged")


def _print_found(found: _Found, photos: int, scores: opt.ScoreKind) -> None:
    """Print each object of a few photos, or how many there are in many, and those of videos."""
    from sppnet.datasets.entries import names_below

    of_photos = [prediction for prediction in found.predictions if prediction.frame is None]
    rows: list[tuple[str, ...]] = []
    if 0 < photos <= _LISTED:
        svm, times = scores == "svm", Counter(p.image.name for p in of_photos)
        for below, p in zip(names_below([p.image for p in of_photos]), of_photos, strict=True):
            name = p.image.name if times[p.image.name] == 1 else below
            for box, score, label in p.detections:
                shown = f"{score:.2f}" if svm else f"{100 * score:.0f} %"
                rows.append((name, label, shown, ", ".join(f"{edge:.0f}" for edge in box)))
            if not p.detections:
                rows.append((name, "-", "", "nothing is likely enough"))
        columns = ("image", "class", "SVM score" if svm else "score", "box (x1, y1, x2, y2)")
        console.print_rows(columns, rows)
    elif photos:
        objects = Counter(label for p in of_photos for label in p.detections.labels)
        images = Counter(label for p in of_photos for label in set(p.detections.labels))
        names = [name for name in found.detector.classes_ if objects[name]]
        rows = [(name, str(objects[name]), str(images[name])) for name in names]
        rows.append(("nothing", "", str(sum(not p.detections for p in of_photos))))
        console.print_rows(("class", "objects", "photos"), rows, f"{len(of_photos)} photos")
        print("each object of each photo: --format csv; each photo: --counts FILE.csv")
    if found.rows:
        console.print_rows(("video", "class", "found", "in frames"), found.rows)
