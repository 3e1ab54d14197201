"""Whether two methods' networks differ by more than the chance of which test samples there were.

Both are compared on the same test samples, so all is paired. With several seeds a sample enters once, with all its seeds:
the same image under three seeds is not three images. Samples that belong together (a column `group`: the tokens of a
sentence, the boxes of a photograph) are drawn, or change sides, together.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import gammaln

from ..metrics import ECE_BINS, METRICS, Metric, bin_of

RESAMPLES = 1000
LEVEL = 0.05
ERROR = "top1_error"
BOOTSTRAPPED = ("nll", "ece", "aurc")  # from confidence, correct and nll; others from a column of their own
AT_ONCE = 2_000_000  # numbers of a chunk of resamples: bounds memory
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


class Sorted:
    """One run's outcomes (columns confidence, correct, nll), laid out so that a resample costs no sort."""

    def __init__(self, table: pd.DataFrame, metrics: Sequence[str] = BOOTSTRAPPED):
        self.metrics = metrics
        self.means = {name: table[name].to_numpy(np.float64) for name in metrics if name not in ("ece", "aurc")}
        confidence, correct = table.confidence.to_numpy(), table.correct.to_numpy().astype(np.float64)
        self.gaps = np.zeros((len(table), ECE_BINS))
        self.gaps[np.arange(len(table)), bin_of(confidence)] = correct - confidence.astype(np.float64)
        self.order = np.argsort(-confidence, kind="stable")
        falling = confidence[self.order]
        self.starts = np.flatnonzero(np.r_[True, falling[1:] != falling[:-1]])  # of each tie of equal confidences
        self.wrong = 1.0 - correct[self.order]

    def figures(self, counts: np.ndarray, harmonic: np.ndarray) -> np.ndarray:
        """The metrics [R, len(metrics)] of resamples in which sample i stands `counts` [R, i] times.

        `harmonic` are the sums of 1/n, up to the largest number of samples that is drawn.
        """
        num_samples = counts.sum(axis=1)
        found = []
        for name in self.metrics:
            if name == "ece":
                found.append(100 * np.abs(counts @ self.gaps).sum(axis=1) / num_samples)
            elif name == "aurc":
                found.append(1000 * self._risk(counts, harmonic) / num_samples)
            else:
                found.append(counts @ self.means[name] / num_samples)
        return np.stack(found, axis=1)

    def _risk(self, counts: np.ndarray, harmonic: np.ndarray) -> np.ndarray:
        """N·AURC [R]: a tie of W samples with E errors, after B samples with C errors, adds Σ (C + j·E/W)/(B + j) over
        j = 1 … W to it, since each of the tie's places has the average over its orders."""
        sorted_counts = counts[:, self.order]
        in_tie = np.add.reduceat(sorted_counts, self.starts, axis=1)
        errors = np.add.reduceat(sorted_counts * self.wrong, self.starts, axis=1)
        after = in_tie.cumsum(axis=1)
        before, errors_before = after - in_tie, errors.cumsum(axis=1) - errors
        rate = errors / np.maximum(in_tie, 1)
        places = harmonic[after.astype(np.int64)] - harmonic[before.astype(np.int64)]
        return (errors + (errors_before - rate * before) * places).sum(axis=1)


def resampled(
    runs: list[pd.DataFrame], resamples: int = RESAMPLES, seed: int = 0, metrics: Sequence[str] = BOOTSTRAPPED
) -> np.ndarray:
    """The metrics [len(runs), 1 + resamples, len(metrics)], first of the samples as they are, then of draws with replacement.

    Every run sees the same draws, of whole groups where there is a column `group`. `runs` have the columns confidence,
    correct and nll, or what else `metrics` names, of the same test samples.
    """
    layouts, num_samples = [Sorted(table, metrics) for table in runs], len(runs[0])
    group = group_of(runs[0])
    units = np.arange(num_samples) if group is None else group
    num_units, largest = units.max() + 1, np.bincount(units).max()
    harmonic = np.r_[0.0, np.cumsum(1.0 / np.arange(1, num_units * largest + 1))]
    generator = np.random.default_rng(seed)
    found = [[layout.figures(np.ones((1, num_samples)), harmonic) for layout in layouts]]
    chunk = max(1, AT_ONCE // num_samples)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = generator.integers(num_units, size=(rows, num_units)) + num_units * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * num_units).reshape(rows, num_units).astype(np.float64)
        counts = counts if group is None else counts[:, group]
        found.append([layout.figures(counts, harmonic) for layout in layouts])
    return np.concatenate([np.stack(part) for part in found], axis=1)


def group_of(table: pd.DataFrame) -> np.ndarray | None:
    """The number 0, 1, … of each sample's group [N], None where every sample is one of its own."""
    return np.unique(table.group, return_inverse=True)[1] if "group" in table else None


def interval_and_p(draws: np.ndarray) -> tuple[float, float, float]:
    """95 % interval and two-sided p of a difference from `draws` [1 + R]: the observed one, then its resamples.

    The basic bootstrap (Davison and Hinkley, 1997): it takes out the bias that resampling gives to ECE.
    """
    observed, drawn = draws[0], draws[1:]
    low, high = np.quantile(drawn, [1 - LEVEL / 2, LEVEL / 2])
    beyond = min((drawn <= 2 * observed).sum(), (drawn >= 2 * observed).sum())
    return 2 * observed - low, 2 * observed - high, float(min(1.0, 2 * max(beyond, 1) / len(drawn)))


def testable(metrics: Sequence[Metric], tables: Sequence[pd.DataFrame]) -> list[Metric]:
    """The metrics that can be resampled: those known here, and means of a column of their name that all `tables` have."""
    known = (ERROR, *BOOTSTRAPPED)
    return [metric for metric in metrics if metric.name in known or all(metric.name in table for table in tables)]


def against(
    baseline: str, tables: dict[str, list[pd.DataFrame]], seed: int = 0, metrics: Sequence[Metric] = IMAGES
) -> pd.DataFrame:
    """Every other method of `tables` against `baseline`, seed by seed: a row a metric that is `testable`.

    `tables` holds, for each method, a frame a seed of the same test samples, the same seeds for all. Columns: method,
    metric, difference to the baseline, better (whether it is for the better), low, high (95 % interval; NaN for the
    error), p.
    """
    runs = [(method, table) for method, each in tables.items() for table in each]
    metrics = testable(metrics, [table for _, table in runs])
    names = [metric.name for metric in metrics if metric.name != ERROR]
    figures = (
        resampled([table for _, table in runs], seed=seed, metrics=names) if names else np.empty((len(runs), 0, 0))
    )
    mean = {m: figures[[i for i, (name, _) in enumerate(runs) if name == m]].mean(axis=0) for m in tables}
    wrong = {m: ~np.stack([table.correct.to_numpy(bool) for table in each]) for m, each in tables.items()}
    group = group_of(runs[0][1])
    rows = []
    for method in [m for m in tables if m != baseline]:
        for metric in metrics:
            if metric.name == ERROR:
                difference = 100 * (wrong[method].mean() - wrong[baseline].mean())
                found = difference, np.nan, np.nan, mcnemar(wrong[method], wrong[baseline], group)
            else:
                column = names.index(metric.name)
                draws = mean[method][:, column] - mean[baseline][:, column]
                found = draws[0], *interval_and_p(draws)
            better = (found[0] > 0) == metric.higher_is_better
            rows.append((method, metric.name, found[0], better, *found[1:]))
    return pd.DataFrame(rows, columns=["method", "metric", "difference", "better", "low", "high", "p"])


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
        side = "higher" if test.difference > 0 else "lower"
        better, worse, before = QUALITY.get(test.metric, (f"has a {side} {titles[test.metric]}",) * 2 + ("",))
        return f"{better if test.better else worse} ({before}{p_in_words(test.p, test.metric)})"

    differ = [words(test) for test in tests.itertuples() if test.p < LEVEL]
    rest = [titles[test.metric] for test in tests.itertuples() if test.p >= LEVEL]
    no_difference = f"no difference in {in_a_row(rest)} can be shown with this many samples"
    if not differ:
        return f"{method} against {baseline}: {no_difference}."
    return f"{method} {in_a_row(differ)} than {baseline}" + (f"; {no_difference}." if rest else ".")


def in_a_row(words: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(words[:-1])] * bool(words[:-1]) + words[-1:])
