"""The network as it was at the end of the last epoch, which PS-KD can take as its teacher."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import ranks
from ..errors import InputError
from ..models.build import contiguous_state
from .base import frozen


class Snapshot:
    """A frozen copy of a network in eval mode, taken at each epoch's end; before the first one there is none."""

    def __init__(self, model: nn.Module | None = None):
        self.network = None if model is None else unwrap_model(model)
        self.frozen = None

    def watch(self, model: nn.Module):
        """Remember the network to copy, where it is not known yet."""
        if self.network is None:
            self.network = unwrap_model(model)

    def take(self):
        """Copy the network, with the main rank's running statistics (all ranks call it together)."""
        if self.frozen is None:
            self.frozen = self._copy()
        else:
            self.frozen.load_state_dict(self.network.state_dict())
        ranks.copy_buffers_from_main(self.frozen)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """What the copy says of `images` [B, 3, H, W]: logits [B, K]."""
        return self.frozen(images)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.frozen is None else contiguous_state(self.frozen)

    def load_state_dict(self, state: dict[str, Tensor]):
        self.frozen = self._copy()
        self.frozen.load_state_dict(state)

    def _copy(self) -> nn.Module:
        if self.network is None:
            raise InputError("teacher snapshot does not know the network yet: give it to setup(…, model=model)")
        return frozen(copy.deepcopy(self.network), like=self.network)


def unwrap_model(model: nn.Module) -> nn.Module:
    """`model` without the wrappers of several processes and of torch.compile."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    return model
