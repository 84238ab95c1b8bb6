"""Images per second of training: real images against tensors that are there already, two sizes against one,
two processes against one on a single core. Run as::

    python benchmarks/training.py DATA --network zf5 --width 0.25

DATA is a folder with a folder of images for each class, or one with the split train.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning_fabric import Fabric

from common import commit, machine
from sppnet.classification.batches import Batch, CropBatches, Reading
from sppnet.classification.network import build
from sppnet.classification.scorer import NetworkSettings
from sppnet.classification.training import Recipe, train
from sppnet.datasets.image_folder import read_image_folder


class Ready:
    """Batches of random pixels on the device, as many as `source` has."""

    def __init__(self, source: CropBatches, classes: int, device: torch.device) -> None:
        size, count = source.side_of(0), source.batch_size // source.reading.world
        images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, device=device)
        labels = torch.randint(0, classes, (count,), device=device)
        self.batch = Batch(images.permute(0, 3, 1, 2), labels, [], [])
        self.source, self.batch_size = source, source.batch_size

    def __len__(self) -> int:
        return len(self.source)

    def side_of(self, number: int) -> int:
        return self.source.side_of(number)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        for _ in range(start, len(self)):
            yield self.batch


def speeds(arguments, scales, ready=False) -> dict[int, float]:
    """Return images per second, over all processes, by side; the first epoch of each side warms up."""
    fabric = fabric_of(arguments)
    images = read_image_folder(arguments.data, "train" if (arguments.data / "train").is_dir() else None)
    images = images.subset(range(0, len(images), max(1, len(images) // arguments.images)))
    reading = Reading(arguments.workers, world=fabric.world_size, rank=fabric.global_rank)
    source = CropBatches(images, arguments.batch, scales, reading=reading)
    network = build(
        NetworkSettings(arguments.network, images.classes, width=arguments.width, size=max(scales))
    )
    batches = Ready(source, len(images.classes), fabric.device) if ready else source
    found = {}
    for record in train(
        network, batches, Recipe(epochs=2 * len(scales), lr=1e-4, milestones=()), fabric=fabric
    ):
        found[record.side] = record.images / record.seconds
    return found


def fabric_of(arguments) -> Fabric:
    world = int(os.environ.get("WORLD_SIZE", 1))
    strategy = "ddp" if world > 1 else "auto"
    fabric = Fabric(
        accelerator=arguments.device, devices=world, strategy=strategy, precision=arguments.precision
    )
    fabric.launch()
    return fabric


def elsewhere(arguments, *launcher: str) -> float:
    """Return the images per second that another process, or several, reach on one thread each."""
    options = [
        "--network",
        arguments.network,
        "--width",
        str(arguments.width),
        "--batch",
        str(arguments.batch),
    ]
    options += ["--images", str(arguments.images), "--size", str(arguments.size), "--child"]
    call = [*launcher, __file__, str(arguments.data), *options]
    printed = subprocess.run(
        call, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ).stdout
    return float(printed.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--network", default="zf5")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    small = round(arguments.size * 180 / 224)
    if arguments.child:
        speed = speeds(arguments, (arguments.size,), ready=True)[arguments.size]
        if int(os.environ.get("RANK", 0)) == 0:
            print(speed)
        return
    one = speeds(arguments, (arguments.size,))[arguments.size]
    ready = speeds(arguments, (arguments.size,), ready=True)[arguments.size]
    both = speeds(arguments, (arguments.size, small))
    found = {
        "images_per_second": one,
        "of_ready_tensors": one / ready,
        "multi_size_of_single": both[arguments.size] / one,
        "images_per_second_small": both[small],
        "two_processes_of_one": None,
    }
    if arguments.device == "cpu":
        alone = elsewhere(arguments, "taskset", "-c", "0", sys.executable)
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        found["two_processes_of_one"] = elsewhere(arguments, *launcher) / alone
    print(f"{machine()}, commit {commit()}")
    print(f"{arguments.network} of width {arguments.width}, {arguments.size} and {small} pixels")
    for name, value in found.items():
        print(f"{name:24} {'not measured' if value is None else f'{value:.3g}'}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
