"""Edge boxes: windows that hold many contours whole (Zitnick and Dollar, ECCV 2014)."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from sppnet.arrays import FloatArray, Pixels
from sppnet.boxes import Windows
from sppnet.features.encoded import EncodedImage
from sppnet.proposals.method import Proposer, drop_small, enlarge, ranked, shrink, ximgproc


@dataclass(frozen=True)
class EdgeBoxes(Proposer):
    """Edge boxes: windows that hold many contours whole, best first (Zitnick and Dollar, 2014).

    The edges are the gradients of the image in Lab, thinned, where the paper learns an edge detector.

    Attributes
    ----------
    max_boxes : int
        Greatest number of windows, the whole image not counted.
    side : int
        The image is shrunk to about `side` x `side` pixels in area.
    blur : float
        Sigma of the Gaussian blur before the gradients are taken, in pixels of the shrunk image.
    min_edge : float
        Weaker edges are passed over; half the strongest edge counts as 1.
    alpha, beta, eta : float
        The paper's step of the sliding window (the IoU of neighbours), the IoU above which an overlapping
        window is suppressed, and the factor of that threshold from one window to the next.
    min_side : int
        Lower or narrower windows are dropped; pixels of the original image.
    """

    max_boxes: int = 450
    side: int = 220
    blur: float = 1.5
    min_edge: float = 0.15
    alpha: float = 0.65
    beta: float = 0.95
    eta: float = 0.9993
    min_side: int = 20

    def __call__(self, image: Pixels, encoded: EncodedImage | None = None) -> Windows:
        """Propose windows for one image; see `sppnet.proposals.method.Proposer`."""
        small = shrink(image, self.side)
        search = ximgproc().createEdgeBoxes(
            alpha=self.alpha,
            beta=self.beta,
            eta=self.eta,
            maxBoxes=self.max_boxes,
            edgeMinMag=self.min_edge,
            # The paper's 1,000 pixels of the original image.
            minBoxArea=max(100.0, 1000 * small.size / image.size),
        )
        rectangles, _ = search.getBoundingBoxes(*_edges(small, self.blur))
        x, y, width, height = np.reshape(rectangles, (-1, 4)).T
        # OpenCV's corners are 1-based and its box holds the pixels x to x + width, both included.
        boxes = enlarge(np.stack([x - 1, y - 1, x + width, y + height], axis=1), small, image)
        return ranked(drop_small(boxes, self.min_side), image.shape[:2])


def _edges(image: Pixels, blur: float) -> tuple[FloatArray, FloatArray]:
    """Return the (H, W) strength, 0 to 1, and direction, 0 to pi, of the thinned edges of an image."""
    lab = cv2.cvtColor(cv2.GaussianBlur(image, (0, 0), blur), cv2.COLOR_RGB2Lab)
    gradient = np.stack([cv2.Sobel(lab, cv2.CV_32F, 1, 0), cv2.Sobel(lab, cv2.CV_32F, 0, 1)])
    strongest = np.square(gradient).sum(axis=0).argmax(axis=-1)
    dx, dy = np.take_along_axis(gradient, strongest[None, ..., None], axis=-1)[..., 0]
    strength, direction = np.hypot(dx, dy), np.arctan2(dy, dx)
    # An edge is stronger than what lies one pixel before and behind it. The margin keeps even slopes out.
    y, x = np.mgrid[: strength.shape[0], : strength.shape[1]].astype(np.float32)
    step_x, step_y = np.cos(direction), np.sin(direction)
    before = cv2.remap(strength, x - step_x, y - step_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    behind = cv2.remap(strength, x + step_x, y + step_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    edge = (strength > 1.001 * before) & (strength >= behind)
    top = max(float(np.percentile(strength, 99.5)), float(strength.max()) / 4, 1e-6)
    return np.where(edge, np.minimum(strength / top, 1), 0).astype(np.float32), np.mod(direction, np.pi)
