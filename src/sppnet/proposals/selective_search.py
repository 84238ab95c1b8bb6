"""Selective search: segments of the image, merged until one is left (Uijlings et al., IJCV 2013)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from sppnet.arrays import Pixels
from sppnet.boxes import Windows, area, nms
from sppnet.features.encoded import EncodedImage
from sppnet.proposals.method import Proposer, drop_small, enlarge, ranked, shrink, ximgproc

COLOURS: Mapping[str, Callable[[Pixels], Any]] = {
    "hsv": lambda image: cv2.cvtColor(image, cv2.COLOR_RGB2HSV),
    "lab": lambda image: cv2.cvtColor(image, cv2.COLOR_RGB2Lab),
    "rgb": lambda image: image,
    "hue": lambda image: cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 0].copy(),
    "grey": lambda image: cv2.cvtColor(image, cv2.COLOR_RGB2GRAY),
}


@dataclass(frozen=True)
class SelectiveSearch(Proposer):
    """Selective search: segments of the image, merged by similarity until one is left.

    The defaults search a small copy of the image in many ways, which finds more objects and sooner than a
    large one in few ways (measured by ``benchmarks/proposals.py``). The windows come shuffled, always the
    same way: the search itself has no better order.

    Attributes
    ----------
    side : int
        The image is shrunk to about `side` x `side` pixels in area.
    colours : tuple of {"hsv", "lab", "rgb", "hue", "grey"}
        Colour spaces to search in.
    k : tuple of float
        Thresholds of the segmentation (Felzenszwalb and Huttenlocher, 2004); greater gives larger segments.
    min_segment : int
        Size of the smallest segment in pixels of the shrunk image.
    sigma : float
        Sigma of the Gaussian blur before the segmentation, in pixels of the shrunk image.
    similarity : tuple of str
        What decides the next merge: the mean of some of the similarities of colour (C), texture (T), size (S)
        and fill (F). The search is done once for each.
    min_side : int
        Lower or narrower windows are dropped; pixels of the original image.
    max_overlap : float
        Of two windows with a greater IoU the smaller is dropped.
    """

    side: int = 130
    colours: tuple[str, ...] = ("hsv", "lab", "rgb", "hue", "grey")
    k: tuple[float, ...] = (150,)
    min_segment: int = 30
    sigma: float = 0.5
    similarity: tuple[str, ...] = ("CTSF", "TSF", "F", "S")
    min_side: int = 20
    max_overlap: float = 0.9

    def __call__(self, image: Pixels, encoded: EncodedImage | None = None) -> Windows:
        """Propose windows for one image; see `sppnet.proposals.method.Proposer`."""
        segmentation = ximgproc().segmentation
        small = shrink(image, self.side)
        search = segmentation.createSelectiveSearchSegmentation()
        for colour in self.colours:
            search.addImage(COLOURS[colour](small))
        for k in self.k:
            search.addGraphSegmentation(segmentation.createGraphSegmentation(self.sigma, k, self.min_segment))
        measures = {
            "C": segmentation.createSelectiveSearchSegmentationStrategyColor(),
            "T": segmentation.createSelectiveSearchSegmentationStrategyTexture(),
            "S": segmentation.createSelectiveSearchSegmentationStrategySize(),
            "F": segmentation.createSelectiveSearchSegmentationStrategyFill(),
        }
        for letters in self.similarity:
            together = segmentation.createSelectiveSearchSegmentationStrategyMultiple()
            for letter in letters:
                together.addStrategy(measures[letter], 1 / len(letters))
            search.addStrategy(together)
        x, y, width, height = search.process().T
        boxes = enlarge(np.stack([x, y, x + width, y + height], axis=1), small, image)
        # OpenCV's own order hangs on the random numbers of the C library; its set of boxes does not.
        boxes = np.unique(drop_small(boxes, self.min_side), axis=0)
        boxes = boxes[nms(boxes, area(boxes), self.max_overlap)]
        return ranked(np.random.default_rng(0).permutation(boxes), image.shape[:2])
