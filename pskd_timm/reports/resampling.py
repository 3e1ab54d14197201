"""The figures of test samples drawn with replacement, without writing a draw out and sorting it again.

A draw is how often each sample stands in it. What a run predicted of the samples is laid out once; then the figures of many
draws are sums and products with these counts. They are those that the same samples, written out, would have.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import coo_array

from ..metrics import ECE_BINS, FURTHER_BINS, GRID, OF_ROWS, bin_of, grid_places, smooth_errors
from .kept import Kept

RESAMPLES = 1000
AT_ONCE = 50_000  # numbers of a chunk of resamples: what is made of it on the way fits into a processor's cache

OfCounts = Callable[[np.ndarray], np.ndarray]  # a figure [R] of draws in which sample i stands counts [R, i] times


class Ranked(NamedTuple):
    """Draws by falling confidence, int64 [R, T] with a column for each of T distinct confidences: how many samples there are of
    it, how many of them are wrong, and of both how many there are up to it."""

    confidence: np.ndarray  # [T]
    size: np.ndarray
    errors: np.ndarray
    upto: np.ndarray
    errors_upto: np.ndarray

    def among_first(self, sums: np.ndarray, places: np.ndarray) -> np.ndarray:
        """`sums` [R, T] up to each confidence, of the first `places` [R, P] samples: equal confidences share alike."""
        start = np.zeros((len(sums), 1))
        upto, sums = np.hstack([start, self.upto]), np.hstack([start, sums])
        return np.stack([np.interp(*row) for row in zip(places, upto, sums, strict=True)])


def aurc(ranked: Ranked) -> np.ndarray:
    """× 10³. W samples of one confidence with E errors, after B samples with C errors, add Σ (C + j·E/W)/(B + j) over
    j = 1 … W, since each of their places has the average over their orders."""
    before, errors_before = ranked.upto - ranked.size, ranked.errors_upto - ranked.errors
    most = int(ranked.upto[:, -1].max())
    harmonic = np.r_[0.0, np.cumsum(1.0 / np.arange(1, most + 1))]
    rate = ranked.errors / np.maximum(ranked.size, 1)
    places = np.diff(harmonic.take(ranked.upto), axis=1, prepend=0.0)
    risk = (ranked.errors + (errors_before - rate * before) * places).sum(axis=1)
    return 1000 * risk / ranked.upto[:, -1]


def augrc(ranked: Ranked) -> np.ndarray:
    """× 10³. As above, Σ (C + j·E/W) over j = 1 … W is W·C + E·(W + 1)/2."""
    errors_before = ranked.errors_upto - ranked.errors
    accepted = (ranked.size * errors_before + ranked.errors * (ranked.size + 1) / 2).sum(axis=1)
    return 1000 * (accepted - ranked.errors_upto[:, -1] / 2) / ranked.upto[:, -1] ** 2


def coverage_at_risk(ranked: Ranked, risk: float = 0.05) -> np.ndarray:
    """In %."""
    allowed = ranked.errors_upto / np.maximum(ranked.upto, 1) <= risk + 1e-12
    return 100 * np.where(allowed, ranked.upto, 0).max(axis=1) / ranked.upto[:, -1]


def risk_at_coverage(ranked: Ranked, coverage: float = 0.8) -> np.ndarray:
    """In %."""
    accepted = np.maximum(1, np.ceil(coverage * ranked.upto[:, -1:] - 1e-9))
    return 100 * (ranked.among_first(ranked.errors_upto, accepted) / accepted)[:, 0]


def adaptive_ece(ranked: Ranked, bins: int = FURTHER_BINS) -> np.ndarray:
    """In %."""
    gaps = (ranked.size * (1 - ranked.confidence) - ranked.errors).cumsum(axis=1)
    number = ranked.upto[:, -1:]
    rising = number // bins * np.arange(bins + 1) + np.minimum(np.arange(bins + 1), number % bins)  # as np.array_split
    upto_edge = ranked.among_first(gaps, number - rising)
    return 100 * np.abs(np.diff(upto_edge, axis=1)).sum(axis=1) / number[:, 0]


RANKED: dict[str, Callable[[Ranked], np.ndarray]] = {
    "aurc": aurc,
    "augrc": augrc,
    "coverage_at_5_risk": coverage_at_risk,
    "risk_at_80_coverage": risk_at_coverage,
    "adaptive_ece": adaptive_ece,
}
BINNED = {"ece": ECE_BINS, "ece15": FURTHER_BINS}
LAID_OUT = (*BINNED, *RANKED, "smooth_ece", *OF_ROWS)  # others are the mean of a column of their name


class ClassGaps:
    """What each sample adds to the gap of each class in each of class-wise ECE's bins.

    Nearly all probabilities lie in the lowest bin; its gap is the class's whole gap less those of the other bins, which have
    few samples each.
    """

    def __init__(self, parts: Iterable[tuple[np.ndarray, np.ndarray]]):
        gaps, cells, samples, first = [], [], [], 0
        for probabilities, labels in parts:
            gaps.append(-probabilities.astype(np.float32))
            gaps[-1][np.arange(len(labels)), labels] += 1
            bins = bin_of(probabilities.ravel(), FURTHER_BINS).reshape(probabilities.shape)
            sample, of_class = bins.nonzero()
            cells.append(of_class * FURTHER_BINS + bins[sample, of_class])
            samples.append(first + sample)
            first += len(labels)
        self.gaps = np.concatenate(gaps)
        cells, samples = np.concatenate(cells), np.concatenate(samples)
        num_samples, num_classes = self.gaps.shape
        entries = self.gaps[samples, cells // FURTHER_BINS].astype(np.float64), (cells, samples)
        self.above = coo_array(entries, shape=(num_classes * FURTHER_BINS, num_samples)).tocsr()

    def ece(self, counts: np.ndarray) -> np.ndarray:
        """In %."""
        above = (self.above @ np.ascontiguousarray(counts.T)).reshape(-1, FURTHER_BINS, len(counts))
        lowest = (counts.astype(np.float32) @ self.gaps).T - above.sum(axis=1)
        gaps = np.abs(above).sum(axis=(0, 1)) + np.abs(lowest).sum(axis=0)
        return 100 * gaps / len(above) / counts.sum(axis=1)


def mean_of(values: np.ndarray) -> OfCounts:
    """The mean of `values` [N]."""
    return lambda counts: counts @ values / counts.sum(axis=1)


def binned_ece(confidence: np.ndarray, gap: np.ndarray, bins: int) -> OfCounts:
    """In %, of `gap` [N], correct − confidence."""
    in_bins = np.zeros((len(gap), bins))
    in_bins[np.arange(len(gap)), bin_of(confidence, bins)] = gap
    return lambda counts: 100 * np.abs(counts @ in_bins).sum(axis=1) / counts.sum(axis=1)


def smooth_ece(confidence: np.ndarray, gap: np.ndarray) -> OfCounts:
    """In %, in float32."""
    low, beyond = grid_places(confidence)
    entries = np.r_[gap * (1 - beyond), gap * beyond], (np.r_[low, low + 1], np.tile(np.arange(len(gap)), 2))
    to_grid = coo_array(entries, shape=(GRID + 1, len(gap))).tocsr()

    def figures(counts: np.ndarray) -> np.ndarray:
        sums = np.ascontiguousarray((to_grid @ np.ascontiguousarray(counts.T)).T, np.float32)
        return 100 * smooth_errors(sums, counts.sum(axis=1))

    return figures


def of_rows(kept: Kept, names: Sequence[str]) -> dict[str, OfCounts]:
    """Those of OF_ROWS among `names`."""
    found: dict[str, OfCounts] = {}
    if "brier" in names:
        found["brier"] = mean_of(kept.squared_errors())
    if "classwise_ece" in names:
        found["classwise_ece"] = ClassGaps(kept.parts()).ece
    return found


class Layout:
    """One run's outcomes (columns confidence, correct, nll or others to take the mean of) laid out for the figures `names`.

    What OF_ROWS need is read from `kept`; where that has no probabilities, or they cannot be read, these figures are NaN.
    """

    def __init__(self, table: pd.DataFrame, names: Sequence[str], kept: Kept | None = None):
        self.names = names
        confidence, correct = table.confidence.to_numpy(), table.correct.to_numpy().astype(np.float64)
        gap = correct - confidence.astype(np.float64)
        self.ranked = {name: RANKED[name] for name in names if name in RANKED}
        self.of_counts = {name: mean_of(table[name].to_numpy(np.float64)) for name in names if name not in LAID_OUT}
        self.of_counts |= {name: binned_ece(confidence, gap, BINNED[name]) for name in names if name in BINNED}
        if "smooth_ece" in names:
            self.of_counts["smooth_ece"] = smooth_ece(confidence, gap)
        if kept and set(OF_ROWS) & set(names):
            self.of_counts |= kept.of_rows(lambda: of_rows(kept, names))
        self.order = np.argsort(-confidence, kind="stable")
        falling = confidence[self.order]
        self.ends = np.flatnonzero(np.r_[falling[1:] != falling[:-1], True])  # of each of the equal confidences
        self.distinct, self.wrong = falling[self.ends].astype(np.float64), (correct[self.order] == 0).astype(np.uint16)

    def figures(self, counts: np.ndarray) -> np.ndarray:
        """The figures [R, len(names)] of draws in which sample i stands `counts` [R, i] times, whole numbers."""
        of_floats = counts.astype(np.float64)
        found = {name: figure(of_floats) for name, figure in self.of_counts.items()}
        if self.ranked:
            ranked = self.rank(counts)
            found |= {name: figure(ranked) for name, figure in self.ranked.items()}
        return np.stack([found[name] if name in found else np.full(len(counts), np.nan) for name in self.names], axis=1)

    def rank(self, counts: np.ndarray) -> Ranked:
        """The draws by falling confidence."""
        falling = counts.take(self.order, axis=1)
        upto = falling.cumsum(axis=1, dtype=np.int64).take(self.ends, axis=1)
        errors_upto = (falling * self.wrong).cumsum(axis=1, dtype=np.int64).take(self.ends, axis=1)
        size, errors = (np.diff(sums, axis=1, prepend=0) for sums in (upto, errors_upto))
        return Ranked(self.distinct, size, errors, upto, errors_upto)


@dataclass
class Predicted:
    """A run's outcomes of the test samples and what else it has kept of them, with the figures of their resamples."""

    outcomes: pd.DataFrame
    kept: Kept | None = None
    figures: dict[str, np.ndarray] = field(default_factory=dict)  # those computed so far

    def resampled(self, names: Sequence[str], resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
        """The figures [1 + resamples, len(names)], first of the samples as they are, then of draws with replacement.

        Every run of the same samples sees the same draws, of whole groups where there is a column `group`.
        """
        missing = [name for name in names if name not in self.figures]
        if missing:
            found = self._resampled(missing, resamples, seed)
            self.figures |= dict(zip(missing, found.T, strict=True))
        return np.stack([self.figures[name] for name in names], axis=1)

    def _resampled(self, names: Sequence[str], resamples: int, seed: int) -> np.ndarray:
        layout, num_samples = Layout(self.outcomes, names, self.kept), len(self.outcomes)
        group = group_of(self.outcomes)
        counts = draws(num_samples if group is None else group.max() + 1, resamples, seed)
        found, chunk = [layout.figures(np.ones((1, num_samples), np.uint16))], max(1, AT_ONCE // num_samples)
        for start in range(0, resamples, chunk):
            of_units = counts[start : start + chunk]
            found.append(layout.figures(of_units if group is None else of_units[:, group]))
        return np.concatenate(found)


@lru_cache(maxsize=1)
def draws(num_units: int, resamples: int, seed: int) -> np.ndarray:
    """How often [resamples, num_units] each of so many samples, or groups of samples, stands in each draw of as many."""
    generator, found = np.random.default_rng(seed), []
    chunk = max(1, AT_ONCE // num_units)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = generator.integers(num_units, size=(rows, num_units)) + num_units * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * num_units).reshape(rows, num_units)
        found.append(counts.astype(np.uint16))
    return np.concatenate(found)


def group_of(table: pd.DataFrame) -> np.ndarray | None:
    """The number 0, 1, … of each sample's group [N], None where every sample is one of its own."""
    return np.unique(table.group, return_inverse=True)[1] if "group" in table else None
