"""Which finished runs are compared with which, over the same test samples and seeds."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from ..metrics import Metric
from .plots import title
from .resampling import Predicted
from .runs import Run
from .scaling import scaled_name, with_scaled_runs
from .significance import LEVEL, against, in_a_row

NONE = "no method"


class Versus(NamedTuple):
    """Methods against one `baseline` over the `seeds` they share: `tests` are rows of `significance.against`."""

    baseline: str
    seeds: tuple[int, ...]
    tests: pd.DataFrame

    def of(self, metrics: Sequence[Metric]) -> "Versus":
        """The rows of these `metrics`."""
        return self._replace(tests=self.tests[self.tests.metric.isin([metric.name for metric in metrics])])


def as_frame(tests: Sequence[Versus]) -> pd.DataFrame:
    """All rows in one table, with the `baseline` and the number of `seeds` before them."""
    parts = [found.assign(baseline=baseline, seeds=len(seeds)) for baseline, seeds, found in tests]
    return pd.concat(parts)[["baseline", "seeds", *tests[0].tests.columns]]


def compare(
    finished: dict[str, list[Run]], scaled: list[Run], metrics: Sequence[Metric]
) -> tuple[list[Versus], list[Versus]]:
    """All against their baselines, the `scaled` baselines among them, and the others against these. No run is resampled twice."""
    each = with_scaled_runs(finished, scaled)
    runs = predicted(each)
    with_baseline = against_baseline(each, runs, metrics)
    return with_baseline, against_baseline(each, runs, metrics, True) if scaled else []


def predicted(finished: dict[str, list[Run]]) -> dict[str, dict[int, Predicted]]:
    """Method → seed → what the last epoch's network predicted, where it was kept."""
    kept = {
        method: {run.seed: Predicted(run.outcomes, run.kept.get("last")) for run in runs if run.outcomes is not None}
        for method, runs in finished.items()
    }
    return {method: by_seed for method, by_seed in kept.items() if by_seed}


def against_baseline(
    finished: dict[str, list[Run]],
    runs: dict[str, dict[int, Predicted]],
    metrics: Sequence[Metric],
    scaled: bool = False,
) -> list[Versus]:
    """All methods that share a baseline, seeds and the test samples, together.

    With `scaled` it is the baseline after temperature scaling, to which the one before is not compared.
    """
    alike: dict[tuple, list[str]] = {}
    for method, of_method in finished.items():
        before = of_method[0].baseline
        baseline = scaled_name(before) if scaled else before
        if method in (before, baseline) or not {method, baseline} <= runs.keys():
            continue
        seeds = tuple(
            seed
            for seed in sorted(runs[method].keys() & runs[baseline].keys())
            if runs[method][seed].outcomes.label.equals(runs[baseline][seed].outcomes.label)
        )
        if seeds:
            alike.setdefault((baseline, seeds), []).append(method)
    found = []
    for (baseline, seeds), methods in alike.items():
        each = {method: [runs[method][seed] for seed in seeds] for method in (baseline, *methods)}
        found.append(Versus(baseline, seeds, against(baseline, each, metrics)))
    return found


def still_better(tests: Sequence[Versus], metrics: Sequence[Metric]) -> list[str]:
    """A sentence for each scaled baseline: which methods are better than it in which of `metrics`."""
    sentences: dict[str, dict[str, list[str]]] = {}
    for baseline, seeds, found in tests:
        runs = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
        start = f"Still better than {title(baseline)}, temperature scaling of the baseline (p < {LEVEL}, {runs})"
        known = set(found.metric[found.p.notna()])
        of_each = [metric.name for metric in metrics if metric.name in known]
        if of_each:
            better = sentences.setdefault(start, {})
            for name in of_each:
                better.setdefault(name, [])
            for test in found[(found.p < LEVEL) & found.better & found.metric.isin(of_each)].itertuples():
                better[test.metric].append(title(test.method))
    titles = {metric.name: metric.title for metric in metrics}
    return [
        f"{start}: {'; '.join(f'{titles[name]}: {in_a_row(methods) or NONE}' for name, methods in of_each.items())}."
        for start, of_each in sentences.items()
    ]
