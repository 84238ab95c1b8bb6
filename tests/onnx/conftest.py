"""What several tests of exports share."""

import numpy as np
import pytest

from sppnet.detection.calibration import Calibration
from sppnet.detection.detector import Detector
from sppnet.detection.fit import Fitted
from sppnet.detection.head import Head
from sppnet.detection.quality import unmeasured
from sppnet.detection.svm import LinearSVMs
from sppnet.features.backbone import Backbone
from sppnet.images import read_image
from sppnet.linear import Linear
from sppnet.photos import demo_photo
from sppnet.proposals import DenseWindows
from sppnet.proposals.maps import Objectness
from sppnet.regression import BoxRegression


@pytest.fixture(scope="session")
def photo():
    """Cows in a meadow, 300 x 451."""
    return np.ascontiguousarray(read_image(demo_photo())[:300, :451])


@pytest.fixture(scope="session")
def small_backbone(backbone_file):
    """A tiny backbone of two stages with drawn weights."""
    return Backbone.shared(backbone_file("test_efficientnet"), ("3", "head"), 16)


def drawn_objectness(rng, channels):
    """Return what proposes windows from maps, drawn instead of fitted."""
    settings = {"sizes": (0.5, 1.0), "reference": 120, "width": 16, "kernel": 3, "limit": 60, "nms_iou": 0.7}
    objectness = Objectness(**settings)
    shapes = {
        "network.reduce.weight": (16, channels),
        "network.reduce.bias": (16,),
        "network.spread.weight": (16, 1, 3, 3),
        "network.spread.bias": (16,),
        "network.answer.weight": (30, 16),
        "network.answer.bias": (30,),
        "weights": (5, 16 * 25),
        "offsets": (5,),
    }
    state = {name: _drawn(rng, *shape) / 2 for name, shape in shapes.items()}
    return Objectness.from_state(state, objectness.get_params(deep=False))


def _drawn(rng, *shape):
    return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


@pytest.fixture(scope="session")
def drawn_detector(small_backbone, photo):
    """Return a function that draws a detector of two classes by the given settings instead of fitting it."""

    def draw(*, head=False, proposes=False, **settings):
        backbone = small_backbone
        layer, rng = "fc7" if head else "pool", np.random.default_rng(0)
        settings = {"scales": (320, 160), "levels": (3, 1), "layer": layer, "proposals": "dense"} | settings
        detector = Detector(backbone.name, stages=backbone.stages, **settings)
        encoded = backbone.encode(photo, detector.scales)
        pooled = detector.pooling(encoded, DenseWindows()(photo).boxes)
        feature_scale = 20 / float(np.linalg.norm(pooled, axis=1).mean())
        length, layers, vectors = pooled.shape[1], None, pooled * np.float32(feature_scale)
        if head:
            thin = Linear(_drawn(rng, 16, length)), Linear(_drawn(rng, 64, 16), _drawn(rng, 64))
            others = [Linear(_drawn(rng, n, 64), _drawn(rng, n)) for n in (64, 3, 8)]
            layers = Head(thin, (others[0],), *others[1:])
            vectors = layers.activations(vectors, layer)
        svms = _drawn(rng, 2, vectors.shape[1])
        svms /= (vectors @ svms.T).std(axis=0)[:, None]
        biases = -(vectors @ svms.T).mean(axis=0) - np.float32([0.5, 1.0])
        offsets = np.float32([[0, 0.1, 0.2, 0.3], [-0.1, 0, 0, 0.1]])
        calibration = Calibration(*np.float32([[0.1, -0.2], [0.5, -1]]), np.float32([[2, 1], [3, 4]]))
        detector.fitted_ = Fitted(
            classes=("this", "that"),
            backbone=backbone,
            head=layers,
            objectness=drawn_objectness(rng, backbone.channels[-1]) if proposes else None,
            svms=LinearSVMs(svms, biases),
            regression=BoxRegression(_drawn(rng, 2, 4, length) / 4, offsets),
            feature_scale=feature_scale,
            photos=np.zeros(0, np.uint64),
            objects=np.zeros(2, np.int64),
            **unmeasured(2)._asdict() | {"calibration": calibration},
        )
        return detector

    return draw


@pytest.fixture(scope="session")
def scenes(photo):
    """Images of several sizes, none of which shrinks to less than half."""
    parts = {"photo": photo, "tall": photo[:, 100:220], "strip": photo[100:118, :300], "tiny": photo[:9, :8]}
    return {name: np.ascontiguousarray(part) for name, part in parts.items()}
