"""Batches by target tokens: pure functions of (seed, epoch, lengths), the same global ones on any number of ranks."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from .. import rng
from ..batch import Batch
from .sentences import Sentences

ORDER, BUCKETS = 20, 21  # streams of random numbers: pairs of equal length, and in which order batches come
SOURCE_STEP = 4  # source lengths this close count as equal


def num_batches(num_tokens: int, batch_tokens: int) -> int:
    """Global batches an epoch: so many that they hold at most `batch_tokens` target tokens on average."""
    return -(-num_tokens // batch_tokens)


def global_batches(
    source_lengths: Tensor, target_lengths: Tensor, batch_tokens: int, seed: int, epoch: int
) -> list[Tensor]:
    """The pairs (int64 ids) of each of an epoch's batches.

    Pairs are lined up by target length, then by source length in steps of four, equal ones in a drawn order. The line is cut
    where the target tokens before a pair pass a multiple of all tokens over `num_batches`: every epoch has as many batches,
    none is off that size by more than the longest target, and each pair is in one. Batches come in a drawn order.
    """
    drawn = torch.randperm(len(target_lengths), generator=_generator(seed, epoch, ORDER))
    batches = [drawn[places] for places in by_length(source_lengths[drawn], target_lengths[drawn], batch_tokens)]
    return [batches[i] for i in torch.randperm(len(batches), generator=_generator(seed, epoch, BUCKETS)).tolist()]


def by_length(source_lengths: Tensor, target_lengths: Tensor, batch_tokens: int) -> list[Tensor]:
    """Pairs (int64 ids) of similar lengths in batches of about `batch_tokens` target tokens, short ones first."""
    num_tokens = int(target_lengths.sum())
    steps = num_batches(num_tokens, batch_tokens)
    longest_source = int(source_lengths.max()) // SOURCE_STEP + 1
    line = (target_lengths * longest_source + source_lengths // SOURCE_STEP).argsort(stable=True)
    before = target_lengths[line].cumsum(0) - target_lengths[line]
    return list(line.split((before * steps // num_tokens).bincount(minlength=steps).tolist()))


def _generator(seed: int, epoch: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(rng.derive_key(seed, epoch, stream))


class TokenBatches:
    """A rank's training batches (`tasks.base.Batches`) of `sources` and `targets`, whose tokens the store has rows for.

    A batch's `inputs` are what `TranslationNetwork` takes; labels and index [T] are those of its target tokens.
    """

    def __init__(
        self,
        sources: Sentences,
        targets: Sentences,
        batch_tokens: int,
        pad: int,
        start: int,
        seed: int,
        device="cpu",
        rank: int = 0,
        world_size: int = 1,
    ):
        self.sources, self.targets, self.batch_tokens = sources, targets, batch_tokens
        self.pad, self.start, self.seed = pad, start, seed
        self.device, self.rank, self.world_size = device, rank, world_size
        self.steps = num_batches(len(targets.tokens), batch_tokens)
        self.global_batches = lru_cache(maxsize=1)(self.global_batches)

    def global_batches(self, epoch: int) -> list[Tensor]:
        """The pairs of each global batch of the epoch."""
        return global_batches(self.sources.lengths, self.targets.lengths, self.batch_tokens, self.seed, epoch)

    def rank_batches(self, epoch: int) -> list[Tensor]:
        # Neighbours in a batch are of a length, so every so many-th pair makes shares of nearly equal work.
        return [batch[self.rank :: self.world_size] for batch in self.global_batches(epoch)]

    def rows(self, batches: list[Tensor]) -> Tensor:
        return self.targets.places(torch.cat(batches)) if batches else torch.empty(0, dtype=torch.int64)

    def rows_renewed(self, epoch: int) -> int:
        return len(self.targets.tokens)

    def global_size(self, epoch: int, step: int) -> int:
        return int(self.targets.lengths[self.global_batches(epoch)[step]].sum())

    def batches(self, batches: list[Tensor], epoch: int, grad_accum_steps: int) -> Iterator[list[Batch]]:
        for pairs in batches:
            parts = (pairs[part::grad_accum_steps] for part in range(grad_accum_steps))
            yield [self.batch(part) for part in parts if len(part)]

    def close(self):
        """Nothing reads ahead."""

    def batch(self, pairs: Tensor) -> Batch:
        """The batch of `pairs` [B] on the device."""
        inputs = make_inputs(self.sources, self.targets, pairs, self.pad, self.start)
        index = self.targets.places(pairs)
        labels = self.targets.tokens[index]
        return Batch(tuple(self._move(tensor) for tensor in inputs), self._move(labels), self._move(index))

    def _move(self, tensor: Tensor) -> Tensor:
        if torch.device(self.device).type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)  # no step waits for its copy


def make_inputs(
    sources: Sentences, targets: Sentences, pairs: Tensor, pad: int, start: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What a network takes of `pairs` [B]: sources [B, S], targets [B, L] behind `start`, flat positions [T] of real targets."""
    source, _ = sources.padded(pairs, pad)
    target, positions = targets.padded(pairs, pad)
    shifted = torch.cat([torch.full((len(pairs), 1), start), target[:, :-1]], dim=1)
    return source, shifted, positions
