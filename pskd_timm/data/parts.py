"""Which samples make a part of a data set: functions of labels and data.seed, the same on every rank."""

import torch
from torch import Tensor

from .. import rng
from ..errors import InputError
from ..files import warn
from ..recipe import Data as DataSection

LIMIT, HOLDOUT, TEST = 0, 1, 5  # streams of data.seed; split.py has the others
STREAMS = {"holdout_fraction": HOLDOUT, "test_fraction": TEST}
NAMED = 5  # classes that a message names


def part_off(setting: str, section: DataSection, labels: Tensor, class_names: list[str]) -> tuple[Tensor, Tensor]:
    """Positions (sorted) of the samples [N] that stay and of those that the section's `setting` takes away.

    A class with too few images for both is named. Raises InputError where that is every class.
    """
    fraction, sizes = getattr(section, setting), labels.bincount(minlength=len(class_names))
    away = stratified(labels, fraction, section.seed, STREAMS[setting])
    if len(away) == 0:
        raise InputError(f"data.{setting} {fraction:g} has nothing to take: no class has two images")
    if single := [class_names[k] for k in (sizes == 1).nonzero().squeeze(1).tolist()]:
        more = f" and {len(single) - NAMED} more" * (len(single) > NAMED)
        warn(f"data.{setting}: left alone, since they have one image each: {', '.join(single[:NAMED])}{more}")
    stays = torch.ones(len(labels), dtype=torch.bool).index_fill(0, away, False)
    return stays.nonzero().squeeze(1), away


def class_balanced(labels: Tensor, count: int, seed: int) -> Tensor:
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
