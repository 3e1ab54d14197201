"""How the differences to the baseline go with a setting in which the runs differ, such as the number of epochs."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from ..metrics import Metric
from .plots import title
from .runs import Run, identity
from .tables import Cell, rows_in_markdown

LEAST_VALUES = 3  # of a setting: a line goes through any two points


class BySetting(NamedTuple):
    """Each run's difference to the baseline's run of its seed and settings.

    `differences` has a row a run: `value` of the setting `key`, `method` (with the other settings that set it apart), `seed`
    and, for each of `metrics`, a column of its name.
    """

    key: str
    metrics: list[Metric]
    differences: pd.DataFrame

    def lines(self) -> list[tuple[str, float, list[Cell]]]:
        """A line a method and value: both, and the mean difference in each metric over the seeds."""
        found = []
        for (method, value), of in self.differences.groupby(["method", "value"], sort=False):
            cells = [Cell(of[m.name].mean(), of[m.name].std(), len(of), m.digits, signed=True) for m in self.metrics]
            found.append((method, value, cells))
        order = list(self.differences.method.unique())
        return sorted(found, key=lambda line: (order.index(line[0]), line[1]))

    def markdown(self) -> str:
        """The lines as a table in Markdown."""
        heads = ["method", self.key, "runs", *(metric.header for metric in self.metrics)]
        body = [
            [title(method), f"{value:g}", str(cells[0].n), *map(str, cells)] for method, value, cells in self.lines()
        ]
        return rows_in_markdown(heads, body)


def by_setting(finished: dict[str, list[Run]], metrics: Sequence[Metric]) -> BySetting | None:
    """The differences by the numeric setting that has the most values in one method; None where none has LEAST_VALUES.

    Methods that have fewer values of it are left out.
    """
    metrics = [metric for metric in metrics if metric.in_brief]
    by_place = {(run.method, run.seed): run for runs in finished.values() for run in runs}
    pairs = [(run, by_place.get((run.baseline, run.seed))) for run in by_place.values() if run.method != run.baseline]
    pairs = [(run, baseline) for run, baseline in pairs if baseline]
    tables = {key: _differences(key, pairs, metrics) for key in _numeric(run for run, _ in pairs)}
    widest = max(tables, key=lambda key: _most_values(tables[key]), default=None)
    if widest is None or _most_values(tables[widest]) < LEAST_VALUES:
        return None
    table = tables[widest]
    wide = table.groupby("method").value.transform("nunique") >= LEAST_VALUES
    return BySetting(widest, metrics, table[wide].reset_index(drop=True))


def _numeric(runs) -> list[str]:
    """The settings that are a number in some of the runs, in the recipe's order."""
    seen = dict.fromkeys(key for run in runs for key, value in identity(run).items() if _is_number(value))
    return list(seen)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _differences(key: str, pairs: list[tuple[Run, Run]], metrics: Sequence[Metric]) -> pd.DataFrame:
    lines = []
    for run, baseline in pairs:
        value = identity(run).get(key)
        if not _is_number(value):
            continue
        one, other = run.values["last"], baseline.values["last"]
        method = run.method.replace(f" {key}={value}", "")
        differences = {metric.name: one[metric.name] - other[metric.name] for metric in metrics}
        lines.append({"value": value, "method": method, "seed": run.seed} | differences)
    return pd.DataFrame(lines, columns=["value", "method", "seed", *(metric.name for metric in metrics)])


def _most_values(table: pd.DataFrame) -> int:
    return int(table.groupby("method").value.nunique().max()) if len(table) else 0
