"""What a network can be trained for. A task is a file here and its line in TASKS; nothing is imported before it is opened."""

from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from ..recipe import Recipe
    from .base import Task

TASKS = {
    "images": "pskd_timm.tasks.images:ImageTask",
    "translation": "pskd_timm.tasks.translation:TranslationTask",
}
_OF_IMAGES = ("image_column", "label_column", "test_split", "test_fraction", "image_size", "crop_pct", "loading")
_OF_IMAGES += ("workers", "shrink_to", "damaged", "label_noise", "gaussian_noise", "cache_dir")
# Sections and settings that a task does not read, and what it has instead.
UNREAD = {
    "images": {"translation": None},
    "translation": {
        "augment": None,
        "batch_size": "translation.batch_tokens says how many target tokens make a step",
        "keep_probabilities": "those of all pieces are never kept",
        "init_from": "name a folder of weights as model.name, with model.pretrained true",
        **{f"data.{name}": None for name in _OF_IMAGES},
        **{f"model.{name}": None for name in ("small_input", "channels_last", "compile", "sync_bn")},
    },
}


def is_read(key: str, task: str) -> bool:
    """Whether a run of `task` reads the setting of that dotted name."""
    return not {key, key.split(".")[0]} & UNREAD.get(task, {}).keys()


def check_read(recipe: "Recipe"):
    """Raise InputError for a setting that the recipe's task does not read."""
    from ..recipe import flatten, settings

    known = settings(type(recipe))
    for key, value in flatten(recipe.model_dump()).items():
        if not is_read(key, recipe.task) and value != known[key].default:
            instead = UNREAD[recipe.task].get(key)
            origin = recipe.source_of(key)
            said = f"{'' if origin == 'default' else f'{origin}: '}{key}: task {recipe.task} does not read it"
            raise InputError(f"{said}: {instead}" if instead else said)


def task_class(name: str) -> type["Task"]:
    """The class behind a name of TASKS."""
    module, _, attribute = TASKS[name].partition(":")
    return getattr(import_module(module), attribute)


def open_task(recipe: "Recipe", progress=None) -> "Task":
    """The task that `recipe` names, with its data opened and checked; on the CPU.

    `progress(what, done, total)` is called while data are read. Raises InputError for a setting that the
    task does not read, and for data that do not fit.
    """
    check_read(recipe)
    return task_class(recipe.task)(recipe, progress)
