"""Margin-based label smoothing (Liu et al., CVPR 2022, arXiv 2111.15430): no logit far below the largest one."""

from functools import partial

import torch
import torch.nn.functional as F

from .. import losses
from .base import Method


class MbLS(Method):
    """Cross-entropy + `weight`·mean over all B·K logits of max(0, z_max − z_c − `margin`), with a gradient to z_max too."""

    term_names = ("cross_entropy", "excess")

    def __init__(self, margin: float = 10.0, weight: float = 0.1):
        self.margin, self.weight = margin, weight

    def loss(self, model, batch):
        logits = model(batch.inputs)
        wide = losses.at_least_float32(logits)
        cross_entropy = batch.label_loss(partial(F.cross_entropy, wide))
        excess = F.relu(wide.amax(dim=1, keepdim=True) - wide - self.margin).mean()
        self.terms = torch.stack([cross_entropy, excess]).detach()
        return cross_entropy + self.weight * excess, logits
