#!/usr/bin/env bash
# MAPIE 1.6.0: `expected_calibration_error` with `num_bins=10` has nine bins of equal width, since ten edges from 0 to 1 bound nine,
# and with `num_bins=1` it is nan. With `split_strategy="array split"`, bins of equally many samples, it depends on the order of the
# samples: bins end at the largest confidence of each part of the array as it is given, so of samples in no order all but a few lie in
# the first bin, and what is left of the error is |accuracy − mean confidence|, a fifth of it.
#
# Input: 2 500 confidences evenly in 0.5 … 1, right too often by 0.1 below 0.75 and too seldom by 0.15 above; the ECE is about 0.125.
# Seen: "uniform" with 10, 15 bins: what 9, 14 bins of equal width give by the formula, 0.116 and 0.115 (10 give 0.107);
# "array split" with 10 bins 0.026, with the samples sorted by confidence 0.126.
# Expected before: the formula's figure for as many bins, to 1e-6, in any order of the samples.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mapie==1.6.0" "numpy==2.4.6" "scikit-learn==1.9.1"
"$folder/venv/bin/python" -W ignore - <<'PY'
from importlib.metadata import version

import numpy as np
from mapie.metrics.calibration import expected_calibration_error

rng = np.random.default_rng(0)
confidence = rng.uniform(0.5, 1.0, 2_500)
correct = (rng.random(2_500) < np.where(confidence < 0.75, confidence + 0.1, confidence - 0.15)).astype(int)
rising = np.argsort(confidence)


def by_formula(bins):
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(place, correct - confidence, bins)
    return np.abs(gaps).sum() / len(confidence)


def by_mapie(bins, strategy, order=slice(None)):
    return expected_calibration_error(correct[order], confidence[order], num_bins=bins, split_strategy=strategy)


print("mapie", version("mapie"))
for bins in (10, 15, 20):
    found = by_mapie(bins, "uniform")
    print(f"uniform, {bins} bins: {found:.4f}; formula {by_formula(bins):.4f}, with a bin less {by_formula(bins - 1):.4f}")
    assert abs(found - by_formula(bins - 1)) < 1e-12
assert abs(by_mapie(10, "uniform") - by_formula(10)) > 0.005
print("uniform, 1 bin:", by_mapie(1, "uniform"))
assert np.isnan(by_mapie(1, "uniform"))
shuffled, in_order = by_mapie(10, "array split"), by_mapie(10, "array split", rising)
print(f"array split, 10 bins: {shuffled:.4f}, sorted {in_order:.4f}; |accuracy - confidence| {by_formula(1):.4f}")
assert in_order > 4 * shuffled and abs(shuffled - by_formula(1)) < 1e-3
PY
