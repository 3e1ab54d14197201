"""Weights of the PS-KD authors' code (Kim et al., ICCV 2021, arXiv 2006.12000) under this package's names."""

import re

import torch.nn as nn
from torch import Tensor

from .base import CifarNet


def stage_of(match: re.Match) -> str:
    """The authors' code counts stages from 1 and names their blocks right below."""
    return f"stages.{int(match[1]) - 1}.blocks."


# One table for all families: their names differ where their structures do. Our own names pass unchanged.
RENAMES = (
    (r"^(conv1|conv_1_3x3)\.", "stem.conv."),
    (r"^(bn1|bn_1)\.", "stem.bn."),
    (r"^(bn|bn_final)\.", "norm.bn."),
    (r"^(linear|fc|classifier)\.", "head.fc."),
    (r"^(?:layer|dense)(\d+)\.", stage_of),
    (r"^trans(\d+)\.", r"stages.\1.transition."),
    (r"^(stage_\d+\.stage_\d+_bottleneck_\d+)\.bn\.", r"\1.bn2."),
    (r"^stage_(\d+)\.stage_\d+_bottleneck_", stage_of),
    (r"\.(conv|bn)_reduce\.", r".\g<1>1."),
    (r"\.conv_conv\.", ".conv2."),
    (r"\.(conv|bn)_expand\.", r".\g<1>3."),
    (r"\.shortcut\.(0|shortcut_conv)\.", ".shortcut.conv."),
    (r"\.shortcut\.(1|shortcut_bn)\.", ".shortcut.bn."),
)


def convert_checkpoint(checkpoint: dict, model: nn.Module) -> dict[str, Tensor]:
    """The weights in `checkpoint`, under the names of `model`; ValueError names the first tensor that does not fit.

    `checkpoint` is a loaded file of the authors' code, {'net': state dict, …}, or a state dict, in its names or ours.
    """
    old = checkpoint.get("net", checkpoint)
    old_names = {new_name(name, model): name for name in old}
    state = {name: old[old_name] for name, old_name in old_names.items()}
    check_fit(state, model.state_dict(), old_names)
    return state


def new_name(name: str, model: nn.Module) -> str:
    """The name in `model` of a tensor that the authors' code calls `name`, with or without `module.` in front."""
    name = name.removeprefix("module.")
    # ResNet-152 is the only network of the paper that is not ours: timm's, whose names are torchvision's.
    for pattern, replacement in RENAMES if isinstance(model, CifarNet) else ():
        name = re.sub(pattern, replacement, name)
    return name


def check_fit(state: dict[str, Tensor], expected: dict[str, Tensor], old_names: dict[str, str]) -> None:
    for name, tensor in expected.items():
        shape = tuple(tensor.shape)
        if name not in state:
            raise ValueError(f"the model's {name} {shape} is not in the checkpoint")
        found = tuple(state[name].shape)
        if found != shape:
            raise ValueError(f"{old_names[name]} is {found} in the checkpoint, but {name} is {shape} in the model")
    for name, tensor in state.items():
        if name not in expected:
            raise ValueError(f"the checkpoint's {old_names[name]} {tuple(tensor.shape)} is not in the model")
