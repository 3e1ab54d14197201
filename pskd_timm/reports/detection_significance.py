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
from .significance import RESAMPLES, interval_and_p

FIGURES = ("map", "map_11", "ap50", "ap75", "ap", "ece")
AT_ONCE = 4_000_000  # numbers of a chunk of draws: bounds memory
ELEVEN, HUNDRED_AND_ONE = np.arange(11) / 10, np.linspace(0.0, 1.0, 101)


class Curve(NamedTuple):
    """The precision–recall curve of a class at one overlap, as what each picture adds to it.

    `seen` [N, H]: detections of picture n since the hit before the h-th one, that included; `hits` [H]: the picture of
    each hit; `objects` [N]. Between two hits precision only falls, so that the curve's envelope is known at hits.
    """

    seen: csr_array
    hits: np.ndarray
    objects: np.ndarray

    def at(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Recall and the envelope of precision [R, H] where picture n stands `counts` [R, N] times.

        Recall is NaN where there is no object.
        """
        hits = counts[:, self.hits].cumsum(axis=1)
        seen = (counts @ self.seen).cumsum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            recall = hits / (counts @ self.objects)[:, None]
        precision = hits / np.maximum(seen, 1)
        return recall, np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]


def curves(found: Found, matches: Matches, num_classes: int) -> list[Curve | None]:
    """The curve of each class; None for one without objects that are not difficult."""
    detections, truths, num_pictures = found.detections, found.truths, len(found.pictures)
    order = by_score(detections)
    order = order[~matches.ignored[order]]
    easy = ~truths.difficult
    each = []
    for k in range(num_classes):
        objects = np.bincount(truths.image[easy & (truths.label == k)], minlength=num_pictures)
        rows = order[detections.label[order] == k]
        picture, correct = detections.image[rows], matches.correct[rows]
        place = correct.cumsum() - correct  # hits before this detection: the number of the hit that ends its stretch
        num_hits = int(correct.sum())
        counted = place < num_hits  # what comes after the last hit changes nothing
        shape = (num_pictures, num_hits)
        seen = csr_array((np.ones(counted.sum()), (picture[counted], place[counted])), shape=shape)
        each.append(Curve(seen, picture[correct], objects.astype(np.float64)) if objects.any() else None)
    return each


def area(recall: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """AP [R] by VOC's rule since 2010, of recall and envelope [R, H]."""
    return (np.diff(recall, axis=1, prepend=0.0) * precision).sum(axis=1)


def at_points(recall: np.ndarray, precision: np.ndarray, points: np.ndarray) -> np.ndarray:
    """AP [R] as the mean of the envelope at rising `points` of recall, each of which the first hit that reaches it has."""
    reached = np.searchsorted(points, recall, side="right")
    return (np.diff(reached, axis=1, prepend=0) * precision).sum(axis=1) / len(points)


class Layout:
    """One run's detections, laid out for `figures`."""

    def __init__(self, found: Found, num_classes: int):
        pairs = pair_up(found.detections, found.truths)
        self.voc = curves(found, found.matches, num_classes)
        self.coco = [
            curves(found, match_coco(found.detections, found.truths, pairs, iou), num_classes) for iou in COCO_IOUS
        ]
        kept = ~found.matches.ignored
        confidence = found.detections.value[kept]
        gap = found.matches.correct[kept] - confidence
        shape = (len(found.pictures), ECE_BINS)
        place = found.detections.image[kept], bin_of(confidence.astype(np.float32))
        self.gaps = csr_array((gap, place), shape=shape)
        self.num_detections = np.bincount(place[0], minlength=shape[0]).astype(np.float64)

    def figures(self, counts: np.ndarray) -> np.ndarray:
        """FIGURES [R, 6] in % where picture n stands `counts` [R, N] times."""
        voc = [_aps(curve, counts, (area, _eleven)) for curve in self.voc if curve]
        coco = [
            np.nanmean([_aps(curve, counts, (_coco,))[0] for curve in of_iou if curve], axis=0) for of_iou in self.coco
        ]
        by_area, by_points = np.nanmean(voc, axis=0)
        ece = np.abs(counts @ self.gaps).sum(axis=1) / np.maximum(counts @ self.num_detections, 1)
        ap75 = coco[COCO_IOUS.index(0.75)]
        return 100 * np.stack([by_area, by_points, coco[0], ap75, np.mean(coco, axis=0), ece], axis=1)


def _eleven(recall, precision):
    return at_points(recall, precision, ELEVEN)


def _coco(recall, precision):
    return at_points(recall, precision, HUNDRED_AND_ONE)


def _aps(curve: Curve, counts: np.ndarray, rules) -> list[np.ndarray]:
    """AP [R] by each of `rules`; NaN where no object of the class was drawn."""
    none = counts @ curve.objects == 0
    recall, precision = curve.at(counts)
    return [np.where(none, np.nan, rule(recall, precision)) for rule in rules]


def resampled(runs: Sequence[Found], num_classes: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """FIGURES [len(runs), 1 + resamples, 6], first of the photographs as they are, then of draws with replacement."""
    layouts, num_pictures = [Layout(found, num_classes) for found in runs], len(runs[0].pictures)
    generator = np.random.default_rng(seed)
    parts = [[layout.figures(np.ones((1, num_pictures))) for layout in layouts]]
    most = max([num_pictures, *(len(curve.hits) for layout in layouts for curve in layout.voc if curve)])
    chunk = max(1, AT_ONCE // most)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        counts = generator.multinomial(num_pictures, np.full(num_pictures, 1 / num_pictures), size=rows)
        parts.append([layout.figures(counts.astype(np.float64)) for layout in layouts])
    return np.concatenate([np.stack(part) for part in parts], axis=1)


def against(reference: str, runs: dict[str, list[Found]], metrics: Sequence[Metric], num_classes: int) -> pd.DataFrame:
    """Every other backbone of `runs` against `reference`, seed by seed: a row a metric, columns as significance.against."""
    names = [(method, found) for method, each in runs.items() for found in each]
    figures = resampled([found for _, found in names], num_classes)
    mean = {m: figures[[i for i, (name, _) in enumerate(names) if name == m]].mean(axis=0) for m in runs}
    rows = []
    for method in [m for m in runs if m != reference]:
        for metric in [metric for metric in metrics if metric.name in FIGURES]:
            draws = (mean[method] - mean[reference])[:, FIGURES.index(metric.name)]
            better = (draws[0] > 0) == metric.higher_is_better
            rows.append((method, metric.name, draws[0], better, *interval_and_p(draws)))
    return pd.DataFrame(rows, columns=["method", "metric", "difference", "better", "low", "high", "p"])
