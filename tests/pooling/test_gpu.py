"""The Triton kernels against loops: on a GPU, in Triton's interpreter, and compiled for a GPU not at hand.

Triton decides when a kernel is defined whether it will be interpreted, so that takes a process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from sppnet.pooling import SpatialPyramidPooling, gpu, pool_regions  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
LEVELS = [(6, 3, 2, 1), (1, 2, 3), (4, 3, 2, 1), (5,), (7, 1), (2, 2)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
MODES = ["max", "average"]
# One, less than a block, a block and a part of one; for a GPU, whose code differs, also multiples of 16.
CHANNELS = [1, 3, 70] if INTERPRETED else [1, 3, 33, 64, 70, 130]

runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="no CUDA device; test_in_the_interpreter runs these checks",
)
on_a_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device")


def bins(part, n):
    """Return the cells of every bin of a part (C, h, w) of a map, in row order."""
    height, width = part.shape[1:]
    rows, columns = (
        [slice(i * side // n, -(-(i + 1) * side // n)) for i in range(n)] for side in (height, width)
    )
    return [part[:, y, x].flatten(1) for y in rows for x in columns]


def parts(maps, windows, index):
    images = [image for m in maps for image in m]
    return [images[i][:, y1:y2, x1:x2] for (x1, y1, x2, y2), i in zip(windows.tolist(), index, strict=True)]


def oracle(maps, windows, index, levels, mode):
    """Pool bin by bin with PyTorch's own maximum and mean, in double precision."""
    vectors = []
    for part in parts(maps, windows, index):
        vector = []
        for n in levels:
            cells = [c.double() for c in bins(part, n)]
            level = torch.stack([c.amax(1) if mode == "max" else c.mean(1) for c in cells], dim=1)
            vector.append(level.flatten())
        vectors.append(torch.cat(vector))
    return torch.stack(vectors)


def pool(maps, windows, index, levels, mode, dtype=None):
    """Pool by the kernels, into memory that tells what was not written."""
    length = maps[0].shape[1] * sum(n * n for n in levels)
    out = torch.full((len(windows), length), -77.0, dtype=dtype or maps[0].dtype, device=DEVICE)
    gpu.pool([m.to(DEVICE) for m in maps], windows.to(DEVICE), index.to(DEVICE), levels, mode, out)
    return out.cpu()


def pool_backward(grad, maps, windows, index, levels, mode):
    there = [m.detach().to(DEVICE) for m in maps]
    grads = gpu.pool_backward(grad.to(DEVICE), there, windows.to(DEVICE), index.to(DEVICE), levels, mode)
    for g, m in zip(grads, there, strict=True):
        assert (g.shape, g.dtype, g.stride()) == (m.shape, m.dtype, torch.empty_like(m).stride())
    return [g.cpu() for g in grads]


def distinct(count, channels, height, width):
    """Return maps without ties in any channel, of few enough numbers for every dtype to tell them apart."""
    orders = [torch.randperm(height * width) - height * width // 2 for _ in range(count * channels)]
    return torch.stack(orders).view(count, channels, height, width).float() / 8


def some_maps(rng, channels):
    """Return maps of three sizes, 1 x 1 among them, with a window for every image."""
    sides = rng.integers(1, 10, (2, 2)).tolist()
    maps = [distinct(2, channels, *sides[0]), distinct(1, channels, 1, 1), distinct(1, channels, *sides[1])]
    index = torch.tensor([0, 3, 2, 1])
    windows = []
    for r, i in enumerate(index.tolist()):
        height, width = maps[[0, 0, 1, 2][i]].shape[2:]
        (x1, x2), (y1, y2) = (
            np.sort(rng.integers(0, side, 2)) + np.array([0, 1]) for side in (width, height)
        )
        windows.append([x1, y1, x2, y2] if r % 2 else [0, 0, width, height])
    return maps, torch.tensor(windows), index


@pytest.fixture
def rng(request):
    """Return random numbers that differ from test to test, but not from run to run."""
    seed = crc32(request.node.name.encode())
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


@pytest.mark.skipif(INTERPRETED, reason="this is the other process")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@runs
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("mode", MODES)
def test_pooling_equals_the_loops(rng, channels, levels, mode):
    maps, windows, index = some_maps(rng, channels)
    pooled = pool(maps, windows, index, levels, mode)
    expected = oracle(maps, windows, index, levels, mode).float()
    if mode == "max":
        assert torch.equal(pooled, expected)
    else:
        torch.testing.assert_close(pooled, expected)


@runs
@pytest.mark.parametrize("levels", [(9,), (12, 6, 4, 1), (17, 1), (10, 1)])
def test_levels_of_many_bins(rng, levels):
    maps, windows, index = some_maps(rng, 5)
    assert torch.equal(
        pool(maps, windows, index, levels, "max"), oracle(maps, windows, index, levels, "max").float()
    )
    average = oracle(maps, windows, index, levels, "average").float()
    torch.testing.assert_close(pool(maps, windows, index, levels, "average"), average)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("into", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_every_dtype(rng, dtype, into, mode):
    maps, windows, index = some_maps(rng, 9)
    maps = [m.to(dtype) for m in maps]
    pooled = pool(maps, windows, index, (3, 2, 1), mode, into)
    expected = oracle(maps, windows, index, (3, 2, 1), mode)
    if mode == "max":
        assert torch.equal(pooled, expected.to(into))
    else:
        # The interpreter cuts bits off where a GPU rounds to bfloat16.
        precision = max(torch.finfo(into).eps, 1e-12 if dtype == torch.float64 else 1e-6)
        torch.testing.assert_close(pooled.double(), expected, rtol=precision, atol=precision)


@runs
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_equal_those_of_the_loops(rng, levels, mode):
    maps, windows, index = some_maps(rng, 33)
    for m in maps:
        m.requires_grad_()
    expected = oracle(maps, windows, index, levels, mode)
    upstream = torch.randn(expected.shape)
    grads = pool_backward(upstream, maps, windows, index, levels, mode)
    expected.backward(upstream.double())
    for g, m in zip(grads, maps, strict=True):
        torch.testing.assert_close(g, m.grad, rtol=1e-4, atol=1e-5)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_in_every_dtype(rng, dtype, mode):
    maps, windows, index = some_maps(rng, 40)
    exact = [m.double().requires_grad_() for m in maps]
    expected = oracle(exact, windows, index, (3, 1), mode)
    upstream = torch.randn(expected.shape).to(dtype)
    grads = pool_backward(upstream, [m.to(dtype) for m in maps], windows, index, (3, 1), mode)
    expected.backward(upstream.double())
    for g, m in zip(grads, exact, strict=True):
        torch.testing.assert_close(g, m.grad.to(dtype))


@runs
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("levels", LEVELS)
def test_nan_and_infinities(rng, levels):
    values = torch.tensor([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-42, -1.0, 3e38])
    maps, windows, index = some_maps(rng, 20)
    # The average gets no numbers that only double precision can add up.
    for mode, count in (("max", 9), ("average", 8)):
        maps = [values[torch.from_numpy(rng.integers(0, count, m.shape))] for m in maps]
        for m in maps:
            m[:, 0], m[:, 1] = -np.inf, np.nan
        expected = oracle(maps, windows, index, levels, mode).float()
        pooled = pool(maps, windows, index, levels, mode)
        torch.testing.assert_close(
            pooled, expected, rtol=0 if mode == "max" else 1e-6, atol=0, equal_nan=True
        )


@runs
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("levels", LEVELS)
def test_the_gradient_of_a_maximum_goes_to_its_first_cell(rng, levels):
    # Few distinct values, so that nearly every bin holds its maximum several times.
    values = torch.tensor([-np.inf, 0.0, -0.0, 1.0, np.nan])
    maps, windows, index = some_maps(rng, 20)
    chances = [0.3, 0.3, 0.2, 0.15, 0.05]
    maps = [values[torch.from_numpy(rng.choice(5, m.shape, p=chances))] for m in maps]
    for m in maps:
        m[:, 0], m[:, 1] = -np.inf, np.nan
    upstream = torch.randn(len(windows), 20 * sum(n * n for n in levels))
    expected = [torch.zeros_like(m) for m in maps]
    cut = zip(parts(maps, windows, index), parts(expected, windows, index), upstream, strict=True)
    for part, target, vector in cut:
        numbers = torch.arange(part[0].numel()).view(1, *part.shape[1:])
        for n, share in zip(levels, vector.split([20 * n * n for n in levels]), strict=True):
            for cells, places, value in zip(
                bins(part, n), bins(numbers, n), share.view(20, n * n).T, strict=True
            ):
                # NumPy's argmax, too, is the first NaN or else the first maximum.
                winner = places[0, torch.from_numpy(cells.numpy().argmax(1))]
                target[torch.arange(20), winner // part.shape[2], winner % part.shape[2]] += value
    for g, e in zip(pool_backward(upstream, maps, windows, index, levels, "max"), expected, strict=True):
        torch.testing.assert_close(g, e)


@runs
@pytest.mark.parametrize("mode", MODES)
def test_memory_layout_does_not_matter(rng, mode):
    feature = distinct(2, 20, 6, 9)
    index = torch.tensor([1, 9, 0, 9, 1, 9])[::2]
    windows = torch.tensor([[0, 0, 9, 6], [0, 0, 9, 6], [2, 1, 5, 6]]).T.contiguous().T
    upstream = torch.randn(20 * 5, 3).T
    expected = pool([feature], windows, index, (2, 1), mode)
    (grad,) = pool_backward(upstream, [feature], windows, index, (2, 1), mode)
    wide = torch.zeros(2, 20, 12, 18)
    wide[:, :, ::2, ::2] = feature
    for same in (
        feature.to(memory_format=torch.channels_last),
        wide[:, :, ::2, ::2],
        feature.mT.contiguous().mT,
        feature.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert not same.is_contiguous()
        assert torch.equal(pool([same], windows, index, (2, 1), mode), expected)
        torch.testing.assert_close(pool_backward(upstream, [same], windows, index, (2, 1), mode)[0], grad)


def test_a_map_with_channels_last_is_not_copied():
    feature = torch.randn(2, 8, 3, 4).to(memory_format=torch.channels_last)
    assert gpu._cells([feature]).data_ptr() == feature.data_ptr()


@on_a_gpu
@pytest.mark.parametrize("mode", MODES)
def test_the_doors_on_a_gpu(rng, mode):
    maps, windows, index = some_maps(rng, 33)
    here = [image.requires_grad_() for m in maps for image in m]
    there = [m.detach().cuda().requires_grad_() for m in here]
    pooled = pool_regions(here, windows, mode=mode, index=index)
    same = pool_regions(there, windows, mode=mode, index=index)
    torch.testing.assert_close(same.cpu(), pooled)
    layer = SpatialPyramidPooling(mode=mode)
    torch.testing.assert_close(layer(there).cpu(), layer(here))
    upstream = torch.randn_like(pooled)
    pooled.backward(upstream)
    same.backward(upstream.cuda())
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-4, atol=1e-5)


@on_a_gpu
def test_outputs_beyond_32_bits():
    count = 2**31 // (64 * 50) + 10
    if torch.cuda.mem_get_info()[0] < 3 * count * 64 * 50:
        pytest.skip("not enough memory on the device")
    feature = torch.randn(1, 64, 7, 7, device="cuda", dtype=torch.float16)
    windows = torch.tensor([[1, 0, 6, 7]], device="cuda").expand(count, 4)
    index = torch.zeros(count, dtype=torch.int64, device="cuda")
    out = torch.empty((count, 64 * 50), dtype=torch.float16, device="cuda")
    gpu.pool([feature], windows, index, LEVELS[0], "max", out)
    assert (out[1:] == out[0]).all()
    assert torch.equal(out[:1], pool([feature], windows[:1], index[:1], LEVELS[0], "max").cuda())


def compile_ahead(kernel, dtype, mode, channels=256, levels=LEVELS[0]):
    """Compile a kernel for an H100, by default for the paper's levels, as Triton does when it is called."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64"}
    wide = names[torch.promote_types(dtype, torch.float32)]
    cells = torch.empty((1, channels), dtype=dtype)
    constants = {"FORM": gpu._form(cells, levels, mode, backward=kernel == "_spread")}
    # Triton makes a constant of a 1, too.
    constants |= {"channels": 1} if channels == 1 else {}
    types = {
        "cells": names[dtype],
        "out": names[dtype],
        "grad": names[dtype],
        "sums": wide,
        "channels": "i32",
    }
    types |= dict.fromkeys(("images", "windows", "index"), "*i64") | dict.fromkeys(constants, "constexpr")
    function = getattr(gpu, kernel)
    signature = {name: types[name] for name in function.arg_names}
    # Memory of PyTorch's begins at multiples of 16.
    even = [
        name for name in signature if name not in constants and (name != "channels" or channels % 16 == 0)
    ]
    aligned = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(function, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": gpu.WARPS})


@pytest.fixture
def ptxas(tmp_path, monkeypatch):
    """Return the assembler that Triton brings along; compile afresh."""
    if INTERPRETED:
        pytest.skip("kernels are interpreted")
    backend = pytest.importorskip("triton.backends.nvidia", reason="Triton has no backend for NVIDIA")
    # The one for newer chips, where there is one, knows the newest language.
    names = ("ptxas-blackwell", "ptxas")
    paths = [path for name in names if (path := Path(backend.__file__).parent / "bin" / name).exists()]
    if not paths:
        pytest.skip("Triton brings no ptxas")
    path = paths[0]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kernel", ["_pool", "_spread"])
@pytest.mark.parametrize("mode", MODES)
def test_compiles_for_an_h100(kernel, dtype, mode, ptxas, tmp_path):
    code = compile_ahead(kernel, dtype, mode).asm["ptx"]
    # Cells are read 16 bytes at a time; nothing is kept in memory for want of registers.
    if kernel == "_pool" or mode == "max":
        assert re.search(r"ld\.global[.\w]*\.v(4\.b32|2\.b64)", code)
    (tmp_path / "kernel.ptx").write_text(code)
    command = [str(ptxas), "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    report = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report


@pytest.mark.parametrize("channels", [1, 33])
@pytest.mark.parametrize("kernel", ["_pool", "_spread"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("ptxas")
def test_any_number_of_channels_compiles(kernel, channels, mode):
    # Every kind of level is there: of several bins and of one, pooled from cells and from a finer level.
    assert compile_ahead(kernel, torch.float32, mode, channels, (3, 1)).asm["cubin"]
