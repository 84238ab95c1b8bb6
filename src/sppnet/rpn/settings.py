"""How backbone, feature pyramid and region proposals are trained together: the settings alone."""

from __future__ import annotations

from dataclasses import dataclass

from sppnet.errors import SppnetError


@dataclass(frozen=True)
class Joint:
    """How a network with a feature pyramid learns to propose windows, and what is in them.

    Nothing of it was tuned on test images: docs/detection.md says how each value was chosen.

    Attributes
    ----------
    photos : int, optional
        Number of training pictures that are seen, each a mosaic or a crop: the same network on every machine.
        By default time says when training ends.
    side : int, optional
        Shorter side of photos in pixels before they are scaled by chance; by default what suits the smaller
        objects, see `sppnet.rpn.pictures.side_for`.
    batch : int
        Pictures of a step.
    lr, backbone_lr : float
        Highest learning rates (AdamW) of what is new, and of the backbone.
    weight_decay : float
        AdamW's weight decay.
    frozen : int
        The first so many stages of the backbone, as timm divides it, stay as they are: of EfficientNets 5 of
        7, all but those of the largest strides.
    mosaic : float
        Share of pictures that are made of four photos (Bochkovskiy et al., "YOLOv4").
    close : float
        At the end, such a share of the training goes without mosaics.
    jitter : (float, float)
        Limits of the chance scale of a photo.
    width : int
        Channels of the pyramid.
    """

    photos: int | None = None
    side: int | None = None
    batch: int = 4
    lr: float = 2e-3
    backbone_lr: float = 6e-4
    weight_decay: float = 0.02
    frozen: int = 5
    mosaic: float = 0.7
    close: float = 0.15
    jitter: tuple[float, float] = (0.5, 1.5)
    width: int = 96

    def __post_init__(self) -> None:
        given = [count for count in (self.photos, self.side) if count is not None]
        counts = min(self.batch, self.width, *given)
        if counts < 1 or min(self.lr, self.backbone_lr) <= 0 or self.weight_decay < 0 or self.frozen < 0:
            raise SppnetError(
                f"found {self}, expected photos, side, batch, width and learning rates above 0, "
                "weight_decay and frozen from 0"
            )
        low, high = self.jitter
        if not (0 <= self.mosaic <= 1 and 0 <= self.close <= 1 and 0 < low <= high):
            raise SppnetError(f"found {self}, expected mosaic and close from 0 to 1, jitter of rising limits")
