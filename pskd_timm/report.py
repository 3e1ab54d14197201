"""Run folders into tables (terminal, Markdown, CSV) and one picture."""

import math
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from .metrics import ECE_BINS, METRICS, bin_of, risk_curve

# Okabe and Ito's colours, told apart with any colour vision; one a method everywhere.
COLOURS = {
    "baseline": "#000000",
    "label_smoothing": "#E69F00",
    "cskd": "#56B4E9",
    "tfkd": "#009E73",
    "pskd": "#D55E00",
}
TITLES = {
    "baseline": "Baseline",
    "label_smoothing": "Label smoothing",
    "cskd": "CS-KD",
    "tfkd": "TF-KD",
    "pskd": "PS-KD",
}
HEADERS = {
    "top1_error": "top-1 error %",
    "top5_error": "top-5 error %",
    "nll": "NLL",
    "ece": "ECE %",
    "aurc": "AURC ×10³",
    "eaurc": "E-AURC ×10³",
}
COLUMNS = ["method", "seed", "status", *METRICS, "seconds"]


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
    """Method → metric (and `seconds`) → Cell, over the finished runs among `rows` (columns as COLUMNS)."""
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


def _body(rows: pd.DataFrame, bold: str) -> list[list[str]]:
    """The table's text: a row a method, then a row for each run that did not finish."""
    lines = []
    for method, cells in summary(rows).items():
        figures = [f"{bold}{cells[m]}{bold}" if cells[m].best else str(cells[m]) for m in METRICS]
        lines.append([TITLES[method], str(cells["nll"].n), *figures, f"{cells['seconds'].mean:.1f}"])
    for run in rows[rows.status != "finished"].itertuples():
        lines.append([TITLES[run.method], f"seed {run.seed}", run.status] + [""] * (len(METRICS)))
    return lines


TABLE_HEADERS = ["method", "runs", *HEADERS.values(), "seconds"]


def terminal_table(rows: pd.DataFrame, title: str):
    """A rich table; the best of each column in bold."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(title),
        title_justify="left",
        caption="lower is better everywhere; ± is the standard deviation over seeds",
        caption_justify="left",
    )
    for i, header in enumerate(TABLE_HEADERS):
        table.add_column(header, justify="left" if i == 0 else "right")
    for line in _body(rows, "**"):
        table.add_row(*(f"[bold]{text[2:-2]}[/bold]" if text.startswith("**") else escape(text) for text in line))
    return table


def markdown_table(rows: pd.DataFrame) -> str:
    """The same table in Markdown."""
    lines = [TABLE_HEADERS, ["---"] + ["---:"] * (len(TABLE_HEADERS) - 1), *_body(rows, "**")]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def plot(runs: dict[str, list[Path]], path: Path, title: str):
    """One PNG: reliability diagrams (pooled over seeds) and risk–coverage curves (mean over seeds) of each method."""
    import numpy as np
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, not pyplot's: no global state and no display.
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    reliability, risk = figure.subplots(1, 2)
    for method, folders in runs.items():
        tables = [
            pd.read_parquet(folder / "predictions.parquet", columns=["confidence", "correct"]) for folder in folders
        ]
        style = {"color": COLOURS[method], "label": TITLES[method], "linewidth": 2}
        pooled = pd.concat(tables)
        of_bin = pooled.groupby(bin_of(torch.tensor(pooled.confidence.to_numpy())).numpy()).mean()
        reliability.plot(of_bin.confidence, of_bin.correct, marker="o", markersize=4, **style)
        curves = [
            risk_curve(torch.tensor(t.confidence.to_numpy()), torch.tensor(t.correct.to_numpy())).numpy()
            for t in tables
        ]
        coverage = np.arange(1, len(curves[0]) + 1) / len(curves[0])
        risk.plot(100 * coverage, 100 * np.mean(curves, axis=0), **style)
    reliability.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, zorder=0)
    reliability.annotate("perfect calibration", (0.06, 0.06), (0.08, 0.03), rotation=0, color="0.45", fontsize=8)
    reliability.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel=f"confidence (mean of each of {ECE_BINS} bins)",
        ylabel="accuracy",
        title="Reliability",
    )
    risk.set(
        xlim=(0, 100),
        xlabel="coverage: most confident share of the test samples (%)",
        ylabel="error among them (%)",
        title="Risk–coverage",
    )
    risk.set_ylim(bottom=0)
    for axes in (reliability, risk):
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    reliability.legend(frameon=False, loc="upper left")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    figure.savefig(path, dpi=150)


def write(rows: pd.DataFrame, runs: dict[str, list[Path]], folder: Path, title: str, notes=()) -> list[Path]:
    """Write comparison.csv, comparison.md, with the lines of `notes`, and, where a run has finished, comparison.png.

    Returns their paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "comparison.csv", folder / "comparison.md"]
    rows.to_csv(paths[0], index=False, columns=COLUMNS)
    told = "".join(f"- {note}\n" for note in notes)
    paths[1].write_text(
        f"## {title}\n\n{markdown_table(rows)}\nLower is better everywhere; ± is the standard deviation over seeds.\n"
        + (f"\n{told}" if told else "")
    )
    if runs:
        paths.append(folder / "comparison.png")
        plot(runs, paths[-1], title)
    return paths
