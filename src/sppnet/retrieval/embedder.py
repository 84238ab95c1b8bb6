"""Images and regions as vectors: frozen maps, a pyramid over the whole image or any box, a projection.

What the paper does on Caltech101 and PASCAL VOC (sections 3.2 and 3.3), for any image and for boxes of one's
own: the network runs once over the image, and every box is pooled from its maps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from sppnet.arrays import Boxes, Image, to_numpy
from sppnet.boxes import area
from sppnet.errors import SppnetError, check_choice
from sppnet.estimator import Estimator
from sppnet.features.backbone import DEFAULT, Backbone
from sppnet.features.encoded import EncodedImage
from sppnet.features.windows import WindowPooling, side_by_side
from sppnet.images import pixels_of, resize
from sppnet.parallel import Runner, Threads, thread_count
from sppnet.pooling.bins import pyramid_length
from sppnet.storage import write_tensors

FORMAT, VERSION = "sppnet-embedder", "3"
"""Mark of a file of an embedder alone; the version counts for those in files of vectors, too."""

VIEWS = ("full", "crop", "warp")
NORMS = ("l2", "none")
SAMPLE = 4096
"""So many vectors teach a projection, drawn at random; more change it little."""

# What shorter vectors are divided by instead of their length.
_SHORTEST = np.float32(1e-12)

_FACTS = "embedder"
# What a file keeps: all settings but those of the machine, and the seed of a draw that is done.
_KEPT = ("scales", "join_scales", "levels", "mode", "view", "flip", "power", "norm", "pca")
_KEPT_BACKBONE = ("stages", "output_stride")

Vectors = npt.NDArray[np.float32]


class Embedder(Estimator):
    """Vectors of images, and of boxes in them, on frozen features; a scikit-learn transformer.

    Parameters
    ----------
    backbone : str or path
        Name of a shipped backbone, or a backbone file, see `sppnet.features.backbone.Backbone`.
    stages : tuple of str
        Which maps are pooled, see `sppnet.features.backbone.Backbone`; the vectors of several are joined.
    output_stride : int
        Largest stride of the backbone: 32, or 16 for finer maps.
    device : str
        ``"cpu"``, or a PyTorch device such as ``"cuda"``, on which the backbone runs.
    scales : tuple of int
        Shorter sides in pixels to which images are resized. Of several, each box takes the one at which its
        own side is nearest to 208 pixels (section 4.1), unless `join_scales`.
    join_scales : bool
        Whether every box is pooled at every scale and the vectors are joined: as many times as long.
    levels : tuple of int
        The pyramid: level n cuts a box into n x n bins. ``(1,)`` is global pooling.
    mode : {"max", "average"}
        What is kept of a bin.
    view : {"full", "crop", "warp"}
        The whole image; its central square; or the whole image pressed into a square (section 3.3). Boxes
        need the whole image.
    flip : bool
        Whether the image with left and right exchanged is pooled, too, and its bins, turned back, are
        averaged with the image's: it costs a second pass of the network. What was left stays left; the mean
        with the flipped image's vector as it is would not tell them apart.
    power : float
        Every number becomes ``sign(x) * abs(x) ** power`` before the norm; 1 leaves it, as the paper does.
        0.5 keeps a few strong responses from deciding everything.
    norm : {"l2", "none"}
        Whether vectors are scaled to length 1 (section 3.2); those that are joined, first one by one.
    pca : int, optional
        Number of components to project to, learned by `fit`; projected vectors are scaled to length 1 again.
    seed : int
        Seed of the draw of the images that the projection is learned from.

    Attributes
    ----------
    pca_mean_ : (D,) float32
        Mean of the vectors that the projection was learned from. There where `pca` is set, after `fit`.
    pca_components_ : (pca, D) float32
        The directions that are projected to, of length 1. There where `pca` is set, after `fit`.

    Examples
    --------
    >>> photo = np.zeros((300, 451, 3), np.uint8)
    >>> embed = Embedder(levels=(2, 1))
    >>> embed(photo).shape
    (6400,)
    >>> embed(photo, np.array([[140, 30, 440, 290], [200, 90, 250, 130]])).shape
    (2, 6400)
    """

    pca_mean_: Vectors
    pca_components_: Vectors

    def __init__(
        self,
        backbone: str | Path = DEFAULT,
        *,
        stages: tuple[str, ...] = ("head",),
        output_stride: int = 32,
        device: str = "cpu",
        scales: tuple[int, ...] = (224,),
        join_scales: bool = False,
        levels: tuple[int, ...] = (3, 2, 1),
        mode: str = "max",
        view: str = "full",
        flip: bool = False,
        power: float = 0.5,
        norm: str = "l2",
        pca: int | None = None,
        seed: int = 0,
    ) -> None:
        self.backbone, self.stages = backbone, stages
        self.output_stride, self.device = output_stride, device
        self.scales, self.join_scales, self.levels, self.mode = scales, join_scales, levels, mode
        self.view, self.flip = view, flip
        self.power, self.norm, self.pca, self.seed = power, norm, pca, seed

    @property
    def network(self) -> Backbone:
        """The backbone; embedders of equal settings share it."""
        self.pooling  # noqa: B018  (says now what is wrong with the settings)
        check_choice("view", self.view, VIEWS)
        check_choice("norm", self.norm, NORMS)
        if not self.power > 0 or (self.pca is not None and self.pca < 1):
            raise SppnetError(f"found power {self.power} and pca {self.pca}, expected above 0 and from 1 up")
        return Backbone.shared(self.backbone, self.stages, self.output_stride, self.device)

    @property
    def pooling(self) -> WindowPooling:
        """How boxes become vectors."""
        return WindowPooling(self.scales, self.levels, self.mode, scale_rule="released")

    @property
    def kind(self) -> str:
        """Text that identifies backbone and settings: what embedders share whose projections may differ."""
        return f"{self.network.signature} {json.dumps(self._settings())}"

    @property
    def signature(self) -> str:
        """Text that identifies everything the vectors depend on."""
        if self.pca is None:
            return self.kind
        self._check_fitted()
        return f"{self.kind} projection={_fingerprint(self.pca_components_)}"

    @property
    def length(self) -> int:
        """Numbers in a vector."""
        return self.pca or sum(self._lengths)

    def __call__(self, image: Image | EncodedImage, boxes: npt.ArrayLike | None = None) -> Vectors:
        """Embed an image, or boxes in it.

        Parameters
        ----------
        image : path, str, PIL.Image.Image, (H, W, 3) uint8 RGB, or EncodedImage
            See `sppnet.images.pixels_of`. Any number of sets of boxes can be asked of what `encode` gave.
        boxes : (R, 4) float, optional
            Boxes in pixels of the original image, 0-based and half-open.

        Returns
        -------
        (D,) float32 without `boxes`, else (R, D) float32

        Raises
        ------
        SppnetError
            If a box has no area or lies outside the image (names the first), the projection is not learned
            yet, boxes are asked of another view than the full one, or the maps are of other settings.
        ImageError
            If the image cannot be read.
        FileNotFoundError
            If there is no such file.
        """
        vectors = self._embed(self.network, image, boxes)
        return vectors[0] if boxes is None else vectors

    def encode(self, image: Image) -> EncodedImage:
        """Compute the maps of an image, the expensive step, once for any number of boxes.

        Parameters
        ----------
        image : path, str, PIL.Image.Image or (H, W, 3) uint8 RGB
            See `sppnet.images.pixels_of`.

        Returns
        -------
        EncodedImage
            The maps of what the view shows; with `flip`, of the flipped image, too.
        """
        return self._encode(self.network, image)

    def _embed(self, backbone: Backbone, image: Image | EncodedImage, boxes: npt.ArrayLike | None) -> Vectors:
        if isinstance(image, EncodedImage):
            self._check_encoded(image)
            encoded, asked = image, None if boxes is None else self._checked(boxes, image.size)
        else:
            pixels = pixels_of(image)
            # Before the expensive step.
            asked = None if boxes is None else self._checked(boxes, pixels.shape[:2])
            encoded = self._encode(backbone, pixels)
        if asked is None:
            height, width = encoded.size
            asked = np.array([[0, 0, width, height]], np.float32)
        parts = [encoded.at(s) for s in range(len(self.scales))] if self.join_scales else [encoded]
        pooled = [to_numpy(self.pooling(part, asked)) for part in parts]
        return self._projected(self._normalised(side_by_side(pooled)))

    def _encode(self, backbone: Backbone, image: Image) -> EncodedImage:
        pixels = pixels_of(image)
        if self.view == "crop":
            side = min(pixels.shape[:2])
            y, x = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
            pixels = pixels[y : y + side, x : x + side]
        elif self.view == "warp":
            pixels = resize(pixels, max(self.scales), max(self.scales))
        return backbone.encode(pixels, self.scales, flip=self.flip)

    def _check_encoded(self, encoded: EncodedImage) -> None:
        """Raise an error for maps of other scales or stages, or with or without the flipped image."""
        if len(encoded.scales) != len(self.scales) or (encoded.flipped is not None) != self.flip:
            found = f"{len(encoded.scales)} scales" + " and the flipped image" * (encoded.flipped is not None)
            expected = f"{len(self.scales)}" + " and the flipped image" * self.flip
            raise SppnetError(f"found maps at {found}, expected {expected}: those that encode gives")
        if encoded.channels != self.network.channels:
            found = f"maps of {encoded.channels} channels"
            raise SppnetError(f"found {found}, expected {self.network.channels}: those that encode gives")

    def fit_transform(self, images: Iterable[Image], labels: object = None) -> Vectors:
        """Learn the projection from images and embed them, as `fit` and `transform` do.

        Parameters
        ----------
        images : iterable of path, str, PIL.Image.Image or (H, W, 3) uint8 RGB
            The images.
        labels
            Passed over; scikit-learn gives them.

        Returns
        -------
        (n, D) float32
            A row for each image.
        """
        images = list(images)
        return self.fit(images, labels).transform(images)

    def fit(self, images: Iterable[Image], labels: object = None) -> Embedder:
        """Learn the projection from whole images; without `pca` there is nothing to learn.

        Parameters
        ----------
        images : iterable of path, str, PIL.Image.Image or (H, W, 3) uint8 RGB
            The images; of more than 4096, so many are drawn at random.
        labels
            Passed over; scikit-learn gives them.

        Returns
        -------
        Embedder
            Itself.

        Raises
        ------
        SppnetError
            If a setting is none of its kind, there are fewer images than components, or an image cannot be
            read (`ImageError`, names it).
        """
        self.network  # noqa: B018  (says now what is wrong with the settings)
        if self.pca is None:
            return self
        chosen = _sampled(list(images), self.seed)
        return self.fit_vectors([self.unprojected().transform(chosen)])

    def unprojected(self) -> Embedder:
        """Return an embedder of the same settings without `pca`: a projection is learned from its vectors."""
        settings: dict[str, Any] = self.get_params() | {"pca": None}
        return Embedder(**settings)

    def fit_vectors(self, vectors: Sequence[Vectors]) -> Embedder:
        """Learn the projection from vectors, of boxes or of whole images.

        Parameters
        ----------
        vectors : sequence of (n, D) float32
            Vectors of the `unprojected` embedder; of more than 4096 in all, so many are drawn at random.

        Returns
        -------
        Embedder
            Itself.

        Raises
        ------
        SppnetError
            If there are fewer vectors than components, or `pca` is not set.
        """
        from sklearn.decomposition import PCA

        if self.pca is None:
            raise SppnetError("found no number of components, expected pca to be set")
        known = np.concatenate([np.zeros((0, self.unprojected().length), np.float32), *vectors])
        if len(known) < self.pca:
            raise SppnetError(
                f"found {len(known)} vectors to learn {self.pca} components from, "
                "expected at least as many; use fewer components or none"
            )
        pca = PCA(self.pca, svd_solver="randomized", random_state=self.seed).fit(_sampled(known, self.seed))
        self.pca_mean_ = pca.mean_.astype(np.float32)
        self.pca_components_ = np.ascontiguousarray(pca.components_, np.float32)
        return self

    def transform(self, images: Iterable[Image]) -> Vectors:
        """Embed whole images, all cores at work.

        Parameters
        ----------
        images : iterable of path, str, PIL.Image.Image or (H, W, 3) uint8 RGB
            The images.

        Returns
        -------
        (n, D) float32
            A row for each image.

        Raises
        ------
        SppnetError, OSError
            What the first image that cannot be read gave; the message names it.
        """

        def rows() -> Iterator[Vectors]:
            for found in self.stream(images):
                if isinstance(found, Exception):
                    raise found
                yield found[0]

        # Vector by vector: nothing is held twice.
        return np.fromiter(rows(), np.dtype((np.float32, self.length)))

    def stream(
        self,
        images: Iterable[Image],
        boxes: Iterable[npt.ArrayLike | None] | None = None,
        *,
        cluster: Runner | None = None,
    ) -> Iterator[Vectors | SppnetError | OSError]:
        """Embed many images in their order, or the boxes in each.

        Each thread takes an image from its file to its vectors, so that all cores work all the time; at most
        four images a core are held.

        Parameters
        ----------
        images : iterable of path, str, PIL.Image.Image or (H, W, 3) uint8 RGB
            The images; drawn from as the vectors are taken.
        boxes : iterable of (R, 4) float or None, optional
            Boxes in each image, in its pixels, 0-based and half-open; None is the whole image.
        cluster : Runner, optional
            Whose workers embed them, see `sppnet.cluster.Cluster`; by default the threads of this process.

        Returns
        -------
        iterator of (R, D) float32, or of SppnetError or OSError
            For each image its vectors, or the error that it gave, which names it.
        """
        pairs = zip(images, repeat(None)) if boxes is None else zip(images, boxes, strict=True)
        # Twice as many as cores: while some wait for the backbone's streams, others decode and pool.
        return (cluster or Threads(2 * thread_count())).stream(_Embedding(self, self.signature), pairs)

    def _attempt(
        self, backbone: Backbone, asked: tuple[Image, npt.ArrayLike | None]
    ) -> Vectors | SppnetError | OSError:
        """Embed an image, or boxes in it, to (R, D), or return the error that names it."""
        image, boxes = asked
        try:
            return self._embed(backbone, image, boxes)
        except (SppnetError, OSError) as error:
            return named(error, image)

    def save(self, path: str | Path) -> None:
        """Write settings and projection to a safetensors file, for `load`.

        Parameters
        ----------
        path : path
            Replaced if it exists.

        Raises
        ------
        NotFittedError
            If `pca` is set and the projection is not learned yet.
        OSError
            If the file cannot be written.
        """
        facts, arrays = self.state()
        write_tensors(path, arrays, {"format": FORMAT, "version": VERSION, **facts})

    def state(self) -> tuple[dict[str, str], dict[str, Vectors]]:
        """Return what `load` needs, as metadata and arrays for a safetensors file of any format."""
        about = {
            "version": VERSION,
            "signature": self.signature,
            "settings": self._settings(),
            "backbone": {"backbone": str(self.backbone)} | {n: getattr(self, n) for n in _KEPT_BACKBONE},
        }
        projection = {} if self.pca is None else {"mean": self.pca_mean_, "components": self.pca_components_}
        return {_FACTS: json.dumps(about)}, {f"pca.{name}": value for name, value in projection.items()}

    @classmethod
    def load(cls, path: str | Path, *, backbone: str | Path | None = None, device: str = "cpu") -> Embedder:
        """Read an embedder from its own file, or from any file of vectors that it made.

        Parameters
        ----------
        path : path
            A file of `save`, of `sppnet.retrieval.vectors.write_vectors`, or of an index.
        backbone : str or path, optional
            Where the backbone file lies now, if it is not where it was.
        device : str
            ``"cpu"``, or a PyTorch device, on which the backbone is to run.

        Returns
        -------
        Embedder
            One that gives the vectors that the one in the file gave.

        Raises
        ------
        SppnetError
            If the file holds none or one of another version, or the backbone is not there or has other
            weights (names both).
        FileNotFoundError
            If there is no such file.
        """
        about, fitted = _stored(Path(path))
        stored = about["backbone"] | about["settings"]
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        if backbone is not None:
            plain["backbone"] = backbone
        embedder = cls(device=device, **plain)
        if embedder.pca is not None:
            embedder.pca_mean_, embedder.pca_components_ = fitted["pca.mean"], fitted["pca.components"]
        made = f"{path}: made by {about['signature']}"
        try:
            found = embedder.signature
        except FileNotFoundError as error:
            raise SppnetError(f"{made}; {error}; say by backbone where that file lies now") from None
        if found != about["signature"]:
            raise SppnetError(f"{made}, found {found} in {embedder.backbone}; expected the same backbone")
        return embedder

    @staticmethod
    def stored_signature(path: Path) -> str:
        """Return the signature of the embedder in a file, for which `load` is not needed."""
        return str(_stored(path)[0]["signature"])

    def __sklearn_is_fitted__(self) -> bool:
        """Tell scikit-learn whether `transform` can be called."""
        return self.pca is None or hasattr(self, "pca_components_")

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _KEPT}

    def _checked(self, boxes: npt.ArrayLike, shape: tuple[int, int]) -> Boxes:
        if self.view != "full":
            raise SppnetError(f"found boxes for the view {self.view!r}, expected the view 'full'")
        given = np.asarray(boxes, np.float32)
        if given.size == 0:
            return np.zeros((0, 4), np.float32)
        if given.ndim != 2 or given.shape[1] != 4:
            raise SppnetError(f"found boxes of shape {given.shape}, expected (R, 4)")
        height, width = shape
        inside = np.clip(given, 0, [width, height, width, height])
        wrong = np.flatnonzero(~np.isfinite(given).all(axis=1) | ~(area(inside) > 0))
        if len(wrong):
            row = int(wrong[0])
            raise SppnetError(
                f"found the box {row} {given[row].tolist()}, expected x1 < x2 and y1 < y2, inside the image "
                f"of {width} x {height}"
            )
        return given

    def _normalised(self, pooled: Vectors) -> Vectors:
        if self.power != 1:
            sizes = np.abs(pooled)
            sizes **= self.power
            pooled = np.copysign(sizes, pooled, out=sizes)
        if self.norm == "none":
            return pooled
        parts = [_unit(part) for part in np.split(pooled, np.cumsum(self._lengths)[:-1], axis=1)]
        return parts[0] if len(parts) == 1 else _unit(side_by_side(parts))

    def _projected(self, vectors: Vectors) -> Vectors:
        if self.pca is None:
            return vectors
        self._check_fitted()
        # The mean is taken off afterwards: it is one short vector there.
        offset = self.pca_components_ @ self.pca_mean_
        projected: Vectors = vectors @ self.pca_components_.T - offset
        return _unit(projected) if self.norm == "l2" else projected

    @property
    def _lengths(self) -> list[int]:
        """Of what is joined to a vector: the pyramid of each stage, at each scale."""
        stages = [pyramid_length(c, self.levels) for c in self.network.channels]
        return stages * (len(self.scales) if self.join_scales else 1)


@dataclass(frozen=True)
class _Embedding:
    """The work of an embedder on images, each alone or with boxes in it; the signature is its own."""

    embedder: Embedder
    signature: str

    def open(self) -> Callable[[tuple[Image, npt.ArrayLike | None]], Vectors | SppnetError | OSError]:
        """Return what embeds one; raise an error where the backbone is another than where it was made."""
        found = self.embedder.signature
        if found != self.signature:
            raise SppnetError(f"found the embedder {found} on a machine, expected {self.signature} on all")
        return partial(self.embedder._attempt, _for_threads(self.embedder.network, thread_count()))


def _stored(path: Path) -> tuple[dict[str, Any], dict[str, Vectors]]:
    """Return what a file tells of the embedder in it, and its projection."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: found no such file, expected an embedder")
    try:
        with safe_open(path, "np") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})[_FACTS])
            projection = {k: file.get_tensor(k) for k in file.keys() if k.startswith("pca.")}  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise SppnetError(f"{path}: found no embedder in it ({error}), expected one of sppnet's") from None
    if about.get("version") != VERSION:
        found = f"an embedder of version {about.get('version', 1)}"
        raise SppnetError(f"{path}: found {found}, expected version {VERSION}; make the file anew")
    return about, projection


def named(error: SppnetError | OSError, image: Image | EncodedImage) -> SppnetError | OSError:
    """Return an error that an image gave, with the name of its file if it lacks that."""
    plain = not isinstance(image, str | Path) or str(image) in str(error)
    return error if plain else SppnetError(f"{image}: {error}")


def check_same(place: Path, known: Embedder, asked: Embedder) -> None:
    """Raise an error, with both names, if what is there was made by another embedder than the one asked for.

    One that has still to learn its projection asks for equal settings, and any projection.
    """
    ready = asked.__sklearn_is_fitted__()
    found, expected = (known.signature, asked.signature) if ready else (known.kind, asked.kind)
    if found != expected:
        raise SppnetError(f"{place}: made by another embedder, {found}; expected {expected}")


@lru_cache(maxsize=8)
def _for_threads(backbone: Backbone, count: int) -> Backbone:
    return backbone.for_threads(count)


def _sampled(items: Any, seed: int) -> Any:
    """Return at most `SAMPLE` of the items, drawn at random."""
    if len(items) <= SAMPLE:
        return items
    chosen = np.sort(np.random.default_rng(seed).choice(len(items), SAMPLE, replace=False))
    return items[chosen] if isinstance(items, np.ndarray) else [items[i] for i in chosen]


def _unit(vectors: Vectors) -> Vectors:
    """Return (R, D) vectors scaled to length 1; those of zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Vectors = vectors / np.maximum(lengths, _SHORTEST)
    return scaled


def _fingerprint(values: Vectors) -> str:
    """Return 16 hexadecimal digits that stand for an array."""
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()[:16]
