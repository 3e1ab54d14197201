#!/usr/bin/env bash
# globox 2.9.0: `COCOEvaluator` has COCO's AP, but another AP by size than pycocotools where objects of different sizes touch. For small
# objects, a detection of a larger one is to be left out; where it also touches a small object, however little, it is counted as a
# mistake. Among equal confidences the two take another order, so that all figures differ a little.
#
# Input: one class; an object of 36×36 pixels, medium, one of 30×30 that overlaps it by a few pixels, small; a detection of each, that
# of the medium object 31×33 and the more confident one. Then 30 pictures with random boxes whose confidences have one digit.
# Seen: AP of small objects 0.80 with pycocotools, 0.50 with globox; all other figures equal. With equal confidences AP 0.3559 and
# 0.3565, AP75 0.2362 and 0.2348.
# Expected before: equal to six digits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "globox==2.9.0" "pycocotools==2.0.11" "numpy==2.4.6"
"$folder/venv/bin/python" -W ignore - <<'PY'
import contextlib
import io
from importlib.metadata import version

import numpy as np
from globox import Annotation, AnnotationSet, BoundingBox, COCOEvaluator
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

# A box: picture, class, left, top, width, height and, of a detection, confidence.


def of_pycocotools(objects, detections, pictures, classes):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i, "width": 640, "height": 640} for i in range(1, pictures + 1)],
            "categories": [{"id": k} for k in range(1, classes + 1)],
            "annotations": [
                {"id": n, "image_id": i + 1, "category_id": k + 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
                for n, (i, k, *box) in enumerate(objects, start=1)
            ],
        }
        truth.createIndex()
        found = [{"image_id": i + 1, "category_id": k + 1, "bbox": box, "score": s} for i, k, *box, s in detections]
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(("AP", "AP50", "AP75", "small", "medium"), map(float, evaluation.stats), strict=False))


def of_globox(objects, detections, pictures):
    def boxes(rows, i):
        return [
            BoundingBox(label=str(k), xmin=x, ymin=y, xmax=x + w, ymax=y + h, confidence=s[0] if s else None)
            for picture, k, x, y, w, h, *s in rows
            if picture == i
        ]

    sets = [
        AnnotationSet([Annotation(str(i), (640, 640), boxes(rows, i)) for i in range(pictures)])
        for rows in (objects, detections)
    ]
    evaluator = COCOEvaluator(ground_truths=sets[0], predictions=sets[1])
    names = ("ap", "ap_50", "ap_75", "ap_small", "ap_medium")
    figures = [float(getattr(evaluator, name)()) for name in names]
    return dict(zip(("AP", "AP50", "AP75", "small", "medium"), figures, strict=True))


def told(name, one, other):
    print(f"{name}:", "  ".join(f"{key} {one[key]:.4f} {other[key]:.4f}" for key in one), "(pycocotools, globox)")
    return {key: abs(one[key] - other[key]) for key in one}


print("globox", version("globox"), "pycocotools", version("pycocotools"))
objects = [(0, 0, 100.0, 100.0, 36.0, 36.0), (0, 0, 128.0, 100.0, 30.0, 30.0)]
detections = [(0, 0, 100.0, 100.0, 31.0, 33.0, 0.9), (0, 0, 128.0, 100.0, 30.0, 30.0, 0.8)]
apart = told("two objects that touch", of_pycocotools(objects, detections, 1, 1), of_globox(objects, detections, 1))
assert apart.pop("small") > 0.25 and max(apart.values()) < 1e-6

rng = np.random.default_rng(0)
objects, detections = [], []
for i in range(30):
    for _ in range(5):
        x, y, w, h = (*rng.uniform(0, 400, 2), *rng.uniform(10, 200, 2))
        k, moved = int(rng.integers(3)), rng.normal(0, 0.08, 4)
        objects.append((i, k, x, y, w, h))
        box = (x + moved[0] * w, y + moved[1] * h, w * np.exp(moved[2]), h * np.exp(moved[3]))
        detections.append((i, k, *map(float, box), float(rng.uniform(0.3, 1))))
        detections.append((i, k, *rng.uniform(0, 400, 2), *rng.uniform(10, 200, 2), float(rng.uniform(0, 0.8))))
apart = told("no equal confidences", of_pycocotools(objects, detections, 30, 3), of_globox(objects, detections, 30))
assert apart["AP"] < 1e-6
rounded = [(*row[:-1], round(row[-1], 1)) for row in detections]
apart = told("equal confidences", of_pycocotools(objects, rounded, 30, 3), of_globox(objects, rounded, 30))
assert apart["AP"] > 3e-4 and apart["AP75"] > 1e-3
PY
