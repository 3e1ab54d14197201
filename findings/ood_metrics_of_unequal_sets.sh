#!/usr/bin/env bash
# ood-metrics 1.1.2: where the known images outnumber the foreign ones, `detection_error` weighs the two kinds of mistake with each
# other's share, so that it is no share of misjudged images; `fpr_at_95_tpr` draws a line between two thresholds and gives a rate
# that no threshold reaches where scores are equal; labels of -1 and 1, which its docstrings name, give another `aupr_out`.
#
# Input: 10 000 scores of known images around 2 and 1 000 of foreign ones around 0, both of spread 1, as they are and rounded to half a
# unit; each figure beside the same from its definition, over every threshold that keeps 95 % of the known images.
# Seen: detection error 0.320 for 0.064 (rounded 0.363 for 0.065); FPR at 95 % TPR 0.348 for 0.347, rounded 0.366 for 0.395;
# aupr_out 0.655 with labels 0 and 1, 0.500 with -1 and 1, all other figures equal.
# Expected before reading its source: equal to the definitions but for ties, the same for both kinds of label.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "ood-metrics==1.1.2" "scikit-learn==1.5.2" "numpy==1.26.4"
"$folder/venv/bin/python" -W ignore - <<'PY'
from importlib.metadata import version

import numpy as np
from ood_metrics import calc_metrics

rng = np.random.default_rng(0)
known = np.repeat([1, 0], [10_000, 1_000])
scores = rng.normal(2.0 * known, 1.0)


def defined(scores):
    """Share of misjudged images, and false positive rate, at the best threshold that keeps 95 % of the known images."""
    found = []
    for threshold in np.unique(scores):
        kept = scores >= threshold
        if kept[known == 1].mean() >= 0.95:
            found.append(((kept != known).mean(), kept[known == 0].mean()))
    return min(error for error, _ in found), min(rate for _, rate in found)


print("ood-metrics", version("ood-metrics"))
seen = {}
for name, values in {"as they are": scores, "rounded": np.round(2 * scores) / 2}.items():
    theirs = calc_metrics(list(values), list(known))
    error, rate = defined(values)
    print(f"{name}: detection error {theirs['detection_error']:.4f}, defined {error:.4f}; "
          f"FPR at 95 % TPR {theirs['fpr_at_95_tpr']:.4f}, defined {rate:.4f}")
    seen[name] = theirs["detection_error"] / error, theirs["fpr_at_95_tpr"] - rate
signed = calc_metrics(list(scores), list(2 * known - 1))
usual = calc_metrics(list(scores), list(known))
print(f"aupr_out: labels 0 and 1 {usual['aupr_out']:.3f}, labels -1 and 1 {signed['aupr_out']:.3f}")
same = [key for key in usual if abs(usual[key] - signed[key]) < 1e-9]
assert sorted(same) == ["aupr_in", "auroc", "detection_error", "fpr_at_95_tpr"] and abs(signed["aupr_out"] - 0.5) < 1e-3
assert seen["as they are"][0] > 4 and seen["rounded"][0] > 4
assert abs(seen["as they are"][1]) < 2e-3 and seen["rounded"][1] < -0.02
PY
