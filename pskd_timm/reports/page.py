"""A comparison as one HTML page that needs nothing but itself: what report.html (the template) shows, made ready."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pyarrow import ArrowException

from .. import __version__
from ..errors import first_line
from ..floors import EceFloor
from ..metrics import Metric
from . import paper, plots, significance
from .by_setting import BySetting
from .facts import distinct, facts, losses, run_lines, settings_lines, versions_and_hardware
from .further import MEANINGS
from .kept import Kept
from .mistakes import data_uri, is_small, shown_mistakes
from .out_of_distribution import outside
from .plots import title
from .runs import Run, by_method, common_metrics, other_parts, part_name, scored_part
from .runs import rows as rows_of
from .scaling import Scaling
from .svg import svg, swatch
from .tables import (
    Cell,
    best_epoch,
    direction,
    floor_text,
    floors_of,
    has_floors,
    over_seeds,
    shown_metrics,
    signed,
    summary,
)
from .trials import Search, searched, shown_in_search
from .versus import Versus

if TYPE_CHECKING:
    from .build import Comparison


def render(
    found: list[Run],
    comparison: "Comparison",
    tables: dict[str, dict[int, pd.DataFrame]],
    tests: list[Versus],
    searches: list[Search],
) -> str:
    """The page of all runs `found`, their `comparison`, predictions (method → seed → table), `tests`, and of `searches`.

    The predictions and tests have the baseline after temperature scaling among the methods.
    """
    finished, further, scaled = by_method(found), comparison.further, comparison.scaled
    looks = plots.looks(dict.fromkeys(run.method for run in [*found, *scaled]))
    swatches = {method: swatch(look) for method, look in looks.items()}
    scaled_lines = temperatures(finished, comparison.scaling, further)
    gains = [*comparison.gains, *comparison.further_gains]
    each = {method: list(by_seed.values()) for method, by_seed in tables.items()}
    fields = fields_of_runs(found, comparison, tests, swatches) | {
        "num_rows": len(comparison.rows) - len(scaled),
        "further": further,
        "meanings": MEANINGS,
        "further_direction": direction(further),
        "has_floors": has_floors(comparison.rows, [*comparison.metrics, *further]),
        "verdicts": verdicts(tests, comparison.metrics) + comparison.gains,
        "further_verdicts": verdicts(tests, further),
        "further_gains": comparison.further_gains,
        "notes": [note for note in comparison.notes if note not in gains],
        "other_parts": [
            (part, figure_tables(found, rows_of(found, part=part), comparison.metrics, swatches, part=part)[:1])
            for part in other_parts(finished)
        ],
        "further_tables": figure_tables(found, comparison.rows, further, swatches) if further else [],
        "paper": paper_notes(finished),
        "paper_source": paper.SOURCE,
        "further_tests": test_lines(tests, further),
        "further_tested": tested_metrics(tests, further),
        "grouped": any("group" in table for of in tables.values() for table in of.values()),
        "untested": untested(finished, tests),
        "unkept": sum(run.outcomes is None for runs in finished.values() for run in runs),
        "legend_of_confidence": [(looks[method], swatches[method]) for method in tables],
        "plots": drawings(finished, comparison, each) if each else {},
        "scored": scored_part(finished),
        "by_setting": by_setting_section(comparison.by_setting),
        "outside": outside(finished),
        "temperatures": scaled_lines,
        "temperature_of": over_seeds(fitted) if (fitted := [line["n"] for line in scaled_lines if line["n"]]) else "",
        "unscaled": comparison.scaling.unreadable,
        "translated": any(run.recipe.task == "translation" for runs in finished.values() for run in runs),
        "scaled_baseline": bool(scaled),
        "mistakes": mistakes(finished) if each else {},
        "searches": [search_section(search) for search in searches],
        "losses": losses(finished),
    }
    return environment().get_template("page.html").render(fields)


def fields_of_runs(
    found: list[Run], comparison: "Comparison", tests: list[Versus], swatches: dict[str, Markup], kind: str = "method"
) -> dict:
    """What the pages of classifiers and of detectors fill in alike; `kind` is what is compared."""
    finished, rows = by_method(found), comparison.rows
    metrics, counts = shown_metrics(rows, comparison.metrics), [len(runs) for runs in finished.values()]
    looks = plots.looks(dict.fromkeys(run.method for run in found))
    return {
        "kind": kind,
        "heading": ", ".join(dict.fromkeys(run.recipe.name for run in found if run.recipe)) or "No run has begun",
        "version": __version__,
        "facts": facts(found),
        "legend": [(look, swatches[method]) for method, look in looks.items()],
        "unfinished": [
            (title(row.method), row.seed, row.status) for row in rows.itertuples() if row.status != "finished"
        ],
        "metrics": metrics,
        "direction": direction(metrics),
        "one_run": set(counts) == {1},
        "tables": figure_tables(found, rows, comparison.metrics, swatches, kind),
        "of_curves": over_seeds(counts, kind) if counts else "",
        "tests": test_lines(tests, comparison.metrics),
        "tested": tested_metrics(tests, comparison.metrics),
        "single_seed": any(len(seeds) == 1 for _, seeds, _ in tests),
        "evaluated_on": evaluated_on(finished),
        "runs": run_lines(found, metrics),
        "settings": settings_lines(found),
        "environment": versions_and_hardware(found),
    }


def environment() -> Environment:
    """Jinja's, for the templates beside this file."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def table_html(heading: str, rows: pd.DataFrame, metrics: Sequence[Metric], kind: str = "method") -> str:
    """The table of the last epoch alone, for a notebook."""
    shown = shown_metrics(rows, metrics)
    lines = "".join(
        f"<tr><th style='text-align:left'>{Markup.escape(title(method))}</th><td>{cells['seconds'].n}</td>"
        + "".join(
            f"<td>{'<b>' if cell.best else ''}{cell}{'</b>' if cell.best else ''}</td>"
            for cell in (cells[metric.name] for metric in shown)
        )
        + "</tr>"
        for method, cells in summary(rows, metrics).items()
    )
    failed = "".join(
        f"<tr><th style='text-align:left'>{Markup.escape(title(run.method))}</th><td>seed {run.seed}</td>"
        f"<td colspan='{len(shown)}' style='text-align:left'>{Markup.escape(run.status)}</td></tr>"
        for run in rows[rows.status != "finished"].itertuples()
    )
    header = "".join(f"<th>{Markup.escape(name)}</th>" for name in (kind, "runs", *(metric.header for metric in shown)))
    return f"<table><caption>{Markup.escape(heading)}</caption><tr>{header}</tr>{lines}{failed}</table>"


# The tables.


def figure_tables(
    found: list[Run],
    rows: pd.DataFrame,
    metrics: Sequence[Metric],
    swatches: dict[str, Markup],
    kind: str = "method",
    part: str | None = None,
) -> list[dict]:
    """The tables of the last and of the best epoch, on `part` or the scored one; the paper's figures beside where it has some."""
    if not (rows.status == "finished").any():
        return []
    chosen = distinct(part_name(run.values["best"]["chosen_on"]) for run in found if run.values)
    scored = part_name(part) if part else scored_part(by_method(found))
    figures = {method: paper.paper_figures(runs[0].recipe) for method, runs in by_method(found).items()}
    what = over_seeds((len(runs) for runs in by_method(found).values()), kind)
    chooses = common_metrics(found)[0].title
    captions = {
        "last": f"Last epoch, on the {scored}: {what}.",
        "best": f"Best epoch instead of the last: of each run the epoch with the best {chooses} on the {chosen}, "
        f"its figures on the {scored}; {what}.",
    }
    if chosen == "test part":
        captions["best"] += (
            " Chosen on what it is tested on, these figures are too good; data.holdout_fraction 0.1 avoids it."
        )
    shown = shown_metrics(rows, metrics)

    def line(method: str, cells: dict[str, Cell], floors: dict[str, dict[str, EceFloor]]) -> dict:
        papers = figures.get(method, {}).get(method.split()[0], {})
        return {
            "title": title(method),
            "swatch": swatches.get(method, ""),
            "n": cells["seconds"].n,
            "seconds": cells["seconds"].mean,
            "cells": [
                (
                    metric,
                    cells[metric.name],
                    beside(cells[metric.name].mean, papers.get(metric.name)),
                    floor_text(floor, metric.digits) if (floor := floors[metric.name].get(method)) else "",
                )
                for metric in shown
            ],
        }

    tables = []
    for which, of_epoch in (("last", rows), ("best", best_epoch(rows, metrics))):
        floors = {metric.name: floors_of(of_epoch, metric.name) for metric in shown}
        lines = [line(method, cells, floors) for method, cells in summary(of_epoch, metrics).items()]
        tables.append({"id": which, "caption": captions[which], "lines": lines})
    return tables


def beside(mean: float, paper_figure: float | None) -> str:
    """The paper's figure and how far from it ours is."""
    if paper_figure is None or math.isnan(paper_figure):
        return ""
    return f"paper {paper_figure:.2f} ({signed(mean - paper_figure)})"


def paper_notes(finished: dict[str, list[Run]]) -> list[str]:
    """Where runs of the paper's data set and network were not made as the shipped recipe says; empty without a paper's figure."""
    recipes = [runs[0].recipe for runs in finished.values() if paper.paper_figures(runs[0].recipe)]
    if not recipes:
        return []
    return list(dict.fromkeys(words for recipe in recipes for words in paper.departures(recipe))) or [
        "as the shipped recipe"
    ]


# Significance.


def verdicts(tests: list[Versus], metrics: Sequence[Metric]) -> list[str]:
    """A sentence a method about `metrics`; of one seed each it speaks of the runs, not of the methods."""
    names = {True: ("{}'s one run", "{}'s"), False: ("{}", "{}")}
    return [
        significance.in_words(
            *(name.format(title(m)) for name, m in zip(names[len(seeds) == 1], (method, baseline), strict=True)),
            found[found.method == method],
            metrics,
        )
        for baseline, seeds, found in (each.of(metrics) for each in tests)
        for method in found.method[found.p.notna()].unique()
    ]


def tested_metrics(tests: list[Versus], metrics: Sequence[Metric]) -> list[Metric]:
    """Those of the tests, in the order of the tables."""
    tested = {name for _, _, found in tests for name in found.metric}
    return [metric for metric in metrics if metric.name in tested]


def test_lines(tests: list[Versus], metrics: Sequence[Metric]) -> list[dict]:
    """A line a method: its differences to the baseline, in the order of `tested_metrics`."""
    lines, digits = [], {metric.name: metric.digits for metric in metrics}
    for baseline, seeds, found in (each.of(metrics) for each in tests):
        for method in found.method.unique():
            cells = []
            for test in found[found.method == method].itertuples():
                if math.isnan(test.p):
                    cells.append(("", "–", "", "", False))
                    continue
                of = digits[test.metric]
                interval = "" if math.isnan(test.low) else f"{signed(test.low, of)} … {signed(test.high, of)}"
                words = significance.p_in_words(test.p, test.metric)
                bold = test.p < significance.LEVEL and len(seeds) > 1
                cells.append((test.difference, signed(test.difference, of), interval, words, bold))
            lines.append({"title": title(method), "baseline": title(baseline), "seeds": len(seeds), "cells": cells})
    return lines


def untested(finished: dict[str, list[Run]], tests: list[Versus]) -> list[str]:
    """The methods that could not be held against a baseline although they have kept their predictions."""
    tested = {method for _, _, found in tests for method in found.method}
    kept = {m for m, runs in finished.items() if any(run.outcomes is not None for run in runs)}
    return [title(m) for m, runs in finished.items() if m in kept - tested and m != runs[0].baseline]


# Drawings.


def drawings(finished: dict[str, list[Run]], comparison: "Comparison", each: dict[str, list[pd.DataFrame]]) -> dict:
    """The page's plots as inline SVG; `each` method's predictions, a frame a run."""
    logged = comparison.history_frame
    looks = plots.looks(finished)
    trained = {
        method: tables for method, tables in each.items() if method in finished
    }  # a temperature changes no class
    names = next(iter(finished.values()))[0].values["class_names"]
    return {
        "curves": [
            svg(
                plots.curves(logged, m.name, m.header, None, False, True, m.higher_is_better),
                f"{m.header} over the epochs",
            )
            for m in comparison.metrics
            if m.in_brief and not m.only_at_end
        ],
        "confidence": [
            svg(plots.reliability(each, legend=False), "reliability diagram"),
            svg(plots.risk_coverage(each, legend=False), "risk-coverage curves"),
        ],
        "histograms": [
            svg(plots.confidence_histogram(tables, looks[method]), f"histogram of confidences: {title(method)}")
            for method, tables in trained.items()
        ],
        "classes": svg(plots.per_class_error(trained, names, legend=False), "error of each class"),
    }


def by_setting_section(found: BySetting | None) -> dict | None:
    """The differences to the baseline by a setting: a plot a metric, and a line a method and value."""
    if found is None:
        return None
    table = found.differences
    return {
        "key": found.key,
        "legend": [(look, swatch(look)) for look in plots.looks(table.method.unique()).values()],
        "plots": [
            svg(
                plots.differences(table, found.key, metric, legend=False),
                f"difference in {metric.header} by {found.key}",
            )
            for metric in found.metrics
        ],
        "heads": ["method", found.key, "runs", *(metric.header for metric in found.metrics)],
        "lines": [(title(method), value, cells) for method, value, cells in found.lines()],
        "direction": direction(found.metrics),
    }


def search_section(search: Search) -> dict:
    """What a search tried and found: its curves, and a line a trial."""
    keys, best, metrics = searched(search.trials, search.metrics), search.best, shown_in_search(search.metrics)
    joined = len(keys) == 1  # with a second setting that changes too, a line would show nothing
    return {
        "title": title(search.method),
        "search": search,
        "best": None if best is None else ", ".join(f"{key} {value_and_text(best[key])[1]}" for key in keys),
        "plots": [
            svg(
                plots.trials(search.trials, key, metric, search.metric, search.method, None, False, joined),
                f"{metric.header} against {key}",
            )
            for key in keys
            for metric in metrics
        ],
        "headers": ["trial", *keys, *(metric.header for metric in metrics), "ended"],
        "lines": [
            [value_and_text(trial[name]) for name in ("trial", *keys, *(m.name for m in metrics), "state")]
            for _, trial in search.trials.iterrows()
        ],
    }


def value_and_text(value) -> tuple:
    """A setting, a figure or a word: what a table sorts by and what it shows."""
    if pd.isna(value):
        return "", "–"
    return value, f"{value:.4g}" if isinstance(value, float) else str(value)


def evaluated_on(finished: dict[str, list[Run]]) -> str:
    """The part that the curves' figures are from."""
    parts = {run.values["best"]["chosen_on"] for runs in finished.values() for run in runs}
    return " and ".join(part_name(part) for part in sorted(parts))


def temperatures(finished: dict[str, list[Run]], scaling: Scaling, further: Sequence[Metric]) -> list[dict]:
    """T fitted on the held-out predictions, NLL and ECE of the test part before and after: a line a method, over its seeds.

    `none` of a line has a reason for each run that has no T; `further` the other metrics at T, as the tables show them.
    """
    lines = []
    for method, runs in finished.items():
        fitted = {run.seed: (run, *scaling.fitted[run.folder]) for run in runs if run.folder in scaling.fitted}
        sound = [(run, kept) for run, temperature, kept in fitted.values() if not temperature.reason]
        table = pd.DataFrame(scaled(run, kept, [metric.name for metric in further]) for run, kept in sound)
        line = {
            "title": title(method),
            "n": len(sound),
            "samples": distinct(f"{temperature.num_samples:,}" for _, temperature, _ in fitted.values()),
            "none": [f"seed {seed}: {t.reason}" for seed, (_, t, _) in fitted.items() if t.reason],
            "mean": dict(table.mean()),
            "std": dict(table.std()),
        }
        at = {m.name: (line["mean"].get(m.name, math.nan), line["std"].get(m.name, math.nan)) for m in further}
        line["further"] = [Cell(*at[metric.name], len(sound), metric.digits) for metric in further]
        lines += [line] if fitted else []
    return lines


def scaled(run: Run, kept: Kept, further: Sequence[str]) -> dict[str, float]:
    """A run's temperature, NLL and ECE of its test part without and with it, and the metrics `further` with it."""
    figures = {"before": run.values["last"], "after": kept.scaled_figures()}
    both = {f"{name}_{when}": values[name] for when, values in figures.items() for name in ("nll", "ece")}
    return {"temperature": kept.temperature} | both | kept.further(further)


def mistakes(finished: dict[str, list[Run]]) -> dict:
    """Each method's most confident mistakes as its first seed's run kept them; `missing` says where no pictures are."""
    groups, without, small = [], [], True
    for method, runs in finished.items():
        run = next((run for run in runs if run.outcomes is not None), None)
        if run is None:
            continue
        names = run.values["class_names"]
        try:
            wrong, kept = shown_mistakes(run.folder, run.outcomes)
        except (ArrowException, OSError, KeyError) as error:
            return {"groups": [], "missing": f"{run.folder / 'mistakes.parquet'} is damaged: {first_line(error)}"}
        if not kept:
            without.append(title(method))
        items = []
        for row in wrong.to_dict("records"):
            image = row.get("image") if isinstance(row.get("image"), bytes) else None
            small = small and (image is None or is_small(image))
            items.append(
                {
                    "image": data_uri(image) if image else None,
                    "text": row.get("text"),
                    "said": plots.cut(names[row["prediction"]], 40),
                    "is": plots.cut(names[row["label"]], 40),
                    "confidence": 100 * row["confidence"],
                    "index": row["index"],
                }
            )
        groups.append({"title": title(method), "seed": run.seed, "items": items})
    missing = f"These runs kept no pictures of their mistakes, as earlier versions did not: {', '.join(without)}."
    return {"groups": groups, "missing": missing if without else "", "pixelated": small}
