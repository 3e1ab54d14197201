"""The table of a comparison, as text for the terminal, Markdown and LaTeX. `rows` have the columns of `runs.columns`."""

import math
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from textwrap import wrap
from typing import NamedTuple

import pandas as pd

from ..floors import FLOORED, EceFloor
from ..metrics import Metric, telling_metrics
from ..progress import WIDE
from .plots import title
from .runs import floor_columns

FURTHER = "Further figures, last epoch"
IF_CALIBRATED = "if calibrated"
LONGEST_UNBROKEN = 24  # letters of a method's name in the terminal; longer ones may wrap
SHORTEST_NAME = 10  # letters below which a name is not narrowed
SHORTEST_LINE = 7  # letters below which no other column is: `error %`
FLOOR_NOTE = (
    "If calibrated: what a network whose confidences are exactly right would measure on so few samples, its mean and, "
    "in brackets, what 95 % of such measurements stay below; an ECE below that cannot be told from 0, nor be the best"
)


class Cell(NamedTuple):
    """Mean and (sample) standard deviation over n runs, shown with so many digits; `best` marks the best mean of a column.

    A mean that is a difference is `signed`.
    """

    mean: float
    std: float
    n: int
    digits: int
    best: bool = False
    signed: bool = False

    def __str__(self):
        if math.isnan(self.mean):
            return "–"
        mean = signed(self.mean, self.digits) if self.signed else f"{self.mean:.{self.digits}f}"
        return f"{mean} ± {self.std:.{self.digits}f}" if self.n > 1 else mean


def signed(value: float, digits: int = 2) -> str:
    """With its sign, and a true minus; with two digits more where it would round to 0, beside a p that tells it from 0."""
    text = f"{value:+.{digits}f}"
    return (f"{value:+.{digits + 2}f}" if value and float(text) == 0 else text).replace("-", "−")


def summary(rows: pd.DataFrame, metrics: Sequence[Metric]) -> dict[str, dict[str, Cell]]:
    """Method → metric (and `seconds`) → Cell, over the finished runs among `rows`."""
    done = rows[rows.status == "finished"].groupby("method", sort=False)[[*(m.name for m in metrics), "seconds"]]
    mean, std, n = done.mean(), done.std(), done.count()  # a further figure may be missing of some runs
    digits = {metric.name: metric.digits for metric in metrics} | {"seconds": 1}
    best = _best(rows, mean, metrics)
    return {
        method: {
            name: Cell(
                mean.at[method, name], std.at[method, name], int(n.at[method, name]), digits[name], method in best[name]
            )
            for name in mean.columns
        }
        for method in mean.index
    }


def _best(rows: pd.DataFrame, mean: pd.DataFrame, metrics: Sequence[Metric]) -> dict[str, set[str]]:
    """Metric (and `seconds`) → the methods with its best mean; none has the best ECE where perfect calibration explains it."""
    best = {"seconds": set()}
    for metric in metrics:
        column = mean[metric.name]
        best[metric.name] = set(column.index[column == (column.max() if metric.higher_is_better else column.min())])
        for method, floor in floors_of(rows, metric.name).items():
            if method in best[metric.name] and mean.at[method, metric.name] <= floor.high:
                best[metric.name] = set()
    return best


def floors_of(rows: pd.DataFrame, name: str) -> dict[str, EceFloor]:
    """Method → what perfect calibration would measure of a metric, both figures means over runs; where it is known."""
    columns = list(floor_columns(name))
    if name not in FLOORED or not set(columns) <= set(rows):
        return {}
    done = rows[rows.status == "finished"].groupby("method", sort=False)[columns].mean().dropna()
    return {method: EceFloor(*values) for method, values in zip(done.index, done.to_numpy(), strict=True)}


def has_floors(rows: pd.DataFrame, metrics: Sequence[Metric]) -> bool:
    """Whether a floor stands beside one of the `metrics`."""
    return any(floors_of(rows, metric.name) for metric in metrics)


def floor_text(floor: EceFloor, digits: int = 2) -> str:
    """As the tables show it: `3.20 (4.71)`."""
    return f"{floor.mean:.{digits}f} ({floor.high:.{digits}f})"


def shown_metrics(rows: pd.DataFrame, metrics: Sequence[Metric]) -> list[Metric]:
    """What the tables show of runs, whose number of classes is NaN where none has finished."""
    return telling_metrics(metrics, rows.num_classes.max())


def over_seeds(counts: Iterable[int], kind: str = "method") -> str:
    """What the figures of a table are whose lines, one of each `kind`, have so many runs."""
    counts = set(counts)
    if counts == {1}:
        return f"one run a {kind} (n = 1), so nothing is known of the spread over seeds"
    return "mean ± standard deviation over the seeds" + (" (no ± where there is one run)" if 1 in counts else "")


def direction(metrics: Sequence[Metric]) -> str:
    """Which figures are better, in words."""
    higher = [metric.title for metric in metrics if metric.higher_is_better]
    if not higher:
        return "Lower is better everywhere"
    if len(higher) == len(metrics):
        return "Higher is better everywhere"
    return f"Higher is better for {', '.join(higher)}, lower for the others"


def footnote(rows: pd.DataFrame, metrics: Sequence[Metric], kind: str = "method", with_floors: bool = True) -> str:
    """The lines below the table, whose lines are of a `kind` each; `with_floors`: also what an ECE if calibrated is."""
    counts = rows[rows.status == "finished"].groupby("method").size()
    words = direction(shown_metrics(rows, metrics)) + (f"; {over_seeds(counts, kind)}." if len(counts) else ".")
    return f"{words} {FLOOR_NOTE}." if with_floors and has_floors(rows, metrics) else words


def best_epoch(rows: pd.DataFrame, metrics: Sequence[Metric]) -> pd.DataFrame:
    """The same rows with the best epoch's figures in the place of the last one's."""
    names = [name for metric in metrics for name in (metric.name, *floor_columns(metric.name))]
    return rows.assign(**{name: rows[f"best_{name}"] for name in names if f"best_{name}" in rows})


def _text(rows: pd.DataFrame, metrics: Sequence[Metric], bold: str, kind: str = "method") -> list[list[str]]:
    """The table's text: its head, a row a method (`kind` says what else it is), then one for each run that did not finish."""
    metrics = shown_metrics(rows, metrics)
    floors = {metric.name: found for metric in metrics if (found := floors_of(rows, metric.name))}
    heads = [[metric.header, *[f"{metric.header} {IF_CALIBRATED}"] * (metric.name in floors)] for metric in metrics]
    lines = [[kind, "runs", *chain(*heads), "seconds"]]
    for method, cells in summary(rows, metrics).items():
        figures = []
        for metric in metrics:
            cell = cells[metric.name]
            figures.append(f"{bold}{cell}{bold}" if cell.best else str(cell))
            if metric.name in floors:
                floor = floors[metric.name].get(method)
                figures.append(floor_text(floor, metric.digits) if floor else "–")
        lines.append([title(method), str(cells["seconds"].n), *figures, f"{cells['seconds'].mean:.1f}"])
    for run in rows[rows.status != "finished"].itertuples():
        lines.append([title(run.method), f"seed {run.seed}", run.status] + [""] * (len(lines[0]) - 3))
    return lines


def terminal_table(
    rows: pd.DataFrame, metrics: Sequence[Metric], heading: str, width: int = WIDE, kind: str = "method"
):
    """A rich table; the best of each column in bold; below it the runs that did not finish.

    In fewer columns than WIDE it has only the metrics that are `in_brief`, and without room no ECE as if calibrated and no
    number of runs.
    """
    from rich.markup import escape
    from rich.table import Table

    shown = [metric for metric in metrics if metric.in_brief or width >= WIDE]
    heads, *body = _text(rows, shown, "**", kind)
    everything = _text(rows, metrics, "**", kind)[0]
    in_lines = [head.replace(IF_CALIBRATED, IF_CALIBRATED.replace(" ", "\n")) for head in heads]
    names, *columns = zip(in_lines, *(line for line in body if line[-1]), strict=True)
    if width < WIDE:
        columns.pop()  # the seconds
    longest = _width(names)
    if _table_width(min(longest, LONGEST_UNBROKEN), columns) > width:
        columns = list(map(_stacked, columns))
    for least_needed in ("calibrated", "runs"):
        if _table_width(min(longest, SHORTEST_NAME), columns) > width:
            columns = [column for column in columns if not column[0].endswith(least_needed)]
    room = max(SHORTEST_NAME, width - _table_width(0, columns))
    kept = [" ".join(head.split()) for head, *_ in (names, *columns)]
    words = [footnote(rows, shown, kind, with_floors=any(head.endswith(IF_CALIBRATED) for head in kept))]
    if left_out := [head for head in everything if head not in kept]:
        words.append(f"In comparison.md, and in a terminal of {WIDE} columns: {', '.join(left_out)}.")
    words += [f"{line[0]} {line[1]}: {line[2]}" for line in body if not line[-1]]
    caption = escape("\n".join(words))
    table = Table(title=escape(heading), title_justify="left", caption=caption, caption_justify="left")
    # Only a name may be broken, where settings make it long: a figure never is.
    table.add_column(names[0], min_width=min(longest, SHORTEST_NAME))
    for head, *_ in columns:
        table.add_column(head, justify="right", no_wrap=True)
    for texts in zip(names[1:], *(column[1:] for column in columns), strict=True):
        cells = (f"[bold]{text[2:-2]}[/bold]" if text.startswith("**") else escape(text) for text in texts[1:])
        table.add_row(escape(_broken(texts[0], room)), *cells)
    return table


def _broken(name: str, room: int) -> str:
    """The name in lines of at most `room` letters, a word longer than that broken after a mark, as `pskd.teacher=` is."""
    lines = [""]
    for word in name.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) <= room:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for part in re.findall(r"[^=._/-]+[=._/-]*|[=._/-]+", word):
            if lines[-1] and len(lines[-1] + part) > room:
                lines.append("")
            lines[-1] += part
    return "\n".join(lines[1:])


def _table_width(name: int, columns: Iterable[Iterable[str]]) -> int:
    """That of a table with a blank and a border beside each column, the first of which has room for `name` letters."""
    widths = [name, *map(_width, columns)]
    return sum(widths) + 3 * len(widths) + 1


def _stacked(column: Sequence[str]) -> list[str]:
    """A head and figures of which each part has a line of its own, `±0.57` below `115.56`; the head in as few as fit."""
    head, *figures = column
    figures = [figure.replace("± ", "±").replace(" ", "\n") for figure in figures]
    room = max(
        SHORTEST_LINE, *map(len, head.split()), *(len(line.strip("*")) for figure in figures for line in figure.split())
    )
    return ["\n".join(wrap(head, room, break_long_words=False, break_on_hyphens=False)), *figures]


def _width(column: Iterable[str]) -> int:
    """That of the longest line."""
    return max(len(line) for text in column for line in text.strip("*").splitlines())


def further_table(rows: pd.DataFrame, metrics: Sequence[Metric]):
    """A rich table of the finished runs' further `metrics`, means only; what perfect calibration would measure below each."""
    from rich.markup import escape
    from rich.table import Table

    heads, *body = _text(rows[rows.status == "finished"], metrics, "")
    words = f"{direction(metrics)}; means over the seeds"
    words += "; below an ECE what it would be if calibrated." if has_floors(rows, metrics) else "."
    table = Table(title=FURTHER, title_justify="left", caption=words, caption_justify="left")
    shown = [i for i, head in enumerate(heads) if head not in ("runs", "seconds") and not head.endswith(IF_CALIBRATED)]
    has_short_names = max((len(line[0]) for line in body), default=0) <= LONGEST_UNBROKEN
    for i in shown:
        table.add_column(heads[i], justify="left" if i == 0 else "right", no_wrap=i == 0 and has_short_names)
    for line in body:
        below = ["\n" + line[i + 1].partition(" (")[0] if heads[i + 1].endswith(IF_CALIBRATED) else "" for i in shown]
        means = [line[i].partition(" ±")[0] for i in shown]
        table.add_row(*(escape(mean + floor) for mean, floor in zip(means, below, strict=True)))
    return table


# Marks that would make something else of a cell's text.
MARKDOWN = str.maketrans({character: f"\\{character}" for character in "\\|<*`"} | {"\n": " "})


def markdown_table(rows: pd.DataFrame, metrics: Sequence[Metric], kind: str = "method") -> str:
    """The same table in Markdown."""
    heads, *body = _text(rows, metrics, "**", kind)
    return rows_in_markdown(heads, body)


def rows_in_markdown(heads: list[str], body: list[list[str]]) -> str:
    """Rows of text as a Markdown table; what stands in bold is not escaped."""
    body = [[text if text.startswith("**") else text.translate(MARKDOWN) for text in line] for line in body]
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


def latex_table(rows: pd.DataFrame, metrics: Sequence[Metric], heading: str, kind: str = "method") -> str:
    """The same table as a LaTeX tabular that needs the package booktabs; runs that did not finish as comments above it."""
    heads, *body = _text(rows[rows.status == "finished"], metrics, "**", kind)
    lines = [f"% {heading}. {footnote(rows, metrics, kind)}", "% Needs \\usepackage{booktabs}."]
    for run in rows[rows.status != "finished"].itertuples():
        lines.append(f"% {title(run.method)} seed {run.seed}: {' '.join(run.status.split())}")
    lines += [r"\begin{tabular}{l" + "r" * (len(heads) - 1) + "}", r"\toprule"]
    lines += [" & ".join(header.translate(LATEX) for header in heads) + r" \\", r"\midrule"]
    for line in body:
        cells = [text.strip("*").translate(LATEX) for text in line]
        bold = [
            rf"\textbf{{{cell}}}" if text.startswith("**") else cell for text, cell in zip(line, cells, strict=True)
        ]
        lines.append(" & ".join(bold) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
