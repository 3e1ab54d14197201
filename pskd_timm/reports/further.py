"""The figures beside a task's own that a report is asked for, of what finished runs have kept."""

from collections.abc import Sequence

from ..errors import InputError, nearest
from ..metrics import ALL, ALL_METRICS, FURTHER_METRICS, Metric
from .plots import title
from .runs import Run
from .significance import in_a_row

MEANINGS = {
    "brier": "squared distance of the probabilities from the right class's 1 and the others' 0, from 0 to 2 (Brier, 1950).",
    "ece15": "ECE over fifteen equal bins instead of ten, as many papers have it.",
    "adaptive_ece": "ECE over fifteen bins that hold equally many samples (Nguyen and O'Connor, 2015).",
    "classwise_ece": "ECE of each class's own probability, in fifteen bins, averaged over the classes (Kull et al., 2019).",
    "smooth_ece": "ECE with a kernel in the place of bins, as wide as the error itself (Błasiok and Nakkiran, 2024).",
    "augrc": "the share of all samples that is accepted and wrong, averaged over how many are accepted (Traub et al., 2024).",
    "coverage_at_5_risk": "the most samples that a threshold on confidence accepts with no more than 5 % of them wrong; "
    "higher is better.",
    "risk_at_80_coverage": "the error among the 80 % of the samples of most confidence.",
}


def further_metrics(names: Sequence[str]) -> list[Metric]:
    """The metrics of `--metrics NAMES|all`, without those that every report has. Raises InputError for an unknown name."""
    for name in names:
        if name not in (*ALL_METRICS, ALL):
            known = ", ".join((*FURTHER_METRICS, ALL))
            raise InputError(f"--metrics: there is no {name!r}, only {known}{nearest(name, ALL_METRICS)}")
    return [metric for name, metric in FURTHER_METRICS.items() if name in names or ALL in names]


def add_further(runs: Sequence[Run], metrics: Sequence[Metric]) -> tuple[list[Metric], list[str]]:
    """Put `metrics` into the figures of the finished `runs`; those that any run's predictions tell, and a note of the others."""
    names, absent = [metric.name for metric in metrics], {}
    finished = [run for run in runs if run.values]
    for run in finished:
        for which in ("last", "best"):
            run.values[which] |= run.kept[which].further(names) if which in run.kept else {}
        missing = tuple(metric.title for metric in metrics if metric.name not in run.values["last"])
        if missing:
            absent.setdefault(missing, []).append(f"{title(run.method)} seed {run.seed}")
    found = [metric for metric in metrics if any(metric.name in run.values["last"] for run in finished)]
    return found, [
        f"Not computed for {in_a_row(of_runs)}, whose predictions do not tell "
        f"{'it' if len(titles) == 1 else 'them'} any more or never did: {in_a_row(list(titles))}."
        for titles, of_runs in absent.items()
    ]
