"""The table of a comparison, as text for the terminal, Markdown and LaTeX. `rows` have the columns of runs.COLUMNS."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd

from ..metrics import METRICS
from .plots import title

HEADERS = {
    "top1_error": "top-1 error %",
    "top5_error": "top-5 error %",
    "nll": "NLL",
    "ece": "ECE %",
    "aurc": "AURC ×10³",
    "eaurc": "E-AURC ×10³",
}
MOST_FOR_TOP5 = 5  # classes: with so many or fewer the right one is always among the first five


class Cell(NamedTuple):
    """Mean and (sample) standard deviation over n runs; `best` marks the lowest mean of a column."""

    mean: float
    std: float
    n: int
    best: bool

    def __str__(self):
        if math.isnan(self.mean):
            return "–"
        return f"{self.mean:.2f} ± {self.std:.2f}" if self.n > 1 else f"{self.mean:.2f}"


def summary(rows: pd.DataFrame) -> dict[str, dict[str, Cell]]:
    """Method → metric (and `seconds`) → Cell, over the finished runs among `rows`."""
    done = rows[rows.status == "finished"].groupby("method", sort=False)[[*METRICS, "seconds"]]
    mean, std, n = done.mean(), done.std(), done.size()
    lowest = mean.min()
    return {
        method: {
            column: Cell(
                mean.at[method, column],
                std.at[method, column],
                int(n[method]),
                column != "seconds" and mean.at[method, column] == lowest[column],
            )
            for column in mean.columns
        }
        for method in mean.index
    }


def short(figures: dict) -> str:
    """The four figures that tell most, in a line."""
    error, nll, ece, aurc = (figures[name] for name in ("top1_error", "nll", "ece", "aurc"))
    return f"error {error:.2f} %  nll {nll:.3f}  ece {ece:.2f} %  aurc {aurc:.1f}"


def shown_metrics(rows: pd.DataFrame) -> list[str]:
    """What the tables show of runs, whose number of classes is NaN where none has finished."""
    return telling_metrics(rows.num_classes.max())


def telling_metrics(num_classes: float) -> list[str]:
    """METRICS, without the top-5 error where there are so few classes that it is always 0."""
    return [metric for metric in METRICS if metric != "top5_error" or not num_classes <= MOST_FOR_TOP5]


def over_seeds(counts: Iterable[int]) -> str:
    """What the figures of a table are whose lines have so many runs."""
    counts = set(counts)
    if counts == {1}:
        return "one run a method (n = 1), so nothing is known of the spread over seeds"
    return "mean ± standard deviation over the seeds" + (" (no ± where there is one run)" if 1 in counts else "")


def footnote(rows: pd.DataFrame) -> str:
    """The line below the table."""
    counts = rows[rows.status == "finished"].groupby("method").size()
    return "Lower is better everywhere" + (f"; {over_seeds(counts)}." if len(counts) else ".")


def headers(metrics: list[str]) -> list[str]:
    """The heads of the table's columns."""
    return ["method", "runs", *(HEADERS[metric] for metric in metrics), "seconds"]


def best_epoch(rows: pd.DataFrame) -> pd.DataFrame:
    """The same rows with the best epoch's figures in the place of the last one's."""
    return rows.assign(**{name: rows[f"best_{name}"] for name in METRICS})


def _body(rows: pd.DataFrame, bold: str) -> list[list[str]]:
    """The table's text: a row a method, then a row for each run that did not finish."""
    lines, metrics = [], shown_metrics(rows)
    for method, cells in summary(rows).items():
        figures = [f"{bold}{cells[m]}{bold}" if cells[m].best else str(cells[m]) for m in metrics]
        lines.append([title(method), str(cells["nll"].n), *figures, f"{cells['seconds'].mean:.1f}"])
    for run in rows[rows.status != "finished"].itertuples():
        lines.append([title(run.method), f"seed {run.seed}", run.status] + [""] * len(metrics))
    return lines


def terminal_table(rows: pd.DataFrame, heading: str):
    """A rich table; the best of each column in bold."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(heading),
        title_justify="left",
        caption=footnote(rows),
        caption_justify="left",
    )
    for i, header in enumerate(headers(shown_metrics(rows))):
        table.add_column(header, justify="left" if i == 0 else "right")
    for line in _body(rows, "**"):
        table.add_row(*(f"[bold]{text[2:-2]}[/bold]" if text.startswith("**") else escape(text) for text in line))
    return table


# Marks that would make something else of a cell's text.
MARKDOWN = str.maketrans({character: f"\\{character}" for character in "\\|<*`"} | {"\n": " "})


def markdown_table(rows: pd.DataFrame) -> str:
    """The same table in Markdown."""
    heads = headers(shown_metrics(rows))
    body = [
        [text if text.startswith("**") else text.translate(MARKDOWN) for text in line] for line in _body(rows, "**")
    ]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "×": r"$\times$",
        "³": "$^3$",
        "α": r"$\alpha$",
        "–": "--",
        **{character: f"${character}$" for character in "<>|"},
        "\n": " ",
    }
)


def latex_table(rows: pd.DataFrame, heading: str) -> str:
    """The same table as a LaTeX tabular that needs the package booktabs; runs that did not finish as comments above it."""
    heads = headers(shown_metrics(rows))
    lines = [f"% {heading}. {footnote(rows)}", "% Needs \\usepackage{booktabs}."]
    for run in rows[rows.status != "finished"].itertuples():
        lines.append(f"% {title(run.method)} seed {run.seed}: {' '.join(run.status.split())}")
    lines += [r"\begin{tabular}{l" + "r" * (len(heads) - 1) + "}", r"\toprule"]
    lines += [" & ".join(header.translate(LATEX) for header in heads) + r" \\", r"\midrule"]
    for line in _body(rows[rows.status == "finished"], "**"):
        cells = [text.strip("*").translate(LATEX) for text in line]
        bold = [
            rf"\textbf{{{cell}}}" if text.startswith("**") else cell for text, cell in zip(line, cells, strict=True)
        ]
        lines.append(" & ".join(bold) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
