"""Methods from a recipe: each class by name, and the one of a run, ready for its task."""

from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from ..errors import InputError
from ..models.weights import load_teacher
from ..recipe import Recipe
from ..tasks.base import Task
from ..teacher import method_settings
from . import METHOD_SECTIONS
from .base import Method


def _method_class(implementation: str) -> type[Method]:
    module, _, name = implementation.partition(":")
    return getattr(import_module(module), name)


METHODS: dict[str, type[Method]] = {
    name: _method_class(section.implementation) for name, section in METHOD_SECTIONS.items()
}


def make_method(recipe: Recipe, network: nn.Module) -> Method:
    """The recipe's method for `network`, not set up yet. Raises InputError where its trained teacher cannot be had."""
    settings = method_settings(recipe)
    if recipe.method_section.trained_teacher:
        try:
            settings["teacher"] = load_teacher(Path(settings["teacher"]), network)
        except InputError as error:
            raise InputError(f"{recipe.method}.teacher: {error}") from None
    return METHODS[recipe.method].from_section(settings)


def build_method(recipe: Recipe, task: Task, network: nn.Module, device: torch.device) -> Method:
    """The recipe's method, set up for a run of `task` with `network`; raises InputError where it cannot teach that."""
    return make_method(recipe, network).setup(
        num_samples=task.num_rows,
        num_classes=task.num_classes,
        num_epochs=recipe.epochs,
        device=device,
        labels=task.labels.to(device),
        model=network,
    )
