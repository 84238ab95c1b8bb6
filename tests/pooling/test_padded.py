import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from sppnet.features.backbone import Backbone
from sppnet.pooling import SpatialPyramidPooling
from sppnet.pooling.padded import SizeBucketSampler, TrueSizes, collate_padded, pad_batch

SIDES = [(70, 97), (96, 64), (33, 90)]


def images_of(sides=SIDES, dtype=torch.float64, channels=3):
    return [torch.randn(channels, *side, dtype=dtype) for side in sides]


def awkward(network):
    """Return a network in evaluation mode whose norms shift, so that its padding does not stay 0."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 0.1, 1)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
    return network.eval().double()


def zf5():
    """Convolution with and without padding, strides, response norm, pooling in ceil mode, dropout, groups."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 7, stride=2),
        nn.ReLU(inplace=True),
        nn.LocalResponseNorm(5),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(8, 12, 5, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(12),
        nn.LeakyReLU(0.1),
        nn.Dropout(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(12, 6, 3, padding=(2, 1), dilation=(2, 1)),
    )


def averages():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.Conv2d(4, 4, 4, padding="same", dilation=2),
        nn.AvgPool2d((3, 2), (2, 2), (1, 0), count_include_pad=False),
        nn.ConstantPad2d((1, 2, 0, 1), 0.5),
        nn.Conv2d(4, 5, 3),
        nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False, divisor_override=3),
        nn.ZeroPad2d((-1, 0, 1, -1)),
        nn.AvgPool2d(2, 1),
    )


class Branches(nn.Module):
    """Branches that are joined, cut and gated by channels and by images."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(3, 4, 1, 2)
        self.gate, self.last = nn.Linear(8, 8), nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x):
        x = torch.cat([self.first(x), F.max_pool2d(self.second(x), 3, 1, 1)], dim=1)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        below = x - x.amax((-2, -1), keepdim=True) - 1
        x = x + F.adaptive_max_pool2d(below * below.abs(), 1) + below
        a, b = torch.where(x > 0, x, 1 - x).chunk(2, dim=1)
        return F.pad(self.last(a) * b.softmax(1), (0, 1, 1, 0), value=-torch.inf).clamp(min=-9)


def resnet18():
    return nn.Sequential(*list(torchvision.models.resnet18(weights=None).children())[:-2])


def timm_features(name):
    network = timm.create_model(name, pretrained=False)
    network.forward = network.forward_features
    return network


NETWORKS = {
    "zf5": zf5,
    "averages": averages,
    "branches": Branches,
    "resnet18": resnet18,
    "densenet121": lambda: torchvision.models.densenet121(weights=None).features,
    "squeezenet": lambda: torchvision.models.squeezenet1_1(weights=None).features,
    "googlenet": lambda: nn.Sequential(
        *list(torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=False).children())[
            :-3
        ]
    ),
    "mobilenet_v3": lambda: torchvision.models.mobilenet_v3_small(weights=None).features,
    "resnet26d": lambda: timm_features("resnet26d"),
    "efficientnet_b0": lambda: timm_features("efficientnet_b0"),
}


def compare(network, images, levels=(3, 2, 1), value=0.0):
    """Compare vectors and gradients of a padded batch, padded with `value`, with those of image by image."""
    pool = SpatialPyramidPooling(levels)
    for image in images:
        image.requires_grad_(True)
    leaves = [*images, *network.parameters()]
    alone = torch.cat([pool(network(image[None])) for image in images])
    weights = torch.randn_like(alone)
    expected = torch.autograd.grad((alone * weights).sum(), leaves, materialize_grads=True)

    batch, sizes = pad_batch(images, value=value)
    with TrueSizes(batch, sizes) as true:
        maps = network(batch)
    together = pool(maps, true.of(maps))
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    for found, wanted in zip(
        torch.autograd.grad((together * weights).sum(), leaves, materialize_grads=True), expected, strict=True
    ):
        scale = float(wanted.abs().max()) or 1
        torch.testing.assert_close(found / scale, wanted / scale, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_image_of_a_padded_batch_gives_what_it_gives_alone(name):
    compare(awkward(NETWORKS[name]()), images_of())


def test_a_backbone_with_fixed_same_padding_gives_each_image_what_it_gives_alone():
    network = awkward(Backbone(weights="random").network.model.requires_grad_(True))
    network.forward = network.forward_features
    compare(network, images_of([(32, 64), (64, 32), (43, 37)]))


@pytest.mark.parametrize("value", [-7.0, 1e30])
def test_what_the_padding_holds_is_never_seen(value):
    compare(awkward(zf5()), images_of(), value=value)
    compare(awkward(averages()), images_of(), value=value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_of_a_padded_batch_are_those_of_each_image_alone(dtype):
    network, images = awkward(averages()).to(dtype), images_of(dtype=dtype)
    batch, sizes = pad_batch(images, multiple=32, value=torch.nan)
    batch = batch.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), TrueSizes(batch, sizes) as true:
        maps = network(batch)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for image, cells, (height, width) in zip(images, maps, true.of(maps).tolist(), strict=True):
        with torch.inference_mode():
            alone = network(image[None])[0]
        assert alone.shape[1:] == (height, width)
        torch.testing.assert_close(cells[:, :height, :width], alone, rtol=tolerance, atol=tolerance)


POOLS = st.tuples(
    st.sampled_from(["conv", "max", "average"]),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(POOLS, min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(6, 17), st.integers(6, 17)), min_size=2, max_size=4),
)
def test_every_setting_of_convolution_and_pooling_keeps_the_images_apart(layers, sides):
    network = nn.Sequential()
    for kind, kernel, stride, padding, dilation, ceil, counted in layers:
        padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
        if kind == "conv":
            network.append(nn.Conv2d(2, 2, kernel, stride, padding, dilation))
        elif kind == "max":
            network.append(nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil))
        else:
            network.append(nn.AvgPool2d(kernel, stride, padding, ceil, counted))
    network.double()
    images = images_of(sides, channels=2)
    try:
        alone = [network(image[None]) for image in images]
    except RuntimeError:  # An image is too small.
        batch, sizes = pad_batch(images)
        with pytest.raises((ValueError, RuntimeError)), TrueSizes(batch, sizes):
            network(batch)
        return
    # A dilated window can miss all of a small map: torch gives -inf then, and its gradient goes anywhere.
    assume(all(maps.isfinite().all() for maps in alone))
    compare(network, images, levels=(2, 1))


def test_networks_with_a_pyramid_need_no_sizes():
    network = nn.Sequential(
        zf5(), SpatialPyramidPooling((3, 1)), nn.Linear(60, 4), nn.BatchNorm1d(4), nn.Softmax(1)
    )
    network, images = awkward(network), images_of()
    batch, sizes = pad_batch(images)
    with TrueSizes(batch, sizes) as true:
        scores = network(batch)
        maps = network[0](batch)
        vectors = network[1](maps, true.of(maps))
        scores.sum().backward()
    torch.testing.assert_close(scores, torch.cat([network(image[None]) for image in images]))
    torch.testing.assert_close(vectors, torch.cat([network[:2](image[None]) for image in images]))


@pytest.mark.parametrize("mode", ["max", "average"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_pooling_of_a_padded_batch_is_that_of_each_map_to_the_last_bit(mode, dtype):
    pool, maps = SpatialPyramidPooling((6, 3, 2, 1), mode), images_of([(13, 9), (1, 5), (7, 16)], dtype, 70)
    alone = torch.stack([pool(m) for m in maps])
    batch, sizes = pad_batch(maps, multiple=4, value=9)
    assert torch.equal(pool(batch, sizes), alone)
    with TrueSizes(batch, sizes):
        assert torch.equal(pool(batch), alone)


def test_padding_is_below_and_on_the_right_up_to_the_multiple():
    images = [torch.ones(2, 3, 5, dtype=torch.uint8), torch.ones(2, 4, 1, dtype=torch.uint8)]
    batch, sizes = pad_batch(images, multiple=4, value=9)
    assert batch.shape == (2, 2, 4, 8)
    assert batch.dtype == torch.uint8
    assert sizes.dtype == torch.int64
    assert sizes.tolist() == [[3, 5], [4, 1]]
    for page, (height, width) in zip(batch, sizes.tolist(), strict=True):
        assert (page[:, :height, :width] == 1).all()
        assert page.sum() == 2 * (height * width + 9 * (32 - height * width))
    assert pad_batch(images)[0].shape == (2, 2, 4, 5)


@pytest.mark.parametrize(
    ("images", "multiple", "message"),
    [
        ([], 1, "found 0 and 1"),
        ([torch.zeros(3, 2, 2)], 0, "found 1 and 0"),
        ([torch.zeros(3, 2, 2), torch.zeros(3, 2)], 1, r"image 1 must be \(C, H, W\) .* found .*\(3, 2\)"),
        ([torch.zeros(3, 0, 2)], 1, "no side of 0"),
        ([np.zeros((3, 2, 2))], 1, "found ndarray"),
        ([torch.zeros(3, 2, 2), torch.zeros(1, 2, 2)], 1, "found 1 channels .* image 1, 3 channels"),
        ([torch.zeros(3, 2, 2), torch.zeros(3, 2, 2).half()], 1, "float16 on cpu for image 1"),
    ],
)
def test_images_that_make_no_batch_are_refused(images, multiple, message):
    with pytest.raises(ValueError, match=message):
        pad_batch(images, multiple)


@pytest.mark.parametrize(
    ("batch", "sizes", "message"),
    [
        (torch.zeros(3, 4, 4), torch.ones(3, 2).long(), r"\(N, C, H, W\)"),
        (torch.zeros(2, 0, 4, 4), torch.ones(2, 2).long(), "no side of 0"),
        (nn.Parameter(torch.zeros(2, 1, 4, 4)), torch.ones(2, 2).long(), "found a parameter"),
        (torch.zeros(2, 1, 4, 4), torch.ones(2, 2), r"shape \(2, 2\), .* found torch.float32"),
        (torch.zeros(2, 1, 4, 4), torch.ones(1, 2).long(), r"found torch.int64 of shape \(1, 2\)"),
        (torch.zeros(2, 1, 4, 4), [[1, 1], [2, 2]], "found list"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([[4, 5], [1, 1]]), r"1 to \[4, 4\], found .* \[4, 5\]"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([[4, 4], [0, 1]]), r"1 to \[4, 4\], found from \[0, 1\]"),
    ],
)
def test_sizes_that_do_not_fit_the_batch_are_refused(batch, sizes, message):
    with pytest.raises(ValueError, match=message):
        TrueSizes(batch, sizes)


UNSUPPORTED = {
    "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d(2),
    "adaptive_max_pool2d": nn.AdaptiveMaxPool2d((1, 2)),
    "batch_norm": nn.BatchNorm2d(3),
    "cat": lambda x: torch.cat([x, x], dim=2),
    "chunk": lambda x: x.chunk(2, dim=-1),
    "conv_transpose2d": nn.ConvTranspose2d(3, 3, 2),
    "flatten": nn.Flatten(),
    "flip": lambda x: x.flip(-1),
    "group_norm": nn.GroupNorm(1, 3),
    "instance_norm": nn.InstanceNorm2d(3),
    "interpolate": nn.Upsample(scale_factor=2),
    "linear": nn.Linear(24, 24),
    "matmul": lambda x: x @ torch.eye(24),
    "max": lambda x: x.max(),
    "max_pool2d_with_indices": nn.MaxPool2d(2, return_indices=True),
    "mean": lambda x: x.mean(),
    "mT": lambda x: x.mT,
    "multi_head_attention_forward": lambda x: nn.MultiheadAttention(24, 1)(x[:, 0], x[:, 0], x[:, 0]),
    "pad": nn.ReflectionPad2d(1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "pixel_unshuffle": nn.PixelUnshuffle(2),
    "reshape": lambda x: x.reshape(2, -1),
    "softmax": nn.Softmax(-1),
    "sum": lambda x: x.sum((2, 3)),
    "where": lambda x: torch.where(x > 0),
    "zeros": lambda x: torch.zeros(2, 1, 24, 24),
    "__getitem__": lambda x: x[:, :, ::2],
    "__setitem__": lambda x: x.__setitem__((0, 0), 1.0),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_operators_that_may_mix_an_image_with_its_padding_are_refused(name):
    batch, sizes = pad_batch(images_of([(24, 20), (20, 24)], torch.float32))
    named = "__getitem__" if name.startswith("multi") else name
    with (
        pytest.raises(ValueError, match=rf"{named}\b.* on padded maps is not supported"),
        TrueSizes(batch, sizes),
    ):
        UNSUPPORTED[name](batch)


def test_maps_of_full_size_go_through_any_operator_and_are_not_masked(monkeypatch):
    batch, sizes = pad_batch(images_of([(24, 20), (24, 20)], torch.float32))
    monkeypatch.setattr(torch.Tensor, "masked_fill", None)
    network = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(3), nn.Flatten()
    )
    with TrueSizes(batch, sizes):
        assert network(batch).shape == (2, 360)


def test_padding_by_a_size_that_was_read_is_refused():
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    batch, sizes = pad_batch(images_of([(64, 60), (61, 64)], torch.float32))
    refused = pytest.raises(ValueError, match=r"pad on padded maps .* size that the network has read")
    with refused, TrueSizes(batch, sizes):
        network(batch)


def test_one_padded_size_with_two_true_ones_is_refused():
    batch, sizes = pad_batch(images_of([(8, 8), (7, 8)], torch.float32))
    with TrueSizes(batch, sizes) as true:
        F.max_pool2d(batch, 2)
        with pytest.raises(ValueError, match=r"max_pool2d .* two paths lead to maps \[4, 4\]"):
            F.max_pool2d(batch, 2, ceil_mode=True)
    with pytest.raises(ValueError, match="expected 2 maps of the batch, 8 x 8, 4 x 4, found"):
        true.of(torch.zeros(2, 1, 5, 5))


def test_an_image_too_small_for_the_network_is_named():
    batch, sizes = pad_batch(images_of([(24, 24), (24, 4)], torch.float32))
    with pytest.raises(ValueError, match=r"conv2d .* image 1 is too small"), TrueSizes(batch, sizes):
        nn.Conv2d(3, 3, 5)(batch)


def test_recomputed_activations_never_give_other_gradients():
    batch, sizes = pad_batch(images_of([(24, 24), (24, 9)], torch.float32))
    network = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))
    with TrueSizes(batch, sizes):
        maps = checkpoint(network, batch, use_reentrant=False)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        maps.sum().backward()


SIZES = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=80)


@settings(deadline=None)
@given(SIZES, st.integers(1, 9), st.booleans(), st.booleans(), st.floats(0, 0.9), st.integers(0, 3))
def test_batches_hold_every_image_once_and_little_padding(sizes, batch_size, shuffle, drop, waste, epoch):
    sampler = SizeBucketSampler(sizes, batch_size, shuffle=shuffle, drop_last=drop, max_waste=waste)
    sampler.set_epoch(epoch)
    batches, sides = list(sampler), np.array(sizes)
    assert batches == list(sampler)
    assert len(batches) == len(sampler)
    indices = sorted(i for batch in batches for i in batch)
    if drop:
        assert len(set(indices)) == len(indices)
        assert all(len(batch) == batch_size for batch in batches)
    else:
        assert indices == list(range(len(sizes)))
        assert all(0 < len(batch) <= batch_size for batch in batches)
    for batch in batches:
        area = sides[batch].max(axis=0).prod()
        assert (sides[batch].prod(axis=1) >= (1 - waste) * area).all()


def test_no_waste_means_equal_sizes():
    sizes = [(375, 500)] * 20 + [(500, 375)] * 5 + [(374, 500)] * 3
    batches = list(SizeBucketSampler(sizes, 8, max_waste=0))
    assert all(len({sizes[i] for i in batch}) == 1 for batch in batches)
    assert sorted(map(len, batches)) == [3, 5, 6, 7, 7]


@settings(deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(1, 5), st.booleans(), st.booleans())
def test_ranks_share_the_batches_evenly(sizes, batch_size, replicas, shuffle, drop):
    options = {"shuffle": shuffle, "drop_last": drop, "seed": 3}
    whole = list(SizeBucketSampler(sizes, batch_size, **options))
    shards = [
        list(SizeBucketSampler(sizes, batch_size, **options, num_replicas=replicas, rank=rank))
        for rank in range(replicas)
    ]
    assert {len(shard) for shard in shards} == {
        len(whole) // replicas if drop else -(-len(whole) // replicas)
    }
    dealt = [shard[i] for i in range(len(shards[0])) for shard in shards]
    assert dealt == [whole[i % len(whole)] for i in range(len(dealt))]
    assert dealt[: len(whole)] == whole[: len(dealt)]


def test_every_epoch_and_seed_draws_other_batches():
    sizes = np.random.default_rng(0).integers(90, 110, (300, 2))
    sampler, other = SizeBucketSampler(sizes, 16), SizeBucketSampler(sizes, 16, seed=1)
    first, foreign = list(sampler), list(other)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first
    for one, two in ((first, second), (first, foreign), (second, foreign)):
        assert {frozenset(b) for b in one}.isdisjoint({frozenset(b) for b in two})
    still = SizeBucketSampler(sizes, 16, shuffle=False)
    before = list(still)
    still.set_epoch(1)
    assert list(still) == before


@pytest.mark.parametrize(
    "arguments",
    [
        {"sizes": []},
        {"sizes": 3},
        {"sizes": [[3, 3, 3]]},
        {"sizes": [[3.0, 3.0]]},
        {"sizes": [[3, 0]]},
        {"batch_size": 0},
        {"max_waste": 1},
        {"max_waste": -0.1},
        {"rank": 1},
        {"rank": -1},
        {"num_replicas": 0},
    ],
)
def test_a_sampler_that_cannot_be_is_refused(arguments):
    with pytest.raises(ValueError, match=r"\(n, 2\) integers|need batch_size"):
        SizeBucketSampler(**({"sizes": [[3, 4]], "batch_size": 2} | arguments))


def test_a_loader_brings_padded_batches():
    images = images_of([(8, 9), (20, 21), (9, 8), (21, 20)], torch.float32)
    sampler = SizeBucketSampler([image.shape[1:] for image in images], 2, shuffle=False)
    loader = DataLoader(
        list(zip(images, range(4), strict=True)), batch_sampler=sampler, collate_fn=collate_padded
    )
    assert len(loader) == 2
    for (batch, sizes), labels in loader:
        assert labels.tolist() in ([0, 2], [1, 3])
        assert sizes.tolist() == [[*images[i].shape[1:]] for i in labels]
        assert [*batch.shape[2:]] == sizes.amax(dim=0).tolist()


def test_weights_of_the_shape_of_the_maps_are_not_taken_for_maps():
    network = nn.Conv2d(3, 3, 3).double()
    network.forward = lambda x: F.conv2d(x, network.weight - network.weight.mean(), None, 1, 1)
    compare(network, images_of([(3, 2), (2, 3), (3, 3)]), levels=(2, 1))


def test_named_arguments_are_followed_or_refused():
    batch, sizes = pad_batch(images_of([(9, 8), (8, 9)], torch.float32))
    weight = torch.ones(4, 3, 3, 3)
    with TrueSizes(batch, sizes) as true:
        named = torch.conv2d(input=batch, weight=weight, padding=(1, 0), stride=2)
        assert torch.equal(named, F.conv2d(batch, weight, None, 2, (1, 0)))
        assert true.of(named).tolist() == [[5, 3], [4, 4]]
        pooled = F.avg_pool2d(input=named, kernel_size=2, ceil_mode=True, stride=[])
        assert torch.equal(pooled, F.avg_pool2d(named, 2, 2, 0, True))
        assert torch.equal(torch.max_pool2d(named, 2), F.max_pool2d(input=named, kernel_size=2))
        with pytest.raises(ValueError, match="conv2d on padded maps"):
            torch.conv2d(weight=weight, input=batch, padding=1)
