"""Files of weights: read without running code in them, and fitted to a network.

Such a file is a state dict, or a checkpoint that holds one: timm's, Lightning's, that of the PS-KD authors, or a plain loop's.
"""

import argparse
import builtins
import copy
import pathlib
import pickle
from pathlib import Path

import numpy as np
import torch
from numpy._core import multiarray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import InputError, first_line
from .build import load_model
from .convert import convert_checkpoint


def plain_dict(_factory=None) -> dict:
    """What a defaultdict is read as: torch's safe reading fills no others."""
    return {}


# Classes that carry data only; everything else that torch's safe reading does not know stays refused.
DATA_ONLY = [
    np.ndarray,
    np.dtype,
    multiarray._reconstruct,
    multiarray.scalar,
    (multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    (multiarray.scalar, "numpy.core.multiarray.scalar"),
    *{type(np.dtype(code)) for code in "efdilqBhH?"},
    argparse.Namespace,
    (plain_dict, "collections.defaultdict"),
    *(getattr(builtins, name) for name in ("dict", "list", "set", "int", "float", "str", "bool")),
    # A path is read as text with slashes, whatever system and Python wrote it.
    *((cls, f"{module}.{name}") for module in ("pathlib", "pathlib._local")
      for name, cls in (("PosixPath", pathlib.PurePosixPath), ("PurePosixPath", pathlib.PurePosixPath),
                        ("WindowsPath", pathlib.PureWindowsPath), ("PureWindowsPath", pathlib.PureWindowsPath))),
]  # fmt: skip
# Where a checkpoint has its weights; a moving average comes first, as in timm.
WEIGHTS = ("state_dict_ema", "model_ema", "net", "state_dict", "model", "model_state_dict")
WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put in front of names
ATTRIBUTES = ("model.", "net.")  # the usual names of the network in a LightningModule


def read_weights_file(path: str | Path) -> dict:
    """The dictionary in a .pth or .safetensors file; InputError if it is none or would run code when read."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(DATA_ONLY):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        refused = _names_of_code(path)
        if refused:
            raise InputError(
                f"{path}: refused: reading it would run code of its own ({refused}): save model.state_dict() instead"
            ) from None
        raise InputError(f"{path}: no checkpoint that can be read") from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = first_line(error)
        raise InputError(f"{path}: no checkpoint that can be read: {reason}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: a checkpoint is a dictionary of weights, this is {type(found).__name__}")
    return found


def _names_of_code(path: Path) -> str:
    """What the file asks for that is not data, named; nothing where it is no checkpoint."""
    try:
        with torch.serialization.safe_globals(DATA_ONLY):
            return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path))[:200]
    except Exception:  # of a file that is none of torch's, its readers raise what they like
        return ""


def find_state_dict(checkpoint: dict, model: nn.Module) -> dict[str, Tensor]:
    """The weights in a checkpoint, without what training loops put in front of their names; ValueError if there are none."""
    state = next((checkpoint[key] for key in WEIGHTS if isinstance(checkpoint.get(key), dict)), checkpoint)
    state = {name: value for name, value in state.items() if isinstance(value, Tensor) and name != "n_averaged"}
    if not state:
        raise ValueError(f"no weights in it, only {', '.join(map(str, checkpoint))[:200] or 'an empty dictionary'}")
    own = tuple(name for name, _ in model.named_children())
    while prefix := _prefix(state, own):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return state


def _prefix(state: dict[str, Tensor], own: tuple[str, ...]) -> str | None:
    """What stands in front of the names of the whole network, if anything does."""
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in state):
            return prefix
    # Beside its network a LightningModule may have weights of losses and of metrics.
    return next((p for p in ATTRIBUTES if p.rstrip(".") not in own and any(name.startswith(p) for name in state)), None)


def load_teacher(place: Path, student: nn.Module) -> nn.Module:
    """The network in a run's folder, or the student's architecture with the weights in a file, on the CPU.

    Raises InputError where neither is there, or the weights do not fit.
    """
    if not place.exists():
        raise InputError(f"{place}: there is no such folder or file")
    if place.is_dir():
        return load_model(place)
    teacher = copy.deepcopy(student).cpu()
    load_weights(place, teacher)
    return teacher


def load_weights(path: str | Path, model: nn.Module) -> dict:
    """Fill `model` with a file's weights, whatever names they have there, and return the file's dictionary."""
    found = read_weights_file(path)
    try:
        model.load_state_dict(convert_checkpoint(find_state_dict(found, model), model))
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} does not fit the model: {error}") from None
    return found
