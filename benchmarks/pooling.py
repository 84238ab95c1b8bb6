"""Spatial pyramid pooling against torchvision's `roi_pool` and PyTorch's adaptive pooling.

Region pooling: one call of `pool_regions` against a call of `torchvision.ops.roi_pool` for each level. Whole
maps: `SpatialPyramidPooling` against a call of `adaptive_max_pool2d` for each level. Both forward, and with
backward. Contestants give the same numbers in the same order, which is checked before anything is timed. They
take turns; medians are reported. Run as::

    python benchmarks/pooling.py --device cpu --json results.json --docs docs

With `--docs` the tables and a plot are written there. `--device cuda` measures the GPU kernel. As a processor
without AVX-512, whatever this one has::

    NUMBA_CPU_NAME=znver3 NUMBA_CPU_FEATURES=+avx2,+fma,+bmi,+bmi2,+f16c,+sse4.2 \\
        NUMBA_CACHE_DIR=$(mktemp -d) ATEN_CPU_CAPABILITY=avx2 python benchmarks/pooling.py --windows
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from torchvision.ops import roi_pool

from common import commit, machine
from sppnet.pooling import SpatialPyramidPooling, pool_region_chunks, pool_regions, pyramid_length

PAPER = (6, 3, 2, 1)
# Channels, height and width of the map, levels, number of windows. The first gives the ratios of the summary.
SHAPES = [
    (256, 43, 58, PAPER, 2000),
    (256, 43, 58, PAPER, 10_000),
    (256, 75, 100, PAPER, 2000),
    (1280, 30, 40, (1, 2, 3), 2000),
    (1280, 30, 40, (1, 2, 3), 500),
]
# Images, channels, height and width.
BATCHES = [
    (1, 256, 13, 13),
    (16, 256, 13, 13),
    (128, 256, 13, 13),
    (1, 256, 43, 58),
    (8, 512, 30, 40),
    (64, 64, 56, 56),
]


def search_windows(count, height, width, rng):
    """Return windows whose sides are log-normal shares of the map's, as those of selective search."""
    mean, covariance = [-1.82, -1.73], [[0.64, 0.32], [0.32, 0.54]]
    shares = np.exp(rng.multivariate_normal(mean, covariance, count)).clip(0.04, 1)
    map_sides = np.array([width, height])
    sides = np.maximum(1, np.rint(shares * map_sides)).astype(int)
    low = rng.integers(0, map_sides - sides + 1)
    return np.concatenate([low, low + sides], axis=1)


def square_windows(count, side, height, width, rng):
    """Return windows of one size."""
    low = rng.integers(0, np.array([width, height]) - side + 1, (count, 2))
    return np.concatenate([low, low + side], axis=1)


def median_times(calls, repeats, device="cpu"):
    """Return the median seconds of each call.

    An untimed call goes before each timed one: every contestant finds memory and caches as it left them.
    """
    times = np.zeros((repeats, len(calls)))
    for line in times:
        for i, call in enumerate(calls):
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            line[i] = time.perf_counter() - start
    return np.median(times, axis=0).tolist()


def backwards(function, maps, upstream):
    """Return a call that pools and differentiates, and returns the gradient."""
    leaf = maps.clone(memory_format=torch.preserve_format).requires_grad_()

    def call():
        leaf.grad = None
        function(leaf).backward(upstream)
        return leaf.grad

    return call


def compare_regions(channels, height, width, levels, count, dtype, device, repeats):
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    maps = torch.randn(1, channels, height, width, dtype=dtype, device=device)
    places = search_windows(count, height, width, rng)
    windows = torch.from_numpy(places).to(device)
    # roi_pool wants inclusive corners, after the number of the map.
    rois = torch.from_numpy(np.pad(places - np.array([0, 0, 1, 1]), ((0, 0), (1, 0)))).to(device, dtype)
    out = torch.zeros(count, pyramid_length(channels, levels), dtype=dtype, device=device)
    upstream = torch.randn_like(out)

    def theirs(m):
        return torch.cat([roi_pool(m, rois, n).flatten(1) for n in levels], dim=1)

    def ours(m):
        return pool_regions(m, windows, levels)

    their_backward, our_backward = backwards(theirs, maps, upstream), backwards(ours, maps, upstream)
    equal = torch.equal(theirs(maps), ours(maps))
    close = torch.allclose(their_backward().float(), our_backward().float(), rtol=1e-3, atol=1e-2)
    calls = {
        "torchvision": lambda: theirs(maps),
        "ours": lambda: ours(maps),
        "ours_out": lambda: pool_regions(maps, windows, levels, out=out),
        "fill": lambda: out.fill_(1.0),
        "torchvision_backward": their_backward,
        "ours_backward": our_backward,
    }
    seconds = dict(zip(calls, median_times(list(calls.values()), repeats, device), strict=True))
    return {
        "shape": f"{channels} x {height} x {width}, levels {','.join(map(str, levels))}, {count:,} windows",
        "dtype": str(dtype).removeprefix("torch."),
        "mean_cells": float((places[:, 2:] - places[:, :2]).prod(axis=1).mean()),
        "output_gb": out.numel() * out.element_size() / 1e9,
        "equal": equal and close,
        "ms": {name: 1e3 * s for name, s in seconds.items()},
    }


def compare_layers(shape, layout, device, repeats):
    torch.manual_seed(0)
    maps = torch.randn(shape, device=device)
    if layout == "channels last":
        maps = maps.to(memory_format=torch.channels_last)
    layer = SpatialPyramidPooling(PAPER)
    upstream = torch.randn(shape[0], pyramid_length(shape[1], PAPER), device=device)

    def theirs(m):
        return torch.cat([functional.adaptive_max_pool2d(m, n).flatten(1) for n in PAPER], dim=1)

    their_backward, our_backward = backwards(theirs, maps, upstream), backwards(layer, maps, upstream)
    equal = torch.equal(theirs(maps), layer(maps))
    close = torch.allclose(their_backward(), our_backward(), rtol=1e-4, atol=1e-4)
    calls = {
        "torch": lambda: theirs(maps),
        "ours": lambda: layer(maps),
        "torch_backward": their_backward,
        "ours_backward": our_backward,
    }
    seconds = median_times(list(calls.values()), 4 * repeats, device)
    ms = {name: 1e3 * s for name, s in zip(calls, seconds, strict=True)}
    return {"shape": " x ".join(map(str, shape)), "layout": layout, "equal": equal and close, "ms": ms}


def curve_over_size(device, repeats):
    """Return milliseconds for 500 windows of each side on a map of 256 x 100 x 100."""
    rng = np.random.default_rng(0)
    maps, points = torch.randn(1, 256, 100, 100, device=device), []
    out = torch.zeros(500, pyramid_length(256, PAPER), device=device)
    for side in (1, 2, 3, 6, 12, 25, 50, 75, 100):
        places = square_windows(500, side, 100, 100, rng)
        windows = torch.from_numpy(places).to(device)
        rois = torch.from_numpy(np.pad(places - np.array([0, 0, 1, 1]), ((0, 0), (1, 0)))).to(device).float()
        ours, theirs = median_times(
            [
                lambda w=windows: pool_regions(maps, w, PAPER, out=out),
                lambda r=rois: [roi_pool(maps, r, n) for n in PAPER],
            ],
            repeats,
            device,
        )
        points.append({"side": side, "ours_ms": 1e3 * ours, "torchvision_ms": 1e3 * theirs})
    return points


def curve_over_count(device):
    """Return seconds for 10 to 1,000,000 windows in chunks of at most 256 MB, once each."""
    rng = np.random.default_rng(0)
    maps, points = torch.randn(1, 256, 43, 58, device=device), []
    for count in (10, 100, 1000, 10_000, 100_000, 1_000_000):
        windows = torch.from_numpy(search_windows(count, 43, 58, rng))
        start = time.perf_counter()
        for _ in pool_region_chunks(maps, windows, PAPER, max_bytes=2**28):
            pass
        if device == "cuda":
            torch.cuda.synchronize()
        points.append({"windows": count, "seconds": time.perf_counter() - start})
    return points


def first_call():
    """Return the seconds that the first call of a fresh process takes, once everything is compiled."""
    code = (
        "import time, torch, numpy as np; from sppnet.pooling import pool_regions; s = time.perf_counter();"
        "pool_regions(torch.ones(3, 9, 9), np.array([[0, 0, 9, 9]])); print(time.perf_counter() - s)"
    )
    call = [sys.executable, "-c", code]
    runs = [subprocess.run(call, capture_output=True, text=True, check=True) for _ in range(3)]
    return float(np.median([float(run.stdout) for run in runs]))


def region_table(results):
    lines = [
        "| map, pyramid, windows | dtype | torchvision | ours | ours, `out=` | filling the output | ratio "
        "| torchvision + backward | ours + backward | ratio |",
        "|---" * 10 + "|",
    ]
    for result in results:
        ms = result["ms"]
        cells = [
            result["shape"],
            result["dtype"],
            *(f"{ms[name]:.1f}" for name in ("torchvision", "ours", "ours_out", "fill")),
            f"{ms['torchvision'] / ms['ours']:.1f}",
            *(f"{ms[name]:.1f}" for name in ("torchvision_backward", "ours_backward")),
            f"{ms['torchvision_backward'] / ms['ours_backward']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def layer_table(results):
    lines = [
        "| maps | layout | adaptive_max_pool2d | ours | ratio | with backward | ours | ratio |",
        "|---" * 8 + "|",
    ]
    for result in results:
        ms = result["ms"]
        pairs = [("torch", "ours"), ("torch_backward", "ours_backward")]
        cells = [f"{ms[a]:.2f} | {ms[b]:.2f} | {ms[a] / ms[b]:.2f}" for a, b in pairs]
        lines.append("| " + " | ".join([result["shape"], result["layout"], *cells]) + " |")
    return lines


def plot(sizes, counts, path):
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    sides = [p["side"] for p in sizes]
    left.loglog(sides, [p["torchvision_ms"] for p in sizes], "o-", label="four roi_pool calls")
    left.loglog(sides, [p["ours_ms"] for p in sizes], "o-", label="pool_regions, out=")
    left.set(
        xlabel="side of the windows in cells", ylabel="ms for 500 windows", title="256 x 100 x 100, 6,3,2,1"
    )
    right.loglog(
        [p["windows"] for p in counts], [p["seconds"] for p in counts], "o-", label="pool_region_chunks"
    )
    right.set(xlabel="windows", ylabel="s", title="256 x 43 x 58, chunks of 256 MB")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--windows", action="store_true", help="measure windows alone, and print their table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--docs", type=Path, metavar="FOLDER", help="write pooling-speed.md and .png here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, repeats = options.device, options.repeats
    name = torch.cuda.get_device_name() if device == "cuda" else machine()
    measured = f"{name}, {options.threads} threads, PyTorch {torch.__version__}, commit {commit()}"

    dtypes = (torch.float32, torch.float16) if device == "cuda" else (torch.float32,)
    regions = [compare_regions(*shape, kind, device, repeats) for shape in SHAPES for kind in dtypes]
    if options.windows:
        print(measured, "", *region_table(regions), sep="\n")
        return
    layouts = ("contiguous", "channels last")
    layers = [compare_layers(shape, kind, device, repeats) for shape in BATCHES for kind in layouts]
    sizes, counts, first = curve_over_size(device, repeats), curve_over_count(device), first_call()
    report = [
        "# Pooling, measured",
        "",
        f"`python benchmarks/pooling.py --device {device} --docs docs` wrote this page.",
        f"{measured}.",
        "Milliseconds, medians of turns; equal results were checked in the same run: "
        + ("all equal." if all(r["equal"] for r in regions + layers) else "NOT ALL EQUAL."),
        f"The first call in a fresh process took {first:.2f} s, with everything compiled before."
        + (" The GPU kernel was not measured." if device == "cpu" else ""),
        "",
        "## Windows",
        "",
        "Sizes of windows as selective search gives them. Ratios are torchvision's time divided by ours;",
        "filling the output once is the floor. The time without `out=` is that of a call whose predecessor's",
        "result was freed, so that its memory is used again.",
        "",
        *region_table(regions),
        "",
        "## Whole maps",
        "",
        "Pyramid 6, 3, 2, 1. For small maps the operator's fixed cost decides: tenths of a millisecond.",
        "",
        *layer_table(layers),
        "",
        "## Over size and number of windows",
        "",
        "![Time over window size and number of windows](pooling-speed.png)",
        "",
        "| side | " + " | ".join(str(p["side"]) for p in sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
        "| ours, ms | " + " | ".join(f"{p['ours_ms']:.1f}" for p in sizes) + " |",
        "| torchvision, ms | " + " | ".join(f"{p['torchvision_ms']:.1f}" for p in sizes) + " |",
        "",
        "| windows | " + " | ".join(f"{p['windows']:,}" for p in counts) + " |",
        "|---" * (len(counts) + 1) + "|",
        "| s | " + " | ".join(f"{p['seconds']:.3f}" for p in counts) + " |",
        "",
    ]
    print("\n".join(report))
    if options.docs:
        plot(sizes, counts, options.docs / "pooling-speed.png")
        (options.docs / "pooling-speed.md").write_text("\n".join(report))
    if options.json:
        ms, gpu = regions[0]["ms"], device == "cuda"
        many = regions[len(dtypes)]["ms"]
        forward, backward = ms["torchvision"] / ms["ours"], ms["torchvision_backward"] / ms["ours_backward"]
        summary = {
            "equal": all(result["equal"] for result in regions + layers),
            "cpu_forward_ratio": None if gpu else forward,
            "cpu_backward_ratio": None if gpu else backward,
            "gpu_forward_ratio": forward if gpu else None,
            "gpu_fill_ratio": many["ours"] / many["fill"] if gpu else None,
            "setting": measured,
            "first_call_seconds": first,
            "regions": regions,
            "layers": layers,
            "over_size": sizes,
            "over_count": counts,
        }
        options.json.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
