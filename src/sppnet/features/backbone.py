"""Convolutional backbones: any image in, feature maps and their geometry out.

A backbone is a frozen timm network cut before its classifier. It takes an image of any size and returns, for
each chosen stage, a map and the exact place of its cells in the image, so that any window of the image can
be pooled from the map (paper sections 2.1 and 4.1).
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sppnet.arrays import Image, Pixels
from sppnet.errors import SppnetError
from sppnet.features.encoded import EncodedImage, FeatureMaps
from sppnet.features.geometry import derive_geometry
from sppnet.features.timm import HEAD, Stages, create_timm, digest_of, fix_same_padding, load_weights
from sppnet.images import pixels_of, resize, whole_image_size

# What is compiled when it is first used.
_COMPILED = ("_run", "_on_device")


class Backbone:
    """A frozen timm network as a source of feature maps, on images of any size.

    Parameters
    ----------
    name : str
        A timm model name.
    stages : sequence of str
        Which maps feed the pyramid: ``"1"`` to ``"5"`` for the stages by falling resolution, ``"head"`` for
        the last map before the classifier's pooling. Several are pooled one by one and joined.
    output_stride : int
        Largest stride; 16 dilates the last stage where the architecture allows it.
    weights : str, optional
        A weights file (safetensors, or a PyTorch state dict, which is read without unpickling code), or
        ``"random"``. By default the installed ImageNet weights: those of ``tf_efficientnet_lite0`` come with
        sppnet, those of ``tf_efficientnet_lite1`` and ``tf_efficientnet_lite2`` with ``sppnet[backbones]``.
    device : str
        ``"cpu"`` runs the network through OpenVINO in float32; any other device through PyTorch.

    Raises
    ------
    SppnetError
        Unknown names or stages, weights that do not fit, a backbone that is not convolutional.
    """

    def __init__(
        self,
        name: str = "tf_efficientnet_lite0",
        stages: Sequence[str] = (HEAD,),
        output_stride: int = 16,
        weights: str | None = None,
        device: str = "cpu",
    ) -> None:
        self.name, self.stages, self.output_stride = name, tuple(stages), output_stride
        self.weights, self.device, self.streams = weights, device, 1
        self.tuned: dict[str, Tensor] = {}
        check_device(device)
        # Random weights are the same ones whenever they are drawn: a backbone may be built again.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = create_timm(name, output_stride)
        self.digest = load_weights(model, name, weights)
        fix_same_padding(model)
        self.network = Stages(model, self.stages).eval().requires_grad_(False)
        self.geometry, self.channels = derive_geometry(self.network)
        # Inputs are padded to a multiple of every stride on the way, dilated ones included, so that the
        # offset of SAME padding is the same for all sizes.
        self.multiple = max(32, round(max(g.stride for g in self.geometry)))

    @classmethod
    def shared(
        cls, name: str, stages: Sequence[str], output_stride: int, weights: str | None, device: str
    ) -> Backbone:
        """Return the backbone of these settings; whoever asks for equal ones gets the same."""
        return _shared(name, tuple(stages), output_stride, weights, device)

    @property
    def signature(self) -> str:
        """Text that identifies everything the maps depend on, for caches and model files."""
        stages = ",".join(self.stages)
        text = f"{self.name} stages={stages} stride={self.output_stride} weights={self.digest[:16]}"
        return text + (f" tuned={digest_of(self.tuned)[:16]}" if self.tuned else "")

    @cached_property
    def _run(self) -> Callable[[Tensor], tuple[Tensor, ...]]:
        if self.device == "cpu":
            return _compile_openvino(_FromPixels(self.network).eval(), self.streams)
        network = self._on_device

        def run(pixels: Tensor) -> tuple[Tensor, ...]:
            with torch.inference_mode():
                return network(pixels)

        return run

    @cached_property
    def _on_device(self) -> Callable[[Tensor], tuple[Tensor, ...]]:
        network = _FromPixels(self.network).eval()
        network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network

    def copy(self) -> Backbone:
        """Return the same backbone with weights of its own, which may be changed."""
        other = self._uncompiled()
        other.network = copy.deepcopy(self.network)
        return other

    def _uncompiled(self) -> Backbone:
        """Return the same backbone, on the same network, to be compiled anew."""
        other = copy.copy(self)
        for name in _COMPILED:
            other.__dict__.pop(name, None)
        return other

    def layers_after(self, stage: str) -> dict[str, nn.Parameter]:
        """Return the parameters of all layers behind a stage by name, the classifier's left out.

        Raises
        ------
        SppnetError
            If `stage` is none from "1" to the last but one.
        """
        model: Any = self.network.model
        modules = [info["module"] for info in model.feature_info]
        if stage not in map(str, range(1, len(modules))):
            raise SppnetError(f"found the stage {stage!r}, expected one from 1 to {len(modules) - 1}")
        # Modules come in the order of the network. A stage may end in one without parameters.
        names, last = [name for name, _ in model.named_modules()], modules[int(stage) - 1]
        end = max(i for i, name in enumerate(names) if f"{name}.".startswith(f"{last}."))
        behind = set(names[end + 1 :])
        unused = {id(p) for p in model.get_classifier().parameters()}
        return {
            name: p
            for name, p in model.named_parameters()
            if name.rpartition(".")[0] in behind and id(p) not in unused
        }

    def retuned(self, state: Mapping[str, Tensor]) -> Backbone:
        """Return the backbone with parameters replaced by those of a state.

        All that were replaced so far are kept in half precision, as `tuned`.

        Raises
        ------
        SppnetError
            If a name or a shape is not the network's.
        """
        other = self.copy()
        own = dict(other.network.model.named_parameters())
        wrong = [n for n, value in state.items() if n not in own or own[n].shape != value.shape]
        if wrong:
            raise SppnetError(f"found tuned weights that {self.name} does not have, first {wrong[0]}")
        tuned = {**self.tuned, **{name: value.detach().half().cpu() for name, value in state.items()}}
        # In the network's order, which the signature depends on.
        other.tuned = {name: tuned[name] for name in own if name in tuned}
        with torch.no_grad():
            for name, value in other.tuned.items():
                own[name].copy_(value)
        other.network.requires_grad_(False)
        return other

    def for_threads(self, count: int) -> Backbone:
        """Return the same backbone for `count` threads at once, on the CPU each with its share of the cores.

        Many images take less time so, and a single one more.
        """
        other = self._uncompiled()
        other.streams = count
        return other

    def release(self) -> None:
        """Free the compiled network and its buffers; it is compiled again when it is next used."""
        for name in _COMPILED:
            self.__dict__.pop(name, None)

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
            float32 maps on the backbone's device, channels last in memory.
        """
        return self._compute(self._run, image, side)

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
        other = self.encode(np.ascontiguousarray(pixels[:, ::-1]), scales) if flip else None
        return EncodedImage((height, width), tuple(self(pixels, side) for side in scales), other)

    def differentiable(self, image: Pixels, side: int) -> FeatureMaps:
        """Compute the maps through PyTorch, with gradients for the parameters that require one.

        Slower than a call on the CPU; the values are the same but for rounding.
        """
        return self._compute(self._on_device, image, side)

    def _compute(self, run: Callable[[Tensor], tuple[Tensor, ...]], image: Pixels, side: int) -> FeatureMaps:
        height, width = image.shape[:2]
        h, w = whole_image_size(height, width, side)
        maps = run(self._padded(resize(image, h, w)).to(self.device))
        inside = tuple(
            m[0, : g.cells(h), : g.cells(w)].permute(2, 0, 1)
            for m, g in zip(maps, self.geometry, strict=True)
        )
        return FeatureMaps(inside, self.geometry, (w / width, h / height), min(h, w))

    def _padded(self, image: Pixels) -> Tensor:
        """Return (1, H', W', 3) float32 pixels, padded to full strides with what becomes 0: their mean."""
        height, width = image.shape[:2]
        up = self.multiple
        padded = np.empty((1, -(-height // up) * up, -(-width // up) * up, 3), dtype=np.float32)
        padded[0, :height, :width] = image
        padded[0, height:] = padded[0, :, width:] = np.float32(self.network.mean) * np.float32(255)
        return torch.from_numpy(padded)


@lru_cache(maxsize=8)
def _shared(
    name: str, stages: tuple[str, ...], output_stride: int, weights: str | None, device: str
) -> Backbone:
    return Backbone(name, stages, output_stride, weights, device)


class _FromPixels(nn.Module):
    """A network of stages behind the standardisation of pixels; channels come last on both sides."""

    def __init__(self, network: Stages) -> None:
        super().__init__()
        self.network = network
        self.mean, self.std = (nn.Buffer(torch.tensor(v) * 255) for v in (network.mean, network.std))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(m.permute(0, 2, 3, 1) for m in self.network(self.standardise(pixels)))

    def standardise(self, pixels: Tensor) -> Tensor:
        """Return (1, H, W, 3) pixels, 0 to 255, as the network takes them, (1, 3, H, W)."""
        return ((pixels - self.mean) / self.std).permute(0, 3, 1, 2)


def check_device(device: str) -> None:
    """Raise ValueError for a device that this machine does not have."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SppnetError(f"device {device!r} was asked for, but PyTorch finds no CUDA device")
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SppnetError(
            f"found the device {device!r} ({reason}), expected cpu or one that PyTorch can use"
        ) from None


def _compile_openvino(network: nn.Module, streams: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Compile for the CPU with free height and width."""
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecates the tracing that OpenVINO converts by.
        model = openvino.convert_model(network, example_input=torch.zeros(1, 64, 64, 3), input=[1, -1, -1, 3])
    compiled = openvino.Core().compile_model(
        model,
        "CPU",
        # float32 everywhere: the same features on every machine, whatever its fast types are.
        {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": streams,
        },
    )
    requests = threading.local()

    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        # A request serves one thread; those of several threads take turns.
        if not hasattr(requests, "own"):
            requests.own = compiled.create_infer_request()
        results = requests.own.infer(pixels.numpy(), share_inputs=True)
        return tuple(torch.from_numpy(results[i]) for i in range(len(compiled.outputs)))

    return run
