"""Running means of a run's loss and error, and its clock."""

import math
import time

import torch
from accelerate import Accelerator

from ..errors import Diverged
from .checkpoint import Progress


class RunningMeans:
    """Loss, error, sample count and the loss's terms summed on the device and read only now and then."""

    def __init__(self, accelerator: Accelerator, term_names: tuple[str, ...] = ()):
        self.accelerator, self.term_names = accelerator, term_names
        self.sums = torch.zeros(3 + len(term_names), device=accelerator.device)  # loss, errors, samples, terms

    def add(self, loss, logits, labels, terms):
        self.sums[1] += (logits.detach().argmax(dim=1) != labels).sum()
        self.add_loss(loss, len(labels), terms)

    def add_loss(self, loss, count, terms):
        """As `add`, where nothing is right or wrong: the mean `loss` and its `terms` over `count` samples."""
        self.sums[0] += loss.detach() * count
        self.sums[2] += count
        self.sums[3:].add_(terms, alpha=count)

    def total(self, where: str) -> list[float]:
        """The sums over all ranks (all ranks call it together); raises Diverged where the loss is not finite."""
        sums = self.accelerator.reduce(self.sums, "sum").tolist()
        if not math.isfinite(sums[0]):
            raise Diverged(f"the loss is {sums[0]} at {where}")
        return sums

    def read(self, progress: Progress, where: str) -> dict[str, float]:
        """Add the sums over all ranks to `progress` and reset them (all ranks call it together).

        Returns the mean `loss`, the `error` in % and the mean of each part.
        """
        loss, errors, samples, *terms = self.total(where)
        self.sums.zero_()
        progress.loss_sum += loss
        progress.error_sum += errors
        progress.num_seen += samples
        means = [loss, 100.0 * errors, *terms]
        names = ("loss", "error", *self.term_names)
        return {name: mean / max(samples, 1) for name, mean in zip(names, means, strict=True)}


class Clock:
    """Adds the time since it last looked to a run's seconds, which survive a resume."""

    def __init__(self):
        self.last = time.perf_counter()

    def update(self, progress: Progress):
        now = time.perf_counter()
        progress.seconds += now - self.last
        progress.epoch_seconds += now - self.last
        self.last = now
