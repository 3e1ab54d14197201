"""Zipf's label smoothing (Liang et al., ECCV 2022, arXiv 2207.12980): the other classes' shares fall as one over their rank.

The authors' code ranks the classes by votes over the places of the last feature map (`--dense`), with auxiliary heads, and
counts the label among the ranks; this is the form that needs the logits alone, ranked among the classes other than the label.
"""

from functools import partial

import torch
import torch.nn.functional as F

from .. import losses
from .base import Method


class Zipf(Method):
    """Cross-entropy + `weight`·KL(t ‖ softmax of the K − 1 logits that are not the label's), t in proportion to 1/rank.

    Equal logits share the better rank. No gradient flows through the ranks.
    """

    term_names = ("cross_entropy", "kl")

    def __init__(self, weight: float = 0.1):
        self.weight = weight

    def loss(self, model, batch):
        logits = model(batch.inputs)
        wide = losses.at_least_float32(logits)
        cross_entropy = batch.label_loss(partial(F.cross_entropy, wide))
        kl = batch.label_loss(partial(zipf_kl, wide))
        self.terms = torch.stack([cross_entropy, kl]).detach()
        return cross_entropy + self.weight * kl, logits


def zipf_kl(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """KL(t ‖ softmax(logits without the label's)), `logits` [B, K], summed over the K − 1 classes; mean over B."""
    is_label = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], True)
    others = logits.masked_fill(is_label, -torch.inf)
    values = others.detach().contiguous()
    # As many stand above a class as the sorted row has entries to the right of its own value; the label is below them all.
    above = values.shape[1] - torch.searchsorted(values.sort(dim=1).values, values, right=True)
    shares = (above + 1).to(logits.dtype).reciprocal().masked_fill(is_label, 0.0)
    shares = shares / shares.sum(dim=1, keepdim=True)
    log_q = F.log_softmax(others, dim=1).masked_fill(is_label, 0.0)
    return F.kl_div(log_q, shares, reduction="batchmean")
