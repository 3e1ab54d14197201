"""Label smoothing (Szegedy et al., CVPR 2016): the label gives ε of its weight to the classes."""

from functools import partial

import torch
import torch.nn.functional as F

from .. import losses
from .base import Method


class LabelSmoothing(Method):
    """Targets (1 − ε)·label + ε/K; where `spread` is `others`, 1 − ε for the label and ε/(K − 1) for each other class."""

    term_names = ("cross_entropy", "uniform_cross_entropy")

    def __init__(self, epsilon: float = 0.1, spread: str = "all"):
        self.epsilon, self.spread = epsilon, spread

    def loss(self, model, batch):
        logits = model(batch.inputs)
        log_p = F.log_softmax(losses.at_least_float32(logits), dim=1)
        cross_entropy, uniform = batch.label_loss(partial(F.nll_loss, log_p)), -log_p.mean()
        self.terms = torch.stack([cross_entropy, uniform]).detach()
        # ε/(K − 1) for the others is ε·K/(K − 1) spread over all.
        num_classes = logits.shape[1]
        epsilon = self.epsilon * (num_classes / (num_classes - 1) if self.spread == "others" else 1.0)
        return (1.0 - epsilon) * cross_entropy + epsilon * uniform, logits
