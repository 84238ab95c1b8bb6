"""Feature maps of images: computed once, asked for any window, kept on disk in half precision."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sppnet.arrays import Boxes, Image, IntArray, Pixels
from sppnet.features.backbone import Backbone
from sppnet.features.geometry import FeatureMaps, choose_scale, project, responses
from sppnet.images import pixels_of
from sppnet.pooling import pool_regions
from sppnet.progress import StageTimer
from sppnet.storage import write_tensors


def encode(backbone: Backbone, image: Pixels, sides: Sequence[int]) -> tuple[FeatureMaps, ...]:
    """Compute the feature maps of an image at every scale: the one expensive step (paper section 4.1).

    Parameters
    ----------
    backbone : Backbone
    image : (H, W, 3) uint8 RGB
    sides : sequence of int
        Shorter sides of the scales, in pixels.

    Returns
    -------
    tuple of FeatureMaps
        One per side.
    """
    return tuple(backbone(image, side) for side in sides)


def pool_windows(
    maps: Sequence[FeatureMaps],
    boxes: Boxes,
    shape: tuple[int, int],
    sides: Sequence[int],
    levels: Sequence[int],
    reference: float | None = None,
    mode: str = "max",
    projection: str = "released",
    scale_rule: str = "released",
) -> Tensor:
    """Pool windows of an image, each at the scale where its size suits the backbone best (section 4.1).

    Parameters
    ----------
    maps : sequence of FeatureMaps
        One per side.
    boxes : (R, 4) float32
        Windows in pixels of the original image.
    shape : (int, int)
        Height and width of the original image.
    sides : sequence of int
        Shorter side of each scale.
    levels : sequence of int
        Sides of the pyramid's levels.
    reference : float, optional
        Side in pixels that a window should have at its scale; by default the scale rule's own.
    mode : {"max", "average"}
        What is kept of a bin.
    projection : {"released", "paper"}
        Which cells a window covers; see `sppnet.features.geometry.project`.
    scale_rule : {"released", "paper"}
        Which scale suits a window; see `sppnet.features.geometry.choose_scale`.

    Returns
    -------
    (R, D) float32 tensor
        For each stage in turn, the pyramid in the order of `sppnet.pooling.pool_regions`.
    """
    scale = choose_scale(boxes, *shape, sides, reference, scale_rule)
    pooled = []
    for t in range(len(maps[0].stages)):
        windows = np.zeros((len(boxes), 4), dtype=np.int64)
        for s in np.unique(scale):
            windows[scale == s] = project(boxes[scale == s], maps[s], t, projection)
        pooled.append(pool_regions([m.stages[t] for m in maps], windows, levels, mode=mode, index=scale))
    return side_by_side(pooled)


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Join (R, D_i) tensors to (R, sum of D_i); a single one is not copied, however many its rows."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def mirror_bins(pooled: Tensor, channels: Sequence[int], levels: Sequence[int]) -> Tensor:
    """Exchange left and right in pooled windows: reverse the columns of every level's bins.

    Parameters
    ----------
    pooled : (R, D) tensor
        As `pool_windows` returns it.
    channels : sequence of int
        Of each stage's map.
    levels : sequence of int
        Sides of the pyramid's levels.
    """
    shapes = [(count, n, n) for count in channels for n in levels]
    parts = torch.split(pooled, [math.prod(shape) for shape in shapes], dim=1)
    return torch.cat(
        [p.reshape(-1, *shape).flip(3).flatten(1) for p, shape in zip(parts, shapes, strict=True)], dim=1
    )


def first_responses(
    maps: Sequence[FeatureMaps],
    boxes: Boxes,
    shape: tuple[int, int],
    sides: Sequence[int],
    reference: float | None = None,
    projection: str = "released",
    scale_rule: str = "released",
) -> IntArray:
    """Return which windows are the first with their cells at their scale: the others are duplicates.

    Parameters are those of `pool_windows`, which pools the same vector for a window and its duplicates.

    Returns
    -------
    (U,) int64
        Rising indices into `boxes`.
    """
    scale = choose_scale(boxes, *shape, sides, reference, scale_rule)
    kept = []
    for s in np.unique(scale):
        here = np.flatnonzero(scale == s)
        _, first = np.unique(responses(boxes[here], maps[s], projection), axis=0, return_index=True)
        kept.append(here[first])
    return np.sort(np.concatenate([np.zeros(0, np.int64), *kept]))


class MapCache:
    """Feature maps on disk in half precision, keyed by the image's content, the backbone and the scales.

    Parameters
    ----------
    folder : Path
        Created if missing. Entries that are damaged are computed anew.
    backbone : Backbone
    sides : sequence of int
    """

    def __init__(self, folder: Path, backbone: Backbone, sides: Sequence[int]) -> None:
        self.folder, self.backbone, self.sides = folder, backbone, tuple(sides)
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, image: Image, timer: StageTimer) -> tuple[tuple[FeatureMaps, ...], tuple[int, int]]:
        """Return the maps of an image, and its height and width."""
        content = image.read_bytes() if isinstance(image, Path) else np.ascontiguousarray(image).tobytes()
        shape = b"" if isinstance(image, Path) else repr(image.shape).encode()
        key = hashlib.sha256(
            content + shape + repr((self.backbone.signature, self.sides)).encode()
        ).hexdigest()
        path = self.folder / f"{key}.safetensors"
        with timer("maps from cache"):
            cached = self._read(path)
        if cached is not None:
            return cached
        with timer("backbone"):
            pixels = pixels_of(image)
            maps = encode(self.backbone, pixels, self.sides)
        with timer("maps to cache"):
            height, width = pixels.shape[:2]
            # Rounded as they will be read: a fit that goes on with maps of the disk gives the same detector.
            maps = tuple(replace(m, stages=tuple(s.half().float() for s in m.stages)) for m in maps)
            self._write(path, maps, (height, width))
        return maps, (height, width)

    def _write(self, path: Path, maps: tuple[FeatureMaps, ...], shape: tuple[int, int]) -> None:
        tensors = {
            f"{s}.{t}": stage.permute(1, 2, 0).half().cpu().contiguous()
            for s, scale in enumerate(maps)
            for t, stage in enumerate(scale.stages)
        }
        about = {"factors": [m.factors for m in maps], "shape": shape}
        write_tensors(path, tensors, {"about": json.dumps(about)})

    def _read(self, path: Path) -> tuple[tuple[FeatureMaps, ...], tuple[int, int]] | None:
        if not path.is_file():
            return None
        device = self.backbone.device
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["about"])
                maps = tuple(
                    FeatureMaps(
                        tuple(
                            file.get_tensor(f"{s}.{t}").to(device).float().permute(2, 0, 1)
                            for t in range(len(self.backbone.geometry))
                        ),
                        self.backbone.geometry,
                        (factors[0], factors[1]),
                    )
                    for s, factors in enumerate(about["factors"])
                )
        except (SafetensorError, KeyError, TypeError, ValueError):
            return None
        return maps, (about["shape"][0], about["shape"][1])
