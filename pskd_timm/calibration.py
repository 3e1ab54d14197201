"""Temperature scaling (Guo et al., ICML 2017): one number, fitted on held-out samples, that mends confidences."""

import math

import torch
from scipy.optimize import brentq
from torch import Tensor

ROWS_AT_ONCE = 1024  # so many that their softmax stays in the processor's cache
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
    logs = [log_probabilities(rows) for rows in probabilities.split(ROWS_AT_ONCE)]
    true = sum(
        rows.gather(1, y[:, None]).double().sum() for rows, y in zip(logs, labels.split(ROWS_AT_ONCE), strict=True)
    )

    def slope(log_temperature: float) -> float:
        # The NLL is convex in 1/T, so its slope there, Σ (expected log p − log p of the label), has one root.
        scale = math.exp(-log_temperature)
        return float(sum(((rows * scale).softmax(dim=1) * rows).sum(dtype=torch.float64) for rows in logs) - true)

    low, high = math.log(LOWEST), math.log(HIGHEST)
    if slope(low) <= 0:
        return LOWEST
    if slope(high) >= 0:
        return HIGHEST
    return math.exp(brentq(slope, low, high, xtol=1e-5))
