"""Train the network with a feature pyramid that comes with sppnet, from ImageNet's weights. Run as::

    python benchmarks/pyramid.py DATA --split train --out src/sppnet/models/pyramid-lite0.onnx

Learns to propose windows of whatever is annotated, with the classes as a further task: 32,000 pictures of
384 x 384 pixels, about an hour on 2 cores. No photo of the split is a good test of it afterwards.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from rich.progress import track

from common import commit, machine
from sppnet.datasets import read_dataset
from sppnet.features.backbone import Backbone
from sppnet.features.graph import make_graph
from sppnet.images import pixels_of
from sppnet.rpn.pictures import kept_photo
from sppnet.rpn.settings import Joint
from sppnet.rpn.training import Clock, Trainer

SIDE, SETTINGS = 288, Joint(batch=16, frozen=2, weight_decay=0.05, mosaic=0.5, close=0.2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--split", default="train")
    parser.add_argument("--photos", type=int, default=32000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    data = read_dataset(args.data, args.split)
    photos = [kept_photo(pixels_of(s.image), s.target, data.classes) for s in data]
    trainer, start = Trainer(Backbone().graph, data.classes, SETTINGS), time.perf_counter()

    def bar(items, description):
        return track(items, description)

    trainer.train(photos, SIDE, Clock(steps=args.photos // SETTINGS.batch), bar)
    graph = trainer.graph("pyramid-lite0")
    source = f"{graph.facts.source}, then trained on {len(data)} photos of {data.root.name} ({args.split})"
    make_graph(graph.model, replace(graph.facts, source=source)).save(args.out)
    print(f"{machine()}, commit {commit()}: {args.out}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
