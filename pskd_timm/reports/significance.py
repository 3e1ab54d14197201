"""Whether two methods' networks differ by more than the chance of which test samples there were.

Both are compared on the same test samples, so all is paired. With several seeds a sample enters once, with all its seeds:
the same image under three seeds is not three images. Samples that belong together (a column `group`: the tokens of a
sentence, the boxes of a photograph) are drawn, or change sides, together.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import gammaln, ndtr, ndtri

from ..metrics import METRICS, Metric
from .resampling import LAID_OUT, RESAMPLES, Predicted, group_of

LEVEL = 0.05
ERROR = "top1_error"
# A figure that jumps: of two equal networks on 600 or 2000 samples the basic bootstrap finds 12 to 17 % different at LEVEL,
# the normal one 4 or 5 % (200 simulations each).
JUMPING = ("coverage_at_5_risk",)
IMAGES = tuple(METRICS.values())


def mcnemar(wrong: np.ndarray, baseline_wrong: np.ndarray, group: np.ndarray | None = None) -> float:
    """Two-sided p of McNemar's exact test on booleans [S, N]: S seeds over N test samples, which may form `group`s [N].

    A sample's (a group's) difference is how many more seeds are wrong; if the methods were alike, each difference could as
    well have the other sign. One seed, no groups: the binomial test on the samples that only one of the two gets wrong.
    """
    difference = wrong.sum(axis=0) - baseline_wrong.sum(axis=0)
    if group is not None:
        difference = np.bincount(group, difference).astype(np.int64)
    likelihood = np.ones(1)  # of the sums −reach … reach of all differences with random signs
    for size, count in enumerate(np.bincount(np.abs(difference))[1:], start=1):
        of_size = np.zeros(2 * size * count + 1)
        of_size[:: 2 * size] = _fair_coins(count)
        likelihood = np.convolve(likelihood, of_size)
    sums = np.abs(np.arange(len(likelihood)) - len(likelihood) // 2)
    return float(min(1.0, likelihood[sums >= abs(difference.sum())].sum()))


def _fair_coins(count: int) -> np.ndarray:
    """Probabilities [count + 1] of 0 … count heads."""
    heads = np.arange(count + 1)
    return np.exp(gammaln(count + 1) - gammaln(heads + 1) - gammaln(count - heads + 1) - count * np.log(2))


def interval_and_p(draws: np.ndarray) -> tuple[float, float, float]:
    """95 % interval and two-sided p of a difference from `draws` [1 + R]: the observed one, then its resamples.

    The basic bootstrap (Davison and Hinkley, 1997): it takes out the bias that resampling gives to ECE.
    """
    observed, drawn = draws[0], draws[1:]
    if np.isnan(draws).any():
        return np.nan, np.nan, np.nan
    low, high = np.quantile(drawn, [1 - LEVEL / 2, LEVEL / 2])
    beyond = min((drawn <= 2 * observed).sum(), (drawn >= 2 * observed).sum())
    return 2 * observed - low, 2 * observed - high, float(min(1.0, 2 * max(beyond, 1) / len(drawn)))


def normal_interval_and_p(draws: np.ndarray) -> tuple[float, float, float]:
    """As `interval_and_p`, with a normal distribution of the draws' standard deviation around the observed difference."""
    observed, error = draws[0], draws[1:].std()
    reach = -ndtri(LEVEL / 2) * error
    return observed - reach, observed + reach, float(2 * ndtr(-abs(observed) / error)) if error else 1.0


def testable(metrics: Sequence[Metric], runs: Sequence[Predicted]) -> list[Metric]:
    """The metrics that can be resampled: those known here, and means of a column of their name that all `runs` have."""
    known = (ERROR, *LAID_OUT)
    return [metric for metric in metrics if metric.name in known or all(metric.name in run.outcomes for run in runs)]


def against(baseline: str, runs: dict[str, list[Predicted]], metrics: Sequence[Metric] = IMAGES) -> pd.DataFrame:
    """Every other method of `runs` against `baseline`, seed by seed: a row a metric that is `testable`.

    `runs` holds, for each method, a run a seed, all of the same test samples, the same seeds for all. Columns: method, metric,
    difference to the baseline, better (whether it is for the better), low, high (95 % interval; NaN for the error), p. All
    are NaN where a run has not kept what the metric needs.
    """
    each = [run for of_method in runs.values() for run in of_method]
    metrics, group = testable(metrics, each), group_of(each[0].outcomes)
    names = [metric.name for metric in metrics if metric.name != ERROR]
    figures = {m: np.mean([run.resampled(names) for run in of], axis=0) if names else None for m, of in runs.items()}
    wrong = {m: ~np.stack([run.outcomes.correct.to_numpy(bool) for run in of]) for m, of in runs.items()}
    rows = []
    for method in [m for m in runs if m != baseline]:
        for metric in metrics:
            if metric.name == ERROR:
                difference = 100 * (wrong[method].mean() - wrong[baseline].mean())
                found = difference, np.nan, np.nan, mcnemar(wrong[method], wrong[baseline], group)
            else:
                column = names.index(metric.name)
                draws = figures[method][:, column] - figures[baseline][:, column]
                interval = normal_interval_and_p if metric.name in JUMPING else interval_and_p
                found = draws[0], *interval(draws)
            better = found[0] > 0 if metric.higher_is_better else found[0] < 0
            rows.append((method, metric.name, found[0], better, *found[1:]))
    return pd.DataFrame(rows, columns=["method", "metric", "difference", "better", "low", "high", "p"])


HAS = ("has a lower ", "has a higher ")
QUALITY = {  # better, worse, and what else stands before p
    "top1_error": ("makes fewer errors", "makes more errors", ""),
    "ece": ("is better calibrated", "is worse calibrated", "ECE, "),
    "aurc": ("ranks its mistakes better", "ranks its mistakes worse", "AURC, "),
}


def p_in_words(p: float, metric: str = ERROR) -> str:
    """`p = 0.003`; small ones as a bound, which a resampled metric reaches with its number of draws."""
    if metric != ERROR and p <= 2 / RESAMPLES:
        return f"p ≤ {2 / RESAMPLES:g}"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def in_words(method: str, baseline: str, tests: pd.DataFrame, metrics: Sequence[Metric] = IMAGES) -> str:
    """What one method's rows of `against` say, in a sentence; `method` and `baseline` as they are to be called."""
    titles = {metric.name: "error" if metric.name == ERROR else metric.title for metric in metrics}

    def words(test) -> str:
        plain = f"{HAS[int(test.difference > 0)]}{titles[test.metric]}"
        better, worse, before = QUALITY.get(test.metric, (plain, plain, ""))
        return f"{better if test.better else worse} ({before}{p_in_words(test.p, test.metric)})"

    differ = _said_once([words(test) for test in tests.itertuples() if test.p < LEVEL])
    rest = [titles[test.metric] for test in tests.itertuples() if test.p >= LEVEL]
    no_difference = f"no difference in {in_a_row(rest)} can be shown with this many samples"
    if not differ:
        return f"{method} against {baseline}: {no_difference}."
    return f"{method} {in_a_row(differ)} than {baseline}" + (f"; {no_difference}." if rest else ".")


def _said_once(words: list[str]) -> list[str]:
    """`has a higher A`, `B` for `has a higher A`, `has a higher B`."""
    starts = [next((start for start in HAS if each.startswith(start)), "") for each in words]
    return [
        each.removeprefix(start) if start == before else each
        for each, start, before in zip(words, starts, ["", *starts], strict=False)
    ]


def in_a_row(words: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(words[:-1])] * bool(words[:-1]) + words[-1:])
