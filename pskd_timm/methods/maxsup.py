"""MaxSup (Zhou et al., 2025, arXiv 2502.15798): label smoothing's pull on the largest logit, not on the label's."""

from functools import partial

import torch
import torch.nn.functional as F

from .. import losses
from .base import Method
from .sections import maxsup_weight


class MaxSup(Method):
    """Cross-entropy + λ·mean(z_max − mean z), λ growing evenly from `weight` in the first to `final_weight` in the last epoch."""

    term_names = ("cross_entropy", "suppression")

    def __init__(self, weight: float = 0.1, final_weight: float = 0.2):
        self.weight, self.final_weight = weight, final_weight

    def setup(self, *, device, **known):
        super().setup(device=device, **known)
        self.weight_now = self.weight  # of the current epoch, on the host
        self._weight = torch.full((), self.weight, dtype=torch.float64, device=device)  # where a recorded step reads it
        return self

    def begin_epoch(self, epoch, order):
        self.weight_now = maxsup_weight(epoch, self.num_epochs, self.weight, self.final_weight)
        self._weight.fill_(self.weight_now)

    def loss(self, model, batch):
        logits = model(batch.inputs)
        wide = losses.at_least_float32(logits)
        cross_entropy = batch.label_loss(partial(F.cross_entropy, wide))
        suppression = (wide.amax(dim=1) - wide.mean(dim=1)).mean()
        self.terms = torch.stack([cross_entropy, suppression]).detach()
        return cross_entropy + self._weight.to(wide.dtype) * suppression, logits

    def values(self):
        return {"suppression_weight": self.weight_now}
