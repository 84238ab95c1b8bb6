"""Measure on one core what is asked for: JSON in, JSON out."""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Read what to measure, and print what it takes."""
    asked = json.loads(sys.stdin.read())
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[asked["core"] % len(cores)]})
    # Imported late: what is not measured is not to be started, nor to take memory.
    if asked["kind"] == "embed":
        from sppnet.measuring.embedding import embed

        found = embed(asked)
    else:
        from sppnet.measuring.detecting import detect, learn

        found = detect(asked) if asked["kind"] == "detect" else learn(asked)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
