"""How fully connected layers, and the last stages of the backbone, are trained: the settings alone."""

from __future__ import annotations

from dataclasses import dataclass

from sppnet.errors import SppnetError


@dataclass(frozen=True)
class Tuning:
    """How a head is trained.

    The paper moves pre-trained layers for 300,000 batches at rates of 1e-4 and 1e-5; new ones on a small
    backbone are done after some thousands of AdamW, with a rate that falls to 0 along a cosine.

    Attributes
    ----------
    stage : str, optional
        The backbone's layers behind this stage learn, too; by default none does.
    batches : int
        Of training the head; 0 leaves it at random.
    batch : int
        Windows of one of them.
    lr : float
        Learning rate of the head.
    weight_decay : float
        AdamW's weight decay.
    windows : int
        Most windows of an image.
    positives : float
        Largest share of them that shows an object (paper: 0.25).
    far : float
        Largest share that overlaps objects by less than 0.1 (paper: 0). With few images they teach what the
        rest of the world looks like.
    width : int
        Units of fc6 and of fc7.
    dropout : float
        After either (paper: 0.5).
    epochs : int
        How often each image is seen while the backbone learns.
    images : int
        Whose gradients make one step then.
    backbone_lr : float
        Learning rate of backbone and head then.
    """

    stage: str | None = None
    batches: int = 3000
    batch: int = 256
    lr: float = 5e-4
    weight_decay: float = 0.1
    windows: int = 64
    positives: float = 0.25
    far: float = 0.25
    width: int = 1024
    dropout: float = 0.5
    epochs: int = 3
    images: int = 4
    backbone_lr: float = 1e-4

    def __post_init__(self) -> None:
        counts = min(self.batch, self.windows, self.width, self.images)
        if counts <= 0 or min(self.batches, self.epochs) < 0 or min(self.lr, self.backbone_lr) <= 0:
            raise SppnetError(
                f"found {self}, expected batch, windows, width, images and learning rates above 0, "
                "batches and epochs from 0"
            )
        if not (
            0 < self.positives <= 1 and 0 <= self.far < 1 and 0 <= self.dropout < 1 and self.weight_decay >= 0
        ):
            raise SppnetError(
                f"found {self}, expected positives above 0 to 1, far and dropout from 0 to below 1, "
                "no negative weight_decay"
            )
