"""Padding in batches of images of many sizes: batches of similar sizes against random batches.

The sizes come from the headers of the images. "Padding" is the share of all pixels of the padded batches that
belong to no image, over one epoch.
"""

import argparse
from pathlib import Path

import numpy as np

from common import commit, write_json
from sppnet.images import find_images, image_size
from sppnet.pooling.padded import SizeBucketSampler


def padding(sizes, batches):
    """Return the share of the pixels of padded batches that belong to no image."""
    taken = sum(len(batch) * int(sizes[batch].max(axis=0).prod()) for batch in batches)
    return 1 - int(sizes[np.concatenate(batches)].prod(axis=1).sum()) / taken


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", help="folders, files or patterns")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    args = parser.parse_args()

    sizes = np.array([image_size(path) for path in find_images(args.images).paths])
    similar = list(SizeBucketSampler(sizes, args.batch_size))
    order = np.random.default_rng(0).permutation(len(sizes))
    random = [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]

    results = {}
    print(f"{len(sizes)} images of {len(np.unique(sizes, axis=0))} sizes, commit {commit()}")
    for name, batches in (("SizeBucketSampler", similar), ("random", random)):
        results[name] = {"padding": padding(sizes, batches), "batches": len(batches)}
        print(f"{name:18} {results[name]['padding']:.1%} padding, {len(batches)} batches")
    facts = {"images": len(sizes), "batch_size": args.batch_size, "commit": commit()}
    write_json(args.json, facts | {"results": results})


if __name__ == "__main__":
    main()
