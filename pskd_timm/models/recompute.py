"""Gradient checkpointing that leaves batch norm's running statistics as they are without it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute(block: nn.Module, *inputs: Tensor | list[Tensor]) -> Tensor:
    """Run `block`, keep only its inputs, and run it again in the backward pass without updating running statistics."""
    if torch.compiler.is_compiling():
        # The compiler recomputes pure operations only, so nothing is updated twice, and it traces no contexts.
        return checkpoint(block, *inputs, use_reentrant=False)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), frozen_statistics(block)))


@contextmanager
def frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Within it, the batch norms of `block` normalise by the batch but keep their running statistics."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for m in norms:
        # Switching track_running_stats off instead would save fewer tensors, which checkpointing refuses.
        m.momentum, m.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for m, (momentum, count) in zip(norms, before, strict=True):
            m.momentum, m.num_batches_tracked = momentum, count
