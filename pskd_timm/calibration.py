"""Temperature scaling (Guo et al., ICML 2017): one number, fitted on held-out samples, that mends confidences."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .metrics import ece

ROWS_AT_ONCE = 1024  # so many that what is made of them stays in the processor's cache
FIRST_PARTS = 4  # of so many rows: enough to begin the search near its end
LOWEST, HIGHEST = 0.01, 100.0  # held-out samples that are all right, or all wrong, would ask for 0 or infinity


def log_probabilities(probabilities: Tensor) -> Tensor:
    """log p [N, K], at least in float32; a probability of 0 counts as float32's smallest normal number, as in the NLL."""
    wide = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    return wide.clamp_min(torch.finfo(torch.float32).tiny).log_()


def with_temperature(probabilities: Tensor, temperature: float) -> Tensor:
    """softmax(log p / T) of `probabilities` [N, K]: above 1 less confident, below 1 more; the order of a row stays."""
    return log_probabilities(probabilities).div_(temperature).softmax(dim=1)


def fit_temperature(probabilities: Tensor, labels: Tensor) -> float:
    """The T in [0.01, 100] that gives `with_temperature(probabilities [N, K], T)` the least NLL against `labels` [N]."""
    return fit_to_parts(zip(probabilities.split(ROWS_AT_ONCE), labels.split(ROWS_AT_ONCE), strict=True))


def fit_to_parts(parts: Iterable[tuple[Tensor, Tensor]]) -> float:
    """`fit_temperature` of probabilities [n, K] and labels [n] that come in parts, each of which is read once."""
    kept = []
    for probabilities, labels in parts:
        logs = log_probabilities(probabilities)
        logs -= logs.amax(dim=1, keepdim=True)
        kept.append((logs, logs.gather(1, labels[:, None]).sum(dtype=torch.float64)))
    scale = 1.0
    for some in (kept[:FIRST_PARTS], kept) if len(kept) > 2 * FIRST_PARTS else (kept,):
        scale = _best_scale(some, scale)
    return 1.0 / scale


def _best_scale(parts: list[tuple[Tensor, Tensor]], scale: float) -> float:
    """The 1/T of the least NLL by Newton's method from `scale`: the NLL is convex in 1/T, so its slope there has one root."""
    lowest, highest = low, high = 1.0 / HIGHEST, 1.0 / LOWEST
    while True:
        slope, curvature = _slope_and_curvature(parts, scale)
        low, high = (low, scale) if slope > 0 else (scale, high)
        step = scale - slope / curvature if curvature > 0 else lowest if slope > 0 else highest
        step = min(max(step, lowest), highest)
        if not low <= step <= high:
            step = math.sqrt(low * high)
        if abs(step / scale - 1) < 1e-6:
            return step
        scale = step


def _slope_and_curvature(parts: list[tuple[Tensor, Tensor]], scale: float) -> tuple[float, float]:
    """First and second derivative of the summed NLL by 1/T: Σ (mean log p − log p of the label), Σ variance of log p."""
    slope = curvature = 0.0
    for logs, of_labels in parts:
        weights = (logs * scale).exp_()
        total = weights.sum(dim=1)
        weighted = weights.mul_(logs)
        mean = weighted.sum(dim=1).div_(total)
        square = torch.linalg.vecdot(weighted, logs).div_(total)
        slope += float(mean.sum(dtype=torch.float64) - of_labels)
        curvature += float((square - mean * mean).sum(dtype=torch.float64))
    return slope, curvature


def scaled_figures(parts: Iterable[tuple[Tensor, Tensor, Tensor]], temperature: float) -> dict[str, float]:
    """`nll` (nats) and `ece` (%) at a temperature, of probabilities [n, K], labels [n] and hits [n] that come in parts."""
    nll, confidences, hits = [], [], []
    for probabilities, labels, correct in parts:
        logs = log_probabilities(probabilities).div_(temperature)
        normaliser = logs.logsumexp(dim=1)
        nll.append((normaliser - logs.gather(1, labels[:, None]).squeeze(1)).double())
        confidences.append((logs.amax(dim=1) - normaliser).exp())
        hits.append(correct)
    return {"nll": torch.cat(nll).mean().item(), "ece": 100.0 * ece(torch.cat(confidences), torch.cat(hits)).item()}
