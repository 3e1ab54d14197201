#!/usr/bin/env bash
# torchmetrics 1.9.0: its calibration error has one bin more than `n_bins`, for confidences of exactly 1.
#
# Bins are [a, b), and 1.0 falls behind the last edge into a bin of its own. Input: 50 predictions of confidence 1 (80 % right) and 50
# of confidence 0.95 (all right). In one bin (0.9, 1] they miss by |0.9 - 0.975| = 7.5 %; apart, by half of 20 % and half of 5 %.
# Seen: 12.5 % with n_bins 10 as with 20, although ten bins put both into the last one.
# Guess before the run: 12.5 % with ten bins. It was right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torchmetrics==1.9.0" "torch==2.14.1" "numpy==2.4.6"
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

import torch
from torchmetrics.functional.classification import multiclass_calibration_error

confidence = torch.tensor([1.0] * 50 + [0.95] * 50)
labels = torch.tensor([0] * 40 + [1] * 10 + [0] * 50)  # class 0 is predicted
probabilities = torch.stack([confidence, 1 - confidence], 1)
found = {n: multiclass_calibration_error(probabilities, labels, num_classes=2, n_bins=n).item() for n in (10, 20)}
print(f"torchmetrics {version('torchmetrics')}:", found)
assert all(abs(value - 0.125) < 1e-5 for value in found.values())
PY
