"""A method in the Hugging Face Trainer: its loss function and its callback."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..batch import Batch
from ..errors import InputError
from ..losses import at_least_float32
from ..methods.base import Method
from ..ranks import rank_and_world_size

try:
    from transformers import TrainerCallback
except ImportError:
    raise ImportError("pskd_timm.adaptors.hf_trainer needs transformers: pip install transformers") from None

FILE = "predictions.safetensors"  # beside the Trainer's own files in each checkpoint


class MethodCallback(TrainerCallback):
    """`Trainer(compute_loss_func=callback.loss, callbacks=[callback])` trains with `method`, whose `setup` was called.

    The training set is Indexed; evaluation, whose labels are plain, gets cross-entropy. The model returns logits or what
    has them under `logits`. Methods that look at the images themselves (CS-KD, a teacher network) and several processes
    are refused. Checkpoints keep what the method remembers.
    """

    def __init__(self, method: Method):
        self.method = method
        if method.needs_partners or getattr(method, "teacher", None) not in (None, "store"):
            raise InputError(
                f"{type(method).__name__} needs the images, which the Trainer does not show a loss function"
            )
        if rank_and_world_size()[1] > 1:
            raise InputError(
                "the Trainer does not say which samples a process will visit: use one process, or pskd-timm train"
            )

    def loss(self, outputs, labels: Tensor, num_items_in_batch=None) -> Tensor:
        """The loss of the model's `outputs` for pairs (label, index) [B, 2], or cross-entropy for plain labels [B]."""
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs
        if labels.ndim == 1:
            return F.cross_entropy(at_least_float32(logits), labels)
        batch = Batch(None, *labels.unbind(1))
        loss, _ = self.method.loss(lambda images: logits, batch)
        # The Trainer counts both numbers of every pair over all batches of the step and expects a share of that.
        return loss if num_items_in_batch is None else loss * (labels.numel() / num_items_in_batch)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0 or not self.method.state_dict(include_store=True):
            return
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
        if not path.is_file():
            raise InputError(f"{path}: not there, and without it the training cannot resume from that checkpoint")
        self.method.load_state_dict(load_file(path))

    def on_epoch_begin(self, args, state, control, **kwargs):
        store = self.method.store
        order = torch.arange(store.num_samples) if store else torch.empty(0, dtype=torch.int64)
        self.method.begin_epoch(int(state.epoch or 0), order)

    def on_epoch_end(self, args, state, control, **kwargs):
        self.method.end_epoch()

    def on_save(self, args, state, control, **kwargs):
        if remembered := self.method.state_dict(include_store=True):
            save_file(remembered, Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE)
