#!/usr/bin/env bash
# pytorch-ood 0.4.0: the AUTC of `OODMetrics`, which is to say how well confidences can be told apart by thresholds, goes by the smallest
# and the largest score: one sample far out among 2 500 moves it by a quarter, and so does any change of scale that keeps the order.
# Its `FPR95TPR` counts known samples where 95 % of the foreign ones are found, as its documentation says; OpenOOD and ood-metrics
# count foreign samples where 95 % of the known ones are kept, under the same name, and for the same scores get another figure.
#
# Input: scores of 2 000 known samples around 2 and 500 foreign ones around 0, both of spread 1; once more with one known sample at
# 30; once more the exponential of all scores.
# Seen: AUTC 0.370, with the outlier 0.469, of the exponentials 0.468; AUROC, AUPR and FPR95TPR the same each time to 0.001.
# FPR95TPR 0.388, the other way round 0.328.
# Expected before: AUTC within 0.02 with one outlier and within 0.05 of the exponentials; the same FPR but for ties.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "pytorch-ood==0.4.0" "torch==2.14.1" "torchvision==0.29.1" "numpy==2.4.6"
"$folder/venv/bin/python" -W ignore - <<'PY'
from importlib.metadata import version

import numpy as np
import torch
from pytorch_ood.metrics import OODMetrics

rng = np.random.default_rng(0)
known = np.repeat([True, False], [2_000, 500])
scores = rng.normal(2.0 * known, 1.0)


def figures(scores, known):
    metrics = OODMetrics()  # larger scores for foreign samples, whose labels are below 0
    metrics.update(torch.tensor(-scores), torch.tensor(np.where(known, 0, -1)))
    return metrics.compute()


print("pytorch-ood", version("pytorch-ood"))
usual = figures(scores, known)
outlier = figures(np.append(scores, 30.0), np.append(known, True))
exponential = figures(np.exp(scores), known)
for name, found in {"as they are": usual, "with an outlier": outlier, "exponentials": exponential}.items():
    print(f"{name}:", "  ".join(f"{key} {value:.3f}" for key, value in found.items()))
for key in ("AUROC", "AUPR-IN", "AUPR-OUT", "FPR95TPR"):
    assert abs(outlier[key] - usual[key]) < 1e-3 and abs(exponential[key] - usual[key]) < 1e-3
assert outlier["AUTC"] > 1.2 * usual["AUTC"] and exponential["AUTC"] > 1.2 * usual["AUTC"]
kept = [scores >= threshold for threshold in np.unique(scores)]
other_way = min(keep[~known].mean() for keep in kept if keep[known].mean() >= 0.95)
print(f"foreign samples among those kept where 95 % of the known ones are: {other_way:.3f}")
assert usual["FPR95TPR"] - other_way > 0.05
PY
