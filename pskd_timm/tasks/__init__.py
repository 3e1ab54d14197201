"""What a network can be trained for. A task is a file here and its line in TASKS; nothing is imported before it is opened."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..recipe import Recipe
    from .base import Task

TASKS = {
    "images": "pskd_timm.tasks.images:ImageTask",
    "translation": "pskd_timm.tasks.translation:TranslationTask",
}


def task_class(name: str) -> type["Task"]:
    """The class behind a name of TASKS."""
    module, _, attribute = TASKS[name].partition(":")
    return getattr(import_module(module), attribute)


def open_task(recipe: "Recipe", progress=None) -> "Task":
    """The task that `recipe` names, with its data opened and checked; on the CPU.

    `progress(what, done, total)` is called while data are read. Raises InputError for data that do not fit.
    """
    return task_class(recipe.task)(recipe, progress)
