"""How a classifier is fitted: from its settings and labelled images, epoch by epoch, in PyTorch."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric

from sppnet.classification.batches import Batch, CentralCrops, CropBatches, Reading, Source, sample_components
from sppnet.classification.checkpoint import Checkpointing, EpochRecord
from sppnet.classification.network import build, scorer_of, start_of
from sppnet.classification.scorer import NetworkSettings, Scorer
from sppnet.classification.training import Recipe, launch, train
from sppnet.datasets.image_folder import LabelledImages
from sppnet.errors import SppnetError
from sppnet.features.architectures import ARCHITECTURES
from sppnet.features.graph import RANDOM
from sppnet.images import readable_keys
from sppnet.progress import Track, no_track

if TYPE_CHECKING:
    from sppnet.classification.classifier import Classifier

# For the vectors of a pretrained backbone: the mean norm to which the paper's code scales features
# (section 4.1).
PRETRAINED_NORM = 20.0
# Finest levels first: the paper's, and one level less for the map of 7 x 7 cells of a timm network.
_PAPER_LEVELS, _TIMM_LEVELS = (6, 3, 2, 1), (3, 2, 1)


class Fitted(NamedTuple):
    """What a fit gave.

    Attributes
    ----------
    scorer : Scorer
        The network.
    photos : (n,) uint64
        Of each photo that it was fitted on a number, see `sppnet.images.photo_keys`.
    about : dict
        How it was fitted, in what JSON can hold.
    """

    scorer: Scorer
    photos: npt.NDArray[np.uint64]
    about: dict[str, Any]


def fit(
    classifier: Classifier,
    images: LabelledImages,
    validation: LabelledImages | None,
    checkpointing: Checkpointing | None,
    track: Track,
    max_bad: float,
) -> Generator[EpochRecord, None, Fitted]:
    """Fit a network by the settings of a classifier, which stays as it is.

    Parameters
    ----------
    classifier : Classifier
        The settings.
    images, validation, track
        See `Classifier.fit`; `validation` has the classes of `images`.
    max_bad : float
        Share of the images that may be unreadable; see `Classifier.fit_epochs`.
    checkpointing : Checkpointing, optional
        Where the fit is written down.

    Yields
    ------
    EpochRecord

    Returns
    -------
    Fitted
    """
    settings = network_settings(classifier, images.classes)
    network = build(settings, classifier.seed)
    network.map_of(min(classifier.scales))
    recipe = recipe_of(classifier, len(network.groups))
    fabric = launch(classifier.device, classifier.precision)
    source, central = _batches(classifier, images, validation, fabric)
    records = train(
        network,
        _Tracked(source, recipe.epochs, no_track if fabric.global_rank else track),
        recipe,
        validation=central,
        checkpointing=checkpointing,
        fabric=fabric,
        seed=classifier.seed,
        unreadable_limit=max(10, int(max_bad * len(images))),
    )
    for record in records:
        last = record
        yield record
    about = {"recipe": asdict(recipe), "images": len(images), "record": asdict(last)}
    return Fitted(scorer_of(network, settings, classifier.device), _photos(images, fabric), about)


def _pretrained(classifier: Classifier) -> bool:
    name = str(classifier.network)
    return name not in ARCHITECTURES and start_of(name).graph.facts.source != RANDOM


def network_settings(classifier: Classifier, classes: tuple[str, ...]) -> NetworkSettings:
    """Return what the network of a classifier is built from.

    Raises
    ------
    SppnetError
        If its settings make no network.
    """
    name, scales = str(classifier.network), classifier.scales
    paper = name in ARCHITECTURES
    levels = (_PAPER_LEVELS if paper else _TIMM_LEVELS) if classifier.levels is None else classifier.levels
    if not scales or min(scales) < 1:
        raise SppnetError(f"found the scales {scales}, expected at least one, from 1 pixel up")
    if not levels and (classifier.uniform or len(scales) > 1):
        raise SppnetError("a network without a pyramid trains at one size; found several")
    if not paper and (classifier.width != 1 or not levels):
        raise SppnetError(
            f"a width and no levels are for the paper's networks, {', '.join(ARCHITECTURES)}; found {name}"
        )
    return NetworkSettings(
        name,
        classes,
        tuple(levels) or None,
        classifier.mode,
        width=classifier.width,
        norm=PRETRAINED_NORM if _pretrained(classifier) else None,
        size=max(scales),
    )


def recipe_of(classifier: Classifier, groups: int) -> Recipe:
    """Return how the weights of a classifier move, for a backbone of so many groups of layers."""
    usual = Recipe.pretrained(groups, classifier.epochs) if _pretrained(classifier) else Recipe()
    names = "epochs", "backbone_lr", "milestones", "frozen", "label_smoothing"
    chosen = {name: getattr(classifier, name) for name in names if getattr(classifier, name) is not None}
    constant = {name: getattr(classifier, name) for name in ("lr", "weight_decay", "accumulate")}
    return replace(usual, **constant, **chosen)


def _batches(
    classifier: Classifier, images: LabelledImages, validation: LabelledImages | None, fabric: Fabric
) -> tuple[CropBatches, CentralCrops | None]:
    size = classifier.batch_size or (32 if _pretrained(classifier) else 128)
    reading = Reading(classifier.workers, world=fabric.world_size, rank=fabric.global_rank)
    source = CropBatches(
        images,
        min(size, len(images)),
        classifier.scales,
        uniform=classifier.uniform,
        components=sample_components(images, seed=classifier.seed),
        seed=classifier.seed,
        reading=reading,
    )
    largest = max(classifier.scales)
    central = None if validation is None else CentralCrops(validation, size, largest, reading)
    return source, central


def _photos(images: LabelledImages, fabric: Fabric) -> npt.NDArray[np.uint64]:
    """Return the keys of all photos, sorted; each process reads its share of them."""
    own = readable_keys(images[i][0] for i in range(fabric.global_rank, len(images), fabric.world_size))
    shares = [own] * fabric.world_size
    if fabric.world_size > 1:
        torch.distributed.all_gather_object(shares, own)
    return np.unique(np.concatenate(shares))


class _Tracked:
    """A source whose batches move a display of progress."""

    def __init__(self, source: Source, epochs: int, track: Track) -> None:
        self._source, self._total, self._track = source, epochs * len(source), track
        self._ticks: Iterator[Any] | None = None

    def __len__(self) -> int:
        return len(self._source)

    @property
    def batch_size(self) -> int:
        """Most images of a batch over all processes."""
        return self._source.batch_size

    def side_of(self, number: int) -> int:
        """Return the side of the images of an epoch in pixels."""
        return self._source.side_of(number)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of an epoch from batch `start` on."""
        done = number * len(self) + start
        if self._ticks is None:
            # Only the batches still to come: the time left is theirs, at the speed of this run alone.
            self._ticks = iter(self._track(range(done, self._total), "Training"))
        for i, batch in enumerate(self._source.epoch(number, start), done + 1):
            next(self._ticks, None)
            yield batch
            if i == self._total:
                next(self._ticks, None)  # So that the display knows of the end.
