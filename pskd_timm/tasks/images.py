"""Image classification: a data set of labelled images, any timm model, the six metrics."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .. import ranks, rng
from ..data import Loader, Split, eval_batches, eval_part, load_data, read_images
from ..errors import Diverged, InputError
from ..losses import at_least_float32
from ..metrics import METRICS, Outcomes
from ..models.build import check_name, check_saves, create_model, load_model, normalisation, read_config, save_model
from ..order import num_batches
from ..outcomes import Predictions, ProbabilityRows, batch_outcomes
from ..recipe import Recipe
from ..run.launch import autocast

WEIGHTS = 10  # stream of random numbers: initial weights
LARGEST_IN_FULL = 10**9  # bytes of a split's probabilities that are kept as they are where nothing else is asked for


class ImageTask:
    """A `Task` (see base.py) over the recipe's `data`, `augment` and `model` sections; a target is an image."""

    counts = "images"
    metrics = tuple(METRICS.values())

    def __init__(self, recipe: Recipe, progress: Callable | None = None):
        check_name(recipe.model.name)
        self.recipe = recipe
        self.data = load_data(recipe.data, recipe.augment, progress)
        self.num_rows, self.num_classes = len(self.data.train), self.data.num_classes
        self.labels, self.fingerprint = self.data.train.labels, self.data.fingerprint
        if self.fingerprint.get("test_contents") == self.fingerprint["contents"]:
            ranks.warn_on_main("data: the test images are the training images: figures on them say nothing of others")
        self.evaluated = {name: split for name in ("test", "holdout") if (split := getattr(self.data, name))}
        self.splits = tuple(self.evaluated)

    def network(self) -> nn.Module:
        torch.manual_seed(rng.derive_key(self.recipe.seed, WEIGHTS))
        return create_model(self.recipe.model, self.num_classes, self.data.image_size)

    def check(self, network: nn.Module, world_size: int):
        recipe = self.recipe
        check_saves(network)
        if recipe.batch_size < world_size:
            raise InputError(
                f"batch_size {recipe.batch_size} is global and must not be below the {world_size} processes"
            )
        if num_batches(self.num_rows, recipe.batch_size, world_size) == 0:
            raise InputError(f"data: {self.num_rows} training samples are fewer than the {world_size} processes")
        tail = self.num_rows % recipe.batch_size
        smallest = tail if tail >= world_size else min(recipe.batch_size, self.num_rows)
        per_rank = smallest // world_size
        if per_rank < 2 * recipe.grad_accum_steps and not takes_one_sample(network, self.data.image_size):
            raise InputError(
                f"model {recipe.model.name} cannot train on a single sample: {self.num_rows} samples with batch_size "
                f"{recipe.batch_size}, {world_size} processes and grad_accum_steps {recipe.grad_accum_steps} leave one; "
                "choose another batch_size"
            )

    def loader(self, network: nn.Module, device, rank: int, world_size: int, partners: str) -> Loader:
        recipe = self.recipe
        return Loader(
            self.data.train.to(device),
            self.num_classes,
            recipe.epochs,
            recipe.batch_size,
            recipe.augment,
            *normalisation(network, recipe),
            seed=recipe.seed,
            rank=rank,
            world_size=world_size,
            partners=partners,
        )

    def evaluate(
        self,
        network: nn.Module,
        split: str,
        final: bool = False,
        progress: Callable | None = None,
        rows_in: Path | None = None,
    ) -> Predictions:
        samples = self.evaluated[split] = self.evaluated[split].to(next(network.parameters()).device)
        recipe = self.recipe
        kept = recipe.keep_probabilities
        if kept == "auto":
            kept = "float32" if 4 * len(samples) * self.num_classes <= LARGEST_IN_FULL else "float16"
        rows = ProbabilityRows(rows_in, self.num_classes, kept) if rows_in and kept != "none" else None
        settings = recipe.batch_size, *normalisation(network, recipe), recipe.mixed_precision
        found = predict(network, samples, *settings, rows, progress)
        return replace(found, paths=samples.paths) if final else found

    def save(self, network: nn.Module, folder: Path):
        seen = *normalisation(network, self.recipe), self.data.image_size, self.recipe.data.crop_pct
        save_model(network, folder, *seen, self.data.class_names)

    def load(self, folder: Path) -> nn.Module:
        network = load_model(folder)
        if network.num_classes != self.num_classes:
            raise InputError(f"{folder}: the model has {network.num_classes} classes, the data {self.num_classes}")
        known = read_config(folder).get("label_names")
        if known and known != self.data.class_names:
            place = next(
                i for i, pair in enumerate(zip(known, self.data.class_names, strict=False)) if len({*pair}) > 1
            )
            raise InputError(
                f"{folder}: the model's class {place} is {known[place]!r}, that of the data {self.data.class_names[place]!r}: "
                "its outputs mean other classes"
            )
        return network

    def describe(self) -> dict:
        return {
            "num_train": self.num_rows,
            "num_test": len(self.evaluated.get("test", ())),
            "num_holdout": len(self.evaluated.get("holdout", ())),
            "num_classes": self.num_classes,
            "class_names": self.data.class_names,
            "data_fingerprint": self.fingerprint,
        }

    def examples(self, split: str, rows: Tensor) -> list:
        return list(read_images(self.evaluated[split], rows).permute(0, 2, 3, 1).cpu().numpy()) if len(rows) else []


@torch.no_grad()
def predict(
    model: nn.Module,
    split: Split,
    batch_size: int,
    mean: list[float],
    std: list[float],
    mixed_precision: str = "no",
    rows: ProbabilityRows | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Predictions:
    """Outcomes of `split` in eval mode, each rank its slice, gathered on every rank and moved to the CPU.

    The probabilities go into `rows`, where there are any, batch by batch, and nowhere else.
    `progress` is called with ("evaluating", samples on their way, samples) of this rank.
    """
    rank, world_size = ranks.rank_and_world_size()
    ranks.copy_buffers_from_main(model)
    model.eval()
    parts = [eval_part(len(split), batch_size, r, world_size) for r in range(world_size)]
    mine, done = parts[rank].stop - parts[rank].start, 0
    # Made before the loop: small tensors kept of each batch would lie between its large ones, whose memory could not be
    # used again.
    types = (torch.float32, torch.bool, torch.bool, torch.float64, torch.int64)
    columns = [torch.empty(mine, dtype=dtype, device=split.labels.device) for dtype in types]
    for images, labels in eval_batches(split, batch_size, mean, std, parts[rank]):
        with autocast(images.device, mixed_precision):
            logits = model(images)
        logits = at_least_float32(logits)
        probabilities = logits.softmax(dim=1)
        of_batch = (*batch_outcomes(logits, probabilities, labels), probabilities.argmax(dim=1))
        for column, values in zip(columns, of_batch, strict=True):
            column[done : done + len(labels)] = values
        if rows:
            rows.add(probabilities)
        done += len(labels)
        if progress:
            progress("evaluating", done, mine)
    if rows:
        rows.close()
    *of_samples, guesses = (ranks.gather_rows(column, parts).cpu() for column in columns)
    gathered = Outcomes(*(column.numpy() for column in of_samples))
    if wrong := int((~np.isfinite(gathered.nll)).sum()):
        raise Diverged(f"the network's outputs are not finite for {wrong} of {len(split)} evaluated samples")
    return Predictions(gathered, split.labels.cpu(), guesses, rows, split.source_id.cpu())


def takes_one_sample(model: nn.Module, image_size: tuple[int, int]) -> bool:
    """Whether a training step works on one image; batch norm on a map of one pixel raises there."""
    tried = copy.deepcopy(model).train()  # the model's own running statistics stay as they are
    try:
        with torch.no_grad():
            tried(torch.zeros(1, 3, *image_size))
    except ValueError:
        return False
    return True
