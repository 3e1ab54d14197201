#!/usr/bin/env bash
# torchmetrics 1.9.0: MeanAveragePrecision's default IoU thresholds are float32 numbers, so a box that overlaps by exactly 0.6
# does not reach the threshold 0.6, as it does in COCO's own evaluation.
#
# Input: one picture, one object [0, 0, 10, 10], one detection [0, 0, 10, 6]: IoU 60 / 100. It is right at 0.5, 0.55 and 0.6 of
# COCO's ten thresholds, so the mean AP is 3 / 10. pycocotools (float64 thresholds) says so.
# Seen: torchmetrics 0.2 by default, 0.3 with the same ten thresholds given as float64 numbers.
# Guess before the run: 0.2 by default, 0.3 when they are given. It was right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torchmetrics==1.9.0" "torch==2.14.1" "torchvision==0.29.1" "pycocotools==2.0.11" "numpy==2.4.6"
"$folder/venv/bin/python" - <<'PY'
import contextlib
import io
from importlib.metadata import version

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchmetrics.detection import MeanAveragePrecision

found = {}
for name, thresholds in {"default": None, "float64": np.linspace(0.5, 0.95, 10).tolist()}.items():
    metric = MeanAveragePrecision(iou_thresholds=thresholds)
    one = {"boxes": torch.tensor([[0.0, 0.0, 10.0, 6.0]]), "scores": torch.tensor([0.9]), "labels": torch.tensor([1])}
    metric.update([one], [{"boxes": torch.tensor([[0.0, 0.0, 10.0, 10.0]]), "labels": torch.tensor([1])}])
    found[name] = round(metric.compute()["map"].item(), 6)

with contextlib.redirect_stdout(io.StringIO()):
    truth = COCO()
    object_ = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0}
    truth.dataset = {"info": {}, "images": [{"id": 1}], "categories": [{"id": 1}], "annotations": [object_]}
    truth.createIndex()
    detected = truth.loadRes([{"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 6], "score": 0.9}])
    evaluation = COCOeval(truth, detected, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
found["pycocotools"] = round(float(evaluation.stats[0]), 6)
print(f"torchmetrics {version('torchmetrics')}, pycocotools {version('pycocotools')}:", found)
assert found == {"default": 0.2, "float64": 0.3, "pycocotools": 0.3}
PY
