"""Run folders into files: tables (Markdown, LaTeX, CSV), one picture, one HTML page."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..detection.outcomes import DETECTIONS
from ..errors import InputError, reason
from ..files import write_atomic
from ..metrics import Metric, format_metrics
from . import detection_page, page, plots
from .by_setting import BySetting, by_setting
from .detection_runs import BACKBONE, DetectorRun, are_detectors, find_detectors
from .further import add_further, further_metrics
from .out_of_distribution import OUTSIDE, outside, outside_markdown
from .plots import title
from .runs import (
    PREDICTIONS,
    Run,
    by_method,
    common_metrics,
    find_runs,
    history,
    other_parts,
    part_name,
    predictions,
    rows,
    scored_part,
)
from .scaling import Scaling, scale, scaled_baselines, with_scaled, with_scaled_runs
from .significance import in_a_row
from .tables import FURTHER, best_epoch, footnote, latex_table, markdown_table, signed, summary
from .trials import Search, find_searches
from .versus import Versus, as_frame, compare, still_better

PICTURE, BY_SETTING, SIGNIFICANCE = "comparison.png", "by_setting.png", "significance.csv"


@dataclass
class Comparison:
    """Runs side by side: `rows` (a row a run, columns as `runs.columns`), their metrics, each method's finished runs, the
    files written.

    `notes` says what always guessing the most frequent class would give, and what each trained teacher reached. `further` are
    metrics that were asked for, `scaling` the runs' temperatures, `scaled` the baseline's runs after temperature scaling,
    which have rows of their own, `gains` the notes of what is still better than these, `further_gains` those of `further`,
    `by_setting` how the differences to the baseline go with a setting of which there are several values.
    """

    rows: pd.DataFrame
    metrics: list[Metric]
    runs: dict[str, list[Path]]
    paths: list[Path]
    heading: str
    notes: list[str]
    history_frame: pd.DataFrame  # the lines of metrics.jsonl of all finished runs, with `method` and `seed`
    further: list[Metric] = field(default_factory=list)
    scaling: Scaling = field(default_factory=Scaling)
    scaled: list[Run] = field(default_factory=list)
    gains: list[str] = field(default_factory=list)
    further_gains: list[str] = field(default_factory=list)
    by_setting: BySetting | None = None
    kind: str = "method"  # what the tables' lines are of

    @property
    def failed(self) -> int:
        """How many runs did not finish."""
        return int((self.rows.status != "finished").sum())

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The table: a row a method; `runs`, the mean of each metric of the last epoch and, as `…_std`, its deviation."""
        lines = {}
        for method, cells in summary(self.rows, self.metrics).items():
            lines[method] = {"runs": cells["seconds"].n}
            for metric in self.metrics:
                cell = cells[metric.name]
                lines[method] |= {metric.name: cell.mean, f"{metric.name}_std": cell.std}
        return pd.DataFrame.from_dict(lines, orient="index").rename_axis("method")

    def _repr_html_(self) -> str:
        return page.table_html(self.heading, self.rows, self.metrics, self.kind)


def report(runs: Iterable[str | Path], output: str | Path | None = None, metrics: Sequence[str] = ()) -> Comparison:
    """Compare the runs in and below the folders `runs`, and write the comparison into `output` (default: their common folder).

    `metrics` names others of `metrics.FURTHER_METRICS` to show, or `all`. Reads nothing but run folders and the searches
    beside them. Raises InputError where there are no runs, or runs that were tested on different data.
    """
    further = further_metrics(metrics)
    runs = [runs] if isinstance(runs, str | Path) else list(runs)
    if not runs:
        raise InputError("report: name run folders, or a folder that holds some (runs/digits)")
    detectors = are_detectors(runs)
    if detectors and further:
        raise InputError("report --metrics: further figures are those of classifiers; these are detectors' runs")
    found = find_detectors(runs) if detectors else find_runs(runs)
    folder = Path(output or os.path.commonpath([Path(path).absolute() for path in runs]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if detectors:
            return write_detectors(found, folder)
        return write(found, find_searches([*map(Path, runs), folder]), folder, further)
    except OSError as error:
        raise InputError(f"{folder}: the report cannot be written: {reason(error)}") from None


def heading(runs: list[Run]) -> str:
    """What a comparison is called: its recipes and networks, where one can be read."""
    recipes = [run.recipe for run in runs if run.recipe]
    names = [dict.fromkeys(recipe.name for recipe in recipes), dict.fromkeys(recipe.model.name for recipe in recipes)]
    return (": ".join(", ".join(each) for each in names if each) or "runs") + ", last epoch"


def write(found: list[Run], searches: list[Search], folder: Path, further: Sequence[Metric] = ()) -> Comparison:
    """Write comparison.csv, .md and .tex and report.html into `folder`, and what there is to show of these.

    comparison.png: finished runs; by_setting.png: a setting of several values; significance.csv: runs with a baseline.
    """
    finished, name, metrics = by_method(found), heading(found), common_metrics(found)
    scaling = scale(finished)
    scaled = scaled_baselines(finished, scaling)
    further, absent = add_further([*found, *scaled], further)
    table = with_scaled(rows(found, further), scaled, further)
    folders = {method: [run.folder for run in runs] for method, runs in finished.items()}
    tests, of_scaled = compare(finished, scaled, [*metrics, *further])
    gains, further_gains = still_better(of_scaled, metrics), still_better(of_scaled, further)
    tables = predictions(with_scaled_runs(finished, scaled))
    of_guessing = majority_notes(tables, scored_part(finished)) if "top1_error" in table else []
    of_teachers = [note for runs in finished.values() for run in runs if (note := teacher_note(run, metrics))]
    notes = [*gains, *further_gains, *overconfidence_notes(tables), *of_guessing, *of_teachers, *absent]
    notes += [*unscaled_notes(finished, scaling), *not_tested(finished, PREDICTIONS)]
    logged = history(finished) if finished else pd.DataFrame()
    of_setting = by_setting(finished, metrics)
    comparison = Comparison(
        table, metrics, folders, [], name, notes, logged, further, scaling, scaled, gains, further_gains, of_setting
    )
    text = markdown(table, metrics, name, notes, further)
    for part in other_parts(finished):
        text += f"\n## {part_name(part)}, last epoch\n\n{markdown_table(rows(found, part=part), metrics)}"
    if of_setting:
        text += f"\n## Difference to the baseline by {of_setting.key}\n\n{of_setting.markdown()}"
    if of_others := outside(finished):
        text += f"\n## {OUTSIDE}\n\n{outside_markdown(of_others)}"
    latex = [latex_table(table, each, heading) for each, heading in ((metrics, name), (further, FURTHER)) if each]
    each = {method: list(by_seed.values()) for method, by_seed in tables.items()}
    pictures = {
        PICTURE: plots.comparison(logged, each, name, metrics[0]) if finished else None,
        BY_SETTING: plots.by_setting(of_setting.differences, of_setting.key, of_setting.metrics)
        if of_setting
        else None,
    }
    html = page.render(found, comparison, tables, tests, searches)
    return _written(comparison, folder, text, "\n".join(latex), tests, pictures, html)


def not_tested(finished: dict[str, list[Run]], file: str) -> list[str]:
    """A note of the methods that cannot be held against another because the `file` of their predictions is gone."""
    without = [title(method) for method, runs in finished.items() if all(run.outcomes is None for run in runs)]
    if not without or len(finished) == 1:
        return []
    of = "" if len(without) == len(finished) else f" of {in_a_row(without)}"
    return [f"No difference is tested{of}: there is no {file} beside the results."]


def write_detectors(found: list[DetectorRun], folder: Path) -> Comparison:
    """As `write`, of detectors' runs."""
    table, finished, name, metrics = rows(found), by_method(found), heading(found), common_metrics(found)
    folders = {method: [run.folder for run in runs] for method, runs in finished.items()}
    logged = history(finished).dropna(subset=[metrics[0].name]) if finished else pd.DataFrame()
    notes = not_tested(finished, DETECTIONS)
    comparison = Comparison(table, metrics, folders, [], name, notes, logged, kind=BACKBONE)
    text, latex = markdown(table, metrics, name, notes, kind=BACKBONE), latex_table(table, metrics, name, BACKBONE)
    tests, pictures = detection_page.tests(finished, metrics), {PICTURE: detection_page.overview(finished, comparison)}
    html = detection_page.render(found, comparison, tests)
    return _written(comparison, folder, text, latex, tests, pictures, html)


def _written(
    comparison: Comparison,
    folder: Path,
    text: str,
    latex: str,
    tests: list[Versus],
    pictures: dict[str, Figure | None],
    html: str,
) -> Comparison:
    """The comparison with the paths of its files; of an earlier one no file stays that this one does not have."""
    write_atomic(folder / "comparison.csv", comparison.rows.to_csv(index=False))
    write_atomic(folder / "comparison.md", text)
    write_atomic(folder / "comparison.tex", latex)
    comparison.paths += [folder / f"comparison.{kind}" for kind in ("csv", "md", "tex")]
    for name in (SIGNIFICANCE, *pictures):
        (folder / name).unlink(missing_ok=True)
    if tests:
        write_atomic(folder / SIGNIFICANCE, as_frame(tests).to_csv(index=False))
        comparison.paths.append(folder / SIGNIFICANCE)
    for name, figure in pictures.items():
        if figure:
            figure.savefig(folder / name, dpi=150)
            comparison.paths.append(folder / name)
    write_atomic(folder / "report.html", html)
    comparison.paths.append(folder / "report.html")
    return comparison


def markdown(
    table: pd.DataFrame,
    metrics: Sequence[Metric],
    name: str,
    notes: list[str],
    further: Sequence[Metric] = (),
    kind: str = "method",
) -> str:
    """The tables of the last and of the best epoch, and the lines of `notes`."""
    lines = "\n" * bool(notes) + "".join(f"- {note}\n" for note in notes)
    text = f"## {name}\n\n{markdown_table(table, metrics, kind)}\n{footnote(table, metrics, kind)}\n{lines}"
    if further:
        text += f"\n## {FURTHER}\n\n{markdown_table(table, further)}\n{footnote(table, further)}\n"
    if (table.status == "finished").any():
        text += f"\n## Best epoch\n\n{markdown_table(best_epoch(table, metrics), metrics, kind)}"
        text += f"\n{markdown_table(best_epoch(table, further), further)}" if further else ""
    return text


def overconfidence_notes(tables: dict[str, dict[int, pd.DataFrame]]) -> list[str]:
    """How far each method's mean confidence lies above its accuracy, mean over its runs: PS-KD pays where a baseline's does."""
    gaps = {
        m: np.mean([100 * (of.confidence - of.correct).mean() for of in runs.values()]) for m, runs in tables.items()
    }
    words = ", ".join(f"{title(method)} {signed(gap, 1)}" for method, gap in gaps.items())
    return [f"Mean confidence less accuracy, in points (above 0: too sure): {words}."] if gaps else []


def unscaled_notes(finished: dict[str, list[Run]], scaling: Scaling) -> list[str]:
    """Why a baseline that held images out has no row with a temperature."""
    baselines = [run for runs in finished.values() for run in runs if run.name == "baseline"]
    fitted = [(run, scaling.fitted[run.folder][0]) for run in baselines if run.folder in scaling.fitted]
    return [
        f"{title(run.method)} seed {run.seed} with a temperature has no line: {temperature.reason}."
        for run, temperature in fitted
        if temperature.reason
    ]


def majority_notes(tables: dict[str, dict[int, pd.DataFrame]], part: str) -> list[str]:
    """What guessing would give: the error of always saying the most frequent class of the scored part (a line a part)."""
    shares = [table.label.value_counts(normalize=True).max() for of in tables.values() for table in of.values()]
    return [
        f"For scale: always saying the most frequent class of the {part} gives a top-1 error of {100 - 100 * share:.2f} %."
        for share in dict.fromkeys(shares)
    ]


def teacher_note(run: Run, metrics: Sequence[Metric]) -> str | None:
    """What a run's teacher reached, where a trained network taught it and its figures are known."""
    teacher = run.values.get("teacher", {})
    if any(metric.name not in teacher for metric in metrics):
        return None
    figures = format_metrics(teacher, metrics, brief=True)
    return f"{run.name} seed {run.seed} was taught by {teacher['run']} (epoch {teacher['epoch']}): {figures}"
