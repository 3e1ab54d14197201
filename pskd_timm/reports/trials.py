"""The trials of a search: what each was, and a search's folder read back."""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from ..files import warn
from ..metrics import METRICS

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
    """A search read back: its folder, what it searched (as `--over` takes it), what it ranks by, its trials as a table."""

    folder: Path
    method: str
    over: list[str]
    metric: str
    seeds: list[int]
    holdout_fraction: float
    trials: pd.DataFrame

    @property
    def best(self) -> pd.Series | None:
        """The finished trial with the lowest metric; None where none finished."""
        done = self.trials[self.trials.state == DONE]
        return done.loc[done[self.metric].idxmin()] if len(done) else None


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
                found.append(
                    Search(
                        folder,
                        there["recipe"]["method"],
                        [ranged(*each) for each in there["over"].items()],
                        there["metric"],
                        there["seeds"],
                        there["recipe"]["data.holdout_fraction"],
                        trials_table(trials),
                    )
                )
        except (ValueError, KeyError, TypeError) as error:
            warn(f"left out: {folder}: what it holds of a search is damaged ({error!r})")
    return found


def ranged(key: str, drawn_from: dict) -> str:
    """A range of search.json as `--over` takes it."""
    low_high = f"{drawn_from['low']:g}:{drawn_from['high']:g}{':log' * drawn_from['log']}"
    return f"{key}={','.join(drawn_from['choices']) or low_high}"


def trials_table(trials: list[Trial]) -> pd.DataFrame:
    """A row a trial: trial, state, each setting by its dotted name, the six figures, their `_std` over seeds, seconds."""
    rows = []
    for trial in trials:
        spread = {f"{name}_std": value for name, value in trial.spread.items()}
        rows.append(
            {
                "trial": trial.number,
                "state": trial.state,
                **trial.settings,
                **{name: trial.figures.get(name) for name in METRICS},
                **spread,
                "seconds": trial.seconds,
            }
        )
    table = pd.DataFrame(rows)
    for key in trials[0].settings:
        with suppress(ValueError):  # words stay words, chosen numbers are numbers
            table[key] = pd.to_numeric(table[key])
    return table


def searched(table: pd.DataFrame) -> list[str]:
    """The settings of a `trials_table`: the columns between `state` and the figures."""
    return list(table.columns[2 : list(table.columns).index(next(iter(METRICS)))])
