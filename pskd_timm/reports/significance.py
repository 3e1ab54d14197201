"""Whether two methods' networks differ by more than the chance of which test samples there were.

Both are tried on the same test samples, so all is paired. With several seeds a sample enters once, with all its seeds: the
same image under three seeds is not three images.
"""

import numpy as np
import pandas as pd
import torch
from scipy.stats import binom

from ..metrics import ECE_BINS, bin_of

RESAMPLES = 1000
LEVEL = 0.05
BOOTSTRAPPED = ("nll", "ece", "aurc")
AT_ONCE = 2_000_000  # numbers of a chunk of resamples: bounds memory


def mcnemar(wrong: np.ndarray, baseline_wrong: np.ndarray) -> float:
    """Two-sided p of McNemar's exact test on booleans [S, N]: S seeds over N test samples.

    A sample's difference is how many more seeds are wrong; if the methods were alike, each difference could as well
    have the other sign. One seed: the binomial test on the samples that only one of the two gets wrong.
    """
    difference = wrong.sum(axis=0) - baseline_wrong.sum(axis=0)
    likelihood = np.ones(1)  # of the sums −reach … reach of all differences with random signs
    for size, count in enumerate(np.bincount(np.abs(difference))[1:], start=1):
        of_size = np.zeros(2 * size * count + 1)
        of_size[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        likelihood = np.convolve(likelihood, of_size)
    sums = np.abs(np.arange(len(likelihood)) - len(likelihood) // 2)
    return float(min(1.0, likelihood[sums >= abs(difference.sum())].sum()))


class Sorted:
    """One run's outcomes (columns confidence, correct, nll), laid out so that a resample costs no sort."""

    def __init__(self, table: pd.DataFrame):
        confidence = torch.tensor(table.confidence.to_numpy())
        correct = table.correct.to_numpy().astype(np.float64)
        self.nll = table.nll.to_numpy(np.float64)
        self.gaps = np.zeros((len(table), ECE_BINS))
        self.gaps[np.arange(len(table)), bin_of(confidence).numpy()] = correct - table.confidence.to_numpy(np.float64)
        self.order = np.argsort(-table.confidence.to_numpy(), kind="stable")
        falling = table.confidence.to_numpy()[self.order]
        self.starts = np.flatnonzero(np.r_[True, falling[1:] != falling[:-1]])  # of each tie of equal confidences
        self.wrong = 1.0 - correct[self.order]

    def figures(self, counts: np.ndarray, harmonic: np.ndarray) -> np.ndarray:
        """NLL (nats), ECE (%) and AURC (× 10³) [R, 3] of resamples in which sample i stands `counts` [R, i] times.

        `harmonic` [N + 1] are the sums of 1/n. A tie of W samples with E errors, after B samples with C errors, adds
        Σ (C + j·E/W)/(B + j) over j = 1 … W to N·AURC: each of the tie's places has the average over its orders.
        """
        num_samples = counts.shape[1]
        nll = counts @ self.nll / num_samples
        ece = 100 * np.abs(counts @ self.gaps).sum(axis=1) / num_samples
        sorted_counts = counts[:, self.order]
        in_tie = np.add.reduceat(sorted_counts, self.starts, axis=1)
        errors = np.add.reduceat(sorted_counts * self.wrong, self.starts, axis=1)
        after = in_tie.cumsum(axis=1)
        before, errors_before = after - in_tie, errors.cumsum(axis=1) - errors
        rate = errors / np.maximum(in_tie, 1)
        places = harmonic[after.astype(np.int64)] - harmonic[before.astype(np.int64)]
        risk = errors + (errors_before - rate * before) * places
        return np.stack([nll, ece, 1000 * risk.sum(axis=1) / num_samples], axis=1)


def resampled(runs: list[pd.DataFrame], resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """NLL, ECE and AURC [len(runs), 1 + resamples, 3]: first of the test samples as they are, then of draws with replacement.

    Every run sees the same draws. `runs` have the columns confidence, correct and nll of the same test samples.
    """
    layouts, num_samples = [Sorted(table) for table in runs], len(runs[0])
    harmonic = np.r_[0.0, np.cumsum(1.0 / np.arange(1, num_samples + 1))]
    generator = np.random.default_rng(seed)
    found = [[layout.figures(np.ones((1, num_samples)), harmonic) for layout in layouts]]
    chunk = max(1, AT_ONCE // num_samples)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = generator.integers(num_samples, size=(rows, num_samples)) + num_samples * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * num_samples).reshape(rows, num_samples).astype(np.float64)
        found.append([layout.figures(counts, harmonic) for layout in layouts])
    return np.concatenate([np.stack(part) for part in found], axis=1)


def interval_and_p(draws: np.ndarray) -> tuple[float, float, float]:
    """95 % interval and two-sided p of a difference from `draws` [1 + R]: the observed one, then its resamples.

    The basic bootstrap (Davison and Hinkley, 1997): it takes out the bias that resampling gives to ECE.
    """
    observed, drawn = draws[0], draws[1:]
    low, high = np.quantile(drawn, [1 - LEVEL / 2, LEVEL / 2])
    beyond = min((drawn <= 2 * observed).sum(), (drawn >= 2 * observed).sum())
    return 2 * observed - low, 2 * observed - high, float(min(1.0, 2 * max(beyond, 1) / len(drawn)))


def against(baseline: str, tables: dict[str, list[pd.DataFrame]], seed: int = 0) -> pd.DataFrame:
    """Every other method of `tables` against `baseline`, seed by seed: a row a metric.

    `tables` holds, for each method, a frame a seed of the same test samples, the same seeds for all. Columns: method,
    metric, difference (below 0 is better than the baseline), low, high (95 % interval; NaN for the error), p.
    """
    runs = [(method, table) for method, each in tables.items() for table in each]
    figures = resampled([table for _, table in runs], seed=seed)
    mean = {m: figures[[i for i, (name, _) in enumerate(runs) if name == m]].mean(axis=0) for m in tables}
    wrong = {m: ~np.stack([table.correct.to_numpy(bool) for table in each]) for m, each in tables.items()}
    rows = []
    for method in tables:
        if method == baseline:
            continue
        difference = 100 * (wrong[method].mean() - wrong[baseline].mean())
        rows.append((method, "top1_error", difference, np.nan, np.nan, mcnemar(wrong[method], wrong[baseline])))
        for i, metric in enumerate(BOOTSTRAPPED):
            draws = mean[method][:, i] - mean[baseline][:, i]
            rows.append((method, metric, draws[0], *interval_and_p(draws)))
    return pd.DataFrame(rows, columns=["method", "metric", "difference", "low", "high", "p"])


QUALITY = {
    "top1_error": ("makes fewer errors", "makes more errors", ""),
    "nll": ("has a lower NLL", "has a higher NLL", ""),
    "ece": ("is better calibrated", "is worse calibrated", "ECE, "),
    "aurc": ("ranks its mistakes better", "ranks its mistakes worse", "AURC, "),
}
NAMES = {"top1_error": "error", "nll": "NLL", "ece": "ECE", "aurc": "AURC"}


def p_in_words(p: float, metric: str = "top1_error") -> str:
    """`p = 0.003`; small ones as a bound, which a resampled metric reaches with its number of draws."""
    if metric in BOOTSTRAPPED and p <= 2 / RESAMPLES:
        return f"p ≤ {2 / RESAMPLES:g}"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def in_words(method: str, baseline: str, tests: pd.DataFrame) -> str:
    """What one method's rows of `against` say, in a sentence; `method` and `baseline` as they are to be called."""
    told = [
        f"{QUALITY[test.metric][int(test.difference > 0)]} ({QUALITY[test.metric][2]}{p_in_words(test.p, test.metric)})"
        for test in tests.itertuples()
        if test.p < LEVEL
    ]
    rest = [NAMES[test.metric] for test in tests.itertuples() if test.p >= LEVEL]
    no_difference = f"no difference in {_and(rest)} can be told from this many samples"
    if not told:
        return f"{method} against {baseline}: {no_difference}."
    return f"{method} {_and(told)} than {baseline}" + (f"; {no_difference}." if rest else ".")


def _and(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1])] * bool(words[:-1]) + words[-1:])
