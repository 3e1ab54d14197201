"""Batches from a split that lies on the device: whole-batch indexing and augmentation, no worker, no copy."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import order, rng
from ..augment import augment, normalize
from ..batch import Batch
from ..recipe import Augment
from .split import Split

ANCHOR, PARTNER = 2, 3  # streams of augmentation draws, so that a partner's view is its own even where it is the anchor


class ResidentLoader:
    """This rank's training batches of an epoch, as a function of (seed, epoch); `partners` fills `partner_images` too."""

    def __init__(
        self,
        split: Split,
        num_classes: int,
        batch_size: int,
        section: Augment,
        mean,
        std,
        seed: int,
        rank: int,
        world_size: int,
        partners: bool,
    ):
        self.split, self.batch_size, self.section, self.seed = split, batch_size, section, seed
        self.rank, self.world_size = rank, world_size
        device = split.images.device
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.partners = order.Partners(split.labels, num_classes) if partners else None

    @property
    def steps(self) -> int:
        """Global batches an epoch."""
        return order.num_batches(len(self.split), self.batch_size, self.world_size)

    def rank_batches(self, epoch: int) -> list[Tensor]:
        """The sample ids (CPU) of each of this rank's batches of the epoch."""
        return order.rank_batches(
            order.epoch_order(len(self.split), self.seed, epoch), self.batch_size, self.rank, self.world_size
        )

    def global_size(self, step: int) -> int:
        """Samples of global batch `step` over all ranks."""
        return min(self.batch_size, len(self.split) - step * self.batch_size)

    def batches(self, ids: list[Tensor], epoch: int, accumulate: int = 1) -> Iterator[list[Batch]]:
        """For each of `ids` its `accumulate` micro-batches (fewer where there are fewer samples)."""
        if not ids:
            return
        # One copy to the device for the whole epoch; a batch's ids are a view of it.
        on_device = torch.cat(ids).to(self.split.images.device).split([len(batch) for batch in ids])
        for batch in on_device:
            shares = [batch[order.share(len(batch), part, accumulate)] for part in range(accumulate)]
            yield [self.batch(share, epoch) for share in shares if len(share)]

    def batch(self, index: Tensor, epoch: int) -> Batch:
        """The samples `index` [B] as this epoch shows them."""
        images = self._view(index, index, rng.fold(self.seed, epoch, ANCHOR))
        partner_images = None
        if self.partners:
            partner = self.partners.draw(index, self.seed, epoch)
            partner_images = self._view(partner, index, rng.fold(self.seed, epoch, PARTNER))
        return Batch(images, self.split.labels[index], index, partner_images)

    def _view(self, samples: Tensor, drawn_for: Tensor, key: int) -> Tensor:
        images = augment(self.split.images[samples], drawn_for, key, self.section.crop_padding, self.section.hflip)
        return normalize(images, self.mean, self.std)


def eval_part(length: int, batch_size: int, rank: int, world_size: int) -> slice:
    """The samples of a split that `rank` evaluates: whole batches, so that they are the same batches on any number of ranks."""
    batches = order.share(-(-length // batch_size), rank, world_size)
    return slice(*(min(bound * batch_size, length) for bound in (batches.start, batches.stop)))


def eval_batches(split: Split, batch_size: int, mean, std, part: slice) -> Iterator[tuple[Tensor, Tensor]]:
    """The `part` of `split` in order, as normalised images and labels; no padding, no repeats."""
    device = split.images.device
    mean, std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    for start in range(part.start, part.stop, batch_size):
        rows = slice(start, min(start + batch_size, part.stop))
        yield normalize(split.images[rows], mean, std), split.labels[rows]
