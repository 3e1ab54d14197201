"""A comparison as one HTML page that needs nothing but itself: what report.html (the template) shows, made ready."""

import io
import math
import re
import warnings
from datetime import timedelta
from pathlib import Path

import matplotlib
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from pyarrow import ArrowException

from .. import __version__
from ..calibration import fit_to_parts, scaled_figures
from ..errors import InputError
from ..methods import METHOD_SECTIONS
from ..recipe import flatten
from . import paper, plots, significance
from .mistakes import image_size, most_confident_mistakes, pictures
from .plots import title
from .runs import HOLDOUT, PART_NAMES, PREDICTIONS, Run, by_method, history, probability_parts, scored_part
from .tables import HEADERS, best_epoch, over_seeds, shown_metrics, summary
from .trials import Search, searched

CURVES = {"top1_error": "top-1 error, %", "nll": "NLL, nats", "ece": "ECE, %", "aurc": "AURC × 10³"}
CSS_COLOURS = {
    plots.INK: "var(--ink)",
    plots.MUTED: "var(--muted)",
    plots.GRID: "var(--grid)",
    "#000000": "var(--baseline)",
}


def render(
    found: list[Run],
    rows: pd.DataFrame,
    tables: dict[str, dict[int, pd.DataFrame]],
    notes: list[str],
    searches: list[Search],
) -> str:
    """The page of all runs `found`, their `rows`, predictions (method → seed → table) and `notes`, and of `searches`."""
    finished = by_method(found)
    each = {method: list(by_seed.values()) for method, by_seed in tables.items()}
    tests = compared_with_baseline(finished, tables)
    scaled_lines, unscaled = temperatures(finished)
    metrics = shown_metrics(rows)
    counts = [len(runs) for runs in finished.values()]
    context = {
        "heading": ", ".join(dict.fromkeys(run.recipe.name for run in found if run.recipe)) or "No run has begun",
        "version": __version__,
        "facts": facts(found),
        "legend": [(look, swatch(look)) for look in plots.looks(dict.fromkeys(run.method for run in found)).values()],
        "unfinished": [
            (title(row.method), row.seed, row.status) for row in rows.itertuples() if row.status != "finished"
        ],
        "num_rows": len(rows),
        "metrics": metrics,
        "headers": [HEADERS[metric] for metric in metrics],
        "one_run": set(counts) == {1},
        "verdicts": verdicts(tests),
        "notes": notes,
        "tables": figure_tables(found, rows),
        "of_curves": over_seeds(counts) if counts else "",
        "paper": paper_notes(finished),
        "paper_source": paper.SOURCE,
        "tests": test_lines(tests),
        "single_seed": any(len(seeds) == 1 for _, seeds, _ in tests),
        "untested": untested(finished, tests),
        "unkept": sum(run.outcomes is None for runs in finished.values() for run in runs),
        "plots": drawings(finished, each) if each else {},
        "scored": scored_part(finished),
        "evaluated_on": evaluated_on(finished),
        "temperatures": scaled_lines,
        "temperature_of": over_seeds(line["n"] for line in scaled_lines) if scaled_lines else "",
        "unscaled": unscaled,
        "mistakes": mistakes(finished, tables) if each else {},
        "runs": run_lines(found, metrics),
        "searches": [search_section(search) for search in searches],
        "losses": losses(finished),
        "settings": settings_lines(found),
        "environment": versions_and_hardware(found),
    }
    return environment().get_template("page.html").render(context)


def environment() -> Environment:
    """Jinja's, for the templates beside this file."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def table_html(heading: str, rows: pd.DataFrame) -> str:
    """The table of the last epoch alone, for a notebook."""
    metrics = shown_metrics(rows)
    lines = "".join(
        f"<tr><th style='text-align:left'>{Markup.escape(title(method))}</th><td>{cells['nll'].n}</td>"
        + "".join(
            f"<td>{'<b>' if cells[m].best else ''}{cells[m]}{'</b>' if cells[m].best else ''}</td>" for m in metrics
        )
        + "</tr>"
        for method, cells in summary(rows).items()
    )
    failed = "".join(
        f"<tr><th style='text-align:left'>{Markup.escape(title(run.method))}</th><td>seed {run.seed}</td>"
        f"<td colspan='{len(metrics)}' style='text-align:left'>{Markup.escape(run.status)}</td></tr>"
        for run in rows[rows.status != "finished"].itertuples()
    )
    header = "".join(f"<th>{name}</th>" for name in ("method", "runs", *(HEADERS[m] for m in metrics)))
    return f"<table><caption>{Markup.escape(heading)}</caption><tr>{header}</tr>{lines}{failed}</table>"


def signed(value: float, digits: int = 2) -> str:
    """With its sign, and a true minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


# What was run.


def facts(found: list[Run]) -> list[tuple[str, str]]:
    """The head of the page: name and value."""
    recipes = [run.recipe for run in found if run.recipe]
    values = [run.values for run in found if run.values]
    lines = [
        ("data", _distinct(r.data.source or Path(r.data.path).name for r in recipes)),
        ("network", _distinct(r.model.name for r in recipes)),
        ("parameters", _distinct(f"{v['num_parameters']:,}" for v in values)),
        ("trained on", _distinct(f"{v['num_train']:,} images" for v in values)),
        ("tested on", _distinct(tested_on(v) for v in values)),
        ("epochs", _distinct(str(r.epochs) for r in recipes)),
        ("seeds", _distinct(str(seed) for seed in sorted({run.seed for run in found}))),
        ("runs", f"{len(values)} of {len(found)} finished"),
        ("training time", str(timedelta(seconds=round(sum(v["seconds"] for v in values)))) + " in all"),
    ]
    return [(name, value) for name, value in lines if value]


def tested_on(values: dict) -> str:
    """What the figures of a run's result.json are of."""
    images = {
        "test": f"{values['num_test']:,} images",
        "holdout": f"{values['num_holdout']:,} held-out training images",
    }
    return f"{images[values['evaluated_on']]}, {values['num_classes']} classes"


def _distinct(words) -> str:
    return ", ".join(dict.fromkeys(words))


def versions_and_hardware(found: list[Run]) -> list[tuple[str, str]]:
    """Versions and hardware, as the runs recorded them."""
    values = [run.values for run in found if run.values]
    names = dict.fromkeys(name for v in values for name in v["versions"])
    lines = [(name, _distinct(v["versions"].get(name, "?") for v in values)) for name in names]
    hardware = _distinct(
        f"{v['hardware']['name']} ({v['hardware']['device']}, {v['num_processes']} "
        f"{'process' if v['num_processes'] == 1 else 'processes'}, threads: {v['hardware']['threads']}, "
        f"{v['hardware']['cpu_count']} cores)"
        for v in values
    )
    return [("hardware", hardware), *lines] if values else []


def settings_lines(found: list[Run]) -> list[tuple[str, str, bool]]:
    """Every setting with its values over all runs, and whether they differ; a method's own settings from its own runs."""
    seen: dict[str, dict[str, None]] = {}
    decisive = {key for run in found if run.recipe for key in run.recipe.identity()}
    for run in found:
        for key, value in flatten(run.recipe.model_dump()).items() if run.recipe else ():
            section = key.partition(".")[0]
            if key not in ("method", "seed") and (section not in METHOD_SECTIONS or section == run.name):
                seen.setdefault(key, {})[str(value)] = None
    return [(key, " | ".join(values), len(values) > 1 and key in decisive) for key, values in seen.items()]


def losses(finished: dict[str, list[Run]]) -> list[tuple[str, list[str]]]:
    """What the loss of each method's runs amounts to, warnings included: title and lines."""
    return [
        (title(method), runs[0].recipe.effective_loss(runs[0].values["num_classes"]).lines(runs[0].recipe.optim.lr))
        for method, runs in finished.items()
    ]


def run_lines(found: list[Run], metrics: list[str]) -> list[dict]:
    """A line a run: how it ended and its figures."""
    return [
        {
            "method": title(run.method),
            "seed": run.seed,
            "status": run.status,
            "folder": str(run.folder),
            "last": [run.values["last"][name] for name in metrics] if run.values else [],
            "seconds": run.values["seconds"] if run.values else math.nan,
            "best": run.values["best"]["epoch"] if run.values else "",
        }
        for run in found
    ]


# The tables.


def figure_tables(found: list[Run], rows: pd.DataFrame) -> list[dict]:
    """The tables of the last and of the best epoch; each figure with the paper's beside it where it has one."""
    if not (rows.status == "finished").any():
        return []
    chosen = _distinct(PART_NAMES[run.values["best"]["chosen_on"]] for run in found if run.values)
    scored = scored_part(by_method(found))
    figures = {method: paper.paper_figures(runs[0].recipe) for method, runs in by_method(found).items()}
    looks = plots.looks(figures)
    what = over_seeds(len(runs) for runs in by_method(found).values())
    captions = {
        "last": f"Last epoch, on the {scored}: {what}.",
        "best": f"Best epoch: of each run the epoch with the lowest error on the {chosen}, its figures on the {scored}; "
        f"{what}.",
    }
    if chosen == "test part":
        captions["best"] += (
            " Chosen on what it is tested on, these figures are too good; data.holdout_fraction 0.1 avoids it."
        )
    return [
        {
            "id": which,
            "caption": captions[which],
            "lines": [
                {
                    "title": title(method),
                    "swatch": swatch(looks[method]),
                    "n": cells["nll"].n,
                    "seconds": cells["seconds"].mean,
                    "cells": [
                        (cells[m], beside(cells[m].mean, figures[method].get(method.split()[0], {}).get(m)))
                        for m in shown_metrics(rows)
                    ],
                }
                for method, cells in summary(of_epoch).items()
            ],
        }
        for which, of_epoch in (("last", rows), ("best", best_epoch(rows)))
    ]


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


def compared_with_baseline(finished: dict[str, list[Run]], tables: dict[str, dict[int, pd.DataFrame]]) -> list[tuple]:
    """(baseline, seeds, rows of significance.against) for all methods that share a baseline, seeds and the test samples."""
    alike: dict[tuple, list[str]] = {}
    for method, runs in finished.items():
        baseline = runs[0].baseline
        if method != baseline and method in tables and baseline in tables:
            seeds = tuple(
                seed
                for seed in tables[method].keys() & tables[baseline].keys()
                if tables[method][seed].label.equals(tables[baseline][seed].label)
            )
            if seeds:
                alike.setdefault((baseline, tuple(sorted(seeds))), []).append(method)
    return [
        (
            baseline,
            seeds,
            significance.against(baseline, {m: [tables[m][s] for s in seeds] for m in (baseline, *methods)}),
        )
        for (baseline, seeds), methods in alike.items()
    ]


def verdicts(tests: list[tuple]) -> list[str]:
    """A sentence a method; of one seed each it speaks of the runs, not of the methods."""
    names = {True: ("{}'s one run", "{}'s"), False: ("{}", "{}")}
    return [
        significance.in_words(
            *(name.format(title(m)) for name, m in zip(names[len(seeds) == 1], (method, baseline), strict=True)),
            found[found.method == method],
        )
        for baseline, seeds, found in tests
        for method in found.method.unique()
    ]


def test_lines(tests: list[tuple]) -> list[dict]:
    """A line a method: its differences to the baseline, in the order of the page's columns."""
    lines = []
    for baseline, seeds, found in tests:
        for method in found.method.unique():
            cells = []
            for test in found[found.method == method].itertuples():
                interval = "" if math.isnan(test.low) else f"{signed(test.low)} … {signed(test.high)}"
                words = significance.p_in_words(test.p, test.metric)
                bold = test.p < significance.LEVEL and len(seeds) > 1
                cells.append((test.difference, signed(test.difference), interval, words, bold))
            lines.append({"title": title(method), "baseline": title(baseline), "seeds": len(seeds), "cells": cells})
    return lines


def untested(finished: dict[str, list[Run]], tests: list[tuple]) -> list[str]:
    """The methods that could not be held against a baseline."""
    tested = {method for _, _, found in tests for method in found.method}
    return [title(m) for m, runs in finished.items() if m not in tested and m != runs[0].baseline]


# Drawings.


def drawings(finished: dict[str, list[Run]], each: dict[str, list[pd.DataFrame]]) -> dict:
    """The page's plots as inline SVG."""
    logged = history({method: [run.folder for run in runs] for method, runs in finished.items()})
    looks = plots.looks(finished)
    names = next(iter(finished.values()))[0].values["class_names"]
    return {
        "curves": [
            svg(plots.curves(logged, m, label, legend=False, names=True), f"{label} over the epochs")
            for m, label in CURVES.items()
        ],
        "confidence": [
            svg(plots.reliability(each, legend=False), "reliability diagram"),
            svg(plots.risk_coverage(each, legend=False), "risk-coverage curves"),
        ],
        "histograms": [
            svg(plots.confidence_histogram(tables, looks[method]), f"histogram of confidences: {title(method)}")
            for method, tables in each.items()
        ],
        "classes": svg(plots.per_class_error(each, names, legend=False), "error of each class"),
    }


def svg(figure: Figure, label: str) -> Markup:
    """A figure as inline SVG that takes the page's font and colours; `label` is what a screen reader says."""
    file = io.StringIO()
    # The salt keeps the ids of one drawing apart from another's. The page's font has letters that matplotlib's lacks.
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>| id=\"(?![phm][0-9a-f]{10})[^\"]*\"", "", text, flags=re.S
    )
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)
    text = re.sub(r"(\.\d\d)\d+", r"\1", text)
    for colour, variable in CSS_COLOURS.items():
        text = text.replace(colour, variable)
    head, body = re.search(r"<svg [^>]*>", text), text[re.search(r"<svg [^>]*>", text).end() :]
    view = re.search(r'viewBox="[^"]*"', head[0])[0]
    link = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
    return Markup(
        f'<svg class="plot" {view} {link} role="img" aria-label="{Markup.escape(label)}">' + body.replace("\n\n", "\n")
    )


def swatch(look: plots.Look) -> Markup:
    """A method's line and marker, for the page's legend."""
    figure = Figure(figsize=(0.5, 0.17))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.plot(
        [0, 1, 2], [0, 0, 0], color=look.colour, linestyle=look.dash, marker=look.marker, markevery=[1], linewidth=1.8
    )
    axes.set_xlim(0.05, 1.95)
    figure.patch.set_alpha(0)
    return svg(figure, f"{look.title}: line and marker")


def search_section(search: Search) -> dict:
    """What a search tried and found: its curves, and a line a trial."""
    keys, best = searched(search.trials), search.best
    metrics = list(plots.TRIAL_LABELS)
    return {
        "title": title(search.method),
        "search": search,
        "metric": HEADERS[search.metric],
        "best": None if best is None else ", ".join(f"{key} {value_and_text(best[key])[1]}" for key in keys),
        "plots": [
            svg(
                plots.trials(search.trials, key, metric, search.metric, search.method, legend=False),
                f"{plots.TRIAL_LABELS[metric]} against {key}",
            )
            for key in keys
            for metric in metrics
        ],
        "headers": ["trial", *keys, *plots.TRIAL_LABELS.values(), "ended"],
        "lines": [
            [value_and_text(trial[name]) for name in ("trial", *keys, *metrics, "state")]
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
    return " and ".join(PART_NAMES[part] for part in sorted(parts))


def temperatures(finished: dict[str, list[Run]]) -> tuple[list[dict], list[str]]:
    """T fitted on the held-out predictions, NLL and ECE of the test part before and after: a line a method, over its seeds.

    Left out are runs that were scored on the held-out part itself. Second, a line for each run whose predictions cannot be read.
    """
    lines, unreadable = [], []
    for method, runs in finished.items():
        each = []
        for run in runs:
            fitted_on_others = run.values["evaluated_on"] == "test" and (run.folder / HOLDOUT).is_file()
            if run.outcomes is not None and fitted_on_others:
                try:
                    each.append(scaled(run))
                except (ArrowException, OSError) as error:
                    unreadable.append(f"{title(method)}, seed {run.seed}: {str(error).splitlines()[0]}")
        if each:
            table = pd.DataFrame(each)
            lines.append({"title": title(method), "n": len(each), "mean": dict(table.mean()), "std": dict(table.std())})
    return lines, unreadable


def scaled(run: Run) -> dict[str, float]:
    """A run's temperature, and NLL and ECE of its test part without and with it."""
    temperature = fit_to_parts(part[:2] for part in probability_parts(run.folder / HOLDOUT))
    after = scaled_figures(probability_parts(run.folder / PREDICTIONS), temperature)
    return {"temperature": temperature} | {
        f"{name}_{when}": values[name]
        for when, values in (("before", run.values["last"]), ("after", after))
        for name in ("nll", "ece")
    }


def mistakes(finished: dict[str, list[Run]], tables: dict[str, dict[int, pd.DataFrame]]) -> dict:
    """Each method's most confident mistakes with their pictures, of its first seed; `missing` says why there are none."""
    first = {method: next(iter(by_seed.items())) for method, by_seed in tables.items()}
    chosen = {method: most_confident_mistakes(table) for method, (_, table) in first.items()}
    run = next(iter(finished.values()))[0]
    names, images, missing, size = run.values["class_names"], {}, "", (0, 0)
    try:
        size = image_size(run.folder)
        shown = pd.concat(chosen.values()).drop_duplicates("index")
        images = pictures(run.recipe, shown, size) if len(shown) else {}
    except (InputError, OSError) as error:
        missing = f"Their pictures cannot be shown: {error}."
    groups = [
        {
            "title": title(method),
            "seed": first[method][0],
            "items": [
                {
                    "image": images.get(row.index_in_test),
                    "said": plots.cut(names[row.prediction], 40),
                    "is": plots.cut(names[row.label], 40),
                    "confidence": 100 * row.confidence,
                    "index": row.index_in_test,
                }
                for row in table.rename(columns={"index": "index_in_test"}).itertuples(index=False)
            ],
        }
        for method, table in chosen.items()
    ]
    return {"groups": groups, "missing": missing, "pixelated": max(size) <= 64}
