"""The page of detectors' runs: what detection.html, which extends page.html, shows, made ready."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pyarrow import ArrowException

from ..errors import first_line
from ..metrics import Metric
from . import detection_significance, plots
from .detection_plots import SMALL, ap_by_class, class_curves, mean_over_classes
from .detection_plots import overview as draw_overview
from .detection_runs import BACKBONE, DetectorRun
from .mistakes import SHOWN, data_uri
from .page import environment, fields_of_runs, verdicts
from .plots import title
from .runs import by_method
from .svg import svg, swatch
from .tables import has_floors
from .versus import Versus

if TYPE_CHECKING:
    from .build import Comparison

MISTAKES = "mistakes.parquet"
CLOSE, NEAR = 0.5, 0.1  # overlaps: of a right detection, and of one that has something to do with an object


def overview(finished: dict[str, list[DetectorRun]], comparison: "Comparison") -> Figure | None:
    """The picture beside the tables; None where no run has kept its detections."""
    kept = with_detections(finished)
    if not kept:
        return None
    curves = {method: mean_over_classes(each) for method, each in curves_of(kept).items()}
    return draw_overview(comparison.history_frame, outcomes_of(kept), curves, comparison.heading, comparison.metrics[0])


def render(found: list[DetectorRun], comparison: "Comparison", tests: list[Versus]) -> str:
    """The page of all runs `found`, their `comparison` and `tests`."""
    finished, metrics = by_method(found), comparison.metrics
    kept = with_detections(finished)
    swatches = {
        method: swatch(look) for method, look in plots.looks(dict.fromkeys(run.method for run in found)).items()
    }
    fields = fields_of_runs(found, comparison, tests, swatches, BACKBONE) | {
        "num_rows": len(comparison.rows),
        "has_floors": has_floors(comparison.rows, metrics),
        "scaled_baseline": False,
        "further": [],
        "further_tables": [],
        "other_parts": [],
        "further_tests": [],
        "outside": {},
        "by_setting": None,
        "verdicts": verdicts(tests, metrics),
        "notes": comparison.notes,
        "paper": [],
        "reference": title(tests[0].baseline) if tests else "",
        "untested": [title(m) for m in list(finished)[1:] if m not in {m for *_, found in tests for m in found.method}],
        "unkept": sum(run.found is None for runs in finished.values() for run in runs),
        "plots": drawings(finished, kept, comparison) if kept else {},
        "mistakes": mistakes(kept),
        "searches": [],
        "losses": [],
    }
    return environment().get_template("detection.html").render(fields)


def with_detections(finished: dict[str, list[DetectorRun]]) -> dict[str, list[DetectorRun]]:
    """The runs that have kept what they found."""
    kept = {method: [run for run in runs if run.found] for method, runs in finished.items()}
    return {method: runs for method, runs in kept.items() if runs}


def outcomes_of(kept: dict[str, list[DetectorRun]]) -> dict[str, list[pd.DataFrame]]:
    """The outcomes of each backbone's runs."""
    return {method: [run.outcomes for run in runs] for method, runs in kept.items()}


def curves_of(kept: dict[str, list[DetectorRun]]) -> dict[str, list[np.ndarray]]:
    """Precision [K, 101] over recall of each backbone's runs."""
    return {
        method: [class_curves(run.found, run.values["num_classes"]) for run in runs] for method, runs in kept.items()
    }


def tests(finished: dict[str, list[DetectorRun]], metrics: Sequence[Metric]) -> list[Versus]:
    """The other backbones against the first one that has kept its detections, in those of `metrics` that are in brief.

    The first is the one called baseline, else the first by name; what has no seed in common with it is left out.
    """
    kept, metrics = with_detections(finished), [metric for metric in metrics if metric.in_brief]
    if not kept:
        return []
    by_seed = {method: {run.seed: run.found for run in runs} for method, runs in kept.items()}
    reference, *others = by_seed
    alike: dict[tuple, list[str]] = {}
    for method in others:
        if seeds := tuple(sorted(by_seed[method].keys() & by_seed[reference].keys())):
            alike.setdefault(seeds, []).append(method)
    return [
        Versus(
            reference,
            seeds,
            detection_significance.against(
                reference, {m: [by_seed[m][s] for s in seeds] for m in (reference, *methods)}, metrics
            ),
        )
        for seeds, methods in alike.items()
    ]


def drawings(
    finished: dict[str, list[DetectorRun]], kept: dict[str, list[DetectorRun]], comparison: "Comparison"
) -> dict:
    """The page's plots as inline SVG."""
    curves, tables, looks = curves_of(kept), outcomes_of(kept), plots.looks(finished)
    logged, names = comparison.history_frame, next(iter(kept.values()))[0].values["class_names"]
    mean = {method: mean_over_classes(each) for method, each in curves.items()}
    of_class = {
        name: {method: [each[k] for each in runs] for method, runs in curves.items()} for k, name in enumerate(names)
    }
    return {
        "curves": [
            svg(
                plots.curves(logged, m.name, m.header, None, False, True, m.higher_is_better),
                f"{m.header} over the epochs",
            )
            for m in comparison.metrics
            if m.in_brief
        ],
        "confidence": [
            svg(
                plots.precision_recall(mean, "Precision and recall"), "precision against recall, mean over the classes"
            ),
            svg(plots.reliability(tables, legend=False), "reliability diagram of the detections"),
        ],
        "histograms": [
            svg(
                plots.confidence_histogram(each, looks[method], counted="detections"),
                f"histogram of confidences: {title(method)}",
            )
            for method, each in tables.items()
        ],
        "precision_recall": [
            svg(plots.precision_recall(each, plots.cut(name), size=SMALL), f"precision against recall: {name}")
            for name, each in of_class.items()
            if not any(np.isnan(curve).any() for runs in each.values() for curve in runs)
        ],
        "classes": svg(
            ap_by_class({m: [run.values["ap_per_class"] for run in runs] for m, runs in finished.items()}),
            "average precision of each class",
        ),
    }


def mistakes(kept: dict[str, list[DetectorRun]]) -> dict:
    """Each backbone's most confident mistakes as its first seed's run kept them; `missing` says where no pictures are."""
    groups, without = [], []
    for method, runs in kept.items():
        run = runs[0]
        if not (run.folder / MISTAKES).is_file():
            without.append(title(method))
            continue
        names = run.values["class_names"]
        try:
            rows = pd.read_parquet(run.folder / MISTAKES).head(SHOWN).to_dict("records")
            items = [
                {
                    "image": data_uri(row["image"], "jpeg"),
                    "picture": row["picture"],
                    "said": plots.cut(names[row["label"]], 40),
                    "confidence": 100 * row["confidence"],
                    "why": why_wrong(row, names),
                }
                for row in rows
            ]
        except (ArrowException, OSError, KeyError, IndexError) as error:
            return {"groups": [], "missing": f"{run.folder / MISTAKES} is damaged: {first_line(error)}"}
        groups.append({"title": title(method), "seed": run.seed, "items": items})
    missing = f"These runs kept no pictures of their mistakes, as earlier versions did not: {', '.join(without)}."
    return {"groups": groups, "missing": missing if without else ""}


def why_wrong(row: dict, names: list[str]) -> str:
    """What is the matter with a wrong detection, from its overlap with objects of its class and of others."""
    said, other = names[row["label"]], names[row["other"]]
    if row["iou"] >= CLOSE:
        return f"a second box on a {said} that a surer one has found"
    if row["other_iou"] >= CLOSE:
        return f"it is a {other} (overlap {row['other_iou']:.2f})"
    if row["iou"] >= NEAR:
        return f"overlaps a {said} by {row['iou']:.2f} only"
    if row["other_iou"] >= NEAR:
        return f"no {said}; overlaps a {other} by {row['other_iou']:.2f}"
    return f"no {said} there"
