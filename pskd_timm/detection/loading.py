"""A timm network for its maps alone, with its weights: what timm's log says of these is checked, not printed."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import timm
import torch
from torch import nn

from ..ranks import warn_on_main

TIMM_LOG = "timm.models._builder"
UNEXPECTED = re.compile(r"Unexpected keys \((.*)\) found while loading")  # in timm's words
MISSING = re.compile(r"Missing keys \((.*)\) discovered while loading")


def features_of(source: str, pretrained: bool) -> nn.Module:
    """timm's `features_only` network called `source`, `pretrained` or new.

    Weights of the part that gives no maps, which timm leaves out, are not named; weights that the network lacks are named in
    a line. Raises whatever timm raises.
    """
    if not pretrained:
        return timm.create_model(source, features_only=True)
    with _watched_log(source) as missing:
        features = timm.create_model(source, pretrained=True, features_only=True)
    # timm looks for the classifier's weights too, and writes the names of parts that it flattens with _.
    held = [name.replace(".", "_") for name in features.state_dict()]
    missing = [name for name in missing if any(each.endswith(name.replace(".", "_")) for each in held)]
    if missing:
        of = f"{missing[0]} and {len(missing) - 1} more" if len(missing) > 1 else missing[0]
        warn_on_main(f"model.backbone: {source.removeprefix('local-dir:')} has no weights {of}: these start at random")
    return features


@contextmanager
def _watched_log(source: str) -> Iterator[list[str]]:
    """Gives a list that gets the missing weights' names, and keeps what is to be expected out of timm's log."""
    logger, missing = logging.getLogger(TIMM_LOG), []
    level, shown_from = logger.level, logger.getEffectiveLevel()

    def is_shown(record: logging.LogRecord) -> bool:
        if found := MISSING.match(record.getMessage()):
            missing.extend(found[1].split(", "))
        found = UNEXPECTED.match(record.getMessage())
        return record.levelno >= shown_from and not (found and set(found[1].split(", ")) <= _weights_of(source))

    logger.addFilter(is_shown)
    logger.setLevel(min(logging.INFO, shown_from))  # timm tells of missing weights as of no problem
    try:
        yield missing
    finally:
        logger.setLevel(level)
        logger.removeFilter(is_shown)


def _weights_of(source: str) -> set[str]:
    """The names of all weights of the network called `source`, its classifier's too."""
    with torch.random.fork_rng(devices=[]):
        return set(timm.create_model(source, pretrained=False).state_dict())
