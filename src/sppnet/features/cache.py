"""Encoded images on disk in half precision: computed once, read whenever a fit comes back to them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from sppnet.arrays import Pixels, placed, to_numpy
from sppnet.features.backbone import Backbone
from sppnet.features.encoded import EncodedImage, FeatureMaps, OwnWindows
from sppnet.features.graph import MAPS
from sppnet.progress import StageTimer
from sppnet.storage import write_tensors


def remove_maps(folder: Path) -> None:
    """Remove the encoded images and checkpoints of a fit, and their folder if nothing else lies there."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


class MapCache:
    """A folder of encoded images, keyed by the image's content, the backbone and the scales.

    Parameters
    ----------
    folder : Path
        Created if missing. Entries that are damaged are computed anew.
    backbone : Backbone
        What computes the maps that are not there yet.
    scales : sequence of int
        Shorter sides of the resized image, in pixels.
    limit : int, optional
        Most entries; where there are so many, the maps of others are computed whenever they are asked for.
    """

    def __init__(
        self, folder: Path, backbone: Backbone, scales: Sequence[int], limit: int | None = None
    ) -> None:
        self.folder, self.backbone, self.scales, self.limit = folder, backbone, tuple(scales), limit
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        # Counted where that matters alone: fits open large folders time and again.
        self._stored = 0 if limit is None else sum(1 for _ in folder.iterdir())

    def __call__(self, image: Path | Pixels, timer: StageTimer) -> EncodedImage:
        """Return the maps of an image, rounded to half precision, as float32."""
        path = self._path(self.name(image))
        with timer("maps from cache"):
            cached = self._read(path)
        if cached is not None:
            return cached
        with timer("backbone"):
            encoded = self.backbone.encode(image, self.scales)
        with timer("maps to cache"):
            # Rounded as they will be read: a fit that goes on with maps of the disk gives the same detector.
            rounded = tuple(
                replace(
                    maps,
                    stages=tuple(self._single(_half(stage)) for stage in maps.stages),
                )
                for maps in encoded.scales
            )
            encoded = replace(encoded, scales=rounded)
            if self.limit is None or self._stored < self.limit:
                self._write(path, encoded)
        return encoded

    def remove(self, names: Iterable[str]) -> None:
        """Remove entries by their names; those that are not there are none."""
        for path in map(self._path, names):
            with suppress(FileNotFoundError), self._lock:
                path.unlink()
                self._stored -= 1

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def name(self, image: Path | Pixels) -> str:
        """Return the name of an image's entry, whether it is there or not."""
        key = hashlib.sha256(repr((self.backbone.signature, self.scales)).encode())
        if isinstance(image, Path):
            key.update(image.read_bytes())
        else:
            key.update(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes())
        return key.hexdigest()

    def _single(self, stage: npt.NDArray[np.float16]) -> Any:
        """Return a map in single precision where the backbone's lie."""
        return placed(stage.astype(np.float32), self.backbone.device)

    def _write(self, path: Path, encoded: EncodedImage) -> None:
        tensors = {
            f"{s}.{t}": np.ascontiguousarray(_half(stage).transpose(1, 2, 0))
            for s, maps in enumerate(encoded.scales)
            for t, stage in enumerate(maps.stages)
        }
        if encoded.windows is not None:
            # Exactly: what was learned of these windows is to be found again.
            tensors |= {f"windows.{name}": value for name, value in encoded.windows._asdict().items()}
        scales = [{"factors": maps.factors, "side": maps.side} for maps in encoded.scales]
        write_tensors(path, tensors, {"encoded": json.dumps({"size": encoded.size, "scales": scales})})
        with self._lock:
            self._stored += 1

    def _read(self, path: Path) -> EncodedImage | None:
        """Return what an entry holds; None if it is missing or damaged."""
        if not path.is_file():
            return None
        geometry = self.backbone.geometry
        try:
            with safe_open(path, "np") as file:
                facts = json.loads(file.metadata()["encoded"])
                windows = None
                if "windows.boxes" in file.keys():  # noqa: SIM118  (no mapping)
                    # What says of cells whether they lie in an object is not kept.
                    geometry = geometry[: len(MAPS)]
                    windows = OwnWindows(*(file.get_tensor(f"windows.{name}") for name in OwnWindows._fields))
                scales = tuple(
                    FeatureMaps(
                        tuple(
                            self._single(file.get_tensor(f"{s}.{t}").transpose(2, 0, 1))
                            for t in range(len(geometry))
                        ),
                        geometry,
                        (scale["factors"][0], scale["factors"][1]),
                        scale["side"],
                    )
                    for s, scale in enumerate(facts["scales"])
                )
            return EncodedImage((facts["size"][0], facts["size"][1]), scales, windows=windows)
        except (SafetensorError, KeyError, TypeError, ValueError, IndexError):
            return None


def _half(stage: Any) -> npt.NDArray[np.float16]:
    """Return a map in half precision."""
    return to_numpy(stage).astype(np.float16)
