"""Label smoothing (Szegedy et al., CVPR 2016): targets (1 − ε)·label + ε/K."""

import torch.nn.functional as F

from .. import losses
from .base import Method


class LabelSmoothing(Method):
    def __init__(self, epsilon: float = 0.1):
        self.epsilon = epsilon

    def loss(self, model, batch):
        logits = model(batch.images)
        smoothed = F.cross_entropy(losses.at_least_float32(logits), batch.labels, label_smoothing=self.epsilon)
        return smoothed, logits
