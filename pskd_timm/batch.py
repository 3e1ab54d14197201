"""What a method is given at every step."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Batch:
    """Images [B, C, H, W], labels [B] and the samples' ids `index` [B], all on one device.

    `partner_images` [B, C, H, W] holds, for the methods that ask for partners, another sample of each one's class.
    In a mixed batch (mixup, cutmix) `own` [] of image i is sample i, the rest is sample `mate[i]` [B] of the same batch.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    partner_images: Tensor | None = None
    mate: Tensor | None = None
    own: Tensor | None = None

    def mixed(self, rows: Tensor) -> Tensor:
        """What `rows` [B, …] say of the samples, said of the images: mixed as they are."""
        return rows if self.mate is None else self.own * rows + (1.0 - self.own) * rows[self.mate]

    def label_loss(self, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """`loss(labels)` [], weighted over the labels of the two samples that mixed images show."""
        if self.mate is None:
            return loss(self.labels)
        return self.own * loss(self.labels) + (1.0 - self.own) * loss(self.labels[self.mate])
