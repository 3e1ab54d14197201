"""Run folders into files: tables (Markdown, LaTeX, CSV), one picture, one HTML page."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from ..errors import InputError
from ..files import write_atomic
from ..metrics import METRICS
from . import page, plots
from .runs import Run, by_method, find_runs, history, predictions, rows, scored_part
from .tables import best_epoch, footnote, latex_table, markdown_table, short, summary
from .trials import Search, find_searches


@dataclass
class Comparison:
    """Runs side by side: `rows` (a row a run, columns as runs.COLUMNS), each method's finished runs, the files written.

    `notes` says what always guessing the most frequent class would give, and what each trained teacher reached.
    """

    rows: pd.DataFrame
    runs: dict[str, list[Path]]
    paths: list[Path]
    heading: str
    notes: list[str]

    @property
    def failed(self) -> int:
        """How many runs did not finish."""
        return int((self.rows.status != "finished").sum())

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The table: a row a method; `runs`, the mean of each figure of the last epoch and, as `…_std`, its deviation."""
        lines = {}
        for method, cells in summary(self.rows).items():
            lines[method] = {"runs": cells["nll"].n}
            for name in METRICS:
                lines[method] |= {name: cells[name].mean, f"{name}_std": cells[name].std}
        return pd.DataFrame.from_dict(lines, orient="index").rename_axis("method")

    @cached_property
    def history_frame(self) -> pd.DataFrame:
        """The lines of metrics.jsonl of all finished runs, with `method` and `seed`."""
        return history(self.runs)

    def _repr_html_(self) -> str:
        return page.table_html(self.heading, self.rows)


def report(runs: Iterable[str | Path], output: str | Path | None = None) -> Comparison:
    """Compare the runs in and below the folders `runs`, and write the comparison into `output` (default: their common folder).

    Reads run folders and the searches beside them only, and the data set for the pictures of mistakes. Raises InputError
    where there are no runs, or runs that were tested on different data.
    """
    runs = [runs] if isinstance(runs, str | Path) else list(runs)
    if not runs:
        raise InputError("report: name run folders, or a folder that holds some (runs/digits)")
    found = find_runs(runs)
    folder = Path(output or os.path.commonpath([Path(path).absolute() for path in runs]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return write(found, find_searches([*map(Path, runs), folder]), folder)
    except OSError as error:
        raise InputError(f"{folder}: the report cannot be written: {error}") from None


def heading(runs: list[Run]) -> str:
    """What a comparison is called: its recipes and networks."""
    recipes = [run.recipe for run in runs if run.recipe]
    names = [dict.fromkeys(recipe.name for recipe in recipes), dict.fromkeys(recipe.model.name for recipe in recipes)]
    return ": ".join(", ".join(each) for each in names if each) + ", last epoch"


def write(found: list[Run], searches: list[Search], folder: Path) -> Comparison:
    """Write comparison.csv, .md and .tex, report.html and, where a run has finished, comparison.png into `folder`."""
    table, finished, name = rows(found), by_method(found), heading(found)
    folders = {method: [run.folder for run in runs] for method, runs in finished.items()}
    tables = predictions(finished)
    notes = majority_notes(tables, scored_part(finished))
    notes += [note for runs in finished.values() for run in runs if (note := teacher_note(run))]
    comparison = Comparison(table, folders, [], name, notes)
    table.to_csv(folder / "comparison.csv", index=False)
    write_atomic(folder / "comparison.md", markdown(table, name, notes))
    write_atomic(folder / "comparison.tex", latex_table(table, name))
    comparison.paths += [folder / f"comparison.{kind}" for kind in ("csv", "md", "tex")]
    if finished:
        each = {method: list(by_seed.values()) for method, by_seed in tables.items()}
        plots.comparison(comparison.history_frame, each, name).savefig(folder / "comparison.png", dpi=150)
        comparison.paths.append(folder / "comparison.png")
    write_atomic(folder / "report.html", page.render(found, table, tables, notes, searches))
    comparison.paths.append(folder / "report.html")
    return comparison


def markdown(table: pd.DataFrame, name: str, notes: list[str]) -> str:
    """The tables of the last and of the best epoch, and the lines of `notes`."""
    told = "\n" * bool(notes) + "".join(f"- {note}\n" for note in notes)
    best = f"\n## Best epoch\n\n{markdown_table(best_epoch(table))}" if (table.status == "finished").any() else ""
    return f"## {name}\n\n{markdown_table(table)}\n{footnote(table)}\n{told}{best}"


def majority_notes(tables: dict[str, dict[int, pd.DataFrame]], part: str) -> list[str]:
    """What guessing would give: the error of always saying the most frequent class of the scored part (a line a part)."""
    shares = [table.label.value_counts(normalize=True).max() for of in tables.values() for table in of.values()]
    return [
        f"For scale: always saying the most frequent class of the {part} gives a top-1 error of {100 - 100 * share:.2f} %."
        for share in dict.fromkeys(shares)
    ]


def teacher_note(run: Run) -> str | None:
    """What a run's teacher reached, where a trained network taught it and its figures are known."""
    teacher = run.values.get("teacher", {})
    if "nll" not in teacher:
        return None
    name = f"{run.name} seed {run.seed}"
    return f"{name} was taught by {teacher['run']} (epoch {teacher['epoch']}): {short(teacher)}"
