#!/usr/bin/env bash
# torchdistill 1.1.5: `KDLoss` is α·cross-entropy + (1 − α)·τ²·KL, as its documentation says, for every α but 0. There it returns the
# KL alone, without τ²: a search over α that has 0 among its values, or a run that distils only, trains at that point with gradients
# τ² times smaller, sixteen times at τ = 4 and four hundred at τ = 20.
#
# Input: random logits of eight samples and ten classes for both networks, τ = 4. Seen: 0.9033 at α = 1e-6, 0.0565 at α = 0.
# Expected before (having read the source): the ratio τ² = 16.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.14.1" "torchvision==0.29.1" "torchdistill==1.1.5"
"$folder/venv/bin/python" -W ignore - <<'PY'
from importlib.metadata import version

import torch
from torchdistill.losses.mid_level import KDLoss

torch.manual_seed(0)
student, teacher, labels = torch.randn(8, 10), torch.randn(8, 10), torch.randint(10, (8,))


def loss(alpha, tau):
    module = KDLoss("fc", "output", "fc", "output", temperature=tau, alpha=alpha)
    return module({"fc": {"output": student}}, {"fc": {"output": teacher}}, labels).item()


print("torchdistill", version("torchdistill"))
for tau in (4.0, 20.0):
    near, at = loss(1e-6, tau), loss(0.0, tau)
    print(f"temperature {tau:g}: {near:.4f} at alpha 1e-6, {at:.4f} at 0, ratio {near / at:.1f}")
    assert abs(near / at / tau**2 - 1) < 0.01
PY
