"""Training that starts from a file: its weights and, where it is one of the PS-KD authors' code, all that it holds.

Such a file holds {'net': weights, 'epoch': the last epoch done, from 0, 'optimizer', 'prev_predictions': N×K, …}.
"""

from pathlib import Path

import torch
from torch import nn

from ..errors import InputError
from ..models.convert import convert_checkpoint
from ..models.weights import load_weights
from ..store import PredictionStore
from .checkpoint import Progress


def start_from(path: str | Path, model: nn.Module, optimizer, store: PredictionStore | None, epochs: int) -> Progress:
    """Where a run that starts from a file stands: its weights, and momentum, predictions and epoch where it has them."""
    found = load_weights(path, model)
    if "net" not in found:
        return Progress()
    progress = Progress(epoch=int(found.get("epoch", -1)) + 1)
    if progress.epoch >= epochs:
        raise InputError(f"init_from: {path} has done {progress.epoch} epochs already: set epochs above that")
    if store is not None and "prev_predictions" in found:
        _fill(store, torch.as_tensor(found["prev_predictions"]), path)
    if "optimizer" in found:
        _take_momentum(found, model, optimizer, path)
    return progress


def _fill(store: PredictionStore, table: torch.Tensor, path):
    expected = (store.num_samples, store.num_classes)
    if tuple(table.shape) != expected:
        raise InputError(f"init_from: {path} has predictions {list(table.shape)}, this run needs {list(expected)}")
    rows = table[store.own]
    # The authors' code starts with zeros: such a row was never seen.
    seen = rows.sum(dim=1) > 0
    store.home[seen.to(store.device)] = store.format.encode(rows[seen]).to(store.device)


def _take_momentum(found: dict, model: nn.Module, optimizer, path):
    """Take over SGD's momentum; a file's optimizer numbers the parameters in the order of the file's weights."""
    parameters = dict(model.named_parameters())
    names = [name for name in convert_checkpoint(found, model) if name in parameters]
    for number, state in found["optimizer"].get("state", {}).items():
        buffer = state.get("momentum_buffer")
        if buffer is None:
            continue
        if number >= len(names) or buffer.shape != parameters[names[number]].shape:
            raise InputError(f"init_from: {path}: the optimizer's state {number} fits no weight of the model")
        parameter = parameters[names[number]]
        # In the weights' memory layout, which a fused step asks for.
        optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)
