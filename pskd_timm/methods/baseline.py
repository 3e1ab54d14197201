"""Plain cross-entropy."""

from functools import partial

import torch.nn.functional as F

from .. import losses
from .base import Method


class Baseline(Method):
    term_names = ("cross_entropy",)

    def loss(self, model, batch):
        logits = model(batch.inputs)
        cross_entropy = batch.label_loss(partial(F.cross_entropy, losses.at_least_float32(logits)))
        self.terms = cross_entropy.detach()[None]
        return cross_entropy, logits
