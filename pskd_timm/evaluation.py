"""A model over a split: per-sample outcomes on each rank's slice, metrics once over the whole split."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import metrics, ranks
from .data import Split, eval_batches, eval_part, load_data
from .errors import Diverged, InputError
from .losses import at_least_float32
from .metrics import Outcomes
from .models.build import check_name, create_model, load_model
from .recipe import Recipe
from .recipe_files import load_recipe
from .run.released import load_weights

BEFORE = {"evaluated_on": "test", "num_holdout": 0}  # in place of what result.json did not say in earlier versions


@dataclass
class Predictions:
    """Every sample's outcome, and its probabilities [N, K], where `probabilities` were kept."""

    outcomes: Outcomes
    labels: Tensor
    probabilities: Tensor

    def score(self) -> dict[str, float]:
        """The six figures over the whole split."""
        return metrics.summarize(self.outcomes)

    def write(self, path: Path):
        """A Parquet file with a row a sample: index, label, prediction, confidence, correct, top5_correct, nll, probabilities."""
        import pyarrow
        from pyarrow import parquet

        flat = pyarrow.array(self.probabilities.float().flatten().numpy())
        columns = {
            "index": pyarrow.array(range(len(self.labels))),
            "label": self.labels.numpy(),
            "prediction": self.probabilities.argmax(dim=1).numpy(),
            **{name: values.numpy() for name, values in self.outcomes._asdict().items()},
            "probabilities": pyarrow.FixedSizeListArray.from_arrays(flat, self.probabilities.shape[1]),
        }
        parquet.write_table(pyarrow.table(columns), path)


@torch.no_grad()
def predict(
    model: nn.Module,
    split: Split,
    batch_size: int,
    mean,
    std,
    mixed_precision: str = "no",
    keep_probabilities: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Predictions:
    """Outcomes of `split` in eval mode, each rank its slice, gathered on every rank and moved to the CPU.

    `progress` is told ("evaluating", samples on their way, samples) of this rank.
    """
    rank, world_size = ranks.rank_and_world_size()
    ranks.copy_buffers_from_main(model)
    model.eval()
    num_classes = model.num_classes
    each, kept, done = [], [], 0
    parts = [eval_part(len(split), batch_size, r, world_size) for r in range(world_size)]
    for images, labels in eval_batches(split, batch_size, mean, std, parts[rank]):
        with autocast(images.device, mixed_precision):
            logits = model(images)
        logits = at_least_float32(logits)
        probabilities = logits.softmax(dim=1)
        # Of the logits, because a float32 probability reaches 0 where its logarithm is still finite.
        nll = F.cross_entropy(logits, labels, reduction="none").double()
        each.append(metrics.outcomes(probabilities, labels)._replace(nll=nll))
        if keep_probabilities:
            kept.append(probabilities)
        done += len(labels)
        if progress:
            progress("evaluating", done, parts[rank].stop - parts[rank].start)
    device = split.labels.device
    empty = Outcomes(
        *(torch.empty(0, dtype=d, device=device) for d in (torch.float32, torch.bool, torch.bool, torch.float64))
    )
    columns = [torch.cat(parts) for parts in zip(*(each or [empty]), strict=True)]
    gathered = Outcomes(*(ranks.gather_rows(column, parts).cpu() for column in columns))
    if not gathered.nll.isfinite().all():
        wrong = int((~gathered.nll.isfinite()).sum())
        raise Diverged(f"the network's outputs are not finite for {wrong} of {len(split)} evaluated samples")
    mine = torch.cat(kept) if kept else torch.empty(0, num_classes, device=device)
    probabilities = ranks.gather_rows(mine, parts).cpu() if keep_probabilities else mine.cpu()
    return Predictions(gathered, split.labels.cpu(), probabilities)


def autocast(device: torch.device, mixed_precision: str):
    """The forward pass's precision as a recipe names it."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def run_recipe(run_dir: Path, overrides: dict | None = None) -> Recipe:
    """The resolved recipe of a run folder."""
    if not (run_dir / "recipe.yaml").is_file():
        raise InputError(f"{run_dir}: no run here (a run folder has a recipe.yaml)")
    return load_recipe(str(run_dir / "recipe.yaml"), overrides)


def run_result(run_dir: Path) -> dict:
    """What a finished run's result.json holds; raises InputError where there is none, or a damaged one."""
    path = run_dir / "result.json"
    if not path.is_file():
        raise InputError(f"{run_dir}: the run is not finished (no result.json); the same train command goes on with it")
    try:
        return BEFORE | json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged: {error}; --resume never trains the run anew") from None


def normalisation(model: nn.Module, recipe: Recipe) -> tuple[list[float], list[float]]:
    """Mean and std [3] in units of the pixel range: the recipe's, else the model's own."""
    config = model.pretrained_cfg
    return recipe.augment.mean or list(config["mean"]), recipe.augment.std or list(config["std"])


def evaluate(run_dir: str | Path, overrides: dict | None = None, progress=None) -> dict[str, dict]:
    """Score a finished run's weights where it was scored, again: {"last": …, "best": …}, `recorded` beside each figure."""
    run_dir = Path(run_dir)
    recipe = run_recipe(run_dir, overrides)
    recorded = run_result(run_dir)
    data = load_data(recipe.data, recipe.augment, progress)
    found = {}
    for which, folder in (("last", run_dir), ("best", run_dir / "best")):
        model = load_model(folder)
        if model.num_classes != data.num_classes:
            raise InputError(f"{folder}: the model has {model.num_classes} classes, the data {data.num_classes}")
        found[which] = _score(model, data.test or data.holdout, recipe, progress)
        found[which]["recorded"] = {name: recorded[which][name] for name in metrics.METRICS}
    return found


def evaluate_checkpoint(path: str | Path, recipe: Recipe, progress=None) -> dict[str, float]:
    """The six figures, on the recipe's test split, of its model with a file's weights (see released.py)."""
    check_name(recipe.model.name)
    data = load_data(recipe.data, recipe.augment, progress)
    model = create_model(recipe.model, data.num_classes, data.image_size)
    load_weights(path, model)
    return _score(model, data.test or data.holdout, recipe, progress)


def _score(model: nn.Module, split: Split, recipe: Recipe, progress) -> dict[str, float]:
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    if recipe.model.channels_last:
        model = model.to(memory_format=torch.channels_last)
    normalise = normalisation(model, recipe)
    settings = (recipe.batch_size, *normalise, recipe.mixed_precision)
    return predict(model, split.to(device), *settings, progress=progress).score()
