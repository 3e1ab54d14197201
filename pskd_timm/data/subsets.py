"""Which samples make a part of a data set: functions of labels and data.seed, the same on every rank."""

import torch
from torch import Tensor

from .. import rng
from ..errors import InputError
from ..ranks import warn_on_main
from ..recipe import Data as DataSection

LIMIT, HOLDOUT, TEST = 0, 1, 5  # streams of data.seed; split.py has the others
STREAMS = {"holdout_fraction": HOLDOUT, "test_fraction": TEST}


def stratified_split(
    setting: str, section: DataSection, labels: Tensor, class_names: list[str]
) -> tuple[Tensor, Tensor]:
    """Positions (sorted) of the samples [N] that are kept and of those that the section's `setting` takes.

    Classes too small for the fraction are named. Raises InputError where no class has two images.
    """
    fraction, sizes = getattr(section, setting), labels.bincount(minlength=len(class_names))
    taken = stratified(labels, fraction, section.seed, STREAMS[setting])
    if len(taken) == 0:
        raise InputError(f"data.{setting} {fraction:g} has nothing to take: no class has two images")
    small = (sizes > 1) & (fraction * sizes.double() <= 0.5)
    if few := _named(small, class_names, sizes):
        warn_on_main(f"data.{setting} {fraction:g} takes one image, which is more than its part, of: {few}")
    if single := _named(sizes == 1, class_names):
        warn_on_main(f"data.{setting}: left alone, since they have one image each: {single}")
    kept = torch.ones(len(labels), dtype=torch.bool).index_fill(0, taken, False)
    return kept.nonzero().squeeze(1), taken


def _named(chosen: Tensor, class_names: list[str], sizes: Tensor | None = None) -> str:
    """The names of the `chosen` [K] classes for a message, with their `sizes`."""
    numbers = chosen.nonzero().squeeze(1).tolist()
    return name_some([class_names[k] + (f" (of {sizes[k]})" if sizes is not None else "") for k in numbers])


def name_some(names: list[str], count: int = 5) -> str:
    """The first `count` of `names` and how many more there are."""
    more = f" and {len(names) - count} more" * (len(names) > count)
    return f"{', '.join(names[:count])}{more}"


def balanced_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """`count` positions (sorted) taken from all classes as evenly as their sizes allow, as a function of `seed`."""
    by_class, turn = _shuffled(labels, seed, LIMIT)
    # The n-th sample of every class comes before the (n + 1)-th of any.
    return by_class[torch.argsort(turn, stable=True)[:count]].sort().values


def stratified(labels: Tensor, fraction: float, seed: int, stream: int) -> Tensor:
    """Positions (sorted) of `fraction` of each class, rounded, as a function of `seed` and `stream`.

    Of a class with two samples or more at least one is taken and one left; the only one of a class is left.
    """
    by_class, turn = _shuffled(labels, seed, stream)
    sizes = labels.bincount()
    taken = (fraction * sizes.double()).round().clamp(min=1).minimum(sizes - 1)
    return by_class[turn < taken[labels[by_class]]].sort().values


def _shuffled(labels: Tensor, seed: int, stream: int) -> tuple[Tensor, Tensor]:
    """All positions by class, shuffled in each, and which of its class (from 0) each one is."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(rng.derive_key(seed, stream)))
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    sizes = labels.bincount()
    first = sizes.cumsum(0) - sizes
    return by_class, torch.arange(len(labels)) - first[labels[by_class]]
