"""Files of the PS-KD authors' released code, and bare weights: read safely, scored, and continued from.

Such a file holds {'net': weights, 'epoch': the last epoch done, from 0, 'optimizer', 'prev_predictions': N×K, …}.
"""

import pickle
from pathlib import Path

import numpy as np
import torch
from numpy._core import multiarray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..errors import InputError
from ..models.convert import convert_checkpoint
from ..store import PredictionStore
from .checkpoint import Progress

# NumPy arrays and numbers carry data only; everything else that weights_only does not know stays refused.
NUMPY = [
    np.ndarray,
    np.dtype,
    multiarray._reconstruct,
    multiarray.scalar,
    *{type(np.dtype(code)) for code in "efdilqBhH?"},
]


def read_file(path: str | Path) -> dict:
    """The dictionary in a .pth or .safetensors file; InputError if it is none or would run code when read."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(NUMPY):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "global" in str(error):
            raise InputError(f"{path}: refused: reading it would run code of its own, not only load weights") from None
        raise InputError(f"{path}: no checkpoint that can be read") from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{path}: no checkpoint that can be read: {reason}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: a checkpoint is a dictionary of weights, this is {type(found).__name__}")
    return found


def load_weights(path: str | Path, model: nn.Module) -> dict:
    """Fill `model` with a file's weights, whatever names they have there, and return the file's dictionary."""
    found = read_file(path)
    try:
        model.load_state_dict(convert_checkpoint(found, model))
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} does not fit the model: {error}") from None
    return found


def start_from(path: str | Path, model: nn.Module, optimizer, store: PredictionStore | None, epochs: int) -> Progress:
    """Where a run that goes on with a file stands: its weights, and momentum, predictions and epoch where it has them."""
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
    # The released code starts with zeros: such a row was never seen.
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
        optimizer.state[parameter]["momentum_buffer"] = buffer.to(parameter)
