"""Focal losses: the better a sample is predicted, the less it counts.

Focal loss is Lin et al.'s (ICCV 2017); for calibration, with a γ for each sample, Mukhoti et al.'s (NeurIPS 2020, arXiv
2002.09437). The dual one is Tao et al.'s (ICML 2023, arXiv 2305.13665). The authors' code for calibration trains with sums
over the batch and clips the gradient's norm at 2; here the loss is a mean, as all others are, and nothing is clipped unless
`optim.clip_grad_norm` says so.
"""

import torch
import torch.nn.functional as F

from .. import losses
from .base import Method

SMALLEST = 1e-12  # of 1 − p, whose powers below 1 have no slope at 0


class Focal(Method):
    """Mean of (1 − p)^γ·(−log p), p the label's probability; γ is `low_gamma` where p < `low_probability`, else `gamma`.

    The defaults are FLSD-53. With a `low_probability` of 0 it is the plain focal loss.
    """

    term_names = ("focal",)

    def __init__(self, gamma: float = 3.0, low_gamma: float = 5.0, low_probability: float = 0.2):
        self.gamma, self.low_gamma, self.low_probability = gamma, low_gamma, low_probability

    def loss(self, model, batch):
        logits = model(batch.inputs)
        log_p = F.log_softmax(losses.at_least_float32(logits), dim=1)
        loss = batch.label_loss(lambda labels: self._focal(log_p, labels))
        self.terms = loss.detach()[None]
        return loss, logits

    def _focal(self, log_p, labels):
        log_p = log_p.gather(1, labels[:, None])[:, 0]
        rest = (-torch.expm1(log_p)).clamp_min(SMALLEST)
        low = log_p.detach().exp() < self.low_probability
        return -(torch.where(low, rest**self.low_gamma, rest**self.gamma) * log_p).mean()


class DualFocal(Focal):
    """Mean of (1 − p + p_j)^γ·(−log p), p the label's probability, p_j the largest one below it (0 where there is none)."""

    def __init__(self, gamma: float = 5.0):
        self.gamma = gamma

    def _focal(self, log_p, labels):
        p, log_of_label = log_p.exp(), log_p.gather(1, labels[:, None])
        of_label = log_of_label.exp()
        runner_up = p.masked_fill(p >= of_label, 0.0).amax(dim=1, keepdim=True)
        rest = (runner_up - torch.expm1(log_of_label)).clamp_min(SMALLEST)
        return -(rest**self.gamma * log_of_label).mean()
