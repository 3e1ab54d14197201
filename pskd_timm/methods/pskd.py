"""PS-KD (Kim et al., ICCV 2021, arXiv 2006.12000): soften the label with the sample's own last prediction."""

import torch
import torch.nn.functional as F

from .. import losses
from ..progress import readable
from ..ranks import rank_and_world_size
from ..recipe import InputError
from ..store import PredictionStore, choose_device, store_bytes
from .base import Method


class PSKD(Method):
    """Target in epoch e of E: (1 − α_e)·label + α_e·last prediction, α_e = `alpha`·(e + 1)/E.

    Predictions are kept in `store_dtype` on `store_device` (`auto` or `cpu`), in full or with `store_format` topk the
    `store_topk` largest of each.
    """

    part_names = ("cross_entropy", "last_cross_entropy")

    def __init__(
        self,
        alpha: float = 0.8,
        store_dtype: str = "float16",
        store_format: str = "full",
        store_topk: int | None = None,
        store_device: str = "auto",
    ):
        if not 0.0 <= alpha <= 1.0:
            raise InputError(f"alpha must lie in [0, 1], got {alpha}")
        self.alpha, self.store_dtype, self.store_device = alpha, store_dtype, store_device
        self.topk = store_topk if store_format == "topk" else None

    def setup(self, *, num_samples, num_classes, num_epochs, device, labels=None):
        super().setup(num_samples=num_samples, num_classes=num_classes, num_epochs=num_epochs, device=device)
        num_bytes = store_bytes(num_samples, num_classes, self.store_dtype, rank_and_world_size()[1], self.topk)
        where = choose_device(self.store_device, device, num_bytes)
        self.store = PredictionStore(num_samples, num_classes, where, self.store_dtype, labels, self.topk)
        self.told = (
            f"prediction store: {num_samples:,} × {num_classes:,} {self.store_dtype}"
            f"{f', the {self.topk} largest of each row' if self.topk else ''}, {readable(num_bytes)} a rank on {where.type}"
        )
        return self

    def about(self):
        error = self.store.topk_error() if self.topk else 0.0
        return f"{self.told}; {100 * error:.2g} % of a row's mass is misplaced on average" if error else self.told

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
        log_p = F.log_softmax(wide.detach(), dim=1)
        self.parts = torch.stack([F.nll_loss(log_p, batch.labels), -(last * log_p).sum(dim=1).mean()])
        return losses.soft_cross_entropy(logits, targets), logits

    def end_epoch(self):
        self.store.checkin()

    def values(self):
        return {"alpha": self.alpha_now}
