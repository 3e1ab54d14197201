"""Which samples, when, on which rank: pure functions of (seed, epoch).

A global batch is a slice of the epoch's order, a rank's part a slice of that: the same batches on any number of ranks,
no sample repeated, none dropped, no pair parted that may be mixed (but in a batch of fewer than two samples a rank). Left
out is only a last batch with fewer samples than ranks.
"""

import torch
from torch import Tensor

from . import rng


def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """The permutation [N] (int64, CPU) in which an epoch visits the samples."""
    generator = torch.Generator().manual_seed(rng.derive_key(seed, epoch, 0))
    return torch.randperm(num_samples, generator=generator)


def num_batches(num_samples: int, batch_size: int, world_size: int = 1) -> int:
    """Global batches an epoch: every full one, and the last short one if each rank gets at least one sample of it."""
    full, tail = divmod(num_samples, batch_size)
    return full + (tail >= world_size and tail > 0)


def even_slice(length: int, part: int, parts: int) -> slice:
    """The `part`-th of `parts` contiguous slices of `length` items, as even as possible (the first ones are longer)."""
    size, longer = divmod(length, parts)
    start = part * size + min(part, longer)
    return slice(start, start + size + (part < longer))


def even_slice_of_pairs(length: int, part: int, parts: int) -> slice:
    """`even_slice` with even bounds, so that it holds both of a mixed pair; below two items a part, `even_slice` itself."""
    if length < 2 * parts:
        return even_slice(length, part, parts)
    pairs = even_slice(length // 2, part, parts)
    return slice(2 * pairs.start, length if part == parts - 1 else 2 * pairs.stop)


def rank_batches(order: Tensor, batch_size: int, rank: int, world_size: int) -> list[Tensor]:
    """The sample ids of each of this rank's batches, in the order of the global batches they are slices of."""
    steps = num_batches(len(order), batch_size, world_size)
    batches = (order[step * batch_size : (step + 1) * batch_size] for step in range(steps))
    return [batch[even_slice_of_pairs(len(batch), rank, world_size)] for batch in batches]


def mix_permutation(start: int, length: int, device=None) -> Tensor:
    """Whom each of `length` samples is mixed with, as positions [length]; the first one's place in the global batch is `start`.

    Places 2j and 2j + 1 are each other's, on any number of ranks. In a batch of fewer than two samples a rank (or forward
    pass) a partner may be out of reach: a sample is then its own.
    """
    places = torch.arange(start, start + length, device=device)
    partner = (places ^ 1) - start
    return torch.where((partner < 0) | (partner >= length), places - start, partner)


class Partners:
    """For CS-KD: another sample of each anchor's class, drawn uniformly (the anchor itself may be drawn)."""

    def __init__(self, labels: Tensor, num_classes: int):
        self.by_class = torch.argsort(labels, stable=True)
        self.count = torch.bincount(labels, minlength=num_classes)
        self.start = torch.cumsum(self.count, 0) - self.count
        self.labels = labels

    def draw(self, index: Tensor, seed: int, epoch: int) -> Tensor:
        """A partner's id for each anchor id in `index` [B]: a function of (seed, epoch, anchor)."""
        label = self.labels[index]
        return self.by_class[self.start[label] + rng.integers(rng.derive_key(seed, epoch, 1), index, self.count[label])]
