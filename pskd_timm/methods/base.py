"""What a method is: a loss that owns the forward pass, and what happens around an epoch."""

from collections.abc import Hashable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import ranks
from ..batch import Batch
from ..errors import InputError
from ..store import PredictionStore


@contextmanager
def eval_mode(model: nn.Module):
    """Runs `model` in eval mode and then puts every part of it back into the mode it was in."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def frozen(network: nn.Module, like: nn.Module | None) -> nn.Module:
    """`network` made a teacher: in eval mode, learning nothing, and compiled and laid out in memory as `like` is."""
    if like is not None and not all(weights.is_contiguous() for weights in like.parameters()):
        network.to(memory_format=torch.channels_last)
    if like is not None and like._compiled_call_impl is not None:
        network.compile(dynamic=False)
    return network.eval().requires_grad_(False)


class Method:
    """Base of all methods. Not an `nn.Module`: a teacher is neither wrapped nor saved with the student."""

    # What `Batch.partner_inputs` is to hold: `class`, another sample of each one's class; `view`, the sample in a second view.
    needs_partners = ""
    recordable = True  # whether `loss` may be replayed as a CUDA graph
    term_names: tuple[str, ...] = ()  # what the loss is made of, as steps.jsonl and wandb name it
    terms: Tensor  # [len(term_names)] after `loss`: the values of its terms, means over B without gradient
    store: PredictionStore | None = None  # what a method remembers of the training samples, saved with a checkpoint

    @classmethod
    def from_section(cls, section: dict):
        """The method with the settings of its section of a recipe."""
        return cls(**section)

    def setup(
        self,
        *,
        num_samples: int,
        num_classes: int,
        num_epochs: int,
        device,
        labels: Tensor | None = None,
        model: nn.Module | None = None,
    ):
        """Prepare for a run over `num_samples` training samples; returns self.

        `labels` [N] and the `model` to be trained are given where they are known.
        """
        self.num_classes, self.num_epochs = num_classes, num_epochs
        self.terms = torch.zeros(len(self.term_names), device=device)
        return self

    def check(self, model: nn.Module | None, num_classes: int):
        """Raise InputError where the method cannot teach `model` (where it is known) on so many classes."""

    def begin_epoch(self, epoch: int, order: Tensor):
        """Before epoch `epoch` (0-based), in which this rank visits the sample ids `order` [n]; all ranks together."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss (a scalar, mean over B) and the logits [B, K] of one training step."""
        raise NotImplementedError

    def end_epoch(self):
        """After the last step of an epoch; all ranks together."""

    @property
    def variant(self) -> Hashable:
        """Anything besides tensors that decides what `loss` does; a new value means the step is recorded again."""
        return None

    def describe(self) -> str | None:
        """A line on what the method keeps, printed at the start and, if it changed, after the first epoch; all ranks together."""

    def values(self) -> dict[str, float]:
        """What the method has to report of the current epoch, by name."""
        return {}

    def state_dict(self, include_store: bool = False) -> dict[str, Tensor]:
        """What the method remembers, of all ranks, for a checkpoint (all ranks call it together).

        With `include_store` the whole table of predictions too, as `predictions`, on every rank; `pskd-timm train` leaves it
        out, since there each rank saves its own rows.
        """
        if not include_store or self.store is None:
            return {}
        return {"predictions": ranks.gather_rows(self.store.shard(), self.store.parts)}

    def load_state_dict(self, state: dict[str, Tensor]):
        """Take over what `state_dict` gave, on any number of ranks. Raises InputError for a table of another size or format."""
        rows = state.get("predictions")
        if rows is None or self.store is None:
            return
        home = self.store.home
        if len(rows) != self.store.num_samples or rows.shape[1:] != home.shape[1:] or rows.dtype != home.dtype:
            raise InputError(f"the saved predictions are {list(rows.shape)}, not of this method and data set")
        home.copy_(rows[self.store.own])
