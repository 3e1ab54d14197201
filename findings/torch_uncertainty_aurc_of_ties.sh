#!/usr/bin/env bash
# torch-uncertainty 0.13.0: AURC depends on the order in which samples of equal confidence arrive.
#
# Confidences in float16 or bfloat16, and those of small test sets, are full of ties; a shuffled loader then gives another AURC of
# the same network. Input: 200 predictions of two classes, confidences in steps of 0.05, three orders of the same samples.
# Seen: 0.1226 as drawn, 0.1333 with the right ones first, 0.1199 with the wrong ones first: 11 % apart.
# Guess before the run: more than 1 % apart. It was right; that the right ones first would give the lower figure was wrong: the
# sort reverses ties. Surprise on the way: a plain install does not bring lightning, rich
# and torchvision, without which `import torch_uncertainty.metrics` fails.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch_uncertainty==0.13.0" "lightning==2.6.6" "rich==15.0.0" "torchvision==0.29.1" "torch==2.14.1" "torchmetrics==1.9.0"
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
from importlib.metadata import version

import torch
from torch_uncertainty.metrics.classification import AURC

generator = torch.Generator().manual_seed(0)
confidence = torch.randint(10, 20, (200,), generator=generator) / 20
wrong = (torch.rand(200, generator=generator) >= confidence).long()
probabilities = torch.stack([confidence, 1 - confidence], 1)  # class 0 is predicted; the label is 1 where that is wrong
orders = {"drawn": torch.arange(200), "right first": wrong.argsort(stable=True), "wrong first": (1 - wrong).argsort(stable=True)}
found = {}
for name, order in orders.items():
    metric = AURC()
    metric.update(probabilities[order], wrong[order])
    found[name] = round(metric.compute().item(), 4)
print(f"torch-uncertainty {version('torch_uncertainty')}:", found)
assert found == {"drawn": 0.1226, "right first": 0.1333, "wrong first": 0.1199}
PY
