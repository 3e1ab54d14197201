"""A split as batches: which samples when is order.py's, how they look is augmentation.py's, both on the device."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import order, rng
from ..batch import Batch
from ..recipe import Augment
from .augmentation import Draws, Mix, augment, cutmix, draw, draw_mix, mixup, normalize_, pixel_scale
from .split import Split
from .streaming import Job, StreamedSplit

# Streams of augmentation draws: a partner's view is its own even where it is the anchor.
ANCHOR, PARTNER, MIXING = 2, 3, 4


class Loader:
    """This rank's training batches of each epoch, as a function of (seed, epoch).

    With `partners` `partner_inputs` is filled too: with another sample of each one's `class`, or a second `view` of it.
    """

    def __init__(
        self,
        split: Split | StreamedSplit,
        num_classes: int,
        num_epochs: int,
        batch_size: int,
        section: Augment,
        mean,
        std,
        seed: int,
        rank: int,
        world_size: int,
        partners: str,
    ):
        self.split, self.num_epochs, self.batch_size = split, num_epochs, batch_size
        self.section, self.seed, self.rank, self.world_size = section, seed, rank, world_size
        device = split.labels.device
        self.mean, self.std = pixel_scale(mean, std, device)
        self.partners = order.Partners(split.labels.cpu(), num_classes) if partners == "class" else None
        self.streams = (ANCHOR, PARTNER)[: 1 + bool(partners)]
        self._stream, self._stream_epoch = (batch for batch in ()), None
        # Asked for by the run and, ahead of it, by the stream.
        self.rank_batches = lru_cache(maxsize=2)(self.rank_batches)

    @property
    def steps(self) -> int:
        """Global batches an epoch."""
        return order.num_batches(len(self.split), self.batch_size, self.world_size)

    def rank_batches(self, epoch: int) -> list[Tensor]:
        """The sample ids (CPU) of each of this rank's batches of the epoch."""
        ids = order.epoch_order(len(self.split), self.seed, epoch)
        return order.rank_batches(ids, self.batch_size, self.rank, self.world_size)

    def rows(self, batches: list[Tensor]) -> Tensor:
        """The rows of the prediction store that `batches` visit: the samples' ids, of which an epoch may have none left."""
        return torch.cat(batches) if batches else torch.empty(0, dtype=torch.int64)

    def global_size(self, epoch: int, step: int) -> int:
        """Samples of global batch `step` over all ranks."""
        return min(self.batch_size, len(self.split) - step * self.batch_size)

    def batches(self, ids: list[Tensor], epoch: int, grad_accum_steps: int = 1) -> Iterator[list[Batch]]:
        """For each of `ids`, the last batches of `epoch`, its `grad_accum_steps` micro-batches (fewer of few samples)."""
        # One stream runs through all epochs, so that workers go on decoding across their boundaries.
        if not ids:
            self._stream_epoch = None
            return
        if epoch != self._stream_epoch:
            self._stream = self.split.stream(self._jobs(ids, epoch))
        self._stream_epoch = None
        numbers = range(self.steps - len(ids), self.steps)
        for number, batch_ids, known in zip(numbers, ids, self._known(ids, epoch), strict=True):
            index, views = next(self._stream)
            if len(index) < len(batch_ids):  # damaged images are left out
                kept = torch.isin(batch_ids, index.cpu()).nonzero().squeeze(1).to(index.device)
                known = known.each(lambda column, kept=kept: column[kept])
            mix = self.mix(epoch, number)
            start = order.even_slice_of_pairs(self.global_size(epoch, number), self.rank, self.world_size).start
            parts = [order.even_slice_of_pairs(len(index), part, grad_accum_steps) for part in range(grad_accum_steps)]
            parts = [part for part in parts if part.stop > part.start]
            yield [
                self._batch(index, views, known, mix, part, start + part.start, micro_batch)
                for micro_batch, part in enumerate(parts)
            ]
        self._stream_epoch = epoch + 1
        if epoch + 1 == self.num_epochs:
            self.close()

    def close(self):
        """End the workers that read ahead.

        Stream and loader hold each other, so that only the garbage collector would find them, and in what it collects
        no message reaches a worker: the next run would wait five seconds for each.
        """
        self._stream.close()

    def mix(self, epoch: int, number: int) -> Mix | None:
        """How global batch `number` of the epoch is mixed, if it is."""
        return draw_mix(self.section, rng.derive_key(self.seed, epoch, MIXING, number))

    def rows_renewed(self, epoch: int) -> int:
        """Samples that the epoch shows unmixed, over all ranks."""
        return sum(self.global_size(epoch, number) for number in range(self.steps) if not self.mix(epoch, number))

    def _jobs(self, ids: list[Tensor], epoch: int) -> Iterator[Job]:
        while True:
            lengths = [len(batch) for batch in ids]
            index = torch.cat(ids)
            partners = self.partners.draw(index, self.seed, epoch) if self.partners else index
            streams = [
                (samples, rng.derive_key(self.seed, epoch, stream))
                for samples, stream in zip((index, partners), self.streams, strict=False)
            ]
            # One copy to the device for the whole epoch; a batch's ids are a view of it.
            on_device = [samples.to(self.split.ids_device).split(lengths) for samples, _ in streams]
            epoch += 1
            for position, (anchors, *others) in enumerate(zip(*on_device, strict=True), 1):
                if position == len(ids) and epoch < self.num_epochs:
                    upcoming = self.rank_batches(epoch)  # known before the epoch ends
                yield anchors, [(samples, key) for samples, (_, key) in zip([anchors, *others], streams, strict=True)]
            if epoch == self.num_epochs:
                return
            ids = upcoming

    def _known(self, ids: list[Tensor], epoch: int) -> list["_Known"]:
        index, lengths = torch.cat(ids).to(self.split.labels.device), [len(batch) for batch in ids]
        keys = [rng.derive_key(self.seed, epoch, stream) for stream in self.streams]
        settings = self.split.size, not self.split.crops_itself
        draws = [draw(self.section, index, key, *settings).split(lengths) for key in keys]
        labels = self.split.labels[index].split(lengths)
        return [_Known(*known) for known in zip(labels, zip(*draws, strict=True), strict=True)]

    def _batch(
        self,
        index: Tensor,
        views: list[Tensor],
        known: "_Known",
        mix: Mix | None,
        part: slice,
        start: int,
        micro_batch: int,
    ) -> Batch:
        if part != slice(0, len(index)):
            index, views, known = index[part], [view[part] for view in views], known.each(lambda column: column[part])
        padding = self.section.crop_padding
        images = [
            augment(view, draws, padding, self.mean, self.std) for view, draws in zip(views, known.draws, strict=True)
        ]
        batch = Batch(images[0], known.labels, index, *images[1:], micro_batch=micro_batch)
        return _mixed(batch, mix, order.mix_permutation(start, len(index), index.device)) if mix else batch


class _Known(NamedTuple):
    """What is worked out for a whole epoch at once, of one batch: its labels [B] and what each of its views draws."""

    labels: Tensor
    draws: tuple[Draws, ...]

    def each(self, change: Callable[[Tensor], Tensor]) -> "_Known":
        return _Known(change(self.labels), tuple(draws.each(change) for draws in self.draws))


def _mixed(batch: Batch, mix: Mix, permutation: Tensor) -> Batch:
    if mix.kind == "mixup":
        images, lam = mixup(batch.inputs, permutation, mix.lam), mix.lam
    else:
        images, lam = cutmix(batch.inputs, permutation, mix.lam, mix.centre)
    return replace(batch, inputs=images, permutation=permutation, lam=torch.full((), lam, device=permutation.device))


def read_images(split: Split | StreamedSplit, rows: Tensor) -> Tensor:
    """The images uint8 [n, C, H, W] of `rows` [n] of a split as evaluation sees them, before they are normalised."""
    ids = rows.to(split.ids_device)
    return next(iter(split.stream([(ids, [(ids, None)])])))[1][0]


def eval_part(length: int, batch_size: int, rank: int, world_size: int) -> slice:
    """The samples of a split that `rank` evaluates: whole batches, so that they are the same batches on any number of ranks."""
    batches = order.even_slice(-(-length // batch_size), rank, world_size)
    return slice(*(min(bound * batch_size, length) for bound in (batches.start, batches.stop)))


def eval_batches(split: Split, batch_size: int, mean, std, part: slice) -> Iterator[tuple[Tensor, Tensor]]:
    """The `part` of `split` in order, as normalised images and labels; no padding, no repeats."""
    device = split.labels.device
    mean, std = pixel_scale(mean, std, device)
    ids = torch.arange(part.start, part.stop, device=split.ids_device)
    jobs = ((index, [(index, None)]) for index in ids.split(batch_size) if len(index))
    for index, (images,) in split.stream(jobs):
        yield normalize_(images, mean, std), split.labels[index]
