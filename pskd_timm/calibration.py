"""Temperature scaling (Guo et al., ICML 2017): one number, fitted on held-out samples, that corrects confidences."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pyarrow import parquet
from scipy.optimize import brentq

from .metrics import as_array

ROWS_AT_ONCE = 1024  # so many that what is made of them stays in the processor's cache
PART_BYTES = (
    32 * 2**20
)  # of float32 probabilities read from a file at once: few enough that no large memory is asked for
LOWEST, HIGHEST = 0.01, 100.0  # bounds of a fit
# Right and wrong predictions that a fit needs of each. In 1700 simulated fits (2, 10 and 100 classes, errors from 1 to 80 %)
# of confidences that were off by a factor of 1.5, the temperature from at most 2 of either made the test NLL worse in 39 to
# 63 % of the cases and by 0.1 nats on average, from 10 to 14 in 9 %, from 20 on in 2 %.
FEWEST = 10

Part = tuple[np.ndarray, float]  # log p [n, K], less its row's largest, and the sum of those of the labels


class Temperature(NamedTuple):
    """What `fit_temperature` found: T, from how many samples; `reason` says why there is none (then `value` is 1), or ''."""

    value: float
    num_samples: int
    reason: str = ""


def kept_probabilities(path: Path) -> str | None:
    """The column of a file of predictions that has probabilities or their logarithms; None where the run kept none."""
    names = parquet.read_schema(path).names
    return next((name for name in ("probabilities", "log_probabilities") if name in names), None)


def probability_parts(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Probabilities [n, K], labels [n] and hits [n] of a file of predictions, part by part, each read once."""
    column = kept_probabilities(path)
    file = parquet.ParquetFile(path, page_checksum_verification=True)
    rows = max(1, PART_BYTES // (4 * file.schema_arrow.field(column).type.list_size))
    for part in file.iter_batches(rows, columns=["label", "correct", column]):
        flat, labels, correct = (
            each.to_numpy(zero_copy_only=False) for each in (part[column].flatten(), part["label"], part["correct"])
        )
        rows_of_part = flat.reshape(len(part), -1)
        if column == "log_probabilities":
            rows_of_part = np.exp(rows_of_part.astype(np.float32))
        yield rows_of_part, labels, correct


def log_probabilities(probabilities) -> np.ndarray:
    """log p [N, K], at least in float32; a probability of 0 counts as float32's smallest normal number, as in the NLL."""
    probabilities = as_array(probabilities)
    wide = probabilities.astype(np.promote_types(probabilities.dtype, np.float32))  # a copy
    np.maximum(wide, np.finfo(np.float32).tiny, out=wide)
    return np.log(wide, out=wide)


def with_temperature(probabilities, temperature: float):
    """softmax(log p / T) of `probabilities` [N, K]: above 1 less confident, below 1 more; the order of a row stays.

    A tensor comes back as a tensor, on its device.
    """
    scaled = log_probabilities(probabilities)
    scaled /= temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    np.exp(scaled, out=scaled)
    scaled /= scaled.sum(axis=1, keepdims=True)
    return probabilities.new_tensor(scaled) if hasattr(probabilities, "new_tensor") else scaled


def fit_temperature(probabilities, labels) -> Temperature:
    """The T in (0.01, 100) that gives `with_temperature(probabilities [N, K], T)` the least NLL against `labels` [N]."""
    probabilities, labels = as_array(probabilities), as_array(labels)
    starts = range(0, len(labels), ROWS_AT_ONCE)
    return fit_to_parts((probabilities[i : i + ROWS_AT_ONCE], labels[i : i + ROWS_AT_ONCE]) for i in starts)


def fit_to_parts(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> Temperature:
    """`fit_temperature` of probabilities [n, K] and labels [n] that come in parts, each of which is read once."""
    kept: list[Part] = []
    right = num_samples = 0
    for probabilities, labels in parts:
        logs = log_probabilities(probabilities)
        logs -= logs.max(axis=1, keepdims=True)
        of_labels = np.take_along_axis(logs, labels[:, None], axis=1)
        kept.append((logs, float(of_labels.sum(dtype=np.float64))))
        right += int((of_labels == 0).sum())
        num_samples += len(labels)
    if not all(np.isfinite(of_labels) for _, of_labels in kept):
        return Temperature(1.0, num_samples, "the held-out probabilities are damaged: some are no numbers")
    wrong = num_samples - right
    if min(right, wrong) < FEWEST:
        count, which = min((right, "right"), (wrong, "wrong"))
        reason = f"only {count} of {num_samples} held-out predictions are {which}, {FEWEST} are needed to fit one"
        return Temperature(1.0, num_samples, reason)
    value = _best(kept)
    if value is None:
        return Temperature(1.0, num_samples, f"the best one lies outside {LOWEST:g} … {HIGHEST:g}")
    return Temperature(value, num_samples)


def _best(parts: list[Part]) -> float | None:
    """The T of the least NLL, which is convex in 1/T, so that its slope there has one root; None where the bounds miss it."""
    low, high = np.log(1 / HIGHEST), np.log(1 / LOWEST)
    if _slope(parts, np.exp(low)) >= 0 or _slope(parts, np.exp(high)) <= 0:
        return None
    return float(np.exp(-brentq(lambda x: _slope(parts, np.exp(x)), low, high, xtol=1e-8)))


def _slope(parts: list[Part], scale: float) -> float:
    """Derivative of the summed NLL by 1/T: Σ (mean of log p under the scaled probabilities − log p of the label)."""
    total = 0.0
    for logs, of_labels in parts:
        weights = np.exp(logs * logs.dtype.type(scale))
        mean = np.vecdot(weights, logs) / weights.sum(axis=1)
        total += float(mean.sum(dtype=np.float64)) - of_labels
    return total


def scaled_outcomes(
    parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], temperature: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each sample's confidence at a temperature, whether it is right, and its NLL in nats, [N] each.

    The probabilities [n, K], labels [n] and hits [n] come in parts.
    """
    nll, confidences, hits = [], [], []
    for probabilities, labels, correct in parts:
        logs = log_probabilities(probabilities) / temperature
        largest = logs.max(axis=1)
        normalizer = largest + np.log(np.exp(logs - largest[:, None]).sum(axis=1))
        nll.append(normalizer - np.take_along_axis(logs, labels[:, None], axis=1)[:, 0])
        confidences.append(np.exp(largest - normalizer))
        hits.append(correct)
    return np.concatenate(confidences), np.concatenate(hits), np.concatenate(nll).astype(np.float64)
