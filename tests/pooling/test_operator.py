"""What PyTorch is promised about the operator: schema, gradients, compiler, exporter, autocast, memory."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from loops import LEVELS
from sppnet.errors import SppnetError
from sppnet.pooling import SpatialPyramidPooling, pool_regions
from sppnet.pooling import operator as operators

pool = torch.ops.sppnet.pool.default


def adaptive(maps, levels, mode="max"):
    """Pool whole maps (C, H, W) by PyTorch's adaptive pooling."""
    function = functional.adaptive_max_pool2d if mode == "max" else functional.adaptive_avg_pool2d
    return torch.cat([function(maps, n).flatten(-3) for n in levels], dim=-1)


def by_windows(maps, windows, index, levels, mode):
    """Pool windows of (C, H, W) maps one by one."""
    cut = [maps[i][:, y1:y2, x1:x2] for (x1, y1, x2, y2), i in zip(windows.tolist(), index, strict=True)]
    return torch.stack([adaptive(part, levels, mode) for part in cut])


def random_windows(rng, maps, count):
    index = rng.integers(0, len(maps), count)
    windows = []
    for i in index:
        height, width = maps[i].shape[-2:]
        (x1, x2), (y1, y2) = (
            np.sort(rng.integers(0, side, 2)) + np.array([0, 1]) for side in (width, height)
        )
        windows.append([x1, y1, x2, y2])
    return torch.tensor(windows), torch.from_numpy(index)


def distinct(*shape, dtype=torch.float32):
    """Return numbers without ties, which every dtype can tell apart."""
    return (torch.randperm(math.prod(shape)) - math.prod(shape) // 3).view(shape).to(dtype) / 8


@pytest.mark.parametrize("mode", ["max", "average"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(rng, mode, grad):
    maps = [torch.randn(2, 3, 5, 7, requires_grad=grad), torch.randn(1, 3, 4, 4, requires_grad=grad)]
    windows, index = random_windows(rng, [maps[0][0], maps[0][1], maps[1][0]], 6)
    torch.library.opcheck(pool, (maps, windows, index, [3, 2, 1], mode))
    torch.library.opcheck(pool, (maps[:1], None, None, [2, 1], mode, torch.float16))
    still = [m.detach() for m in maps]
    torch.library.opcheck(
        torch.ops.sppnet.pool_backward.default,
        (torch.randn(6, 3 * 14), still, windows, index, [3, 2, 1], mode),
    )
    torch.library.opcheck(
        torch.ops.sppnet.pool_into.default,
        (still, windows, index, [3, 2, 1], mode, torch.zeros(6, 3 * 14)),
    )


@pytest.mark.parametrize("mode", ["max", "average"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradcheck(rng, mode, layout):
    maps = distinct(2, 3, 5, 6, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    other = distinct(1, 3, 1, 1, dtype=torch.float64).requires_grad_()
    windows, index = random_windows(rng, [maps[0], maps[1], other[0]], 7)

    def regions(*given):
        return pool(list(given), windows, index, [3, 2, 1], mode)

    assert torch.autograd.gradcheck(regions, (maps, other))
    layer = SpatialPyramidPooling((4, 3, 1), mode)
    sizes = torch.tensor([[5, 2], [1, 6]])
    assert torch.autograd.gradcheck(lambda m: layer(m, sizes), maps)


@pytest.mark.parametrize("mode", ["max", "average"])
def test_gradients_of_gradients_are_refused_and_not_silently_missing(mode):
    maps = distinct(1, 3, 5, 6, dtype=torch.float64).requires_grad_()
    weights = torch.randn(15, dtype=torch.float64, requires_grad=True)
    layer = SpatialPyramidPooling((2, 1), mode)
    (grad,) = torch.autograd.grad((layer(maps) @ weights).square().sum(), maps, create_graph=True)
    penalty = grad.square().sum()
    for call in (
        lambda: torch.autograd.grad(penalty, weights, retain_graph=True),
        lambda: penalty.backward(retain_graph=True),
        lambda: torch.autograd.gradgradcheck(layer, maps),
    ):
        with pytest.raises(SppnetError, match="gradients of gradients"):
            call()
    # With a constant upstream there is nothing to derive.
    (grad,) = torch.autograd.grad(layer(maps).sum(), maps, create_graph=True)
    assert not grad.requires_grad


@pytest.mark.parametrize("mode", ["max", "average"])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("channels", [1, 16, 33, 130])
def test_gradients_equal_those_of_adaptive_pooling(rng, mode, levels, channels):
    sides = [(1, 1), (1, 5), (6, 2), (13, 13), (11, 20)]
    ours = [distinct(channels, *s).requires_grad_() for s in sides]
    theirs = [m.detach().clone().requires_grad_() for m in ours]
    windows, index = random_windows(rng, ours, 40)
    pooled = pool_regions(ours, windows, levels, mode=mode, index=index)
    expected = by_windows(theirs, windows, index, levels, mode)
    torch.testing.assert_close(pooled, expected)
    upstream = torch.randn_like(pooled)
    pooled.backward(upstream)
    expected.backward(upstream)
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad.shape == a.shape
        wanted = torch.zeros_like(a) if b.grad is None else b.grad
        torch.testing.assert_close(a.grad, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["max", "average"])
def test_gradients_in_every_dtype(mode, dtype):
    maps = distinct(2, 5, 4, 3).to(dtype).requires_grad_()
    exact = maps.detach().double().requires_grad_()
    upstream = torch.randn(2, 5 * 14).to(dtype)
    SpatialPyramidPooling((3, 2, 1), mode)(maps).backward(upstream)
    SpatialPyramidPooling((3, 2, 1), mode)(exact).backward(upstream.double())
    assert maps.grad.dtype == dtype
    torch.testing.assert_close(maps.grad, exact.grad.to(dtype))


@pytest.mark.parametrize("levels", LEVELS)
def test_ties_go_to_the_first_cell_in_row_order(rng, levels):
    # Few distinct values, so that nearly every bin holds its maximum several times.
    ours = torch.from_numpy(rng.integers(-1, 2, (19, 11, 14))).float().requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    windows, index = random_windows(rng, [ours], 60)
    upstream = torch.randn(60, 19 * sum(n * n for n in levels))
    pool_regions(ours, windows, levels).backward(upstream)
    by_windows([theirs], windows, index, levels, "max").backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_tie_between_two_finer_bins_goes_to_the_earlier_row():
    # The left finer bin holds the maximum in row 1, the right one in row 0: row order, not bin order.
    maps = torch.tensor([[[0.0, 0.0, 0.0, 5.0], [5.0, 0.0, 0.0, 0.0]]], requires_grad=True)
    pool_regions(maps, [[0, 0, 4, 2]], (2, 1)).backward(torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]]))
    assert maps.grad.tolist() == [[[0, 0, 0, 1], [0, 0, 0, 0]]]


def test_the_gradient_of_nan_goes_to_the_first_nan():
    maps = torch.tensor([[[1.0, math.nan, math.inf, math.nan]]], requires_grad=True)
    pooled = pool_regions(maps, [[0, 0, 4, 1]], (1,))
    assert pooled.isnan().all()
    pooled.backward(torch.ones(1, 1))
    assert maps.grad.tolist() == [[[0, 1, 0, 0]]]


def test_all_minus_infinity_is_a_maximum_like_any_other():
    maps = torch.full((1, 2, 2), -math.inf, requires_grad=True)
    pooled = pool_regions(maps, [[0, 0, 2, 2]], (1,))
    assert pooled.tolist() == [[-math.inf]]
    pooled.backward(torch.ones(1, 1))
    assert maps.grad.tolist() == [[[1, 0], [0, 0]]]


@pytest.mark.parametrize("mode", ["max", "average"])
@pytest.mark.parametrize("channels", [16, 100, 300])
def test_threads_do_not_change_the_gradients(rng, threads, mode, channels):
    maps = [torch.randn(channels, 20, 30), torch.randn(channels, 9, 9)]
    windows, index = random_windows(rng, maps, 500)
    upstream = torch.randn(500, channels * 14)
    grads = []
    for count in (1, 2, 3):
        threads(count)
        given = [m.clone().requires_grad_() for m in maps]
        pool_regions(given, windows, (3, 2, 1), mode=mode, index=index).backward(upstream)
        grads.append([m.grad for m in given])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_no_windows_have_a_gradient_of_0():
    maps = torch.randn(3, 4, 5, requires_grad=True)
    pool_regions(maps, torch.zeros(0, 4, dtype=torch.int64)).sum().backward()
    assert maps.grad.abs().sum() == 0
    batch = torch.randn(0, 3, 4, 5, requires_grad=True)
    SpatialPyramidPooling()(batch).sum().backward()
    assert batch.grad.shape == (0, 3, 4, 5)


def test_maps_without_gradient_among_others():
    fixed, moving = torch.randn(1, 2, 2), torch.randn(1, 3, 3, requires_grad=True)
    pool_regions([fixed, moving], [[0, 0, 2, 2], [0, 0, 3, 3]], (1,), index=[0, 1]).sum().backward()
    assert fixed.grad is None
    assert moving.grad.sum() == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_without_a_graph_break_for_any_size(rng, backend):
    layer = SpatialPyramidPooling((3, 2, 1))

    def call(maps, windows, sizes):
        whole = layer(maps, sizes).sum(dim=0) + layer(maps).sum(dim=0)
        index = torch.zeros(windows.shape[0], dtype=torch.int64)
        return pool_regions(maps, windows, (3, 2, 1), index=index).relu() + whole

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)
    for count, height, width, rows in [(2, 8, 9, 4), (3, 13, 5, 7), (2, 20, 21, 3)]:
        maps = distinct(count, 4, height, width).requires_grad_()
        windows, _ = random_windows(rng, [maps[0]], rows)
        sizes = torch.tensor([[height, width]] * count)
        expected = call(maps, windows, sizes)
        (wanted,) = torch.autograd.grad(expected.sum(), maps)
        found = compiled(maps, windows, sizes)
        torch.testing.assert_close(found, expected)
        (grad,) = torch.autograd.grad(found.sum(), maps)
        torch.testing.assert_close(grad, wanted)


def test_compiled_into_the_memory_of_the_caller(rng):
    maps = torch.randn(3, 8, 9)
    windows, _ = random_windows(rng, [maps], 5)

    def call(maps, windows, out):
        pool_regions(maps, windows, (2, 1), out=out)
        return out * 2

    out = torch.zeros(5, 15)
    doubled = torch.compile(call, fullgraph=True, backend="aot_eager")(maps, windows, out)
    assert torch.equal(out, pool_regions(maps, windows, (2, 1)))
    assert torch.equal(doubled, out * 2)


def test_exported_with_free_sizes(rng):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)
            self.pool = SpatialPyramidPooling((6, 3, 2, 1))

        def forward(self, images, windows):
            maps = self.backbone(images)
            index = torch.zeros(windows.shape[0], dtype=torch.int64)
            return self.pool(maps), pool_regions(maps, windows, (3, 2, 1), index=index)

    network = Network().eval()
    free = torch.export.Dim.DYNAMIC
    example = torch.randn(2, 3, 32, 48), torch.tensor([[0, 0, 3, 3], [1, 2, 5, 4]])
    program = torch.export.export(network, example, dynamic_shapes=({0: free, 2: free, 3: free}, {0: free}))
    for shape in [(2, 3, 16, 90), (5, 3, 61, 33)]:
        images = torch.randn(shape)
        windows, _ = random_windows(rng, [network.backbone(images)[0]], shape[0] + 1)
        for found, expected in zip(program.module()(images, windows), network(images, windows), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_dtype_of_the_maps(dtype):
    maps = torch.randn(2, 3, 5, 5, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert SpatialPyramidPooling()(maps).dtype == dtype
        convolved = functional.conv2d(maps, torch.randn(4, 3, 1, 1))
        assert SpatialPyramidPooling()(convolved).dtype == torch.bfloat16


def test_shapes_are_known_without_numbers():
    maps = torch.empty(2, 3, 5, 5, device="meta")
    assert SpatialPyramidPooling()(maps).shape == (2, 150)
    pooled = pool_regions(maps, np.zeros((7, 4), int), (1,), index=np.zeros(7, int), dtype=torch.float16)
    assert pooled.shape == (7, 3)
    assert pooled.dtype == torch.float16
    assert pooled.is_meta


def test_devices_without_a_kernel_compute_on_the_cpu(rng, monkeypatch):
    monkeypatch.setattr(operators, "_kernels", lambda device: None)
    maps = torch.randn(3, 8, 9, requires_grad=True)
    windows, index = random_windows(rng, [maps], 5)
    pooled = pool_regions(maps, windows)
    torch.testing.assert_close(pooled, by_windows([maps], windows, index, (6, 3, 2, 1), "max"))
    pooled.sum().backward()
    assert maps.grad.sum() == pooled.numel()
