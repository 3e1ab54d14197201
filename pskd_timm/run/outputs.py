"""What a run leaves when it has finished: predictions of each part and, written last, result.json."""

import json
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from .. import __version__, ranks
from ..cpus import num_cpus
from ..files import without_nan, write_atomic
from ..metrics import Metric
from ..outcomes import Predictions
from ..recipe import Recipe
from ..tasks.base import Task
from ..teacher import teacher_figures
from .checkpoint import Progress
from .result import RunResult

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "datasets")


def better(metric: Metric, figures: dict, best: dict) -> bool:
    """Whether `figures` beat `best` by the metric that chooses the best epoch; a tie keeps the earlier one."""
    one, other = figures[metric.name], best[metric.name]
    return one > other if metric.higher_is_better else one < other


def run_result(
    recipe: Recipe,
    task: Task,
    network: nn.Module,
    last: dict[str, Predictions],
    best: dict[str, Predictions],
    progress: Progress,
    world_size: int,
    device: torch.device,
) -> RunResult:
    """What result.json says of a run, from what the `last` and the `best` epoch's weights predict of each split."""

    def figures(split: str) -> dict:
        of_last, of_best = last[split].score(), best[split].score()
        return {
            "last": {"epoch": recipe.epochs, **of_last},
            "best": {"epoch": progress.best["epoch"], **of_best},
        }

    scored_on, *others = task.splits
    scored = figures(scored_on)
    scored["best"]["chosen_on"] = task.splits[-1]
    if scored_on == "holdout":
        others = ["holdout"]
    values = RunResult(
        name=recipe.name,
        task=recipe.task,
        method=recipe.method,
        seed=recipe.seed,
        metrics=[metric._asdict() for metric in task.metrics],
        evaluated_on=scored_on,
        **scored,
        seconds=progress.seconds,
        **task.describe(),
        num_parameters=sum(weights.numel() for weights in network.parameters()),
        num_processes=world_size,
        **describe_machine(device),
        **{split: figures(split) for split in others},
    )
    if teacher := teacher_figures(recipe):
        values["teacher"] = teacher
    return values


def score_splits(task: Task, network: nn.Module, folder: Path, progress: Callable) -> dict[str, Predictions]:
    """What `network` predicts of each split (all ranks call it together), written into `folder` by the main rank.

    predictions.parquet has the scored split, <split>.parquet the others and the held-out one.
    """
    is_main, found = ranks.rank_and_world_size()[0] == 0, {}
    for place, split in enumerate(task.splits):
        rows = folder / f"{split}.rows"
        try:
            found[split] = task.evaluate(network, split, True, progress, rows)
            if is_main:
                folder.mkdir(exist_ok=True)
                if place == 0:
                    found[split].write(folder / "predictions.parquet")
                if place > 0 or split == "holdout":
                    found[split].write(folder / f"{split}.parquet")
        finally:
            if is_main:
                shutil.rmtree(rows, ignore_errors=True)
    return found


def write_result(run_dir: Path, values: RunResult):
    """Write result.json, which says that the run is finished."""
    text = json.dumps(without_nan(values), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(run_dir / "result.json", text)


def describe_machine(device: torch.device) -> dict:
    """Versions of what matters and the hardware, as result.json has them."""
    is_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_cuda else platform.processor() or platform.machine()
    hardware = {
        "device": device.type,
        "name": name,
        "cpu_count": num_cpus(),
        "threads": torch.get_num_threads(),
    }
    versions = {"python": platform.python_version(), "pskd_timm": __version__}
    versions |= {package: version(package) for package in PACKAGES}
    return {"versions": versions, "hardware": hardware}
