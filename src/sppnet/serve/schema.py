"""The JSON of the API, as pydantic models: what requests may say and what answers hold."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MOST_BOXES = 5000
"""Boxes of one photo."""

# What XML, and so VOC, has no place for, and what would break a line.
_UNFIT = re.compile("[\x00-\x1f\x7f\u2028\u2029\ud800-\udfff\ufffe\uffff]")


def _fit_name(name: str) -> str:
    if name.strip() != name or not name or _UNFIT.search(name):
        raise ValueError(f"found the name {name!r}, expected one line without spaces around it")
    return name


def _has_area(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError("found a box without area, expected x1 < x2 and y1 < y2")
    return box


Name = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_fit_name)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Edge = Annotated[float, Field(ge=-1_000_000, le=1_000_000, allow_inf_nan=False)]
Corners = Annotated[tuple[Edge, Edge, Edge, Edge], AfterValidator(_has_area)]
PhotoId = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
Origin = Literal["drawn", "accepted", "corrected"]
Annotations = Literal["project", "beside"]
ExportWhat = Literal["boxes", "detections"]
ExportFormat = Literal["csv", "coco", "voc", "yolo", "labelstudio", "json"]
FitState = Literal["waiting", "running", "done", "failed", "cancelled"]


class Asked(BaseModel):
    """A request: what it does not know is refused, not passed over."""

    model_config = ConfigDict(extra="forbid")


class Problem(BaseModel):
    """What is wrong with a request."""

    message: str
    found: str | None = None
    expected: str | None = None


class Failure(BaseModel):
    """The answer to a request that is refused."""

    error: Problem


class Health(BaseModel):
    """Whether the server answers, and whether its engine does, too."""

    status: Literal["ok"] = "ok"
    version: str
    ready: bool
    name: str


class Labelled(Asked):
    """A box that is an object of a class, or is known not to be one."""

    box: Corners
    label: Name


class LabelledBox(Labelled):
    """An object: a box, its class, and how it came to be."""

    origin: Origin = "drawn"


class Boxes(BaseModel):
    """What is known of a photo.

    ``rejected`` are detections that were found wrong; ``reviewed`` says that all objects of it have a box.
    """

    revision: int
    boxes: list[LabelledBox]
    rejected: list[Labelled]
    reviewed: bool
    warning: str | None = None


class BoxesGiven(Asked):
    """All that is to be known of a photo from now on, made of that revision."""

    revision: Annotated[int, Field(ge=0, le=2**53)]
    boxes: Annotated[list[LabelledBox], Field(max_length=MOST_BOXES)]
    rejected: Annotated[list[Labelled], Field(max_length=MOST_BOXES)] = []
    reviewed: bool = False


class Conflict(Failure):
    """The answer where a photo has another revision: what it has now."""

    current: Boxes


class Review(Asked):
    """Detections that are right, and detections that are wrong."""

    accept: Annotated[list[Labelled], Field(max_length=MOST_BOXES)] = []
    reject: Annotated[list[Labelled], Field(max_length=MOST_BOXES)] = []


class Photo(BaseModel):
    """A photo of the project."""

    id: PhotoId
    name: str
    width: int
    height: int
    state: Literal["waiting", "encoded", "failed"]
    error: str | None
    boxes: int
    reviewed: bool
    found: int
    doubt: float | None


class Photos(BaseModel):
    """Some of the photos, and how many there are in all."""

    total: int
    photos: list[Photo]


class ClassFacts(BaseModel):
    """A class of the project."""

    name: str
    boxes: int
    threshold: float | None


class CanFit(BaseModel):
    """Whether there is enough to learn from, and what is missing."""

    ok: bool
    reason: str | None


class ClassQuality(BaseModel):
    """How well a class is found on photos that were not learned from; null where that is not known."""

    objects: int
    ap: float | None
    precision: float | None
    recall: float | None
    threshold: float


class Quality(BaseModel):
    """How good a fit is on photos that it did not learn from, and what changed since the one before."""

    fit: str
    made: str
    photos: int
    objects: int
    words: list[str]
    mean_ap: float | None
    classes: dict[str, ClassQuality]
    changed: list[str]


class Qualities(BaseModel):
    """Of every fit, the newest last."""

    fits: list[Quality]


class Fit(BaseModel):
    """A fit, and how far it is; ``left`` are seconds, null until they can be told."""

    id: str
    state: FitState
    stage: str
    share: float
    seconds: float
    left: float | None
    error: str | None
    quality: Quality | None


class ModelFacts(BaseModel):
    """A detector of the project."""

    id: str
    name: str
    made: str
    classes: list[str]
    mean_ap: float | None
    bytes: int
    used: bool


class UsedModel(BaseModel):
    """The detector whose detections the results are."""

    id: str
    name: str
    classes: list[str]
    made: str


class ProjectFacts(BaseModel):
    """A project as a whole."""

    name: str
    folder: str | None
    project_folder: str
    annotations: Annotations
    classes: list[ClassFacts]
    photos: int
    labelled: int
    encoded: int
    boxes: int
    can_fit: CanFit
    model: UsedModel | None
    fit: Fit | None
    demo: bool
    version: str
    notes: list[str]


class ProjectChange(Asked):
    """What is to be changed of a project: where annotations go; its classes, their order and their names.

    ``classes`` are all that there are to be, in their order: new ones are made, and those left out removed,
    which must be without boxes. ``rename`` comes first.
    """

    annotations: Annotations | None = None
    classes: Annotated[list[Name], Field(max_length=1000)] | None = None
    rename: Annotated[dict[Name, Name], Field(max_length=1000)] | None = None


class Search(Asked):
    """A region of a photo, whose like are looked for."""

    photo: PhotoId
    box: Corners
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


class Region(BaseModel):
    """A region that is like the one that was asked for."""

    photo: PhotoId
    box: tuple[float, float, float, float]
    score: float


class Regions(BaseModel):
    """Regions, the most like first, and what it took to find them."""

    regions: list[Region]
    seconds: float


class Found(BaseModel):
    """A detection, and whether it was looked at."""

    box: tuple[float, float, float, float]
    label: str
    score: float
    state: Literal["new", "accepted", "rejected"]


class Results(BaseModel):
    """Detections of at least a small probability in all photos that have some."""

    model: str | None
    classes: list[str]
    thresholds: dict[str, float]
    photos: dict[str, list[Found]]


class ImageDetections(BaseModel):
    """What was found in an image; see docs/results.schema.json."""

    image: str
    height: int
    width: int
    detections: list[Detection]


class Detection(BaseModel):
    """An object that was found."""

    label: str
    score: float
    box: tuple[float, float, float, float]


class DetectionsFile(BaseModel):
    """The JSON of ``sppnet detect run --format json``."""

    version: int
    scores: Literal["probability", "svm"]
    images: list[ImageDetections]


class Vectors(BaseModel):
    """The vectors of boxes, or of a whole image."""

    vectors: list[list[float]]
    length: int


class Change(BaseModel):
    """Something of the project that changed, for pages that show it."""

    what: Literal["photos", "boxes", "classes", "fit", "results"]
    photo: str | None = None
    encoded: int | None = None
    photos: int | None = None
    fit: Fit | None = None
