"""Convolutional backbones: any image in, feature maps and their geometry out.

A backbone is a network cut before its classifier, in a file (`sppnet.features.graph`). It takes an image of
any size and returns, for each chosen stage, a map and the exact place of its cells in the image, so that any
window of the image can be pooled from the map (paper sections 2.1 and 4.1).
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import onnx
from sppnet.arrays import FloatArray, Image, Pixels, channels_first
from sppnet.errors import SppnetError, check_extra
from sppnet.features.encoded import EncodedImage, FeatureMaps
from sppnet.features.graph import HEAD, Graph, read_graph
from sppnet.features.graph import MAPS as LEVELS
from sppnet.features.graph import STAGES as PYRAMID
from sppnet.features.inference import CompiledGraph, Pixels32, compile_graph, size_rule
from sppnet.features.pyramid import with_windows
from sppnet.images import pixels_of, resize, whole_image_size
from sppnet.models import model_path
from sppnet.storage import digest_of

DEFAULT = "efficientnet-lite0"
"""The backbone that comes with sppnet."""

Half = npt.NDArray[np.float16]

# So many times the stride, or more, is large enough for any network.
_SMALL = 4


class Backbone:
    """A frozen network as a source of feature maps, on images of any size.

    Parameters
    ----------
    source : str, path or Graph
        ``"efficientnet-lite0"``, which comes with sppnet, or a file that ``sppnet backbone make`` wrote.
    stages : sequence of str
        Which maps feed the pyramid: ``"1"`` to ``"5"`` for the stages by falling resolution, ``"head"`` for
        the last map before the classifier's pooling. Several are pooled one by one and joined.
    output_stride : int
        Largest stride; 16 dilates the last stage where the network allows it.
    device : str
        ``"cpu"`` runs the network through OpenVINO in float32; any other device through PyTorch.

    Attributes
    ----------
    graph : Graph
        The network as its file has it.
    geometry : tuple of Geometry
        Where the cells of each stage's map lie in the resized image.
    channels : tuple of int
        Channels of each stage's map; of a pyramid, of those that windows are pooled from.
    multiple : int
        Height and width are padded to multiples of this.
    tuned : dict of str to float16 array
        The weights that are not those of the graph; see `retuned`.

    Raises
    ------
    SppnetError
        Unknown names, stages or output strides, a file that holds no backbone, a device that is not there.
    FileNotFoundError
        If there is no such file.
    """

    def __init__(
        self,
        source: str | Path | Graph = DEFAULT,
        stages: Sequence[str] = (HEAD,),
        output_stride: int = 16,
        device: str = "cpu",
    ) -> None:
        self.graph = source if isinstance(source, Graph) else read_graph(backbone_path(source))
        self.stages, self.output_stride, self.device, self.streams = tuple(stages), output_stride, device, 1
        facts = self.graph.facts
        facts.check_stages(self.stages)
        variant = facts.variant(output_stride)
        if device != "cpu":
            check_extra("torch", f"the device {device}")
            from sppnet.features.network import check_device

            check_device(device)
        self.geometry = tuple(variant.geometry[stage] for stage in self.stages)
        pooled = LEVELS if self.proposes else self.stages
        self.channels = tuple(facts.channels[stage] for stage in pooled)
        self.multiple = variant.multiple
        self.mean, self.std = (tuple(255 * v for v in values) for values in (facts.mean, facts.std))
        self.tuned: dict[str, Half] = {}
        self._first = True

    @classmethod
    def shared(
        cls, source: str | Path, stages: Sequence[str], output_stride: int, device: str = "cpu"
    ) -> Backbone:
        """Return the backbone of these settings; whoever asks for equal ones gets the same."""
        path = backbone_path(source)
        stat = path.stat()
        return _shared(path, (stat.st_mtime_ns, stat.st_size), tuple(stages), output_stride, device)

    @property
    def name(self) -> str:
        """What the backbone is called."""
        return self.graph.facts.name

    @property
    def digest(self) -> str:
        """SHA-256 of the weights of its file, 64 hexadecimal digits."""
        return self.graph.facts.digest

    @property
    def proposes(self) -> bool:
        """Whether its maps are those of a pyramid, which proposes windows; see `sppnet.features.pyramid`."""
        return self.stages == PYRAMID

    @property
    def signature(self) -> str:
        """Text that identifies everything the maps depend on, for caches and model files."""
        stages = ",".join(self.stages)
        text = f"{self.name} stages={stages} stride={self.output_stride} weights={self.digest[:16]}"
        return text + (f" tuned={digest_of(self.tuned)[:16]}" if self.tuned else "")

    @cached_property
    def parameters(self) -> dict[str, FloatArray]:
        """All weights by name, in the order of the network, as float32."""
        tuned = {name: value.astype(np.float32) for name, value in self.tuned.items()}
        return {**self.graph.parameters, **tuned}

    @property
    def model(self) -> onnx.ModelProto:
        """The graph of its stages at its output stride, with the weights that it has now."""
        return self.graph.at(self.stages, self.output_stride, self.tuned)

    @cached_property
    def _run(self) -> Callable[[Pixels32], tuple[Any, ...]]:
        if self.device == "cpu":
            return compile_graph(self.model, self.mean, self.std, self.streams)
        from sppnet.features.network import on_device

        return on_device(self)

    def compile(self) -> None:
        """Compile the network now; an error says what the runtime lacks."""
        self._run  # noqa: B018

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has, in another process, too: all but what is computed of it."""
        computed = ("_run", "parameters", "sides", "smallest")
        return {name: value for name, value in vars(self).items() if name not in computed} | {"_first": True}

    def _copy(self) -> Backbone:
        """Return the same backbone, to be changed or compiled anew."""
        return copy.copy(self)

    def retuned(self, state: Mapping[str, FloatArray]) -> Backbone:
        """Return the backbone with weights replaced by those of a state.

        All that were replaced so far are kept in half precision, as `tuned`.

        Raises
        ------
        SppnetError
            If a name or a shape is not the network's.
        """
        self.graph.check_parameters(state)
        tuned = {**self.tuned, **{name: value.astype(np.float16) for name, value in state.items()}}
        other = self._copy()
        # In the network's order, which the signature depends on.
        other.tuned = {name: tuned[name] for name in self.graph.names if name in tuned}
        return other

    def for_threads(self, count: int) -> Backbone:
        """Return the same backbone for `count` threads at once, on the CPU each with its share of the cores.

        Many images take less time so, and a single one more.
        """
        other = self._copy()
        other.streams = count
        return other

    def release(self) -> None:
        """Free the compiled network and its buffers; it is compiled again when it is next used."""
        self.__dict__.pop("_run", None)

    def __call__(self, image: Pixels, side: int) -> FeatureMaps:
        """Compute the maps of one image whose shorter side is resized to `side`; several threads may.

        Parameters
        ----------
        image : (H, W, 3) uint8 RGB
        side : int
            Shorter side in pixels; the aspect ratio is kept (paper section 4.1). Strips get a smaller one,
            see `sppnet.images.whole_image_size`.

        Returns
        -------
        FeatureMaps
            float32 maps, channels last in memory; on a device other than the CPU, tensors there.
        """
        return self.compute(self._run, image, side)

    def maps(self, images: Pixels) -> tuple[Any, ...]:
        """Compute the maps of equally large images as they are: nothing is resized, padded or left out.

        Parameters
        ----------
        images : (N, H, W, 3) uint8 RGB

        Returns
        -------
        tuple of (N, h, w, C) float32 arrays
            One for each stage; on a device other than the CPU, tensors there.

        Raises
        ------
        SppnetError
            If the images are too small for the network.
        """
        height, width = images.shape[1:3]
        # Larger ones fit every network, and the question takes a while.
        if min(height, width) < _SMALL * self.multiple and min(height, width) < self.smallest:
            raise SppnetError(
                f"found an image that becomes {height} x {width} pixels, expected at least {self.smallest} "
                "each way for the network; cut it into parts"
            )
        return self._run(images.astype(np.float32))

    @cached_property
    def smallest(self) -> int:
        """Side in pixels of the smallest image that the network takes without padding."""
        return bisect_left(range(_SMALL * self.multiple), True, lo=1, key=lambda side: all(self.sides(side)))

    @cached_property
    def sides(self) -> Callable[[int], tuple[int, ...]]:
        """What tells the side of each stage's map of a square image without padding, 0 if it is too small."""
        return size_rule(self.model)

    def encode(self, image: Image, scales: Sequence[int], *, flip: bool = False) -> EncodedImage:
        """Compute the maps of an image at every scale: the one expensive step (paper section 4.1).

        Parameters
        ----------
        image : path, str, PIL.Image.Image or (H, W, 3) uint8 RGB
            See `sppnet.images.pixels_of`.
        scales : sequence of int
            Shorter sides of the resized image, in pixels.
        flip : bool
            Whether the maps of the image with left and right exchanged are computed, too.

        Returns
        -------
        EncodedImage
            The maps, one set for each scale, and the size of the image.
        """
        pixels = pixels_of(image)
        height, width = pixels.shape[:2]
        if self.proposes:
            (side,) = scales
            encoded = with_windows(self(pixels, side), (height, width))
            self._first = False
            return encoded
        other = self.encode(np.ascontiguousarray(pixels[:, ::-1]), scales) if flip else None
        # The largest first: its buffers serve the others, too.
        maps = {side: self(pixels, side) for side in sorted(set(scales), reverse=True)}
        if self._first and isinstance(self._run, CompiledGraph):
            # It may be the only image: what follows need not pile up on hundreds of megabytes.
            self._run.free_buffers()
        self._first = False
        return EncodedImage((height, width), tuple(maps[side] for side in scales), other)

    def compute(self, run: Callable[[Pixels32], tuple[Any, ...]], image: Pixels, side: int) -> FeatureMaps:
        """Compute maps as a call does, by another way of running the network.

        Parameters
        ----------
        run : callable
            Takes (1, H, W, 3) float32 pixels, 0 to 255, and returns (1, h, w, C) maps, arrays or tensors.
        image, side
            As in a call.
        """
        height, width = image.shape[:2]
        h, w = whole_image_size(height, width, side)
        maps = run(self.padded(resize(image, h, w)))
        inside = tuple(
            channels_first(m[0, : g.cells(h), : g.cells(w)]) for m, g in zip(maps, self.geometry, strict=True)
        )
        return FeatureMaps(inside, self.geometry, (w / width, h / height), min(h, w))

    def padded(self, image: Pixels) -> Pixels32:
        """Return (1, H', W', 3) float32 pixels, padded to full strides with what becomes 0: their mean."""
        height, width = image.shape[:2]
        up = self.multiple
        padded = np.empty((1, -(-height // up) * up, -(-width // up) * up, 3), dtype=np.float32)
        padded[0, :height, :width] = image
        padded[0, height:] = padded[0, :, width:] = np.array(self.mean, np.float32)
        return padded


def backbone_path(source: str | Path) -> Path:
    """Return the file of a backbone that is given by its path or, if it came with sppnet, by its name.

    Raises
    ------
    FileNotFoundError, SppnetError
        If there is none; see `sppnet.models.model_path`.
    """
    try:
        return model_path(source, suffix=".onnx")
    except SppnetError as error:
        hint = "; sppnet backbone make NAME --out FILE makes one of any timm network"
        raise SppnetError(f"{error}{hint}") from None


@lru_cache(maxsize=8)
def _shared(
    path: Path, _: tuple[int, int], stages: tuple[str, ...], output_stride: int, device: str
) -> Backbone:
    return Backbone(path, stages, output_stride, device)
