"""Weights scored again: a finished run's, or those in a file."""

from collections.abc import Callable
from pathlib import Path

from .errors import InputError
from .models.weights import load_weights
from .recipe import Recipe
from .run.folder import read_metrics, read_recipe, read_result
from .run.launch import place_network, prepare_scoring
from .tasks import open_task
from .tasks.base import Task


def evaluate(
    run_dir: str | Path, overrides: dict | None = None, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, dict]:
    """Score a finished run's weights where it was scored, again: {"last": …, "best": …}, `recorded` beside each metric.

    `overrides` replaces settings of the run's recipe by dotted name; `progress(what, done, total)` is called now and then.
    Raises InputError where there is no finished run, or the data have other classes than its network.

    Example:
        >>> evaluate("runs/digits/pskd/seed0")["last"]["ece"]
    """
    run_dir = Path(run_dir)
    recipe = read_recipe(run_dir, overrides)
    recorded = read_result(run_dir)
    if not (run_dir / "model.safetensors").is_file():
        raise InputError(f"{run_dir}: no weights here (model.safetensors): of this run only the figures were kept")
    task = open_task(recipe, progress)
    found = {}
    for which, folder in (("last", run_dir), ("best", run_dir / "best")):
        found[which] = _score(task, task.load(folder), recipe, progress)
        found[which]["recorded"] = {metric.name: recorded[which][metric.name] for metric in read_metrics(recorded)}
    return found


def evaluate_checkpoint(path: str | Path, recipe: Recipe, progress: Callable | None = None) -> dict[str, float]:
    """The metrics, on the part that the recipe scores, of its network with a file's weights (see models/weights.py)."""
    task = open_task(recipe, progress)
    network = task.network()
    load_weights(path, network)
    return _score(task, network, recipe, progress)


def _score(task: Task, network, recipe: Recipe, progress: Callable | None) -> dict[str, float]:
    device = prepare_scoring(recipe)
    section = recipe.model.model_copy(update={"compile": "off", "sync_bn": False})
    return task.evaluate(place_network(network, section, device), task.splits[0], True, progress).score()
