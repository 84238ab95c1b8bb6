"""How the network that scores and moves anchors is trained, by PyTorch (Ren et al., arXiv 1506.01497)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sppnet.arrays import is_tensor, to_numpy
from sppnet.errors import SppnetError
from sppnet.features.encoded import EncodedImage, FeatureMaps
from sppnet.progress import Track
from sppnet.proposals.anchors import AnchorNetwork, last_stage
from sppnet.proposals.truth import Truth
from sppnet.regression import encode_deltas

if TYPE_CHECKING:
    from sppnet.proposals.maps import Objectness

# Anchors of an image that count in the loss, at most half of them objects (Ren et al.).
_SAMPLED = 256
_IMAGES_PER_STEP = 4
# Overlap at which the smooth L1 loss turns linear, in deltas.
_BETA = 0.1


def train(
    settings: Objectness, read: Callable[[int], EncodedImage], truths: Sequence[Truth], track: Track
) -> AnchorNetwork:
    """Fit the network that scores and moves the anchors of a proposal method.

    Parameters
    ----------
    settings : Objectness
        The method; it stays as it is.
    read : callable
        ``read(i)`` returns what the backbone made of image i.
    truths : sequence of Truth
        What is annotated in each image.
    track : callable
        ``track(items, description)`` yields the items and may draw progress.

    Raises
    ------
    SppnetError
        If the images' maps are of several numbers of channels, or the loss is not finite.
    """
    rng = np.random.default_rng(settings.seed)
    stage = read(0).scales[0].stages[-1]
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        anchors = len(settings.sizes) * len(settings.aspects)
        network = _Network(stage.shape[0], settings.width, settings.kernel, anchors)
    network.to(stage.device)
    optimizer = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=settings.steps + 1, pct_start=0.1
    )
    epochs = -(-settings.steps * _IMAGES_PER_STEP // len(truths))
    order = np.concatenate([rng.permutation(len(truths)) for _ in range(epochs)])
    for step in track(range(settings.steps), "Fitting objectness"):
        optimizer.zero_grad()
        for i in order[step * _IMAGES_PER_STEP : (step + 1) * _IMAGES_PER_STEP]:
            loss = _loss(settings, network, read(int(i)).scales, truths[i], rng) / _IMAGES_PER_STEP
            if not math.isfinite(loss.item()):
                raise SppnetError(
                    f"found the loss {loss.item()} at image {i} and the learning rate "
                    f"{schedule.get_last_lr()[0]:g}, expected a finite number"
                )
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return AnchorNetwork.from_state({name: to_numpy(value) for name, value in network.state_dict().items()})


def _loss(
    settings: Objectness,
    network: _Network,
    maps: Sequence[FeatureMaps],
    truth: Truth,
    rng: np.random.Generator,
) -> Tensor:
    """Return the loss of a sample of one image's anchors: logistic, and smooth L1 of the deltas."""
    anchors = np.concatenate([settings.anchors(m) for m in maps])
    labels, nearest = truth.label(anchors)
    objects, rest = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    objects = rng.choice(objects, min(len(objects), _SAMPLED // 2), replace=False)
    rest = rng.choice(rest, min(len(rest), _SAMPLED - len(objects)), replace=False)
    answers = torch.cat([network(m) for m in maps])
    chosen = answers[torch.from_numpy(np.concatenate([objects, rest])).to(answers.device)]
    wanted = torch.zeros(len(chosen), device=chosen.device)
    wanted[: len(objects)] = 1
    loss = F.binary_cross_entropy_with_logits(chosen[:, 0], wanted, reduction="sum")
    if len(objects):
        goals = torch.from_numpy(encode_deltas(anchors[objects], truth.boxes[nearest[objects]]))
        moves = chosen[: len(objects), 1:]
        loss = loss + F.smooth_l1_loss(moves, goals.to(moves.device), beta=_BETA, reduction="sum")
    return loss / _SAMPLED


class _Network(nn.Module):
    """`AnchorNetwork` while it learns."""

    def __init__(self, channels: int, width: int, kernel: int, anchors: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, width)
        self.spread = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.answer = nn.Linear(width, 5 * anchors)
        nn.init.normal_(self.answer.weight, std=0.01)
        nn.init.zeros_(self.answer.bias)

    def forward(self, maps: FeatureMaps) -> Tensor:
        """Return the (h * w * A, 5) answers for the last stage of maps."""
        stage = last_stage(maps, self.reduce.in_features)
        cells: Tensor = stage if is_tensor(stage) else torch.from_numpy(stage)
        hidden = F.relu(self.reduce(cells.permute(1, 2, 0))).permute(2, 0, 1)[None]
        answers: Tensor = self.answer(F.relu(self.spread(hidden))[0].permute(1, 2, 0))
        return answers.reshape(-1, 5)
