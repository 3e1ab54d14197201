"""What a method is given at every step."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Batch:
    """Images [B, C, H, W], labels [B] and the samples' ids `index` [B], all on one device.

    `partner_images` [B, C, H, W] holds, for the methods that ask for partners, another sample of each one's class.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    partner_images: Tensor | None = None
