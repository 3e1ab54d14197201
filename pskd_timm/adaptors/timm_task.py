"""A method as one of timm's training tasks, for loops written for `timm.task`."""

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn

from ..batch import Batch
from ..errors import InputError
from ..methods.base import Method


class MethodTask(ClassificationTask):
    """timm's classification task with the loss of `method`, whose `setup` was called; targets are Indexed's pairs [B, 2].

    Call `begin_epoch` before and `end_epoch` after each epoch. timm's CheckpointSaver(task=…) and resume_task_checkpoint
    keep what the method remembers: its table of predictions, its snapshot. What asks for partners (CS-KD) is refused.
    """

    def __init__(self, model: nn.Module, method: Method, device=None, dtype=None, verbose: bool = True):
        super().__init__(model, nn.CrossEntropyLoss(), device=device, dtype=dtype, verbose=verbose)
        if method.needs_partners:
            raise InputError(
                f"{type(method).__name__} needs a second input for each sample, which timm's loaders do not bring"
            )
        self.method, self._state = method, {}
        if snapshot := getattr(method, "snapshot", None):
            snapshot.watch(model)

    def begin_epoch(self, epoch: int, order=None):
        """Before epoch `epoch` (0-based), in which this rank visits the sample ids `order`; alone it may be left out."""
        store = self.method.store
        if store is None:
            order = torch.empty(0, dtype=torch.int64)
        elif order is None and store.world_size > 1:
            raise InputError("begin_epoch(epoch, order): name the sample ids of this rank, order=list(loader.sampler)")
        elif order is None:
            order = torch.arange(store.num_samples)
        self.method.begin_epoch(epoch, torch.as_tensor(order))

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """{"loss": a scalar, "output": logits [B, K]} for images [B, C, H, W] and pairs (label, index) [B, 2]."""
        if target.ndim != 2 or target.shape[1] != 2:
            raise InputError("targets should be pairs (label, index): wrap the training set, Indexed(dataset)")
        labels, index = target.unbind(1)
        loss, logits = self.method.loss(self.trainable_module, Batch(input, labels, index))
        return {"loss": loss, "output": logits}

    def end_epoch(self):
        """After an epoch's last step; all ranks together."""
        self.method.end_epoch()
        # Here, where all ranks are, since timm's saver asks one of them alone.
        self._state = self.method.state_dict(include_store=True)

    def get_task_state(self, module=None, ema: bool = False) -> dict:
        """What the method remembered at the last epoch's end."""
        return {} if ema else self._state

    def load_task_state(self, state, strict: bool = True, module=None, ema: bool = False):
        """Take over what `get_task_state` gave. Raises InputError if its table is of another size."""
        if state and not ema:
            self.method.load_state_dict(state)
