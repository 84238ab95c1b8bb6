#!/usr/bin/env bash
# All that is claimed of GPUs, checked and measured in under ten minutes on one card:
#     bash benchmarks/gpu.sh [PYTHON] [FOLDER]
# PYTHON has sppnet[test]; tables and figures go to FOLDER.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python} out=${2:-out/gpu}
mkdir -p "$out"

# The kernel against plain loops and the CPU; maps, objectness and detections of the card against the CPU's.
"$python" -m pytest -q tests/pooling/test_gpu.py tests/features/test_network.py tests/proposals/test_maps.py \
    tests/detection/test_detector.py | tee "$out/tests.txt"
for device in cpu cuda; do
    "$python" -m sppnet detect run animals src/sppnet/photos/cows.jpg --device "$device" --json "$out/$device.json"
done

# Pooling of windows against torchvision's roi_pool on the card.
"$python" benchmarks/pooling.py --device cuda --windows | tee "$out/pooling.txt"
