"""Average precision by VOC's two rules and by COCO's, and the calibration of detections.

All detections are one flat table, matched at once for all pictures and classes; nothing here loops over detections or needs
torch.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..metrics import Metric, ece

if TYPE_CHECKING:
    from .data import Objects

METRICS = (
    Metric("map", "mAP", "%", higher_is_better=True),
    Metric("map_11", "mAP 11 points", "%", higher_is_better=True, in_brief=False),
    Metric("ap50", "AP50", "%", higher_is_better=True, in_brief=False),
    Metric("ap75", "AP75", "%", higher_is_better=True),
    Metric("ap", "AP .50:.95", "%", higher_is_better=True),
    Metric("ece", "ECE", "%"),
)
IOU = 0.5  # VOC's
RECALLS = np.linspace(0.0, 1.0, 101)  # COCO's
COCO_IOUS = tuple(k / 100 for k in range(50, 100, 5))


class Table(NamedTuple):
    """Boxes of many pictures and classes: `image` [N], `label` [N] (from 0) and `box` [N, 4]; `value` [N] is a detection's
    score, or 1.0 for a difficult object."""

    image: np.ndarray
    label: np.ndarray
    box: np.ndarray
    value: np.ndarray

    @property
    def difficult(self) -> np.ndarray:
        """Of a table of objects: which are difficult."""
        return self.value > 0


class Matches(NamedTuple):
    """What each detection [N] turned out to be at one overlap; one that is ignored is neither right nor wrong."""

    correct: np.ndarray
    ignored: np.ndarray


class Pairs(NamedTuple):
    """Detections and objects of the same picture and class: their numbers and overlap, each [P], by detection."""

    detection: np.ndarray
    truth: np.ndarray
    iou: np.ndarray


def objects_table(objects: "list[Objects]") -> Table:
    """The objects of pictures 0 … N − 1 as a table."""
    image = np.repeat(np.arange(len(objects)), [len(each.labels) for each in objects])
    columns = [np.concatenate([getattr(each, name) for each in objects]) for name in ("labels", "boxes", "difficult")]
    return Table(image, columns[0], columns[1].astype(np.float64), columns[2].astype(np.float64))


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [P, 4] and others [P, 4], row by row."""
    corner = np.minimum(boxes[:, 2:], others[:, 2:]) - np.maximum(boxes[:, :2], others[:, :2])
    shared = corner.clip(min=0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (others[:, 2:] - others[:, :2]).prod(axis=1)
    return shared / np.maximum(areas - shared, np.finfo(np.float64).tiny)


def pair_up(detections: Table, truths: Table) -> Pairs:
    """Every detection with every object of its picture and class."""
    classes = 1 + max(detections.label.max(initial=0), truths.label.max(initial=0))
    place = truths.image * classes + truths.label
    order = np.argsort(place, kind="stable")
    wanted = detections.image * classes + detections.label
    first = np.searchsorted(place[order], wanted, side="left")
    count = np.searchsorted(place[order], wanted, side="right") - first
    detection = np.repeat(np.arange(len(wanted)), count)
    within = np.arange(len(detection)) - np.repeat(count.cumsum() - count, count)
    truth = order[np.repeat(first, count) + within]
    return Pairs(detection, truth, overlaps(detections.box[detection], truths.box[truth]))


def by_score(detections: Table) -> np.ndarray:
    """The order of the detections, the most confident first; equals stay as they stand."""
    return np.argsort(-detections.value, kind="stable")


def best_overlap(detections: Table, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Of each detection: the largest overlap with an object (0 where there is none) and that object's number (or −1)."""
    order = np.lexsort((pairs.truth, -pairs.iou, pairs.detection))
    detection, at = np.unique(pairs.detection[order], return_index=True)
    iou, truth = np.zeros(len(detections.value)), np.full(len(detections.value), -1)
    iou[detection], truth[detection] = pairs.iou[order][at], pairs.truth[order][at]
    return iou, truth


def match_voc(detections: Table, truths: Table, pairs: Pairs, threshold: float = IOU) -> Matches:
    """VOC's rule: a detection belongs to the object it overlaps most, if by `threshold` at least.

    The most confident one of an object is right and every further one wrong; one that belongs to a difficult object is
    ignored (VOC's devkit, VOCevaldet).
    """
    iou, truth = best_overlap(detections, pairs)
    hit = iou >= threshold
    ignored = np.zeros(len(hit), bool)
    ignored[hit] = truths.difficult[truth[hit]]
    order = by_score(detections)
    claims = order[(hit & ~ignored)[order]]
    _, first = np.unique(truth[claims], return_index=True)
    correct = np.zeros(len(hit), bool)
    correct[claims[first]] = True
    return Matches(correct, ignored)


def match_coco(detections: Table, truths: Table, pairs: Pairs, threshold: float) -> Matches:
    """COCO's rule: the most confident detection first, each takes the object it overlaps most among those not taken yet.

    An object that is not difficult goes before a difficult one; detections of these are ignored, as VOC does: COCO has none.
    """
    close = pairs.iou >= min(threshold, 1 - 1e-10)
    detection, truth, iou = (values[close] for values in pairs)
    hard = truths.difficult[truth]
    taken = np.zeros(len(truths.value), bool)
    correct, ignored = np.zeros(len(detections.value), bool), np.zeros(len(detections.value), bool)
    for turn in _turns(detections, detection):
        free = turn[~taken[truth[turn]] | hard[turn]]
        # Of equal overlaps COCO's code takes the last object.
        best = free[np.lexsort((-truth[free], -iou[free], hard[free], detection[free]))]
        _, first = np.unique(detection[best], return_index=True)
        chosen = best[first]
        ignored[detection[chosen]] = hard[chosen]
        correct[detection[chosen]] = ~hard[chosen]
        taken[truth[chosen[~hard[chosen]]]] = True
    return Matches(correct, ignored)


def _turns(detections: Table, detection: np.ndarray) -> list[np.ndarray]:
    """Pairs by turn: in the n-th are those of the n-th most confident detection of each picture and class."""
    rank = np.empty(len(detections.value), np.int64)
    rank[by_score(detections)] = np.arange(len(rank))
    alive = np.unique(detection)
    place = detections.image[alive] * (1 + detections.label.max(initial=0)) + detections.label[alive]
    order = np.lexsort((rank[alive], place))
    place = place[order]
    start = np.flatnonzero(np.r_[True, place[1:] != place[:-1]]) if len(place) else np.zeros(0, np.int64)
    turn_of = np.zeros(len(rank), np.int64)
    turn_of[alive[order]] = np.arange(len(place)) - np.repeat(start, np.diff(np.r_[start, len(place)]))
    turn = turn_of[detection]
    by_turn = np.argsort(turn, kind="stable")
    return np.split(by_turn, np.flatnonzero(np.diff(turn[by_turn])) + 1) if len(turn) else []


def recall_and_precision(correct: np.ndarray, num_objects: int) -> tuple[np.ndarray, np.ndarray]:
    """Hits so far over `num_objects`, and over detections so far, of `correct` [n] by falling score, none ignored."""
    hits = correct.cumsum()
    return hits / num_objects, hits / np.arange(1, len(hits) + 1)


def envelope(precision: np.ndarray) -> np.ndarray:
    """The best precision at this or any higher recall."""
    return np.maximum.accumulate(precision[::-1])[::-1]


def area(recall: np.ndarray, precision: np.ndarray) -> float:
    """VOC's rule since 2010: the area under the envelope of the precision–recall curve."""
    return float((np.diff(recall, prepend=0.0) * envelope(precision)).sum())


def eleven_points(recall: np.ndarray, precision: np.ndarray) -> float:
    """VOC's rule of 2007: mean of the envelope at recall 0, 0.1, …, 1."""
    return float(precision_at(recall, precision, np.arange(11) / 10).mean())


def hundred_and_one_points(recall: np.ndarray, precision: np.ndarray) -> float:
    """COCO's rule: mean of the envelope at recall 0, 0.01, …, 1."""
    return float(precision_at(recall, precision, RECALLS).mean())


def precision_at(recall: np.ndarray, precision: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The envelope at `points` of recall; 0 beyond what is reached."""
    reached = np.searchsorted(recall, points, side="left")
    return np.append(envelope(precision), 0.0)[reached]


def per_class(detections: Table, truths: Table, matches: Matches, num_classes: int, rule) -> np.ndarray:
    """AP [K] in [0, 1] of each class by `rule` (area, eleven_points, …); NaN for a class without objects."""
    found = np.full(num_classes, np.nan)
    order = by_score(detections)
    order = order[~matches.ignored[order]]
    labels = detections.label[order]
    for k, count in enumerate(np.bincount(truths.label[~truths.difficult], minlength=num_classes)):
        if count:
            correct = matches.correct[order[labels == k]]
            found[k] = rule(*recall_and_precision(correct, count)) if len(correct) else 0.0
    return found


class Scores(NamedTuple):
    """Figures of METRICS by name, AP [K] of each class by VOC's area, and what VOC's rule made of each detection."""

    figures: dict[str, float]
    per_class: np.ndarray
    matches: Matches
    iou: np.ndarray  # [N] largest overlap with an object of the class


def score(detections: Table, truths: Table, num_classes: int) -> Scores:
    """Every figure of `detections` against the objects `truths`, in %.

    A mean is over the classes with objects that are not difficult. ECE is that of scores against being right by VOC's rule.
    """
    pairs = pair_up(detections, truths)
    voc = match_voc(detections, truths, pairs)
    by_area = per_class(detections, truths, voc, num_classes, area)
    coco = [
        per_class(detections, truths, match_coco(detections, truths, pairs, iou), num_classes, hundred_and_one_points)
        for iou in COCO_IOUS
    ]
    figures = {
        "map": np.nanmean(by_area),
        "map_11": np.nanmean(per_class(detections, truths, voc, num_classes, eleven_points)),
        "ap50": np.nanmean(coco[0]),
        "ap75": np.nanmean(coco[COCO_IOUS.index(0.75)]),
        "ap": np.nanmean(coco),
        "ece": calibration_error(detections.value[~voc.ignored], voc.correct[~voc.ignored]),
    }
    in_percent = {name: 100.0 * float(value) for name, value in figures.items()}
    return Scores(in_percent, by_area, voc, best_overlap(detections, pairs)[0])


def calibration_error(scores: np.ndarray, correct: np.ndarray) -> float:
    """ECE in [0, 1] of detections; 0 where there is none, for none claims too much."""
    return ece(scores, correct) if len(scores) else 0.0
