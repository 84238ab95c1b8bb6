"""Seconds and peak memory of listing a tree of images in 1000 class folders.

The files are empty, and listed right after they were made: what the system remembers of them costs no disk
access. Listing runs in a process of its own, whose peak includes Python, NumPy and OpenCV, told as its start.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

CLASSES = 1000
LIST = """
import sys, time
from sppnet.progress import peak_memory
from sppnet.datasets.image_folder import read_image_folder
before, start = peak_memory(), time.perf_counter()
images = read_image_folder(sys.argv[1])
seconds = time.perf_counter() - start
print(f"{images}: {seconds:.1f} s, peak {peak_memory():.2f} GB, at the start {before:.2f} GB")
"""


def make(root, count):
    """Make empty files named like those of ImageNet: 23 bytes, 33 with their folder."""
    for label in range(CLASSES):
        folder = root / f"n{label:08d}"
        folder.mkdir()
        for number in range(label, count, CLASSES):
            (folder / f"n{label:08d}_{number:08d}.JPEG").touch()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_300_000)
    parser.add_argument("--folder", type=Path, help="where to make the tree; default: the temporary folder")
    args = parser.parse_args()
    if args.images < CLASSES:
        parser.error(f"found --images {args.images}, expected at least {CLASSES}, one for each class")

    with TemporaryDirectory(dir=args.folder) as root:
        make(Path(root), args.images)
        subprocess.run([sys.executable, "-c", LIST, root], check=True)

    # Only now: a process starts with its parent's peak, and this brings PyTorch.
    from common import commit, machine

    print(f"{machine()}, one thread, commit {commit()}")


if __name__ == "__main__":
    main()
