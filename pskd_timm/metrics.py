"""The six figures of the paper's tables, in its units: error and ECE in %, NLL in nats, AURC and E-AURC × 10³."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .errors import InputError


class Metric(NamedTuple):
    """How a metric is shown: its key in result.json, title, unit, decimals, which direction is better, whether also in lines
    with room for few, and whether it is computed only once a run has ended, not after each epoch."""

    name: str
    title: str
    unit: str = ""
    digits: int = 2
    higher_is_better: bool = False
    in_brief: bool = True
    only_at_end: bool = False

    @property
    def header(self) -> str:
        """Title and unit, as over a column."""
        return f"{self.title} {self.unit}".rstrip()

    def format(self, value: float) -> str:
        """`value` with its decimals, one more where there is no unit: such values (nats) are small."""
        return f"{value:.{self.digits if self.unit else self.digits + 1}f}"


METRICS = {
    metric.name: metric
    for metric in (
        Metric("top1_error", "top-1 error", "%"),
        Metric("top5_error", "top-5 error", "%", in_brief=False),
        Metric("nll", "NLL"),
        Metric("ece", "ECE", "%"),
        Metric("aurc", "AURC", "×10³"),
        Metric("eaurc", "E-AURC", "×10³", in_brief=False),
    )
}
ECE_BINS = 10
FLOOR_DRAWS = (200, 1000)  # of outcomes for the ECE of perfect calibration: more where samples are few
NUMBERS_DRAWN = 10_000_000  # for these, about, which bounds time
NUMBERS_AT_ONCE = 1_000_000  # and at once, which bounds memory
ROW_SUM_TOLERANCE = 0.02  # what rows of float16 or bfloat16 may be off
ROWS_AT_ONCE = 1024  # looked at together: they and what is made of them fit into a processor's cache


def format_metrics(values: dict[str, float], metrics: Iterable[Metric], brief: bool = False) -> str:
    """The `values` of `metrics` in a line: `top-1 error 23.12 %  NLL 1.012`; `brief` leaves out those not `in_brief`."""
    shown = [metric for metric in metrics if metric.in_brief or not brief]
    return "  ".join(f"{metric.title} {metric.format(values[metric.name])} {metric.unit}".rstrip() for metric in shown)


class Outcomes(NamedTuple):
    """What is kept of each sample's prediction, arrays [N]: `confidence` is the largest probability, `nll` in nats."""

    confidence: np.ndarray
    correct: np.ndarray
    top5_correct: np.ndarray
    nll: np.ndarray


class Bins(NamedTuple):
    """ECE's bins, arrays [bins]: upper edge, mean confidence and accuracy (NaN where empty), fraction of the samples."""

    upper_edge: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    fraction: np.ndarray


class EceFloor(NamedTuple):
    """The ECE in % that perfect calibration would measure on so few samples: its mean, and what 95 % of draws stay below."""

    mean: float
    high: float


def true_rank(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes stand before the label [N] in `probabilities` [N, K]; among equals the lower class is first."""
    true = np.take_along_axis(probabilities, labels[:, None], axis=1)
    classes = np.arange(probabilities.shape[1])
    return ((probabilities > true) | ((probabilities == true) & (classes < labels[:, None]))).sum(axis=1)


def outcomes(probabilities: np.ndarray, labels: np.ndarray) -> Outcomes:
    """Each sample's outcome from `probabilities` [N, K] and `labels` [N].

    A true class of probability 0 counts as float32's smallest normal number: 87.3 nats, whatever the type.
    """
    starts = range(0, len(labels), ROWS_AT_ONCE)
    rank = [true_rank(probabilities[i : i + ROWS_AT_ONCE], labels[i : i + ROWS_AT_ONCE]) for i in starts]
    rank = np.concatenate(rank)
    true = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0].astype(np.float64)
    true = np.where(true > 0, true, np.finfo(np.float32).tiny)
    return Outcomes(probabilities.max(axis=1), rank == 0, rank < 5, -np.log(true))


def bin_of(confidence: np.ndarray, bins: int = ECE_BINS) -> np.ndarray:
    """The bin 0 … bins − 1 of each `confidence` [N] among (0, 1/bins], … (1 − 1/bins, 1]."""
    # Edges are rounded to the confidences' own type, so that a float32 0.3 is on the edge 0.3, not just above it.
    edges = (np.arange(bins + 1) / bins).astype(confidence.dtype)
    return (np.searchsorted(edges, confidence) - 1).clip(0, bins - 1)


def reliability_bins(confidence: np.ndarray, correct: np.ndarray, bins: int = ECE_BINS) -> Bins:
    """What ECE's bins hold of `confidence` and `correct` [N]."""
    place = bin_of(confidence, bins)
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(place, x.astype(np.float64), minlength=bins) / counts for x in (confidence, correct)]
    return Bins(np.arange(1, bins + 1) / bins, *means, counts / len(place))


def ece(confidence: np.ndarray, correct: np.ndarray, bins: int = ECE_BINS) -> float:
    """Expected calibration error in [0, 1]: Σ over bins of |accuracy − mean confidence| · n_bin / N (Guo et al., 2017)."""
    gap = np.bincount(bin_of(confidence, bins), correct.astype(np.float64) - confidence.astype(np.float64), bins)
    return float(np.abs(gap).sum() / len(confidence))


def ece_floor(confidence: np.ndarray, bins: int = ECE_BINS, seed: int = 0) -> EceFloor:
    """What `ece` of `confidence` [N] would be if each were the probability of being right.

    Consistency resampling (Bröcker and Smith, 2007): outcomes are drawn from the confidences, which stay as they are.
    """
    confidence = np.sort(np.asarray(confidence))
    place = bin_of(confidence, bins)
    expected = np.bincount(place, confidence.astype(np.float64), bins)
    in_bin = (place[:, None] == np.arange(bins)).astype(np.float32)
    draws = int(np.clip(NUMBERS_DRAWN // len(confidence), *FLOOR_DRAWS))
    rows = max(1, NUMBERS_AT_ONCE // len(confidence))
    generator, found = np.random.default_rng(seed), []
    for start in range(0, draws, rows):
        drawn = generator.random((min(rows, draws - start), len(confidence)), dtype=np.float32)
        right = (drawn < confidence).astype(np.float32) @ in_bin  # exact: whole numbers
        found.append(100 * np.abs(right - expected).sum(axis=1) / len(confidence))
    found = np.concatenate(found)
    return EceFloor(float(found.mean()), float(np.quantile(found, 0.95)))


def risk_curve(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Error rate [N] among the n = 1 … N most confident samples; equal confidences take their average over all orders."""
    falling = np.argsort(-confidence, kind="stable")
    sorted_confidence = confidence[falling]
    tie = np.r_[0, np.cumsum(sorted_confidence[1:] != sorted_confidence[:-1])]
    in_tie = np.bincount(tie)
    expected = (np.bincount(tie, 1.0 - correct[falling].astype(np.float64)) / in_tie)[tie]
    return expected.cumsum() / np.arange(1, len(tie) + 1)


def most_confident_mistakes(confidence: np.ndarray, correct: np.ndarray, count: int) -> np.ndarray:
    """Rows of the at most `count` wrong samples of most `confidence` [N], the surest first."""
    wrong = np.flatnonzero(~correct)
    return wrong[np.argsort(-confidence[wrong], kind="stable")[:count]]


def thinned(length: int, most: int) -> np.ndarray:
    """At most `most` of 0 … length − 1, evenly spread, first and last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int))


def optimal_aurc(num_samples: int, num_errors: int) -> float:
    """AURC in [0, 1] of the best ranking: every error less confident than every hit (Geifman et al., ICLR 2019)."""
    k = np.arange(1, num_errors + 1)
    return float((k / (num_samples - num_errors + k)).sum() / num_samples)


def summarize(each: Outcomes) -> dict[str, float]:
    """The six metrics over a whole split, from each sample's outcome (arrays, or tensors on the CPU)."""
    each = Outcomes(*map(np.asarray, each))
    aurc = float(risk_curve(each.confidence, each.correct).mean())
    return {
        "top1_error": 100.0 * float((~each.correct).mean()),
        "top5_error": 100.0 * float((~each.top5_correct).mean()),
        "nll": float(each.nll.astype(np.float64).mean()),
        "ece": 100.0 * ece(each.confidence, each.correct),
        "aurc": 1000.0 * aurc,
        "eaurc": 1000.0 * (aurc - optimal_aurc(len(each.correct), int((~each.correct).sum()))),
    }


def as_array(values) -> np.ndarray:
    """Numbers as an array that numpy computes with fast: a tensor (on any device), an array of any type, a list."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if "bfloat16" in str(values.dtype) else values  # which numpy has not
    array = np.asarray(values)
    if array.dtype.kind == "f":
        return array.astype(np.float64 if array.dtype.itemsize > 8 else array.dtype.newbyteorder("="), copy=False)
    return array.astype(np.int64, copy=False) if array.dtype.kind == "u" else array


def score(probabilities, labels) -> dict[str, float]:
    """The six metrics of `probabilities` [N, K] (rows sum to 1) against `labels` [N], tensors or arrays of any float type.

    Raises InputError where shapes, label range or values do not fit.
    """
    probabilities, labels = as_array(probabilities), as_array(labels)
    if probabilities.dtype.kind not in "fiub":
        raise InputError(f"cannot score an array of {probabilities.dtype}")
    if probabilities.ndim != 2 or probabilities.dtype.kind != "f" or 0 in probabilities.shape:
        raise InputError(
            f"probabilities must be floats of shape [N, K], got {probabilities.dtype} {list(probabilities.shape)}"
        )
    if labels.shape != probabilities.shape[:1] or labels.dtype.kind not in "iub":
        raise InputError(
            f"labels must be integers of shape [{len(probabilities)}], got {labels.dtype} {list(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise InputError(f"labels must lie in 0 … {probabilities.shape[1] - 1}, got {labels.min()} … {labels.max()}")
    smallest, largest = probabilities.min(), probabilities.max()  # NaN if any is
    if not (smallest >= 0 and largest <= 1 + 1e-3):
        raise InputError(
            "probabilities must be finite and lie in [0, 1]; these do not (logits go through a softmax first)"
        )
    largest_sum = probabilities.sum(axis=1, dtype=np.float64).max()
    if largest_sum > 1 + ROW_SUM_TOLERANCE:
        raise InputError(f"rows of probabilities must sum to 1, one sums to {largest_sum:.3g}")
    return summarize(outcomes(probabilities, labels.astype(np.int64)))
