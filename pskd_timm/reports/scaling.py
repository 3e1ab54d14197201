"""Temperature scaling of finished runs, and the baseline with it as a row beside the methods: what one would do without them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from pyarrow import ArrowException

from ..calibration import Temperature, fit_to_parts, kept_probabilities, probability_parts
from ..errors import first_line
from ..metrics import Metric
from .kept import SCALED_METRICS, Kept
from .plots import SCALED, title
from .runs import HOLDOUT, PREDICTIONS, Run, by_method, rows


@dataclass
class Scaling:
    """Each run's temperature of the last epoch, by its folder, with its predictions at it; runs that cannot be read.

    Left out are runs without held-out predictions, and those that were scored on the held-out part itself.
    """

    fitted: dict[Path, tuple[Temperature, Kept]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)


def scale(finished: dict[str, list[Run]]) -> Scaling:
    """The temperatures of the finished runs, each fitted on the run's held-out predictions."""
    found = Scaling()
    for run in (run for runs in finished.values() for run in runs):
        try:
            if (fitted := at_temperature(run, "last")) is not None:
                fitted[1].outcomes  # noqa: B018, read here, where what cannot be read is told
                found.fitted[run.folder] = fitted
        except (ArrowException, OSError) as error:
            found.unreadable.append(f"{title(run.method)}, seed {run.seed}: {first_line(error)}")
    return found


def at_temperature(run: Run, which: str) -> tuple[Temperature, Kept] | None:
    """The temperature of the `last` or `best` epoch of a run, and its predictions at it; None where nothing can be fitted."""
    folder = run.folder if which == "last" else run.folder / "best"
    held_out, scored = folder / HOLDOUT, folder / PREDICTIONS
    if run.values["evaluated_on"] == "holdout" or not {"nll", "ece"} <= run.values[which].keys():
        return None
    if not (held_out.is_file() and scored.is_file() and kept_probabilities(held_out) and kept_probabilities(scored)):
        return None
    fitted = fit_to_parts(part[:2] for part in probability_parts(held_out))
    return fitted, Kept(scored, fitted.value)


def scaled_baselines(finished: dict[str, list[Run]], scaling: Scaling) -> list[Run]:
    """The baseline's runs that have a temperature, each as a run of the method SCALED: its figures are those after scaling."""
    found = []
    for run in (run for runs in finished.values() for run in runs if run.name == "baseline"):
        fitted, kept = scaling.fitted.get(run.folder, (None, None))
        if fitted and not fitted.reason:
            try:
                found.append(scaled_baseline(run, kept))
            except (ArrowException, OSError) as error:
                scaling.unreadable.append(f"{title(run.method)}, seed {run.seed}: {first_line(error)}")
    return found


def scaled_baseline(run: Run, last: Kept) -> Run:
    """A baseline's run after temperature scaling; `last` are its predictions of the last epoch."""
    kept, (fitted, best) = {"last": last}, at_temperature(run, "best") or (None, None)
    if fitted and not fitted.reason:
        kept["best"] = best
    values = dict(run.values)
    for which in ("last", "best"):
        after = kept[which].scaled_figures() if which in kept else dict.fromkeys(SCALED_METRICS, np.nan)
        values[which] = run.values[which] | after
    outcomes = run.outcomes.assign(**{name: last.outcomes[name].to_numpy() for name in ("confidence", "nll")})
    return replace(run, name=SCALED, values=values, outcomes=outcomes, kept=kept)


def scaled_name(method: str) -> str:
    """What a baseline's runs after scaling are called, of the `method` of them as they are."""
    return f"{SCALED}{method.removeprefix('baseline')}"


def with_scaled_runs(finished: dict[str, list[Run]], scaled: Sequence[Run]) -> dict[str, list[Run]]:
    """The finished runs of each method and, after each baseline's, those of it after scaling."""
    added, found = by_method(list(scaled)), {}
    for method, runs in finished.items():
        found[method] = runs
        if (after := scaled_name(method)) in added:
            found[after] = added[after]
    return found


def with_scaled(table: pd.DataFrame, scaled: Sequence[Run], further: Sequence[Metric]) -> pd.DataFrame:
    """`runs.rows` with those of the scaled baselines, each after its own baseline's."""
    if not scaled:
        return table
    added = rows(list(scaled), further)
    added = added[added.status == "finished"]  # a seed without a temperature is no missing run
    parts = []
    for method in table.method.unique():
        parts += [table[table.method == method], added[added.method == scaled_name(method)]]
    return pd.concat([part for part in parts if len(part)], ignore_index=True)
