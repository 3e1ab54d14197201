"""A training batch, as methods take it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Batch:
    """What the network takes (`inputs`: images [B, C, H, W]), `labels` [B] and the rows `index` [B] of the prediction store.

    `partner_inputs`, like `inputs`, holds another sample of each one's class, or the same in a second view, for the methods
    that ask for it. Where a step is split into several forward passes, `micro_batch` says which of them this is.
    In a mixed batch (mixup, cutmix) input i is `lam` [] (λ) parts sample i and 1 − λ parts sample `permutation[i]` [B].

    Example:
        >>> batch = Batch(images, labels, index)  # [128, 3, 32, 32], [128], [128]
    """

    inputs: Any
    labels: Tensor
    index: Tensor
    partner_inputs: Any = None
    permutation: Tensor | None = None
    lam: Tensor | None = None
    micro_batch: int = 0

    def mixed(self, rows: Tensor) -> Tensor:
        """`rows` [B, …] of the samples, mixed as the inputs are; unchanged in a batch that is not mixed."""
        return rows if self.permutation is None else self.lam * rows + (1.0 - self.lam) * rows[self.permutation]

    def label_loss(self, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """`loss(labels)` [], in a mixed batch λ·loss(labels) + (1 − λ)·loss(labels[permutation])."""
        if self.permutation is None:
            return loss(self.labels)
        return self.lam * loss(self.labels) + (1.0 - self.lam) * loss(self.labels[self.permutation])
