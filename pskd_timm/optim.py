"""Optimizer, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from .errors import InputError, nearest
from .recipe import Optim as OptimSection


def make_optimizer(model: nn.Module, section: OptimSection) -> torch.optim.Optimizer:
    """torch's SGD, or any of timm's optimizers by name."""
    from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay

    if section.name == "sgd":
        groups = model.parameters()
        if not section.decay_norm_and_bias:
            groups = param_groups_weight_decay(model, section.weight_decay)
        fused = next(model.parameters()).is_cuda  # one kernel for all weights
        return torch.optim.SGD(
            groups,
            section.lr,
            section.momentum,
            nesterov=section.nesterov and section.momentum > 0,
            weight_decay=section.weight_decay,
            fused=fused,
        )
    if section.name not in list_optimizers():
        raise InputError(
            f"optim.name: timm has no optimizer {section.name!r}{nearest(section.name, list_optimizers())}"
        )
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=section.name,
            lr=section.lr,
            weight_decay=section.weight_decay,
            momentum=section.momentum,
            filter_bias_and_bn=not section.decay_norm_and_bias,
        )
    except Exception as error:  # some need packages or a GPU of their own
        raise InputError(f"optim.name {section.name} cannot be made: {str(error).splitlines()[0]}") from None
    if getattr(optimizer, "is_second_order", False):
        raise InputError(f"optim.name {section.name} needs second derivatives, which training does not compute")
    return optimizer


def lr_at(step: int, steps_per_epoch: int, epochs: int, section: OptimSection) -> float:
    """Learning rate of global step `step` (0-based)."""
    epoch = step / steps_per_epoch
    if epoch < section.warmup_epochs:
        return section.lr * (step + 1) / (section.warmup_epochs * steps_per_epoch + 1)
    if section.schedule == "step":
        drops = sum(epoch >= (at if at >= 1 else at * epochs) for at in section.milestones)
        return section.lr * section.decay_rate**drops
    if section.schedule == "cosine":
        part = (epoch - section.warmup_epochs) / (epochs - section.warmup_epochs)
        return section.min_lr + (section.lr - section.min_lr) * 0.5 * (1 + math.cos(math.pi * part))
    return section.lr
