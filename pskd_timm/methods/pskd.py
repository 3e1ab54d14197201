"""PS-KD (Kim et al., ICCV 2021, arXiv 2006.12000): soften the label with the sample's own last prediction."""

import torch.nn.functional as F

from .. import losses
from ..store import PredictionStore
from .base import Method


class PSKD(Method):
    """Target in epoch e of E: (1 − α_e)·label + α_e·last prediction, α_e = `alpha`·(e + 1)/E."""

    def __init__(self, alpha: float = 0.8, store_dtype: str = "float16"):
        self.alpha, self.store_dtype = alpha, store_dtype

    def setup(self, *, num_samples, num_classes, num_epochs, device, labels=None):
        super().setup(num_samples=num_samples, num_classes=num_classes, num_epochs=num_epochs, device=device)
        self.store = PredictionStore(num_samples, num_classes, device, self.store_dtype, labels)
        return self

    def begin_epoch(self, epoch, order):
        self.alpha_now = self.alpha * (epoch + 1) / self.num_epochs
        self.store.checkout(order)

    def loss(self, model, batch):
        logits = model(batch.images)
        wide = losses.at_least_float32(logits)
        last = self.store.read(batch.index, batch.labels).to(wide.dtype)
        label = F.one_hot(batch.labels, self.num_classes).to(wide.dtype)
        targets = (1.0 - self.alpha_now) * label + self.alpha_now * last
        # What this very forward predicts (training mode, augmented view) is the next visit's target.
        self.store.write(batch.index, wide.detach().softmax(dim=1))
        return losses.soft_cross_entropy(logits, targets), logits

    def end_epoch(self):
        self.store.checkin()

    def values(self):
        return {"alpha": self.alpha_now}
