#!/usr/bin/env bash
# mean-average-precision 2024.1.5.0: its "COCO mAP" (the README's settings) is not pycocotools': a class without any object in the
# ground truth counts as an average precision of 0, and boxes are a pixel wider and higher than their corners say.
#
# Input: three pictures, two boxes in each, three classes of which the third has no object. First the detections are the boxes
# themselves; then each one is moved so far that its IoU is 0.48, and counts as a hit at 0.5 if a pixel is added.
# Seen: boxes themselves: pycocotools AP50 1.0, mean-average-precision 0.667. Moved: pycocotools 0.0, mean-average-precision 0.667.
# Guess before the run: equal within 0.005. It was wrong in both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mean-average-precision==2024.1.5.0" "pycocotools==2.0.11" "numpy==2.4.6" pandas
"$folder/venv/bin/python" - <<'PY'
import contextlib
import io
from importlib.metadata import version

import numpy as np
from mean_average_precision import MetricBuilder
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

CLASSES, PICTURES = 3, 3
BOXES = [((10.0, 10.0, 20.0, 20.0), 0), ((50.0, 50.0, 60.0, 60.0), 1)]  # corners, class


def iou(moved):
    shared = (10.0 - moved) * 10.0
    return shared / (200.0 - shared)


def of_coco(moved):
    boxes = [(picture, box, kind) for picture in range(PICTURES) for box, kind in BOXES]
    objects = [
        dict(id=i + 1, image_id=picture, category_id=kind, bbox=[x, y, X - x, Y - y], area=100.0, iscrowd=0)
        for i, (picture, (x, y, X, Y), kind) in enumerate(boxes)
    ]
    found = [
        dict(image_id=picture, category_id=kind, bbox=[x + moved, y, X - x, Y - y], score=0.9)
        for picture, (x, y, X, Y), kind in boxes
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        pictures = [dict(id=picture, width=100, height=100) for picture in range(PICTURES)]
        truth.dataset = dict(images=pictures, annotations=objects, categories=[dict(id=i) for i in range(CLASSES)], info={})
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[1])


def of_package(moved):
    metric = MetricBuilder.build_evaluation_metric("map_2d", async_mode=False, num_classes=CLASSES)
    for _ in range(PICTURES):
        truth = np.array([[*box, kind, 0, 0] for box, kind in BOXES])
        found = np.array([[box[0] + moved, box[1], box[2] + moved, box[3], kind, 0.9] for box, kind in BOXES])
        metric.add(found, truth)
    recalls = np.arange(0.0, 1.01, 0.01)
    return float(metric.value(iou_thresholds=0.5, recall_thresholds=recalls, mpolicy="soft")["mAP"])


moved = 3.5
assert 0.47 < iou(moved) < 0.49
found = {"the boxes": (of_coco(0.0), of_package(0.0)), f"IoU {iou(moved):.2f}": (of_coco(moved), of_package(moved))}
print(f"AP50 of pycocotools {version('pycocotools')} and mean-average-precision {version('mean-average-precision')}:")
print({name: tuple(round(value, 3) for value in values) for name, values in found.items()})
(same, lower), (missed, hit) = found.values()
assert abs(same - 1.0) < 1e-9 and abs(lower - 2 / 3) < 0.01
assert missed == 0.0 and abs(hit - 2 / 3) < 0.01
PY
