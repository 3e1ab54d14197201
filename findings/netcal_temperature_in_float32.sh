#!/usr/bin/env bash
# netcal 1.4.0: TemperatureScaling fitted on float32 probabilities stays at 1, without a warning; in float64 it fits.
#
# A network's softmax is float32. Input: 2 000 rows over five classes, labels drawn from softmax(z), confidences softmax(1.5 z): the
# right inverse temperature is 1/1.5 = 0.667. The same rows as float64 and as float32.
# Seen: 0.661 from float64, exactly 1.0 from float32.
# Guess before the run: float32 stays at 1. It was right (the direction was not: `temperature` multiplies the logits).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "netcal==1.4.0" "numpy==2.4.6" "torch==2.14.1"
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
from importlib.metadata import version

import numpy as np
from netcal.scaling import TemperatureScaling

generator = np.random.default_rng(0)
logits = generator.normal(size=(2000, 5)) * 3
true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
labels = np.array([generator.choice(5, p=row) for row in true])
said = np.exp(1.5 * logits) / np.exp(1.5 * logits).sum(axis=1, keepdims=True)
fitted = {}
for dtype in ("float64", "float32"):
    scaling = TemperatureScaling()
    scaling.fit(said.astype(dtype), labels)
    fitted[dtype] = float(scaling.temperature[0])
print(f"netcal {version('netcal')}:", fitted)
assert abs(fitted["float64"] - 1 / 1.5) < 0.02 and fitted["float32"] == 1.0
PY
