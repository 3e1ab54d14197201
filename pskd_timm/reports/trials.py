"""The trials of a search: what each was, and a search's folder read back."""

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from ..errors import InputError
from ..files import warn
from ..metrics import METRICS, Metric
from ..run.folder import read_metrics, read_result

DONE, STOPPED, DIVERGED, REFUSED, TOO_LARGE = "finished", "stopped early", "diverged", "refused", "out of memory"


@dataclass
class Trial:
    """One choice of settings: how it ended, its figures on the held-out part (mean over seeds), its metric by epoch."""

    number: int
    state: str
    settings: dict
    figures: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)  # sample standard deviation over seeds
    by_epoch: dict[int, float] = field(default_factory=dict)  # of the first seed
    seconds: float = 0.0


@dataclass
class Search:
    """A search read back: its folder, what it searched (as `--over` takes it), the metric it ranks by, its trials as a table."""

    folder: Path
    method: str
    over: list[str]
    metric: Metric
    metrics: list[Metric]
    seeds: list[int]
    holdout_fraction: float
    trials: pd.DataFrame

    @property
    def best(self) -> pd.Series | None:
        """The finished trial with the best metric; None where none finished."""
        return best_trial(self.trials, self.metric)


def best_trial(table: pd.DataFrame, metric: Metric) -> pd.Series | None:
    """The finished trial of a `trials_table` with the best `metric`; None where none finished."""
    values = table[metric.name].where(table.state == DONE).dropna()
    return None if values.empty else table.loc[values.idxmax() if metric.higher_is_better else values.idxmin()]


def read_trials(folder: Path) -> list[Trial]:
    """The trials in a search's folder. Raises ValueError, KeyError or TypeError where the file is damaged."""
    path = folder / "trials.jsonl"
    trials = [Trial(**json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []
    for trial in trials:
        trial.by_epoch = {int(epoch): value for epoch, value in trial.by_epoch.items()}
    return trials


def find_searches(paths: Iterable[Path]) -> list[Search]:
    """The searches in and directly below the folders `paths` that have trials; a damaged one is left out with a warning."""
    folders = dict.fromkeys(
        file.parent.resolve() for path in paths for file in [path / "search.json", *sorted(path.glob("*/search.json"))]
    )
    found = []
    for folder in folders:
        if not (folder / "search.json").is_file():
            continue
        try:
            there, trials = json.loads((folder / "search.json").read_text(encoding="utf-8")), read_trials(folder)
            if trials:
                metrics = trials_metrics(folder)
                found.append(
                    Search(
                        folder,
                        there["recipe"]["method"],
                        [ranged(*each) for each in there["over"].items()],
                        next(metric for metric in metrics if metric.name == there["metric"]),
                        metrics,
                        there["seeds"],
                        there["recipe"]["data.holdout_fraction"],
                        trials_table(trials, metrics),
                    )
                )
        except (ValueError, KeyError, TypeError, StopIteration, InputError) as error:
            warn(f"left out: {folder}: what it holds of a search is damaged ({error!r})")
    return found


def trials_metrics(folder: Path) -> list[Metric]:
    """The metrics of a search's runs, as the first finished one says; the six of images where there is none."""
    finished = next(iter(sorted(folder.glob("trial*/*/seed*/result.json"))), None)
    return read_metrics(read_result(finished.parent)) if finished else list(METRICS.values())


def ranged(key: str, drawn_from: dict) -> str:
    """A range of search.json as `--over` takes it."""
    low_high = f"{drawn_from['low']:g}:{drawn_from['high']:g}{':log' * drawn_from['log']}"
    return f"{key}={','.join(drawn_from['choices']) or low_high}"


def trials_table(trials: list[Trial], metrics: Sequence[Metric]) -> pd.DataFrame:
    """A row a trial: trial, state, each setting by its dotted name, the metrics, their `_std` over seeds, seconds."""
    rows = []
    for trial in trials:
        spread = {f"{name}_std": value for name, value in trial.spread.items()}
        rows.append(
            {
                "trial": trial.number,
                "state": trial.state,
                **trial.settings,
                **{metric.name: trial.figures.get(metric.name) for metric in metrics},
                **spread,
                "seconds": trial.seconds,
            }
        )
    table = pd.DataFrame(rows)
    for key in trials[0].settings:
        with suppress(ValueError):  # words stay words, chosen numbers are numbers
            table[key] = pd.to_numeric(table[key])
    return table


def searched(table: pd.DataFrame, metrics: Sequence[Metric]) -> list[str]:
    """The settings of a `trials_table`: the columns between `state` and the metrics."""
    return list(table.columns[2 : list(table.columns).index(metrics[0].name)])


def shown_in_search(metrics: Sequence[Metric]) -> list[Metric]:
    """The metrics that a search's tables and pictures have room for, the one that chooses the best epoch last."""
    first, *others = [metric for metric in metrics if metric.in_brief]
    return [metric for metric in others if metric.name != "aurc"] + [first]
