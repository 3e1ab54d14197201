"""Average precision against a plain implementation, object by object, and against COCO's own code."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pskd_timm.detection.data import Objects
from pskd_timm.detection.metrics import (
    COCO_IOUS,
    Table,
    area,
    eleven_points,
    hundred_and_one_points,
    match_coco,
    objects_table,
    pair_up,
    per_class,
    score,
)

CLASSES = 3


def random_case(seed: int, pictures: int = 8, difficult: float = 0.3):
    """Objects, and detections near them, elsewhere, doubled, and with equal scores."""
    generator = np.random.default_rng(seed)
    objects, rows = [], []
    for image in range(pictures):
        count = int(generator.integers(0, 6))
        corner = generator.integers(0, 60, (count, 2))
        boxes = np.concatenate([corner, corner + generator.integers(5, 40, (count, 2))], axis=1).astype(np.float32)
        labels = generator.integers(0, CLASSES, count)
        objects.append(Objects(boxes, labels, generator.random(count) < difficult))
        for _ in range(int(generator.integers(0, 12))):
            if count and generator.random() < 0.7:
                k = int(generator.integers(count))
                box, label = boxes[k] + generator.integers(-6, 7, 4), labels[k]
            else:
                left, top = generator.integers(0, 60, 2)
                box, label = np.array([left, top, left + 20, top + 20]), generator.integers(CLASSES)
            if box[2] > box[0] and box[3] > box[1]:
                rows.append((image, int(label), box, round(float(generator.random()), 1 if seed % 2 else 6)))
    rows.sort(key=lambda row: row[0])
    image, label, box, value = zip(*rows, strict=True) if rows else ((), (), (), ())
    table = Table(
        np.array(image, int), np.array(label, int), np.array(box, float).reshape(-1, 4), np.array(value, float)
    )
    return table, objects


def overlap(one, other):
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    return shared / sum([(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)] + [-shared])


def plain_voc(detections: Table, objects: list[Objects], label: int, eleven: bool, threshold=0.5):
    """AP as the devkit's VOCevaldet computes it: a loop over detections, 1-based positions and all."""
    total, seen = 0, set()
    for each in objects:
        total += sum(1 for k, hard in zip(each.labels, each.difficult, strict=True) if k == label and not hard)
    mine = [i for i in range(len(detections.value)) if detections.label[i] == label]
    mine.sort(key=lambda i: -detections.value[i])
    hits = misses = 0
    curve = []
    for i in mine:
        image = detections.image[i]
        found, best = None, -1.0
        for k, (box, of) in enumerate(zip(objects[image].boxes, objects[image].labels, strict=True)):
            if of == label and overlap(detections.box[i], box) > best:
                found, best = k, overlap(detections.box[i], box)
        if best >= threshold and objects[image].difficult[found]:
            continue
        if best >= threshold and (image, found) not in seen:
            seen.add((image, found))
            hits += 1
        else:
            misses += 1
        curve.append((hits / total if total else 0, hits / (hits + misses)))
    if not total:
        return None
    if eleven:
        return sum(max([p for r, p in curve if r >= t / 10] or [0.0]) for t in range(11)) / 11
    recalls = [0.0] + [r for r, _ in curve] + [1.0]
    precisions = [0.0] + [p for _, p in curve] + [0.0]
    for i in range(len(precisions) - 2, -1, -1):
        precisions[i] = max(precisions[i], precisions[i + 1])
    return sum((recalls[i] - recalls[i - 1]) * precisions[i] for i in range(1, len(recalls)))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6))
def test_both_of_vocs_rules_equal_a_plain_loop_over_detections_difficult_objects_among_them(seed):
    detections, objects = random_case(seed)
    truths = objects_table(objects)
    if not (~truths.difficult).any():
        return
    expected = {
        rule: [plain_voc(detections, objects, k, rule == "map_11") for k in range(CLASSES)]
        for rule in ("map", "map_11")
    }
    found = score(detections, truths, CLASSES)
    for rule, of_classes in expected.items():
        there = [value for value in of_classes if value is not None]
        assert found.figures[rule] == pytest.approx(100 * sum(there) / len(there), abs=1e-9)
    for value, ours in zip(expected["map"], found.per_class, strict=True):
        assert np.isnan(ours) if value is None else ours == pytest.approx(value, abs=1e-12)


def coco_scores(detections: Table, objects: list[Objects]):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    rows = [
        {"image_id": i + 1, "category_id": int(k) + 1, "bbox": [*box[:2], *(box[2:] - box[:2])], "iscrowd": 0}
        for i, each in enumerate(objects)
        for box, k in zip(each.boxes.astype(float), each.labels, strict=True)
    ]
    truth.dataset = {
        "images": [{"id": i + 1} for i in range(len(objects))],
        "categories": [{"id": k + 1} for k in range(CLASSES)],
        "annotations": [row | {"id": n + 1, "area": row["bbox"][2] * row["bbox"][3]} for n, row in enumerate(rows)],
        "info": {},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes(
            [
                {
                    "image_id": int(i) + 1,
                    "category_id": int(k) + 1,
                    "bbox": [*box[:2], *(box[2:] - box[:2])],
                    "score": float(v),
                }
                for i, k, box, v in zip(*detections, strict=True)
            ]
        )
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(("ap", "ap50", "ap75"), 100 * evaluation.stats[:3], strict=True))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_cocos_figures_equal_pycocotools_where_no_object_is_difficult(seed):
    detections, objects = random_case(seed, difficult=0.0)
    if not len(detections.value) or not sum(len(each.labels) for each in objects):
        return
    ours, cocos = score(detections, objects_table(objects), CLASSES).figures, coco_scores(detections, objects)
    assert {name: ours[name] for name in cocos} == pytest.approx(cocos, abs=1e-6)


def test_a_perfect_detector_scores_a_hundred_and_none_zero():
    _, objects = random_case(4)
    truths = objects_table(objects)
    perfect = Table(truths.image, truths.label, truths.box, np.ones(len(truths.label)))
    figures = score(perfect, truths, CLASSES).figures
    assert {name: figures[name] for name in ("map", "map_11", "ap50", "ap75", "ap")} == dict.fromkeys(
        ("map", "map_11", "ap50", "ap75", "ap"), 100.0
    )
    assert figures["ece"] == 0.0
    nothing = Table(*(values[:0] for values in perfect))
    assert score(nothing, truths, CLASSES).figures == dict.fromkeys(figures, 0.0)


def test_a_detection_of_a_difficult_object_is_neither_right_nor_wrong_and_its_object_is_not_missed():
    objects = [
        Objects(np.array([[0, 0, 10, 10], [20, 20, 40, 40]], np.float32), np.array([0, 0]), np.array([True, False]))
    ]
    detections = Table(
        np.zeros(3, int),
        np.zeros(3, int),
        np.array([[0, 0, 10, 10], [0, 0, 9, 10], [20, 20, 40, 40]], float),
        np.array([0.9, 0.8, 0.7]),
    )
    found = score(detections, objects_table(objects), 1)
    assert found.matches.ignored.tolist() == [True, True, False] and found.figures["map"] == 100.0
    assert found.figures["ece"] == pytest.approx(30.0)  # one detection that counts, right, said with 0.7


def test_vocs_second_detection_of_an_object_is_wrong_and_cocos_may_take_another_object():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 8]], np.float32)
    objects = [Objects(boxes, np.array([0, 0]), np.array([False, False]))]
    detections = Table(np.zeros(2, int), np.zeros(2, int), np.array([boxes[0], boxes[0]], float), np.array([0.9, 0.8]))
    truths = objects_table(objects)
    pairs = pair_up(detections, truths)
    assert score(detections, truths, 1).matches.correct.tolist() == [True, False]
    assert match_coco(detections, truths, pairs, 0.5).correct.tolist() == [True, True]


def test_a_recall_that_reaches_a_point_exactly_counts_there():
    recall, precision = np.arange(1, 11) / 10, np.ones(10)
    assert (
        eleven_points(recall, precision) == area(recall, precision) == hundred_and_one_points(recall, precision) == 1.0
    )
    assert eleven_points(recall[:3], precision[:3]) == 4 / 11  # 0, 0.1, 0.2 and 0.3


def test_a_class_without_an_object_that_counts_is_left_out_of_the_mean():
    objects = [Objects(np.array([[0, 0, 9, 9], [0, 0, 9, 9]], np.float32), np.array([0, 1]), np.array([False, True]))]
    detections = Table(np.zeros(1, int), np.zeros(1, int), np.array([[0, 0, 9, 9]], float), np.array([0.9]))
    found = score(detections, objects_table(objects), CLASSES)
    assert np.isnan(found.per_class[1:]).all() and found.figures["map"] == 100.0
    assert np.isnan(per_class(detections, objects_table(objects), found.matches, CLASSES, area)[1:]).all()


def test_cocos_thresholds_are_those_of_its_code():
    assert pytest.approx(np.linspace(0.5, 0.95, 10)) == COCO_IOUS
