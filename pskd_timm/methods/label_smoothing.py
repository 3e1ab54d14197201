"""Label smoothing (Szegedy et al., CVPR 2016): the label gives ε of its weight to the classes."""

import torch.nn.functional as F

from .. import losses
from .base import Method


class LabelSmoothing(Method):
    """Targets (1 − ε)·label + ε/K; where `spread` is `others`, 1 − ε for the label and ε/(K − 1) for each other class."""

    def __init__(self, epsilon: float = 0.1, spread: str = "all"):
        self.epsilon, self.spread = epsilon, spread

    def loss(self, model, batch):
        logits = model(batch.images)
        wide = losses.at_least_float32(logits)
        if self.spread == "others":
            targets = losses.virtual_teacher(batch.labels, logits.shape[1], 1.0 - self.epsilon, wide.dtype)
            return losses.soft_cross_entropy(wide, targets), logits
        return F.cross_entropy(wide, batch.labels, label_smoothing=self.epsilon), logits
