"""Pictures of detectors' runs: precision against recall, AP by class; what else a page shows is drawn by plots.py."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..detection.metrics import RECALLS, by_score, precision_at, recall_and_precision
from ..detection.outcomes import Found
from ..metrics import Metric
from . import plots

SMALL = (3.1, 2.5)  # inches of one of many pictures


def class_curves(found: Found, num_classes: int) -> np.ndarray:
    """Precision [K, 101] of each class at recall 0, .01, … 1 by VOC's rule at IoU .5; NaN for a class without objects."""
    detections, matches, truths = found.detections, found.matches, found.truths
    order = by_score(detections)
    order = order[~matches.ignored[order]]
    labels = detections.label[order]
    curves = np.full((num_classes, len(RECALLS)), np.nan)
    for k, count in enumerate(np.bincount(truths.label[~truths.difficult], minlength=num_classes)):
        if count:
            curves[k] = precision_at(*recall_and_precision(matches.correct[order[labels == k]], count), RECALLS)
    return curves


def ap_by_class(ap: dict[str, list[dict[str, float]]], most: int = 20) -> Figure:
    """AP of each class, mean over a backbone's runs; of many classes the `most` with the lowest mean over backbones."""
    table = pd.DataFrame({method: pd.DataFrame(each).mean() for method, each in ap.items()}).dropna()
    shown = table.loc[table.mean(axis=1).sort_values().index[:most]]
    which = "" if len(shown) == len(table) else f": the lowest {len(shown)} of {len(table)}"
    return plots.by_class(shown[::-1], f"AP by class{which}", "AP, %", legend=False)


def overview(
    history: pd.DataFrame,
    tables: dict[str, list[pd.DataFrame]],
    curves: dict[str, list[np.ndarray]],
    heading: str,
    metric: Metric,
) -> Figure:
    """One picture of a comparison: a metric over the epochs, precision against recall, reliability."""
    figure = Figure(figsize=(13.5, 4.6), layout="constrained")
    first, precision, reliable = figure.subplots(1, 3)
    plots.curves(history, metric.name, metric.header, axes=first, legend=False, higher_is_better=True)
    plots.precision_recall(curves, "Precision and recall, mean over classes", precision)
    plots.reliability(tables, reliable, legend=False)
    figure.patch.set_alpha(1)
    plots.legend_below(figure, (first, reliable))
    figure.suptitle(plots.plain(heading), x=0.01, ha="left", fontsize=12)
    return figure


def mean_over_classes(curves: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Of each run's `class_curves` the mean over the classes with objects, [101]."""
    return [np.nanmean(each, axis=0) for each in curves]
