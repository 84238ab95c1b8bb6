"""How good a detector is, on one page: an HTML file that holds its own pictures and needs no network."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from sppnet.arrays import Boxes, IntArray, Pixels
from sppnet.boxes import Detections, Target, score_texts
from sppnet.drawing.detections import draw_detections
from sppnet.drawing.fonts import legible, page_fonts
from sppnet.drawing.plots import CURVES, PANELS, RATES, precision_recall_svg, reliability_svg, threshold_svgs
from sppnet.drawing.sheets import message_tile, scaled
from sppnet.errors import SppnetError
from sppnet.evaluation.calibration import LIKELY, reliability
from sppnet.evaluation.confusion import detection_confusion
from sppnet.evaluation.detection import Counts, DetectionReport, image_f1
from sppnet.evaluation.mistakes import Miss, Mistakes, above_thresholds, find_mistakes, recall_by_size
from sppnet.images import pixels_of, resize
from sppnet.storage import atomic_path

if TYPE_CHECKING:
    from sppnet.datasets.records import Sample

# How many mistakes of each kind, and photos, are shown, and the longer sides in pixels of their pictures:
# together with JPEG's quality they bound the page, some 3 MB of photos.
_MISTAKES, _PHOTOS = 24, 6
_CROP, _PHOTO, _QUALITY = 200, 480, 80
# Around a mistake as much is shown, in sides of its box, and at least so many pixels; it is enlarged so much.
_CONTEXT, _LEAST_CROP, _ENLARGED = 1.8, 48, 4.0
# A confusion matrix of more classes shows those of the most mistakes.
_CONFUSED = 30


class Shown(NamedTuple):
    """A picture of the page.

    Attributes
    ----------
    photo : str
        Name of the image.
    title, text : str
        What is said of it.
    picture : str
        The JPEG as a ``data:`` address; empty until it is drawn.
    """

    photo: str
    title: str
    text: str
    picture: str = ""


@dataclass(frozen=True)
class _Wish:
    """What is to be drawn of an image: a part of it, or all; and with which boxes."""

    image: int
    shown: Shown
    detections: Detections
    target: Target
    part: Boxes | None = None


def write_detection_report(
    report: DetectionReport,
    data: Sequence[Sample],
    path: Path,
    *,
    about: Mapping[str, str],
    notes: Sequence[str] = (),
    photos: bool = True,
) -> None:
    """Write how good detections are as one HTML page that holds its pictures.

    It tells what was measured, the numbers of each class at its threshold, what is taken for what, curves,
    whether scores are probabilities, which objects are missed and which detections are wrong, with a picture
    of each, and the images on which the detector is best and worst. The same report gives the same page.

    Parameters
    ----------
    report : DetectionReport
        How good the detections are.
    data : sequence of Sample
        The annotated images that were measured, also those that the report left out.
    path : Path
        File to write, replaced if it exists.
    about : mapping of str to str
        What was measured, line by line: model, data, split, date.
    notes : sequence of str
        What was put right or left out when the data were read.
    photos : bool
        Whether there are photos to show; annotations alone give numbers and curves.
    """
    import jinja2

    left_out = set(report.left_out)
    kept = [sample for i, sample in enumerate(data) if i not in left_out]
    classes, thresholds = list(report.classes), report.thresholds
    targets = [sample.target for sample in kept]
    mistakes = find_mistakes(report.detections, targets, classes, thresholds)
    matrix = detection_confusion(report.detections, targets, classes, thresholds)
    galleries = _galleries(report, kept, mistakes) if photos else {}
    loader = jinja2.PackageLoader("sppnet.drawing", "")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: legible(value) if type(value) is str else value,
    )
    page = environment.get_template("report.html.jinja").render(
        report=report,
        about=about,
        notes=notes,
        headline=headline(report),
        rows=class_rows(report),
        percent=_are_probabilities(report),
        confusion=_confusion(matrix, classes),
        sizes=recall_by_size(targets, classes, mistakes.misses),
        mistakes=mistakes,
        galleries=galleries,
        unreadable=[sample.name for i, sample in enumerate(data) if i in left_out],
        curves=(CURVES, PANELS),
        rates={name: "rgb({}, {}, {})".format(*colour) for name, (colour, _) in RATES.items()},
        plots=_plots(report),
        fonts=page_fonts("".join([*classes, *(sample.name for sample in data), *about.values(), *notes])),
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, "utf-8")


def headline(report: DetectionReport) -> list[str]:
    """Return in words how good the detections are, a sentence each."""
    total = report.total
    if not total.objects:
        return ["There is no object to find in these photos."]
    if not total.hits:
        return [f"None of the {total.objects} objects is found."]
    counted = f"{total.hits} of {total.objects}"
    found = f"{counted} objects" if total.objects <= 10 else f"{_of_ten(total)} objects ({counted})"
    sentences = [f"Finds {found}."]
    if total.false_alarms:
        each = report.images / total.false_alarms
        alarms = f"{1 / each:.1f} false alarms a photo"
        if each >= 1:
            alarms = "one false alarm " + ("a photo" if each < 1.5 else f"in {each:.0f} photos")
        sentences.append(
            f"{alarms[0].upper()}{alarms[1:]}: {100 * total.precision:.0f} % of what it shows is right."
        )
    else:
        sentences.append("No false alarm.")
    sentences.append(f"Mean average precision {100 * report.mean_ap:.1f} (VOC 2007, IoU 0.5).")
    if report.coco is not None:
        sentences.append(f"COCO's AP {100 * report.coco['AP']:.1f}, AP50 {100 * report.coco['AP50']:.1f}.")
    return sentences


def _of_ten(counts: Counts) -> str:
    """Return a share in words."""
    tenths = 10 * counts.recall
    return "all" if counts.hits == counts.objects else f"{min(9.9, tenths):.1f} of 10".replace(".0 ", " ")


def class_rows(report: DetectionReport) -> list[dict[str, Any]]:
    """Return what the table says of each class, the best first."""
    counts, thresholds = report.counts, report.thresholds
    percent = _are_probabilities(report)
    rows = [
        {
            "name": name,
            "result": result,
            "counts": counts[name],
            "threshold": "–" if math.isnan(t := thresholds[name]) else score_texts([t], percent)[0],
            "alarms": counts[name].false_alarms / max(report.images, 1),
        }
        for name, result in report.classes.items()
    ]
    return sorted(rows, key=lambda row: -np.nan_to_num(row["result"].average_precision, nan=-1))


def _are_probabilities(report: DetectionReport) -> bool:
    """Return whether all scores are such as probabilities have."""
    return all(((d.scores >= 0) & (d.scores <= 1)).all() for d in report.detections)


def _plots(report: DetectionReport) -> dict[str, Any]:
    """Return the plots of the page as SVG, and the calibration error where there are probabilities."""
    plots: dict[str, Any] = {
        "curves": precision_recall_svg(report.classes),
        "thresholds": threshold_svgs(report.classes, report.thresholds),
    }
    scores = np.concatenate([np.zeros(0, np.float32), *(r.scores for r in report.classes.values())])
    if len(scores) and _are_probabilities(report):
        hits = np.concatenate([result.hits for result in report.classes.values()])
        likely = scores >= LIKELY
        if likely.any():
            kept = reliability(scores[likely], hits[likely])
            plots |= {"reliability": reliability_svg(kept), "error": kept.error}
        plots |= {"likely": int(likely.sum()), "least": f"{LIKELY:.0%}".replace("%", " %")}
    return plots


def _confusion(matrix: IntArray, classes: Sequence[str]) -> dict[str, Any]:
    """Return the rows of the confusion matrix: names, counts and shares of the row."""
    mistakes = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * matrix.diagonal()
    most = np.sort(np.argsort(-mistakes[:-1], kind="stable")[:_CONFUSED])
    chosen = np.append(most, len(classes))
    part, total = matrix[np.ix_(chosen, chosen)], np.maximum(matrix.sum(axis=1)[chosen], 1)
    shares = part / total[:, None]
    shares[-1] = part[-1] / max(part[-1].max(), 1)
    names = [classes[i] for i in most]
    rows = zip([*names, None], part.tolist(), shares.tolist(), strict=True)
    return {
        "names": names,
        "rows": [(name, list(zip(counts, row, strict=True))) for name, counts, row in rows],
        "left_out": len(classes) - len(names),
    }


def _galleries(report: DetectionReport, data: Sequence[Sample], mistakes: Mistakes) -> dict[str, list[Shown]]:
    """Draw the mistakes, and the images on which the detections are best and worst."""
    wishes = {
        "misses": _of_misses(report, data, mistakes.misses[:_MISTAKES]),
        "alarms": _of_alarms(report, data, mistakes),
        **_of_photos(report, data),
    }
    drawn: dict[int, str] = {}
    every = sorted((wish for part in wishes.values() for wish in part), key=lambda wish: wish.image)
    for wish, picture in zip(every, _drawn(every, data, list(report.classes)), strict=True):
        drawn[id(wish)] = picture
    return {
        name: [wish.shown._replace(picture=drawn[id(wish)]) for wish in part] for name, part in wishes.items()
    }


def _of_misses(report: DetectionReport, data: Sequence[Sample], misses: Sequence[Miss]) -> list[_Wish]:
    percent, thresholds = _are_probabilities(report), report.thresholds
    wishes = []
    for miss in misses:
        text = miss.reason
        if text == "scores too little":
            score, least = score_texts([miss.score, thresholds[miss.label]], percent)
            text = f"scores {score}, shown from {least} on"
        shown = Shown(data[miss.image].name, miss.label, text)
        wishes.append(_Wish(miss.image, shown, _nothing(), Target.of([miss.box], [miss.label]), miss.box))
    return wishes


def _of_alarms(report: DetectionReport, data: Sequence[Sample], mistakes: Mistakes) -> list[_Wish]:
    percent = _are_probabilities(report)
    wishes = []
    for alarm in mistakes.false_alarms[:_MISTAKES]:
        (score,) = score_texts([alarm.score], percent)
        shown = Shown(data[alarm.image].name, f"{alarm.label} {score}", alarm.reason)
        found = Detections(alarm.box[None], np.array([alarm.score], np.float32), (alarm.label,))
        wishes.append(_Wish(alarm.image, shown, found, Target.of([], []), alarm.box))
    return wishes


def _of_photos(report: DetectionReport, data: Sequence[Sample]) -> dict[str, list[_Wish]]:
    """Return wishes for the images that are best and worst; of equals the one with the higher best score."""
    classes, thresholds = list(report.classes), report.thresholds
    shown = [above_thresholds(found, thresholds) for found in report.detections]
    there = [_of_classes(sample.target, classes) for sample in data]
    quality = [
        image_f1(found, target, {*found.labels, *target.labels})
        for found, target in zip(shown, there, strict=True)
    ]

    def rank(i: int) -> tuple[float, float]:
        return -quality[i], -float(report.detections[i].scores[:1].sum())

    # An image without an object, and without a false alarm, says little.
    order = sorted((i for i in range(len(data)) if there[i].labels or len(shown[i])), key=rank)
    worst = [i for i in order[::-1] if quality[i] < 1][:_PHOTOS]
    parts = {"best": [i for i in order if i not in worst][:_PHOTOS], "worst": worst}
    return {
        name: [_Wish(i, Shown(data[i].name, f"F1 {quality[i]:.2f}", ""), shown[i], there[i]) for i in part]
        for name, part in parts.items()
    }


def _drawn(wishes: Iterable[_Wish], data: Sequence[Sample], names: Sequence[str]) -> Iterator[str]:
    """Yield the pictures of wishes, by rising image: each image is read once, and one at a time."""
    read: int | None = None
    pixels: Pixels | None = None
    failure = ""
    for wish in wishes:
        if wish.image != read:
            read, pixels = wish.image, None
            try:
                pixels = pixels_of(data[wish.image].image)
            except (SppnetError, OSError) as error:
                failure = f"cannot be read: {error}"
        if pixels is None:
            yield _jpeg(message_tile(failure, _CROP if wish.part is not None else _PHOTO))
            continue
        if wish.part is None:
            small, target = scaled(pixels, wish.target, _PHOTO)
            factor = np.float32(small.shape[1] / pixels.shape[1])
            found = Detections(wish.detections.boxes * factor, wish.detections.scores, wish.detections.labels)
            yield _jpeg(draw_detections(small, found, names, target))
        else:
            yield _jpeg(_crop(pixels, wish, names))


def _crop(image: Pixels, wish: _Wish, names: Sequence[str]) -> Pixels:
    """Draw a part of an image, with what is around it."""
    assert wish.part is not None
    height, width = image.shape[:2]
    x1, y1, x2, y2 = (float(edge) for edge in wish.part)
    side = max(_CONTEXT * max(x2 - x1, y2 - y1), _LEAST_CROP)
    left, top = (max(0, math.floor(middle - side / 2)) for middle in ((x1 + x2) / 2, (y1 + y2) / 2))
    left, top = min(left, width - 1), min(top, height - 1)
    part = image[top : top + math.ceil(side), left : left + math.ceil(side)]
    scale = min(_ENLARGED, _CROP / max(part.shape[:2]))
    small = resize(part, max(1, round(scale * part.shape[0])), max(1, round(scale * part.shape[1])))
    boxes = (wish.part[None] - np.array([left, top, left, top], np.float32)) * np.float32(scale)
    found, there = wish.detections, wish.target
    # The name stands below the picture: no label hides the mistake.
    return draw_detections(
        small,
        Detections(boxes[: len(found)], found.scores, found.labels),
        names,
        Target(boxes[: len(there.labels)], there.labels, there.difficult, there.crowd),
        labels=False,
    )


def _of_classes(target: Target, classes: Sequence[str]) -> Target:
    """Return the objects of some classes."""
    rows = [i for i, name in enumerate(target.labels) if name in classes]
    labels = tuple(target.labels[i] for i in rows)
    return Target(target.boxes[rows], labels, target.difficult[rows], target.crowd[rows])


def _nothing() -> Detections:
    return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), ())


def _jpeg(image: Pixels) -> str:
    """Return an image as the address of a JPEG that is part of the page."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
