"""Whether two backbones' detectors differ by more than the chance of which photographs there were.

All is paired: photographs are drawn with replacement, with all their objects and detections, the same draws for every run, and
a photograph enters once with all seeds. Each draw has the figures that the same code gives on the photographs written out as
often as they were drawn; but a draw costs no sort and no matching.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from ..detection.metrics import COCO_IOUS, Matches, by_score, match_coco, pair_up
from ..detection.outcomes import Found
from ..metrics import ECE_BINS, Metric, bin_of
from .resampling import RESAMPLES
from .significance import interval_and_p

FIGURES = ("map", "map_11", "ap50", "ap75", "ap", "ece")
AT_ONCE = 4_000_000  # numbers of a chunk of draws: bounds memory
ELEVEN, HUNDRED_AND_ONE = np.arange(11) / 10, np.linspace(0.0, 1.0, 101)


class Curve(NamedTuple):
    """The precision–recall curve of a class at one overlap, as what each picture adds to it.

    `seen` [H, N]: detections of picture n since the hit before the h-th one, that included; `hits` [H]: the picture of
    each hit. Between two hits precision only falls, so that the curve's envelope is known at hits.
    """

    seen: csr_array
    hits: np.ndarray

    def at(self, counts: np.ndarray, num_objects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Recall and the envelope of precision [H, R] where picture n stands `counts` [N, R] times.

        `num_objects` [R] is how many there are to be found; recall is NaN where there is none.
        """
        hits = counts[self.hits].cumsum(axis=0)
        seen = (self.seen @ counts).cumsum(axis=0)
        with np.errstate(invalid="ignore"):
            recall = hits / num_objects
        precision = hits / np.maximum(seen, 1)
        return recall, np.maximum.accumulate(precision[::-1], axis=0)[::-1]


def curves(found: Found, matches: Matches, classes: np.ndarray) -> list[Curve]:
    """The curve of each of `classes`."""
    detections = found.detections
    order = by_score(detections)
    order = order[~matches.ignored[order]]
    each = []
    for k in classes:
        rows = order[detections.label[order] == k]
        picture, correct = detections.image[rows], matches.correct[rows]
        place = correct.cumsum() - correct  # hits before this detection: the number of the hit that ends its stretch
        num_hits = int(correct.sum())
        counted = place < num_hits  # what comes after the last hit changes nothing
        seen = np.ones(counted.sum()), (place[counted], picture[counted])
        each.append(Curve(csr_array(seen, shape=(num_hits, len(found.pictures))), picture[correct]))
    return each


def area(recall: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """AP [R] by VOC's rule since 2010, of recall and envelope [H, R]."""
    return (np.diff(recall, axis=0, prepend=0.0) * precision).sum(axis=0)


def at_points(recall: np.ndarray, precision: np.ndarray, points: np.ndarray) -> np.ndarray:
    """AP [R] as the mean of the envelope at rising `points` of recall, each of which the first hit that reaches it has."""
    reached = np.searchsorted(points, recall, side="right")
    return (np.diff(reached, axis=0, prepend=0) * precision).sum(axis=0) / len(points)


class Layout:
    """One run's detections, laid out for `figures`."""

    def __init__(self, found: Found):
        truths, num_pictures = found.truths, len(found.pictures)
        easy = ~truths.difficult
        classes, row = np.unique(truths.label[easy], return_inverse=True)
        self.objects = csr_array((np.ones(len(row)), (row, truths.image[easy])), shape=(len(classes), num_pictures))
        pairs = pair_up(found.detections, truths)
        self.voc = curves(found, found.matches, classes)
        self.coco = [curves(found, match_coco(found.detections, truths, pairs, iou), classes) for iou in COCO_IOUS]
        kept = ~found.matches.ignored
        confidence, picture = found.detections.value[kept], found.detections.image[kept]
        gap = found.matches.correct[kept] - confidence
        place = bin_of(confidence.astype(np.float32)), picture
        self.gaps = csr_array((gap, place), shape=(ECE_BINS, num_pictures))
        self.num_detections = np.bincount(picture, minlength=num_pictures).astype(np.float64)

    def figures(self, counts: np.ndarray) -> np.ndarray:
        """FIGURES [R, 6] in % where picture n stands `counts` [N, R] times."""
        num_objects = self.objects @ counts
        voc = _aps(self.voc, counts, num_objects, (area, _eleven))
        coco = [_aps(of_iou, counts, num_objects, (_coco,))[0] for of_iou in self.coco]
        ece = np.abs(self.gaps @ counts).sum(axis=0) / np.maximum(self.num_detections @ counts, 1)
        ap75 = coco[COCO_IOUS.index(0.75)]
        return 100 * np.stack([*voc, coco[0], ap75, np.mean(coco, axis=0), ece], axis=1)


def _eleven(recall, precision):
    return at_points(recall, precision, ELEVEN)


def _coco(recall, precision):
    return at_points(recall, precision, HUNDRED_AND_ONE)


def _aps(curves: list[Curve], counts: np.ndarray, num_objects: np.ndarray, rules) -> list[np.ndarray]:
    """AP [R] by each of `rules`, mean over the classes of which an object was drawn, NaN where there is none.

    `num_objects` [K, R] is how many there are of each class.
    """
    total = np.zeros((len(rules), counts.shape[1]))
    for curve, number in zip(curves, num_objects, strict=True):
        recall, precision = curve.at(counts, number)
        for i, rule in enumerate(rules):
            total[i] += np.where(number, rule(recall, precision), 0)
    with np.errstate(invalid="ignore"):
        return list(total / (num_objects > 0).sum(axis=0))


def resampled(runs: Sequence[Found], resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """FIGURES [len(runs), 1 + resamples, 6], first of the photographs as they are, then of draws with replacement."""
    layouts, num_pictures = [Layout(found) for found in runs], len(runs[0].pictures)
    generator = np.random.default_rng(seed)
    parts = [[layout.figures(np.ones((num_pictures, 1))) for layout in layouts]]
    most = max([num_pictures, *(len(curve.hits) for layout in layouts for curve in layout.voc)])
    chunk = max(1, AT_ONCE // most)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        counts = generator.multinomial(num_pictures, np.full(num_pictures, 1 / num_pictures), size=rows)
        parts.append([layout.figures(np.ascontiguousarray(counts.T, np.float64)) for layout in layouts])
    return np.concatenate([np.stack(part) for part in parts], axis=1)


def against(reference: str, runs: dict[str, list[Found]], metrics: Sequence[Metric]) -> pd.DataFrame:
    """Every other backbone of `runs` against `reference`, seed by seed: a row a metric, columns as significance.against."""
    names = [(method, found) for method, each in runs.items() for found in each]
    figures = resampled([found for _, found in names])
    mean = {m: figures[[i for i, (name, _) in enumerate(names) if name == m]].mean(axis=0) for m in runs}
    rows = []
    for method in [m for m in runs if m != reference]:
        for metric in [metric for metric in metrics if metric.name in FIGURES]:
            draws = (mean[method] - mean[reference])[:, FIGURES.index(metric.name)]
            draws = draws[np.isfinite(draws)]  # photographs without any object have no mAP
            better = (draws[0] > 0) == metric.higher_is_better
            rows.append((method, metric.name, draws[0], better, *interval_and_p(draws)))
    return pd.DataFrame(rows, columns=["method", "metric", "difference", "better", "low", "high", "p"])
