#!/usr/bin/env bash
# pycalib 0.1.0.dev6: conf_ECE adds a bin's confidences up in their own precision, one after another. In float16 a sum of ones stops
# at 2048, so the ECE of half-precision predictions is wrong once a bin holds more than that, and says so nowhere.
#
# Input: 20 000 rows over five classes, labels drawn from softmax(z), confidences softmax(6 z), most of them near 1; the same rows as
# float64, float32 and float16. The ECE in fifteen bins is computed beside it with numpy, from float16 too, in float64 sums.
# Seen: 0.282 from float64 and float32, 0.523 from float16 (numpy: 0.282 from all three).
# Guess before the run: float16 differs by rounding, 0.001 at most. It was wrong.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "pycalib==0.1.0.dev6" "numpy==2.4.6"
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

import numpy as np
from pycalib.metrics import conf_ECE


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def ece(rows, labels, bins=15):
    confidence, hit = rows.max(axis=1).astype(np.float64), rows.argmax(axis=1) == labels
    number = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(number, weights=hit - confidence, minlength=bins)
    return np.abs(gaps).sum() / len(rows)


generator = np.random.default_rng(0)
logits = 2 * generator.normal(size=(20_000, 5))
labels = np.array([generator.choice(5, p=row) for row in softmax(logits)])
found, right = {}, {}
for dtype in ("float64", "float32", "float16"):
    rows = softmax(6 * logits).astype(dtype)
    found[dtype] = round(float(conf_ECE(np.eye(5)[labels], rows, bins=15)), 3)
    right[dtype] = round(float(ece(rows, labels)), 3)
print(f"pycalib {version('pycalib')}:", found, "numpy:", right)
assert found["float64"] == found["float32"] and abs(found["float64"] - right["float64"]) < 0.002
assert abs(right["float16"] - right["float64"]) < 0.002 and abs(found["float16"] - right["float16"]) > 0.05
PY
