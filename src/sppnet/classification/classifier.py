"""The classifier: a network with a pyramid, fitted to folders of photos, that names what an image shows.

By default a pretrained backbone gets a pyramid and a new last layer; the paper's networks start from random
weights, by the paper's recipe (section 3.1). Only a fit needs PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sppnet.arrays import FloatArray, Image, Pixels
from sppnet.classification.file import StoredNetwork, load_network, save_network, titles_of
from sppnet.classification.scorer import Scorer
from sppnet.classification.views import check_views, probabilities
from sppnet.datasets.image_folder import LabelledImages
from sppnet.errors import SppnetError, check_extra
from sppnet.estimator import Estimator
from sppnet.evaluation.classification import ClassificationReport, evaluate_classification
from sppnet.features.backbone import DEFAULT
from sppnet.images import pixels_of, readable_keys
from sppnet.models import model_path
from sppnet.parallel import Runner, Staged, Threads
from sppnet.progress import StageTimer, Track, no_track

if TYPE_CHECKING:
    from sppnet.classification.checkpoint import Checkpointing, EpochRecord

# What says where and how fast a classifier is fitted, and nothing of what comes out.
_PLACE = ("device", "workers")


class RankedClass(NamedTuple):
    """A class of an image.

    Attributes
    ----------
    name : str
        The class, as the folder of its images was named.
    title : str
        What people call it: the description of a WordNet id, any other name as it is.
    probability : float
        How probable it is, from 0 to 1.
    """

    name: str
    title: str
    probability: float


@dataclass(frozen=True)
class ClassScores:
    """How probable each class is for an image.

    Attributes
    ----------
    probabilities : (K,) float32
        One probability for each class; they sum to 1.
    classes : tuple of K str
        Names of the classes.
    titles : tuple of K str
        What people call the classes.
    """

    probabilities: FloatArray
    classes: tuple[str, ...]
    titles: tuple[str, ...]

    def top(self, count: int = 5) -> tuple[RankedClass, ...]:
        """Return the most probable classes, at most `count`, the best first; of equal ones the first."""
        order = np.argsort(-self.probabilities, kind="stable")[:count]
        return tuple(
            RankedClass(self.classes[i], self.titles[i], float(self.probabilities[i])) for i in order
        )


class Classifier(Estimator):
    """A classifier of images of any size: a backbone, a pyramid, and fully connected layers.

    Parameters
    ----------
    network : str or path
        ``"efficientnet-lite0"``, the backbone that comes with sppnet; the file of another, which ``sppnet
        backbone make`` wrote; or a network of the paper, which starts from random weights: ``"zf5"``,
        ``"zf5-released"``, ``"convnet5"``, ``"overfeat5"``, ``"overfeat7"``. A backbone whose file says that
        its weights are random is not pretrained.
    levels : tuple of int, optional
        The pyramid. By default the paper's (6, 3, 2, 1) for its networks, and (3, 2, 1) for others; ``()`` is
        the paper's network without a pyramid, which takes images of one size only.
    mode : {"max", "average"}
        What is kept of a bin.
    scales : tuple of int
        Sides of the training images in pixels; epochs take turns among them (paper section 2.3).
    uniform : bool
        Whether the side of each epoch is drawn between the least and the largest of `scales` instead.
    epochs : int, optional
        Most epochs; by default 8 on a pretrained backbone, and else 70.
    lr : float
        Learning rate.
    backbone_lr : float, optional
        Factor of the learning rate for the backbone, 0 to freeze it; by default 0.5 if pretrained, and else
        1.
    milestones : tuple of int, optional
        Epochs before which the learning rate is divided by 10. By default after 60 and 85 % of the epochs on
        a pretrained backbone, and else whenever the error stalls.
    weight_decay : float
        Penalty of large weights.
    batch_size : int, optional
        Images of a batch over all processes; by default 32 on a pretrained backbone, and else 128.
    accumulate : int
        Batches whose gradients make one step.
    frozen : int, optional
        First groups of the backbone's layers that stay as they are; by default half of them if pretrained,
        and else none.
    label_smoothing : float, optional
        Share of each label that is spread evenly over all classes; by default 0.1 on a pretrained backbone,
        and else 0.
    width : float
        Factor on the paper's numbers of filters and units, for its networks.
    workers : int
        Processes that read training images; 0 reads in this one. A script that uses some must guard what it
        does by ``if __name__ == "__main__":``.
    device : str
        ``"cpu"`` or ``"cuda"``.
    precision : {"32-true", "bf16-mixed", "16-mixed"}
        What training computes in.
    seed : int
        Seed of every random draw.

    Attributes
    ----------
    classes_ : tuple of str
        Names of the classes.
    titles_ : tuple of str
        What people call the classes: descriptions of ImageNet's WordNet ids, other names as they are.
    scorer_ : Scorer
        The network.
    photos_ : (n,) uint64
        Of each photo that it was fitted on a number, see `sppnet.images.photo_keys`.
    about_ : dict
        How it was fitted, in what JSON can hold.

    Examples
    --------
    >>> classifier = Classifier.load("imagenet")
    >>> scores = classifier.predict(np.zeros((120, 160, 3), np.uint8))
    >>> len(scores.classes), len(scores.top(5))
    (1000, 5)
    """

    classes_: tuple[str, ...]
    titles_: tuple[str, ...]
    scorer_: Scorer
    photos_: npt.NDArray[np.uint64]
    about_: dict[str, Any]

    def __init__(
        self,
        network: str | Path = DEFAULT,
        *,
        levels: tuple[int, ...] | None = None,
        mode: str = "max",
        scales: tuple[int, ...] = (224, 180),
        uniform: bool = False,
        epochs: int | None = None,
        lr: float = 0.01,
        backbone_lr: float | None = None,
        milestones: tuple[int, ...] | None = None,
        weight_decay: float = 5e-4,
        batch_size: int | None = None,
        accumulate: int = 1,
        frozen: int | None = None,
        label_smoothing: float | None = None,
        width: float = 1.0,
        workers: int = 0,
        device: str = "cpu",
        precision: str = "32-true",
        seed: int = 0,
    ) -> None:
        self.network, self.levels, self.mode = network, levels, mode
        self.scales, self.uniform, self.width = scales, uniform, width
        self.epochs, self.lr, self.backbone_lr, self.milestones = epochs, lr, backbone_lr, milestones
        self.weight_decay, self.batch_size, self.accumulate = weight_decay, batch_size, accumulate
        self.frozen, self.label_smoothing = frozen, label_smoothing
        self.workers, self.device, self.precision, self.seed = workers, device, precision, seed

    def fit(
        self,
        images: LabelledImages,
        validation: LabelledImages | None = None,
        *,
        checkpoint: str | Path | None = None,
        track: Track = no_track,
    ) -> Classifier:
        """Fit the network to labelled images, from the settings alone: a second fit starts anew.

        Parameters
        ----------
        images : LabelledImages
            What to learn from, such as `sppnet.read_image_folder` lists.
        validation : LabelledImages, optional
            What is measured after each epoch; with the paper's networks it decides when the learning rate
            drops. Its classes must be among those of `images`.
        checkpoint : path, optional
            Where the fit is written down after every epoch and every five minutes. If the file exists, the
            fit goes on from it; it stays when the fit has ended.
        track : callable
            ``track(items, description)`` yields the items and may draw progress.

        Returns
        -------
        Classifier
            Itself.

        Raises
        ------
        SppnetError
            If PyTorch is not installed, something else than labelled images is given, a setting makes no
            network, or `checkpoint` belongs to another fit.
        TrainingError
            If the loss is not finite, or too many files cannot be read.
        """
        for _ in self.fit_epochs(images, validation, checkpoint=checkpoint, track=track):
            pass
        return self

    def fit_epochs(
        self,
        images: LabelledImages,
        validation: LabelledImages | None = None,
        *,
        checkpoint: str | Path | None = None,
        max_bad: float = 0.01,
        track: Track = no_track,
    ) -> Iterator[EpochRecord]:
        """Fit like `fit`, and yield what each epoch gave; the classifier is fitted when all are taken.

        Under ``torchrun`` every process gets the same records and the same network. Photos that cannot be
        read are left out and named in the records, unless they are more than 10 and more than the share
        `max_bad` of all: then the training stops with a `TrainingError`.
        """
        check_extra("torch", "training a network")
        _check_images(images)
        if validation is not None:
            _check_images(validation)
            validation = validation.relabelled(images.classes)

        from sppnet.classification.fit import fit

        checkpointing = None if checkpoint is None else self._checkpointing(checkpoint, images, validation)
        self.scorer_, self.photos_, self.about_ = yield from fit(
            self, images, validation, checkpointing, track, max_bad
        )
        self.classes_, self.titles_ = images.classes, titles_of(images.classes)

    def _checkpointing(
        self, path: str | Path, images: LabelledImages, validation: LabelledImages | None
    ) -> Checkpointing:
        from sppnet.classification.checkpoint import Checkpointing

        data = {"images": images.contents}
        if validation is not None:
            data["validation images"] = validation.contents
        return Checkpointing(Path(path), self._lasting(), data)

    def _lasting(self) -> dict[str, Any]:
        """Return the settings that what is fitted depends on."""
        settings = {name: value for name, value in self.get_params(deep=False).items() if name not in _PLACE}
        return settings | {"network": str(self.network)}

    def predict(self, image: Image, views: str | None = None) -> ClassScores:
        """Compute how probable each class is for an image.

        Parameters
        ----------
        image : path, str, PIL.Image.Image or (H, W, 3) uint8 RGB
            See `sppnet.images.pixels_of`.
        views : str, optional
            What is looked at, see `sppnet.classification.views.probabilities`; by default the whole image, or
            the central crop if there is no pyramid.

        Raises
        ------
        NotFittedError
            If the classifier is not fitted.
        SppnetError, FileNotFoundError
            If the image cannot be read, or there are no such views.
        """
        pixels, chosen = pixels_of(image), self.views(views)
        return self._named(probabilities(self.scorer_, pixels, chosen))

    def views(self, views: str | None = None) -> str:
        """Return the views that are taken if these are asked for, or none.

        Raises
        ------
        NotFittedError
            If the classifier is not fitted.
        SppnetError
            If there are no such views, or the network has no pyramid and they need one.
        """
        self._check_fitted()
        chosen = views or ("full" if self.scorer_.takes_any_size else "one")
        check_views(self.scorer_, chosen)
        return chosen

    def _named(self, found: FloatArray) -> ClassScores:
        return ClassScores(found, self.classes_, self.titles_)

    def stream(
        self, images: Iterable[Image], views: str | None = None, *, cluster: Runner | None = None
    ) -> Iterator[ClassScores | SppnetError | OSError]:
        """Classify many images; the next one is read while one is looked at.

        Parameters
        ----------
        images : iterable of whatever `predict` takes
            The images.
        views : str, optional
            See `predict`.
        cluster : Runner, optional
            Whose workers look at them, see `sppnet.cluster.Cluster`; by default this process.

        Returns
        -------
        iterator of ClassScores, or the SppnetError or OSError that an image gave
            In the order of the images.
        """
        if isinstance(images, str | Path):
            raise SppnetError(f"found the path {str(images)!r}, expected a list of images")
        return self._stream(images, self.views(views), cluster)

    def _stream(
        self, images: Iterable[Image], views: str, cluster: Runner | None
    ) -> Iterator[ClassScores | SppnetError | OSError]:
        for found in (cluster or Threads(1)).stream(_Classifying(self.scorer_, views), images):
            yield found if isinstance(found, Exception) else self._named(found)

    def evaluate(
        self,
        images: LabelledImages,
        views: str | None = None,
        *,
        track: Track = no_track,
        timer: StageTimer | None = None,
        cluster: Runner | None = None,
    ) -> ClassificationReport:
        """Measure the classifier on labelled images.

        Parameters
        ----------
        images : LabelledImages
            The images, such as `sppnet.read_image_folder` lists: others than those of the fit, or the figures
            say little.
        views : str, optional
            See `predict`.
        track : callable
            ``track(items, description)`` yields the items and may draw progress.
        timer : StageTimer, optional
            Takes the seconds of the stage classify.
        cluster : Runner, optional
            See `stream`.

        Returns
        -------
        ClassificationReport
            Its ``seen`` tells on how many of the images the classifier was fitted, its ``unreadable`` has a
            line for each file that could not be read and was left out.

        Raises
        ------
        NotFittedError
            If the classifier is not fitted.
        SppnetError
            If something else than labelled images is given, a class is unknown, or no image can be read.
        """
        chosen, timer = self.views(views), timer or StageTimer()
        _check_images(images)
        images = images.relabelled(self.classes_)
        found, labels, unreadable = [], [], []
        stream = self._stream((path for path, _ in images), chosen, cluster)
        for _, label in track(images, "Classifying"):
            with timer("classify"):
                result = next(stream)
            if isinstance(result, Exception):
                unreadable.append(str(result))
            else:
                found.append(result.probabilities)
                labels.append(label)
        if not found:
            raise SppnetError(f"could not read any of {len(images)} images, first: {unreadable[0]}")
        report = evaluate_classification(np.stack(found), np.array(labels), self.classes_)
        return replace(report, seen=self.seen(images), unreadable=tuple(unreadable))

    def seen(self, images: LabelledImages) -> int:
        """Return how many of some images are among those that the classifier was fitted on."""
        self._check_fitted()
        return int(np.isin(readable_keys(path for path, _ in images), self.photos_).sum())

    def save(self, path: str | Path) -> None:
        """Write the classifier to one safetensors file that says everything needed to run it.

        Raises
        ------
        NotFittedError
            If the classifier is not fitted.
        OSError
            If the file cannot be written; an older one stays as it was.
        """
        self._check_fitted()
        about = {**self.about_, "classifier": self._lasting()}
        save_network(path, StoredNetwork(self.scorer_, self.titles_, about, self.photos_))

    @classmethod
    def load(cls, name: str | Path, *, device: str = "cpu") -> Classifier:
        """Read a classifier that `save` wrote, or one that comes with sppnet.

        Parameters
        ----------
        name : path or str
            A file, or ``"imagenet"``: the default backbone with its own classifier of 1,000 classes.
        device : str
            Where the backbone runs: ``"cpu"``, or a device of PyTorch's.

        Raises
        ------
        SppnetError
            If there is no shipped classifier of that name (the message names those that are near), or the
            file is damaged, no network, or of another version.
        FileNotFoundError
            If there is no such file.
        """
        scorer, titles, about, photos = load_network(model_path(name), device)
        params = about.pop("classifier", {})
        classifier = cls(device=device)
        classifier.set_params(**{k: tuple(v) if isinstance(v, list) else v for k, v in params.items()})
        classifier.classes_, classifier.titles_, classifier.scorer_ = scorer.settings.classes, titles, scorer
        classifier.about_, classifier.photos_ = about, photos
        return classifier


def _check_images(images: object) -> None:
    """Raise an error that says what helps where something else than labelled images is given."""
    if isinstance(images, str | Path):
        path = str(images)
        raise SppnetError(f"found the path {path!r}, expected labelled images: read_image_folder({path!r})")
    if not isinstance(images, LabelledImages):
        raise SppnetError(
            f"found {type(images).__name__}, expected labelled images: what read_image_folder gives"
        )


@dataclass(frozen=True)
class _Classifying:
    """The work of classifying an image: its probabilities, or the error that it gave."""

    scorer: Scorer
    views: str

    def open(
        self,
    ) -> Staged[Image, Pixels | SppnetError | OSError, FloatArray | SppnetError | OSError]:
        """Return what reads an image, and then classifies it."""
        return Staged(_read, self._classify)

    def _classify(self, pixels: Pixels | SppnetError | OSError) -> FloatArray | SppnetError | OSError:
        if isinstance(pixels, Exception):
            return pixels
        try:
            return probabilities(self.scorer, pixels, self.views)
        except SppnetError as error:
            return error


def _read(image: Image) -> Pixels | SppnetError | OSError:
    try:
        return pixels_of(image)
    except (SppnetError, OSError) as error:
        return error
