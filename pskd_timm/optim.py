"""Optimizer, its parameter groups, and the learning rate as a function of the step."""

import math
from collections.abc import Container, Iterable
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor, nn

from .errors import InputError, nearest
from .recipe import Optim as OptimSection
from .section import COMMAND_LINE, SourcedSection


def make_optimizer(model: nn.Module, section: OptimSection) -> torch.optim.Optimizer:
    """torch's SGD, or any of timm's optimizers by name."""
    from timm.optim import create_optimizer_v2, list_optimizers

    if section.name == "sgd":
        fused = next(model.parameters()).is_cuda  # one kernel for all weights
        optimizer = torch.optim.SGD(
            param_groups(model, section),
            section.lr,
            section.momentum,
            nesterov=section.nesterov and section.momentum > 0,
            weight_decay=section.weight_decay,
            fused=fused,
        )
        if section.momentum > 0:
            # Else the first step makes them, and a fused one that fp16 overflows in leaves in them what the memory held.
            for parameter in model.parameters():
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
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
            **({"betas": tuple(section.betas)} if section.betas else {}),
        )
    except Exception as error:  # some need packages or a GPU of their own
        raise InputError(f"optim.name {section.name} cannot be made: {str(error).splitlines()[0]}") from None
    if getattr(optimizer, "is_second_order", False):
        raise InputError(f"optim.name {section.name} needs second derivatives, which training does not compute")
    return optimizer


def param_groups(model: nn.Module, section: OptimSection) -> list[dict]:
    """The model's parameters with and without weight decay, in its order; only the former where all decay.

    What `model.no_weight_decay()` names (a ViT's position embedding and class token, Swin's bias tables) never decays: that
    belongs to the architecture. Whether norm weights and biases do belongs to the recipe: `decay_norm_and_bias`.
    """
    spared = getattr(model, "no_weight_decay", set)()
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        is_norm_or_bias = parameter.ndim <= 1 or name.endswith(".bias")
        exempt = name in spared or (is_norm_or_bias and not section.decay_norm_and_bias)
        (others if exempt else decayed).append(parameter)
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": section.weight_decay}]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm [] of all gradients as one vector; they stay as they are, also where it is not finite."""
    return torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])


def slow_warmup(section: OptimSection, steps_per_epoch: int, epochs: int) -> str | None:
    """What to say of a run in which the learning rate never rises to `lr`; None where it does."""
    steps, warmup = steps_per_epoch * epochs, section.warmup_steps or first_step(section.warmup_epochs, steps_per_epoch)
    if steps >= warmup:
        return None
    return (
        f"the run has {steps:,} steps and warms up for {warmup:,}, so the learning rate ends at {steps / warmup:.0%} of "
        "optim.lr: choose fewer optim.warmup_steps (warmup_epochs) or more epochs"
    )


def unread(section: OptimSection) -> dict[str, str]:
    """The settings, by dotted name, that nothing reads beside the others, and which of those is why."""
    is_step = section.schedule == "step"
    by_name = {"nesterov": section.name == "sgd", "betas": section.name != "sgd"}
    if section.name != "sgd":
        from timm.optim import get_optimizer_info, list_optimizers

        if section.name in list_optimizers():  # else what makes it says so
            taken = get_optimizer_info(section.name)
            by_name |= {"momentum": taken.has_momentum, "betas": taken.has_betas}
    by_schedule = {
        "min_lr": section.schedule == "cosine",
        "milestones": is_step,
        "decay_rate": is_step,
    }
    found = {name: f"optim.name {section.name}" for name, is_read in by_name.items() if not is_read}
    found |= {name: f"optim.schedule {section.schedule}" for name, is_read in by_schedule.items() if not is_read}
    if section.name == "sgd" and not section.momentum:
        found["nesterov"] = "optim.momentum 0"
    if is_step and not section.milestones:
        found["decay_rate"] = "optim.milestones []"
    return {f"optim.{name}": why for name, why in found.items()}


def given_in_vain(recipe: SourcedSection, searched: Container[str] = ()) -> list[str]:
    """A line for each setting of the optimizer that the command line gives and nothing reads, whatever is `searched`."""
    return [
        f"{key} is given, but {why} does not read it"
        for key, why in unread(recipe.optim).items()
        if recipe.source_of(key) == COMMAND_LINE and why.split()[0] not in searched
    ]


def lr_at(step: int, steps_per_epoch: int, epochs: int, section: OptimSection) -> float:
    """Learning rate of global step `step` (0-based)."""
    if step < section.warmup_steps:
        return section.lr * (step + 1) / section.warmup_steps
    if section.schedule == "inverse_sqrt":
        return section.lr * math.sqrt(section.warmup_steps / (step + 1))
    if step < first_step(section.warmup_epochs, steps_per_epoch):
        return section.lr * (step + 1) / (section.warmup_epochs * steps_per_epoch + 1)
    if section.schedule == "step":
        # A milestone below 1 is a part of the run, from 1 on an epoch.
        at = [first_step(when, steps_per_epoch * (1 if when >= 1 else epochs)) for when in section.milestones]
        drops = sum(step >= first for first in at)
        return section.lr * section.decay_rate**drops
    if section.schedule == "cosine":
        warmup = section.warmup_steps / steps_per_epoch or section.warmup_epochs
        part = (step / steps_per_epoch - warmup) / (epochs - warmup)
        return section.min_lr + (section.lr - section.min_lr) * 0.5 * (1 + math.cos(math.pi * part))
    return section.lr


@cache
def first_step(duration: float, steps: int) -> int:
    """The first step from `duration` · `steps` on, for the decimal number as it is written: 0.07 · 100 is 7, not 7 + 1e-15."""
    return math.ceil(Fraction(str(duration)) * steps)
