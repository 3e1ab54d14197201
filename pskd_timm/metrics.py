"""The six figures of the paper's tables, in its units: error and ECE in %, NLL in nats, AURC and E-AURC × 10³; and others.

Where other packages give other values for the same predictions, README.md beside this file says why.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from .errors import InputError, nearest


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
FURTHER_METRICS = {  # computed where they are asked for, from what a finished run has kept
    metric.name: metric
    for metric in (
        Metric("brier", "Brier score", digits=3, only_at_end=True),
        Metric("ece15", "15-bin ECE", "%", only_at_end=True),
        Metric("adaptive_ece", "adaptive ECE", "%", only_at_end=True),
        Metric("classwise_ece", "class-wise ECE", "%", digits=3, only_at_end=True),
        Metric("smooth_ece", "smooth ECE", "%", only_at_end=True),
        Metric("augrc", "AUGRC", "×10³", only_at_end=True),
        Metric("coverage_at_5_risk", "coverage at 5 % risk", "%", higher_is_better=True, only_at_end=True),
        Metric("risk_at_80_coverage", "risk at 80 % coverage", "%", only_at_end=True),
    )
}
ALL_METRICS = METRICS | FURTHER_METRICS
ALL = "all"  # what stands for every one of them
OF_ROWS = ("brier", "classwise_ece")  # need each sample's probabilities of all classes
ECE_BINS = 10
MOST_FOR_TOP5 = 5  # classes: with so many or fewer the right one is always among the first five
FURTHER_BINS = 15  # of the other errors with bins
NARROWEST = 0.001  # bandwidth of smooth ECE, as in relplot
GRID = 2048  # intervals of [0, 1] on which smooth ECE is computed
DRAWS_AT_ONCE = 64  # of smooth ECE, whose grids then stay in a processor's cache
NARROWINGS = 5  # of the interval of bandwidths, before a secant ends the search: to 0.4 % and, on average, 0.01 %
ROW_SUM_TOLERANCE = 0.02  # what rows of float16 or bfloat16 may be off
ROWS_AT_ONCE = 1024  # looked at together: they and what is made of them fit into a processor's cache


def format_metrics(values: dict[str, float], metrics: Iterable[Metric], brief: bool = False) -> str:
    """The `values` of `metrics` in a line: `top-1 error 23.12 %  NLL 1.012`; `brief` leaves out those not `in_brief`.

    What is computed only at a run's end is left out of the values of an earlier epoch.
    """
    shown = [metric for metric in metrics if metric.in_brief or not brief]
    shown = [metric for metric in shown if not metric.only_at_end or metric.name in values]
    return "  ".join(f"{metric.title} {metric.format(values[metric.name])} {metric.unit}".rstrip() for metric in shown)


def telling_metrics(metrics: Iterable[Metric], num_classes: float) -> list[Metric]:
    """`metrics`, without the top-5 error where there are so few classes that it is always 0."""
    return [metric for metric in metrics if metric.name != "top5_error" or not num_classes <= MOST_FOR_TOP5]


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


def true_rank(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes stand before the label [N] in `probabilities` [N, K]; among equals the lower class is first."""
    true = np.take_along_axis(probabilities, labels[:, None], axis=1)
    classes = np.arange(probabilities.shape[1])
    return ((probabilities > true) | ((probabilities == true) & (classes < labels[:, None]))).sum(axis=1)


def outcomes(probabilities: np.ndarray, labels: np.ndarray) -> Outcomes:
    """Each sample's outcome from `probabilities` [N, K] and `labels` [N].

    A true class's probability counts as float32's smallest normal number at least: 87.3 nats at most, whatever the type.
    """
    starts = range(0, len(labels), ROWS_AT_ONCE)
    rank = [true_rank(probabilities[i : i + ROWS_AT_ONCE], labels[i : i + ROWS_AT_ONCE]) for i in starts]
    rank = np.concatenate(rank)
    true = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0].astype(np.float64)
    true = np.maximum(true, np.finfo(np.float32).tiny)
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
    return Bins(np.arange(1, bins + 1) / bins, *means, counts / max(len(place), 1))


def ece(confidence: np.ndarray, correct: np.ndarray, bins: int = ECE_BINS) -> float:
    """Expected calibration error in [0, 1]: Σ over bins of |accuracy − mean confidence| · n_bin / N (Guo et al., 2017)."""
    gap = np.bincount(bin_of(confidence, bins), correct.astype(np.float64) - confidence.astype(np.float64), bins)
    return float(np.abs(gap).sum() / len(confidence))


def equal_mass_shares(rising: np.ndarray, bins: int = FURTHER_BINS) -> np.ndarray:
    """The part [N, bins] of each of the `rising` confidences [N] that lies in each of `bins` with equally many samples.

    Equal confidences are spread alike over the bins that they reach into, so that no order among them matters.
    """
    sizes = [len(part) for part in np.array_split(rising, bins)]
    tie = _ties(rising)
    shares = np.zeros((tie[-1] + 1, bins))
    np.add.at(shares, (tie, np.repeat(np.arange(bins), sizes)), 1.0)
    return (shares / shares.sum(axis=1, keepdims=True))[tie]


def adaptive_ece(confidence: np.ndarray, correct: np.ndarray, bins: int = FURTHER_BINS) -> float:
    """ECE in [0, 1] over `bins` that hold equally many samples (Nguyen and O'Connor, 2015)."""
    rising = np.argsort(confidence, kind="stable")
    gap = correct[rising].astype(np.float64) - confidence[rising].astype(np.float64)
    return float(np.abs(gap @ equal_mass_shares(confidence[rising], bins)).sum() / len(gap))


def class_gaps(probabilities: np.ndarray, labels: np.ndarray, bins: int = FURTHER_BINS) -> np.ndarray:
    """Σ over the samples of (1 if the label is k else 0) − p_k for `probabilities` [N, K], in each bin of p_k: [K, bins]."""
    num_samples, num_classes = probabilities.shape
    cell = bin_of(probabilities.ravel(), bins) + bins * np.tile(np.arange(num_classes), num_samples)
    gaps = -np.bincount(cell, probabilities.ravel().astype(np.float64), num_classes * bins)
    of_labels = cell.reshape(probabilities.shape)[np.arange(num_samples), labels]
    return (gaps + np.bincount(of_labels, minlength=num_classes * bins)).reshape(num_classes, bins)


def classwise_ece(probabilities: np.ndarray, labels: np.ndarray, bins: int = FURTHER_BINS) -> float:
    """Mean over the classes of the ECE in [0, 1] of the class's own probability (Kull et al., NeurIPS 2019)."""
    return float(np.abs(class_gaps(probabilities, labels, bins)).sum() / probabilities.size)


def squared_errors(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each sample's Brier score [N] in [0, 2]: Σ over the classes of (p_k − 1 if k is the label else p_k)²."""
    wide = probabilities.astype(np.float64)
    true = np.take_along_axis(wide, labels[:, None], axis=1)[:, 0]
    return np.square(wide).sum(axis=1) - 2 * true + 1


def smooth_ece(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Smooth ECE in [0, 1] (Błasiok and Nakkiran, ICLR 2024): ∫ |r(t)| dt, with r the mean of (correct − confidence)
    smoothed by a Gaussian kernel that is reflected at 0 and 1, and of the bandwidth that equals the result (NARROWEST where
    that is narrower).
    """
    gap = correct.astype(np.float64) - confidence.astype(np.float64)
    return float(smooth_errors(on_grid(gap[None], grid_places(confidence)), len(gap))[0])


def grid_places(confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The grid's point below each confidence [N], and how far beyond it the confidence is, in intervals."""
    place = confidence.astype(np.float64) * GRID
    low = place.astype(np.int64).clip(0, GRID - 1)
    return low, place - low


def on_grid(gaps: np.ndarray, places: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The sums [R, GRID + 1] of each row of `gaps` [R, N] at the grid's points, each gap shared by the two beside it."""
    low, beyond = places
    rows = [
        np.bincount(low, gap * (1 - beyond), GRID + 1) + np.bincount(low + 1, gap * beyond, GRID + 1) for gap in gaps
    ]
    return np.stack(rows)


def smooth_errors(sums: np.ndarray, num_samples: int | np.ndarray) -> np.ndarray:
    """Smooth ECE in [0, 1], [R], of sums of gaps [R, GRID + 1] at the grid's points, of so many samples (each)."""
    number = np.broadcast_to(num_samples, len(sums)).astype(sums.dtype)
    rows = range(0, len(sums), DRAWS_AT_ONCE)
    return np.concatenate([_smooth_errors(sums[i : i + DRAWS_AT_ONCE], number[i : i + DRAWS_AT_ONCE]) for i in rows])


def _smooth_errors(sums: np.ndarray, num_samples: np.ndarray) -> np.ndarray:
    # Reflected again and again the interval is a circle of length 2, where smoothing is a product of Fourier coefficients.
    # What lies at 0 and 1 falls upon its own reflection.
    circle = np.concatenate([2 * sums[:, :1], sums[:, 1:-1], 2 * sums[:, -1:], sums[:, -2:0:-1]], axis=1)
    spectrum, frequency = np.fft.rfft(circle), np.pi * np.arange(GRID + 1, dtype=sums.dtype)

    def error(bandwidth: np.ndarray) -> np.ndarray:
        smoothed = np.fft.irfft(spectrum * np.exp(-0.5 * np.square(bandwidth[:, None] * frequency)), 2 * GRID)
        return np.abs(smoothed).sum(axis=1) / (2 * num_samples)

    at_narrowest = error(np.full(len(sums), NARROWEST, sums.dtype))
    # The error falls as the bandwidth grows: where the two are equal lies between any bandwidth and the error at it.
    wide = np.maximum(at_narrowest, sums.dtype.type(NARROWEST))
    narrow = error(wide)
    for _ in range(NARROWINGS):
        middle = (narrow + wide) / 2
        found = error(middle)
        narrow, wide = np.maximum(narrow, np.minimum(middle, found)), np.minimum(wide, np.maximum(middle, found))
    excess, lack = error(narrow) - narrow, wide - error(wide)
    share = excess / np.maximum(excess + lack, np.finfo(sums.dtype).tiny)  # both are 0 where the ends have met
    return np.where(at_narrowest > NARROWEST, narrow + (wide - narrow) * share.clip(0, 1), at_narrowest)


def _ties(ordered: np.ndarray) -> np.ndarray:
    """The number 0, 1, … of each of the `ordered` values [N] among their distinct ones."""
    return np.r_[0, np.cumsum(ordered[1:] != ordered[:-1])]


def risk_curve(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Error rate [N] among the n = 1 … N most confident samples; equal confidences take their average over all orders."""
    falling = np.argsort(-confidence, kind="stable")
    sorted_confidence = confidence[falling]
    tie = _ties(sorted_confidence)
    in_tie = np.bincount(tie)
    expected = (np.bincount(tie, 1.0 - correct[falling].astype(np.float64)) / in_tie)[tie]
    return expected.cumsum() / np.arange(1, len(tie) + 1)


def augrc(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Area in [0, ½] under the share of all samples that are accepted and wrong, over the share that is accepted (Traub et
    al., NeurIPS 2024): (1 − AUROC of confidence for being right) · accuracy · error rate + ½ error rate²."""
    wrong = risk_curve(confidence, correct) * np.arange(1, len(confidence) + 1)  # among the 1 … N most confident
    return float((wrong.sum() - wrong[-1] / 2) / len(wrong) ** 2)


def coverage_at_risk(confidence: np.ndarray, correct: np.ndarray, risk: float = 0.05) -> float:
    """The largest part of the samples that a threshold on confidence accepts with an error rate of at most `risk`, else 0."""
    falling = np.sort(confidence)[::-1]
    is_threshold = np.r_[falling[1:] != falling[:-1], True]  # equal confidences are accepted together
    allowed = np.flatnonzero(is_threshold & (risk_curve(confidence, correct) <= risk + 1e-12))
    return float((allowed.max(initial=-1) + 1) / len(falling))


def risk_at_coverage(confidence: np.ndarray, correct: np.ndarray, coverage: float = 0.8) -> float:
    """Error rate among the part `coverage` of the samples of most confidence, rounded up to a whole sample."""
    accepted = max(1, int(np.ceil(coverage * len(confidence) - 1e-9)))
    return float(risk_curve(confidence, correct)[accepted - 1])


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The chance in [0, 1] that one of the values `positive` [N] is above one of `negative` [M]; equal ones count half."""
    ordered = np.sort(negative)
    below, upto = (np.searchsorted(ordered, positive, side) for side in ("left", "right"))
    return float((below + upto).mean() / (2 * len(ordered)))


def fpr_at_recall(positive: np.ndarray, negative: np.ndarray, recall: float = 0.95) -> float:
    """The part in [0, 1] of `negative` [M] at or above the highest threshold that at least `recall` of `positive` [N] reach."""
    needed = int(np.ceil(recall * len(positive) - 1e-9))
    threshold = np.sort(positive)[len(positive) - needed]
    return float((negative >= threshold).mean())


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


OF_OUTCOMES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {  # of the further ones, of confidence and correct
    "ece15": lambda confidence, correct: 100 * ece(confidence, correct, FURTHER_BINS),
    "adaptive_ece": lambda confidence, correct: 100 * adaptive_ece(confidence, correct),
    "smooth_ece": lambda confidence, correct: 100 * smooth_ece(confidence, correct),
    "augrc": lambda confidence, correct: 1000 * augrc(confidence, correct),
    "coverage_at_5_risk": lambda confidence, correct: 100 * coverage_at_risk(confidence, correct),
    "risk_at_80_coverage": lambda confidence, correct: 100 * risk_at_coverage(confidence, correct),
}


def further_of_outcomes(confidence: np.ndarray, correct: np.ndarray, names: Iterable[str]) -> dict[str, float]:
    """Those of FURTHER_METRICS among `names` that `confidence` and `correct` [N] tell."""
    return {name: OF_OUTCOMES[name](confidence, correct) for name in names if name in OF_OUTCOMES}


def further_of_rows(parts: Iterable[tuple[np.ndarray, np.ndarray]], names: Iterable[str]) -> dict[str, float]:
    """Those of OF_ROWS among `names`, of probabilities [n, K] and labels [n] that come in parts, each of which is read once."""
    names, num_samples, squares, gaps = set(names) & set(OF_ROWS), 0, 0.0, 0.0
    if not names:
        return {}
    for probabilities, labels in parts:
        num_samples += len(labels)
        squares += float(squared_errors(probabilities, labels).sum())
        gaps = gaps + class_gaps(probabilities, labels)
    found = {"brier": squares / num_samples, "classwise_ece": 100 * float(np.abs(gaps).sum() / num_samples / len(gaps))}
    return {name: found[name] for name in OF_ROWS if name in names}


def check_names(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """`names`, each once. Raises InputError where one is none of the `known`, or `names` is no list of them."""
    if isinstance(names, str) or names is None:
        raise InputError(f'metrics must be a list of names, got {names!r}: ["ece", "brier"] for instance')
    for name in names:
        if name not in known:
            raise InputError(f"there is no metric {name!r}, only {', '.join(known)}{nearest(name, known)}")
    return list(dict.fromkeys(names))


def as_array(values) -> np.ndarray:
    """Numbers as an array that numpy computes with fast: a tensor (on any device), an array of any type, a list."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if "bfloat16" in str(values.dtype) else values  # which numpy has not
    array = np.asarray(values)
    if array.dtype.kind == "f":
        return array.astype(np.float64 if array.dtype.itemsize > 8 else array.dtype.newbyteorder("="), copy=False)
    return array.astype(np.int64, copy=False) if array.dtype.kind == "u" else array


def score(probabilities, labels, metrics: Iterable[str] = tuple(METRICS)) -> dict[str, float]:
    """The six metrics of `probabilities` [N, K] (rows sum to 1) against `labels` [N], tensors or arrays of any float type.

    `metrics` names others of ALL_METRICS, or is ["all"]. Raises InputError where names, shapes, label range or values do
    not fit.

    Example:
        >>> score(probabilities, labels, ["ece", "smooth_ece", "augrc"])
    """
    names = check_names(metrics, (*ALL_METRICS, ALL))
    names = list(ALL_METRICS) if ALL in names else names
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
    sums = probabilities.sum(axis=1, dtype=np.float64)
    furthest = sums[np.abs(sums - 1).argmax()]
    if abs(furthest - 1) > ROW_SUM_TOLERANCE:
        raise InputError(f"rows of probabilities must sum to 1, one sums to {furthest:.3g}")
    labels = labels.astype(np.int64)
    each = outcomes(probabilities, labels)
    starts = range(0, len(labels), ROWS_AT_ONCE)
    parts = ((probabilities[i : i + ROWS_AT_ONCE], labels[i : i + ROWS_AT_ONCE]) for i in starts)
    found = summarize(each) | further_of_outcomes(each.confidence, each.correct, names) | further_of_rows(parts, names)
    return {name: found[name] for name in names}
