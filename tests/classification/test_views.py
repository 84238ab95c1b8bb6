from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import nn

from sppnet.classification import scorer as scoring
from sppnet.classification.network import build, scorer_of
from sppnet.classification.scorer import NetworkSettings, Scorer
from sppnet.classification.views import probabilities
from sppnet.features.backbone import Backbone
from sppnet.images import resize

# Shorter sides of 224, 256, 300, 360, 448 and 560 for views of 224, in proportion for views of 64.
SIDE = 64
SCALES = (64, 73, 86, 103, 128, 160)
MAIN = 73
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
VIEWS = ("one", "ten", "full", "maps10", "maps96", "maps98")


pytestmark = pytest.mark.usefixtures("threads")


@lru_cache
def networks_of(levels=(3, 2, 1), mode="max", name="zf5"):
    """Return a small network whose scores differ much from view to view: as it learns, as it runs."""
    settings = NetworkSettings(name, tuple("abcde"), levels, mode, width=1 / 32, size=SIDE)
    network = build(settings).eval()
    torch.manual_seed(0)
    for module in network.head.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    # As they are kept, in half precision.
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half().float()
    return network, scorer_of(network, settings)


def noise(height, width, seed=0):
    """Draw blocks of colours, whose crops have something of their own to show."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return resize(blocks, height, width)


def shorter(image, side):
    height, width = image.shape[:2]
    scale = side / min(height, width)
    return resize(image, int(np.ceil(height * scale - 1e-9)), int(np.ceil(width * scale - 1e-9)))


def places(image, sides=False):
    """Return the upper left corners of the centre, the four corners and perhaps the middles of the sides."""
    bottom, right = image.shape[0] - SIDE, image.shape[1] - SIDE
    corners = {(right // 2, bottom // 2), (0, 0), (right, 0), (0, bottom), (right, bottom)}
    middles = {(right // 2, 0), (right // 2, bottom), (0, bottom // 2), (right, bottom // 2)}
    return sorted(corners | middles if sides else corners)


def scorer():
    return networks_of()[1]


def scores_of(network, image):
    """Return the softmax scores of an image alone."""
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
    return network(pixels).softmax(dim=1)[0]


def crop_scores(network, image):
    picture = shorter(image, MAIN)
    crops = [picture[y : y + SIDE, x : x + SIDE] for x, y in places(picture)]
    return [scores_of(network, way) for crop in crops for way in (crop, crop[:, ::-1])]


def stride_of(network):
    """Return the stride of a network's map, by how many cells 192 pixels more make."""
    lengths = [network.backbone(torch.zeros(1, 3, 96, side)).shape[-1] for side in (96, 96 + 192)]
    return 192 // (lengths[1] - lengths[0])


def window_scores(network, image, side, sides=False):
    """Cut every window out of the maps of the image and of its mirror image, and pool it alone."""
    stride = stride_of(network)
    picture, found = shorter(image, side), []
    for mirrored in (False, True):
        shown = picture[:, ::-1].copy() if mirrored else picture
        maps = network.backbone(network.standardise(torch.from_numpy(shown).permute(2, 0, 1)[None]))
        for x, y in places(picture, sides):
            left = picture.shape[1] - x - SIDE if mirrored else x
            column, row = (left + stride // 2) // stride, (y + stride // 2) // stride
            side = network.backbone(torch.zeros(1, 3, SIDE, SIDE)).shape[-1]
            column, row = min(column, maps.shape[3] - side), min(row, maps.shape[2] - side)
            vector = network.pool(maps[:, :, row : row + side, column : column + side])
            found.append(network.head(vector).softmax(dim=1)[0])
    return found


def view_scores(network, image, views):
    """Compute the softmax scores of each view, one at a time."""
    if views == "one":
        picture = shorter(image, MAIN)
        y, x = ((length - SIDE) // 2 for length in picture.shape[:2])
        return [scores_of(network, picture[y : y + SIDE, x : x + SIDE])]
    if views == "ten":
        return crop_scores(network, image)
    if views == "full":
        return [scores_of(network, shorter(image, MAIN))]
    if views == "maps10":
        return window_scores(network, image, MAIN)
    found = [score for side in SCALES for score in window_scores(network, image, side, sides=True)]
    if views == "maps98":
        picture = shorter(image, MAIN)
        found += [scores_of(network, picture), scores_of(network, picture[:, ::-1])]
    return found


@pytest.mark.parametrize("views", VIEWS)
# Of the last, the centre and its mirror image, one pixel apart, cover other cells.
@pytest.mark.parametrize("shape", [(90, 131), (180, 120), (73, 73), (73, 99)])
def test_views_are_the_mean_of_each_view_alone(views, shape):
    (network, scorer), image = networks_of(), noise(*shape)
    with torch.inference_mode():
        alone = torch.stack(view_scores(network, image, views))
    found = probabilities(scorer, image, views)
    assert found.shape == (5,)
    assert found.dtype == np.float32
    assert found.sum() == pytest.approx(1)
    np.testing.assert_allclose(found, alone.mean(dim=0).numpy(), **CLOSE)
    if len(alone) > 1:
        assert alone.std(dim=0).max() > 0.01  # Another choice of views would be seen.


@pytest.mark.parametrize("views", ["ten", "maps10", "maps98"])
@pytest.mark.parametrize(
    "options", [{"mode": "average"}, {"name": "overfeat5"}, {"name": "test_resnet", "levels": (2, 1)}]
)
def test_views_of_other_networks(views, options, backbone_file):
    if options.get("name") == "test_resnet":
        options = options | {"name": str(backbone_file("test_resnet"))}
    (network, scorer), image = networks_of(**options), noise(110, 90)
    with torch.inference_mode():
        expected = torch.stack(view_scores(network, image, views)).mean(dim=0)
    np.testing.assert_allclose(probabilities(scorer, image, views), expected.numpy(), **CLOSE)


@pytest.mark.parametrize("views", ["one", "ten"])
def test_crops_need_no_pyramid(views):
    (network, scorer), image = networks_of(None), noise(80, 100)
    with torch.inference_mode():
        expected = torch.stack(view_scores(network, image, views)).mean(dim=0)
    np.testing.assert_allclose(probabilities(scorer, image, views), expected.numpy(), **CLOSE)


@pytest.mark.parametrize(
    ("shape", "counts"),
    [
        # Five scales of 18 views, and 6 at the smallest, where only 3 places differ.
        ((90, 131), {"one": 1, "ten": 10, "full": 1, "maps10": 10, "maps96": 96, "maps98": 98}),
        ((131, 90), {"one": 1, "ten": 10, "full": 1, "maps10": 10, "maps96": 96, "maps98": 98}),
        # In a square there is 1 place at the smallest scale.
        ((90, 90), {"one": 1, "ten": 10, "full": 1, "maps10": 10, "maps96": 92, "maps98": 94}),
    ],
)
def test_number_of_views(shape, counts, monkeypatch):
    rows, head = [], Scorer.head
    monkeypatch.setattr(Scorer, "head", lambda scorer, v: rows.append(len(v)) or head(scorer, v))
    for views in VIEWS:
        probabilities(scorer(), noise(*shape), views)
    assert rows == list(counts.values())


def test_the_backbone_runs_once_per_scale(monkeypatch):
    sizes, maps = [], Backbone.maps
    monkeypatch.setattr(Backbone, "maps", lambda self, i: sizes.append(i.shape) or maps(self, i))
    probabilities(scorer(), noise(100, 150), "maps98")
    assert sizes == [(2, side, -(-side * 3 // 2), 3) for side in SCALES]


@pytest.mark.parametrize("views", ["ten", "maps10"])
def test_a_mirror_image_gets_the_same_probabilities(views):
    # Nothing is resized, and both margins are even, so the centre is the same from either side.
    image = noise(MAIN, 100)
    found = probabilities(scorer(), image[:, ::-1], views)
    np.testing.assert_allclose(found, probabilities(scorer(), image, views), **CLOSE)
    one = probabilities(scorer(), image[:, ::-1], "full")
    assert not np.allclose(one, probabilities(scorer(), image, "full"), atol=1e-4)


def test_by_default_the_whole_image_is_seen():
    image = noise(80, 200)
    assert np.array_equal(probabilities(scorer(), image), probabilities(scorer(), image, "full"))


def test_views_that_are_not_there():
    with pytest.raises(
        ValueError, match="found the views 'maps11', expected one of one, ten, full, maps10, "
    ):
        probabilities(scorer(), noise(80, 100), "maps11")


@pytest.mark.parametrize("views", ["full", "maps10", "maps96", "maps98"])
def test_views_that_need_a_pyramid(views):
    with pytest.raises(
        ValueError, match=f"the views '{views}' need a network with a pyramid, expected one or ten"
    ):
        probabilities(networks_of(None)[1], noise(80, 100), views)


def test_a_strip_that_becomes_too_thin():
    strip = np.zeros((1, 90_000, 3), np.uint8)
    settings = NetworkSettings("zf5", ("a", "b"), width=0.05, size=96)
    scorer = scorer_of(build(settings), settings)
    with pytest.raises(ValueError, match="cut it into parts"):
        probabilities(scorer, strip, "full")


@pytest.mark.parametrize(("name", "smallest"), [("zf5", 31), ("overfeat5", 15), ("test_resnet", 17)])
def test_the_smallest_image(name, smallest, backbone_file):
    backbone = networks_of(name=str(backbone_file(name)) if name == "test_resnet" else name)[1].backbone
    assert backbone.smallest == smallest
    for side in range(1, 40):
        images = np.full((1, side, side, 3), 255, np.uint8)
        if side < smallest:
            with pytest.raises(ValueError, match=f"becomes {side} x {side} .*, expected at least {smallest}"):
                backbone.maps(images)
        else:
            assert backbone.maps(images)[0].shape[1:3] == backbone.sides(side) * 2


def test_scores_without_a_pyramid_are_of_one_size():
    with pytest.raises(ValueError, match="takes 64 x 64 images, found 64 x 80"):
        networks_of(None)[1].scores(np.zeros((1, 64, 80, 3), np.uint8))


def test_scores_of_an_empty_map_are_finite():
    settings = NetworkSettings("zf5", ("a", "b"), (1,), width=1 / 32, norm=3.0, size=SIDE)
    scorer = scorer_of(build(settings), settings)
    assert np.isfinite(scorer.head(np.zeros((1, 8), np.float32))).all()


def test_a_view_has_as_many_cells_as_a_crop():
    network, scorer = networks_of()
    side = network.backbone(torch.zeros(1, 3, SIDE, SIDE)).shape[-1]
    seen = []
    image = np.random.default_rng(0).integers(0, 256, (90, 130, 3), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        pool = scoring.pool_regions
        patch.setattr(scoring, "pool_regions", lambda m, w, *a, **k: seen.append(w) or pool(m, w, *a, **k))
        probabilities(scorer, image, "maps96")
    sizes = np.concatenate(seen)[:, 2:] - np.concatenate(seen)[:, :2]
    assert (sizes == side).all()
