#!/usr/bin/env bash
# relplot 1.0.3: smooth ECE counts samples whose confidence is exactly 1 (or 0) by half.
#
# The kernel is reflected at 0 and 1, but the grid's end points are left out of the reflected copies, so what lies on an end loses
# the half of its mass that should be folded back. A confidence of 1.0 is what float16 and bfloat16 round many confidences to.
# Input: 500 samples of confidence 1 (80 % right) and 500 of confidence 0.5 (50 % right). The residual has one sign, so that any
# kernel that keeps mass gives 0.1; at 0.999 instead of 1 relplot does, at 1 it gives two thirds of it.
# Seen: 0.0680 at 1.0, 0.1005 at 0.999.
# Guess before the run: 0.067 and 0.0995. It was right; an earlier one, that confidence 1 alone would halve the figure, was wrong:
# the density that divides it is halved too (0.1000).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "relplot==1.0.3" "numpy==2.4.6"
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

import numpy as np
import relplot

right = np.repeat([1.0, 0.0, 1.0, 0.0], [400, 100, 250, 250])
found = {top: relplot.smECE(np.repeat([top, 0.5], 500), right) for top in (1.0, 0.999)}
alone = relplot.smECE(np.ones(1000), np.repeat([1.0, 0.0], [900, 100]))
print(f"relplot {version('relplot')}:", {top: round(float(value), 4) for top, value in found.items()}, f"alone: {alone:.4f}")
assert abs(found[1.0] - 0.068) < 1e-3 and abs(found[0.999] - 0.1005) < 1e-3 and abs(alone - 0.1) < 1e-3
PY
