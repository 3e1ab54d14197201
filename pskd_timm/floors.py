"""What perfect calibration would measure on so few samples: errors of outcomes drawn from the confidences themselves."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from .metrics import (
    ECE_BINS,
    FURTHER_BINS,
    bin_of,
    equal_mass_shares,
    grid_places,
    on_grid,
    smooth_errors,
)

FLOORED = ("ece", "ece15", "adaptive_ece", "classwise_ece", "smooth_ece")  # are above 0 for perfect calibration too
FLOOR_DRAWS = (200, 1000)  # of outcomes for the ECE of perfect calibration: more where samples are few
NUMBERS_DRAWN = 10_000_000  # for these, about, which bounds time
NUMBERS_AT_ONCE = 1_000_000  # and at once, which bounds memory


class EceFloor(NamedTuple):
    """What perfect calibration would measure on so few samples, in %: its mean, and what 95 % of draws stay below."""

    mean: float
    high: float


def ece_floor(confidence: np.ndarray, name: str = "ece", seed: int = 0) -> EceFloor:
    """What the metric `name` (of FLOORED, without `classwise_ece`) would be in % if each `confidence` [N] were the probability
    of being right.

    Consistency resampling (Bröcker and Smith, 2007): outcomes are drawn from the confidences, which stay as they are.
    """
    confidence = np.sort(np.asarray(confidence))
    errors, generator = _errors_of_draws(confidence, name), np.random.default_rng(seed)
    draws = (
        FLOOR_DRAWS[0] if name == "smooth_ece" else _num_draws(len(confidence))
    )  # each costs as much with few samples
    rows, found = max(1, NUMBERS_AT_ONCE // len(confidence)), []
    for start in range(0, draws, rows):
        drawn = generator.random((min(rows, draws - start), len(confidence)), dtype=np.float32)
        found.append(100 * errors(drawn < confidence))
    return _floor(np.concatenate(found))


def _errors_of_draws(rising: np.ndarray, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """What gives the metric `name` in [0, 1] of outcomes [R, N] that were drawn for the `rising` confidences [N]: [R]."""
    wide = rising.astype(np.float64)
    if name == "smooth_ece":
        places = grid_places(rising)
        return lambda right: smooth_errors(on_grid(right - wide, places).astype(np.float32), len(rising))
    if name == "adaptive_ece":
        shares = equal_mass_shares(rising)
    else:
        bins = {"ece": ECE_BINS, "ece15": FURTHER_BINS}[name]
        shares = (bin_of(rising, bins)[:, None] == np.arange(bins)).astype(np.float64)
    expected, narrow = wide @ shares, shares.astype(np.float32)  # in which whole numbers are exact
    return lambda right: np.abs(right.astype(np.float32) @ narrow - expected).sum(axis=1) / len(rising)


def classwise_floor(parts: Iterable[np.ndarray], num_samples: int, seed: int = 0) -> EceFloor:
    """What `classwise_ece` would be in % if the rows of probabilities, in `parts` [n, K] of `num_samples` in all, were right.

    Labels are drawn from the rows, as `ece_floor` draws outcomes.
    """
    draws, generator, gaps = _num_draws(num_samples), np.random.default_rng(seed), 0.0
    rows = max(1, NUMBERS_AT_ONCE // draws)
    for part in parts:
        for start in range(0, len(part), rows):
            gaps = gaps + _drawn_class_gaps(part[start : start + rows], draws, generator)
    return _floor(100 * np.abs(gaps).sum(axis=(1, 2)) / (num_samples * part.shape[1]))


def _drawn_class_gaps(probabilities: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """`class_gaps` of `probabilities` [n, K] for labels drawn from them: [draws, K, bins]."""
    num_samples, num_classes = probabilities.shape
    cells = num_classes * FURTHER_BINS
    upto = probabilities.cumsum(axis=1, dtype=np.float64)
    upto = upto / upto[:, -1:] + np.arange(num_samples)[:, None]  # row after row: one rising sequence
    drawn = generator.random((draws, num_samples)) + np.arange(num_samples)
    last = num_classes * np.arange(1, num_samples + 1) - 1
    place = np.minimum(np.searchsorted(upto.ravel(), drawn, side="right"), last)
    cell = bin_of(probabilities.ravel(), FURTHER_BINS) + FURTHER_BINS * np.tile(np.arange(num_classes), num_samples)
    counts = np.bincount((cell[place] + cells * np.arange(draws)[:, None]).ravel(), minlength=draws * cells)
    expected = np.bincount(cell, probabilities.ravel().astype(np.float64), cells)
    return (counts.reshape(draws, cells) - expected).reshape(draws, num_classes, FURTHER_BINS)


def _num_draws(num_samples: int) -> int:
    return int(np.clip(NUMBERS_DRAWN // num_samples, *FLOOR_DRAWS))


def _floor(drawn: np.ndarray) -> EceFloor:
    return EceFloor(float(drawn.mean()), float(np.quantile(drawn, 0.95)))
