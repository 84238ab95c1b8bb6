"""Region pooling against torchvision: one call of `pool_regions`, four (or three) of `roi_pool`.

Both give the same numbers in the same order, which is checked before anything is timed. The windows have the
sizes that selective search finds on VOC photographs. The contestants take turns; medians are reported.
"""

import argparse
import json
import platform
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import roi_pool

from sppnet.pooling import pool_regions, pyramid_length

# Channels, height and width of the map, levels, number of windows. The first gives the ratio of the summary.
SHAPES = [
    (256, 43, 58, (6, 3, 2, 1), 2000),
    (1280, 30, 40, (1, 2, 3), 2000),
    (1280, 30, 40, (1, 2, 3), 500),
]


def search_windows(count, height, width, rng):
    """Return windows whose sides are log-normal shares of the map's, as those of selective search."""
    mean, covariance = [-1.82, -1.73], [[0.64, 0.32], [0.32, 0.54]]
    shares = np.exp(rng.multivariate_normal(mean, covariance, count)).clip(0.04, 1)
    map_sides = np.array([width, height])
    sides = np.maximum(1, np.rint(shares * map_sides)).astype(int)
    low = rng.integers(0, map_sides - sides + 1)
    return np.concatenate([low, low + sides], axis=1)


def median_times(calls, repeats):
    """Return the median seconds of each call.

    An untimed call goes before each timed one: every contestant finds memory and caches as it left them.
    """
    times = np.zeros((repeats, len(calls)))
    for line in times:
        for i, call in enumerate(calls):
            call()
            start = time.perf_counter()
            call()
            line[i] = time.perf_counter() - start
    return np.median(times, axis=0).tolist()


def compare(channels, height, width, levels, count, repeats):
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    maps = torch.randn(1, channels, height, width)
    windows = search_windows(count, height, width, rng)
    # roi_pool wants inclusive corners, after the number of the map.
    rois = torch.from_numpy(np.pad(windows - np.array([0, 0, 1, 1]), ((0, 0), (1, 0)))).float()
    out = torch.zeros(count, pyramid_length(channels, levels))

    def torchvision_calls():
        return [roi_pool(maps, rois, n).flatten(1) for n in levels]

    equal = torch.equal(torch.cat(torchvision_calls(), dim=1), pool_regions(maps, windows, levels))
    seconds = median_times(
        [
            lambda: torch.cat(torchvision_calls(), dim=1),
            torchvision_calls,
            lambda: pool_regions(maps, windows, levels),
            lambda: pool_regions(maps, windows, levels, out=out),
            lambda: out.fill_(1.0),
        ],
        repeats,
    )
    names = ["torchvision", "torchvision_parts", "ours", "ours_out", "fill"]
    return {
        "shape": f"{channels} x {height} x {width}, levels {levels}, {count} windows",
        "mean_cells": float((windows[:, 2:] - windows[:, :2]).prod(axis=1).mean()),
        "output_gb": out.numel() * 4 / 1e9,
        "equal": equal,
        "ms": {name: 1e3 * s for name, s in zip(names, seconds, strict=True)},
    }


def show(result):
    ms = result["ms"]
    print(f"\n{result['shape']}, {result['mean_cells']:.0f} cells on average, equal: {result['equal']}")
    print(f"{'':42}{'ms':>9}{'ratio':>8}{'GB/s':>8}")
    for name, label in [
        ("torchvision", "torchvision.ops.roi_pool, concatenated"),
        ("torchvision_parts", "torchvision.ops.roi_pool, not concatenated"),
        ("ours", "pool_regions"),
        ("ours_out", "pool_regions, out="),
        ("fill", "floor: fill the output once"),
    ]:
        ratio, rate = ms["torchvision"] / ms[name], result["output_gb"] / ms[name] * 1e3
        print(f"{label:42}{ms[name]:9.1f}{ratio:8.1f}{rate:8.1f}")


def machine():
    """Return the name of the processor."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {len(models)} cores"


def commit():
    """Return the commit that was measured, marked if files have changed since."""
    call = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(call, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "no commit"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print(f"{machine()}, {options.threads} threads, torch {torch.__version__}, commit {commit()}")
    results = [compare(*shape, options.repeats) for shape in SHAPES]
    for result in results:
        show(result)
    if options.json:
        ms = results[0]["ms"]
        summary = {
            "equal": all(result["equal"] for result in results),
            "cpu_forward_ratio": ms["torchvision"] / ms["ours"],
            "cpu_backward_ratio": None,
            "gpu_forward_ratio": None,
            "gpu_fill_ratio": None,
            "machine": machine(),
            "threads": options.threads,
            "torch": torch.__version__,
            "commit": commit(),
            "shapes": results,
        }
        options.json.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
