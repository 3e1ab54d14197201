"""Label smoothing (Szegedy et al., CVPR 2016): targets (1 − ε)·label + ε/K."""

import torch
import torch.nn.functional as F

from .. import losses
from .base import Method


class LabelSmoothing(Method):
    part_names = ("cross_entropy", "uniform_cross_entropy")

    def __init__(self, epsilon: float = 0.1):
        self.epsilon = epsilon

    def loss(self, model, batch):
        logits = model(batch.images)
        wide = losses.at_least_float32(logits)
        smoothed = F.cross_entropy(wide, batch.labels, label_smoothing=self.epsilon)
        log_p = F.log_softmax(wide.detach(), dim=1)
        self.parts = torch.stack([F.nll_loss(log_p, batch.labels), -log_p.mean()])
        return smoothed, logits
