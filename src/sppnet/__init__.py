"""Spatial pyramid pooling: one convolutional pass over an image of any size, then any window as a vector.

Names are imported on first use, so that ``import sppnet`` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sppnet.boxes import Detections, Target
    from sppnet.classify import probabilities
    from sppnet.combine import Combination
    from sppnet.datasets import Dataset, Sample, read_dataset
    from sppnet.detect import Detector
    from sppnet.folders import LabelledImages, read_labelled_images
    from sppnet.geometry import FeatureMaps, Geometry
    from sppnet.images import read_image
    from sppnet.maps import encode, pool_windows
    from sppnet.networks import NetworkSettings, SPPNet, build, load_network, save_network
    from sppnet.pooling import SpatialPyramidPooling, pool_region_chunks, pool_regions
    from sppnet.represent import Embedder
    from sppnet.search import Index
    from sppnet.trunks import Trunk
    from sppnet.vectors import VectorTable, read_vectors

__version__ = "0.1.0"

__all__ = [
    "Combination",
    "Dataset",
    "Detections",
    "Detector",
    "Embedder",
    "FeatureMaps",
    "Geometry",
    "Index",
    "LabelledImages",
    "NetworkSettings",
    "SPPNet",
    "Sample",
    "SpatialPyramidPooling",
    "Target",
    "Trunk",
    "VectorTable",
    "build",
    "encode",
    "load_network",
    "pool_region_chunks",
    "pool_regions",
    "pool_windows",
    "probabilities",
    "read_dataset",
    "read_image",
    "read_labelled_images",
    "read_vectors",
    "save_network",
]

_HOMES = {
    "boxes": ("Detections", "Target"),
    "classify": ("probabilities",),
    "combine": ("Combination",),
    "datasets": ("Dataset", "Sample", "read_dataset"),
    "detect": ("Detector",),
    "folders": ("LabelledImages", "read_labelled_images"),
    "geometry": ("FeatureMaps", "Geometry"),
    "maps": ("encode", "pool_windows"),
    "images": ("read_image",),
    "networks": ("NetworkSettings", "SPPNet", "build", "load_network", "save_network"),
    "trunks": ("Trunk",),
    "represent": ("Embedder",),
    "search": ("Index",),
    "vectors": ("VectorTable", "read_vectors"),
    "pooling": ("SpatialPyramidPooling", "pool_region_chunks", "pool_regions"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"sppnet.{module}"), name)
    raise AttributeError(f"module 'sppnet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
