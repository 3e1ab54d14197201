"""CS-KD (Yun et al., CVPR 2020, arXiv 2003.13964): predict like another sample of the same class."""

import torch
import torch.nn.functional as F

from .. import losses
from .base import Method


class CSKD(Method):
    needs_partners = True
    part_names = ("cross_entropy", "kl")

    def __init__(self, weight: float = 1.0, temperature: float = 4.0):
        self.weight, self.temperature = weight, temperature

    def loss(self, model, batch):
        logits = model(batch.images)
        # The released code's way: a second forward in train mode, so batch statistics are the partners' own.
        with torch.no_grad():
            partner_logits = model(batch.partner_images)
        cross_entropy = F.cross_entropy(losses.at_least_float32(logits), batch.labels)
        kl = losses.tempered_kl(logits, partner_logits, self.temperature)
        self.parts = torch.stack([cross_entropy, kl]).detach()
        return cross_entropy + self.weight * self.temperature**2 * kl, logits
