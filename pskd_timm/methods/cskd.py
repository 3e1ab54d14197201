"""CS-KD (Yun et al., CVPR 2020, arXiv 2003.13964): predict like another sample of the same class."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F

from .. import losses
from .base import Method, eval_mode


class CSKD(Method):
    """Cross-entropy + `weight`·T²·KL(partner ‖ prediction), both at T; partners run in train mode, or in `partner_mode` eval."""

    needs_partners = "class"
    term_names = ("cross_entropy", "kl")

    def __init__(self, weight: float = 1.0, temperature: float = 4.0, partner_mode: str = "train"):
        self.weight, self.temperature, self.partner_mode = weight, temperature, partner_mode

    def loss(self, model, batch):
        logits = model(batch.inputs)
        # The released code's way is train mode, so that batch statistics are the partners' own.
        with torch.no_grad(), nullcontext() if self.partner_mode == "train" else eval_mode(model):
            partner_logits = model(batch.partner_inputs)
        cross_entropy = F.cross_entropy(losses.at_least_float32(logits), batch.labels)
        kl = losses.tempered_kl(logits, partner_logits, self.temperature)
        self.terms = torch.stack([cross_entropy, kl]).detach()
        return cross_entropy + self.weight * self.temperature**2 * kl, logits
