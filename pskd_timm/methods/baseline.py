"""Plain cross-entropy."""

import torch.nn.functional as F

from .. import losses
from .base import Method


class Baseline(Method):
    part_names = ("cross_entropy",)

    def loss(self, model, batch):
        logits = model(batch.images)
        cross_entropy = F.cross_entropy(losses.at_least_float32(logits), batch.labels)
        self.parts = cross_entropy.detach()[None]
        return cross_entropy, logits
