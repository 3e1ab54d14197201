"""The six figures of the paper's tables, in its units: error and ECE in %, NLL in nats, AURC and E-AURC × 10³."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import InputError


class Metric(NamedTuple):
    """How a metric is shown: its key in result.json, title, unit, decimals, which direction is better, and whether also
    in lines with room for few."""

    name: str
    title: str
    unit: str = ""
    digits: int = 2
    higher_is_better: bool = False
    in_brief: bool = True

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
ROW_SUM_TOLERANCE = 0.02  # what rows of float16 or bfloat16 may be off
ROWS_AT_ONCE = 1024  # looked at together: they and what is made of them fit into a processor's cache


def format_metrics(values: dict[str, float], metrics: Iterable[Metric], brief: bool = False) -> str:
    """The `values` of `metrics` in a line: `top-1 error 23.12 %  NLL 1.012`; `brief` leaves out those not `in_brief`."""
    shown = [metric for metric in metrics if metric.in_brief or not brief]
    return "  ".join(f"{metric.title} {metric.format(values[metric.name])} {metric.unit}".rstrip() for metric in shown)


class Outcomes(NamedTuple):
    """What is kept of each sample's prediction, each [N]: `confidence` is the largest probability, `nll` in nats."""

    confidence: Tensor
    correct: Tensor
    top5_correct: Tensor
    nll: Tensor


def true_rank(probabilities: Tensor, labels: Tensor) -> Tensor:
    """How many classes stand before the label [N] in `probabilities` [N, K]; among equals the lower class is first."""
    true = probabilities.gather(1, labels[:, None])
    classes = torch.arange(probabilities.shape[1], device=labels.device)
    return ((probabilities > true) | ((probabilities == true) & (classes < labels[:, None]))).sum(dim=1)


def outcomes(probabilities: Tensor, labels: Tensor) -> Outcomes:
    """Each sample's outcome from `probabilities` [N, K] and `labels` [N].

    A true class of probability 0 counts as float32's smallest normal number: 87.3 nats, whatever the type.
    """
    rank = torch.cat(
        [true_rank(p, y) for p, y in zip(probabilities.split(ROWS_AT_ONCE), labels.split(ROWS_AT_ONCE), strict=True)]
    )
    true = probabilities.gather(1, labels[:, None]).squeeze(1).double()
    true = torch.where(true > 0, true, torch.finfo(torch.float32).tiny)
    return Outcomes(probabilities.amax(dim=1), rank == 0, rank < 5, -torch.log(true))


def bin_of(confidence: Tensor, bins: int = ECE_BINS) -> Tensor:
    """The bin 0 … bins − 1 of each `confidence` [N] among (0, 1/bins], … (1 − 1/bins, 1]."""
    # Edges are rounded to the confidences' own type, so that a float32 0.3 is on the edge 0.3, not just above it.
    edges = (torch.arange(bins + 1, dtype=torch.float64) / bins).to(confidence)
    return (torch.bucketize(confidence.contiguous(), edges) - 1).clamp(0, bins - 1)


def ece(confidence: Tensor, correct: Tensor, bins: int = ECE_BINS) -> Tensor:
    """Expected calibration error in [0, 1]: Σ over bins of |accuracy − mean confidence| · n_bin / N (Guo et al., 2017)."""
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    gap.index_add_(0, bin_of(confidence, bins), correct.double() - confidence.double())
    return gap.abs().sum() / len(confidence)


def risk_curve(confidence: Tensor, correct: Tensor) -> Tensor:
    """Error rate [N] among the n = 1 … N most confident samples; equal confidences take their average over all orders."""
    descending = confidence.argsort(descending=True)
    _, tie = torch.unique_consecutive(confidence[descending], return_inverse=True)
    wrong = 1.0 - correct[descending].double()
    in_tie = torch.bincount(tie).double()
    expected = (torch.zeros_like(in_tie).index_add_(0, tie, wrong) / in_tie)[tie]
    return expected.cumsum(0) / torch.arange(1, len(wrong) + 1, device=wrong.device)


def optimal_aurc(num_samples: int, num_errors: int) -> float:
    """AURC in [0, 1] of the best ranking: every error less confident than every hit (Geifman et al., ICLR 2019)."""
    k = torch.arange(1, num_errors + 1, dtype=torch.float64)
    return (k / (num_samples - num_errors + k)).sum().item() / num_samples


def summarize(each: Outcomes) -> dict[str, float]:
    """The six figures over a whole split, from each sample's outcome."""
    correct = each.correct.double()
    aurc = risk_curve(each.confidence, each.correct).mean().item()
    return {
        "top1_error": 100.0 * (1.0 - correct).mean().item(),
        "top5_error": 100.0 * (1.0 - each.top5_correct.double()).mean().item(),
        "nll": each.nll.double().mean().item(),
        "ece": 100.0 * ece(each.confidence, each.correct).item(),
        "aurc": 1000.0 * aurc,
        "eaurc": 1000.0 * (aurc - optimal_aurc(len(correct), int((~each.correct).sum()))),
    }


def _tensor(values) -> Tensor:
    if isinstance(values, Tensor):
        return values
    array = np.asarray(values)
    # torch has nothing wider than float64, and no unsigned integers to compute with.
    narrow = array.dtype.kind == "f" and array.dtype.itemsize <= 8
    wanted = (
        array.dtype.newbyteorder("=") if narrow else {"f": np.float64, "u": np.int64}.get(array.dtype.kind, array.dtype)
    )
    try:
        return torch.tensor(array.astype(wanted))
    except TypeError:
        raise InputError(f"cannot score an array of {array.dtype}") from None


def score(probabilities, labels) -> dict[str, float]:
    """The six figures of `probabilities` [N, K] (rows sum to 1) against `labels` [N], tensors or arrays of any float type.

    Raises InputError where shapes, label range or values do not fit.
    """
    probabilities, labels = _tensor(probabilities), _tensor(labels)
    if probabilities.ndim != 2 or not probabilities.is_floating_point() or 0 in probabilities.shape:
        raise InputError(
            f"probabilities must be floats of shape [N, K], got {probabilities.dtype} {list(probabilities.shape)}"
        )
    if labels.shape != probabilities.shape[:1] or labels.is_floating_point():
        raise InputError(
            f"labels must be integers of shape [{len(probabilities)}], got {labels.dtype} {list(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise InputError(f"labels must lie in 0 … {probabilities.shape[1] - 1}, got {labels.min()} … {labels.max()}")
    smallest, largest = probabilities.aminmax()  # NaN if any is
    if not (smallest >= 0 and largest <= 1 + 1e-3):
        raise InputError(
            "probabilities must be finite and lie in [0, 1]; these do not (logits go through a softmax first)"
        )
    sums = torch.cat([rows.sum(dim=1, dtype=torch.float64) for rows in probabilities.split(ROWS_AT_ONCE)])
    if sums.max() > 1 + ROW_SUM_TOLERANCE:
        raise InputError(f"rows of probabilities must sum to 1, one sums to {sums.max():.3g}")
    return summarize(outcomes(probabilities, labels.to(probabilities.device).long()))
