"""A detector's detections of a part of the data, over all processes."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from .. import ranks
from ..run.launch import autocast
from .data import Part, examples
from .metrics import Table
from .settings import DetectionRecipe


@torch.no_grad()
def detect(
    detector: nn.Module, part: Part, recipe: DetectionRecipe, device: torch.device, progress: Callable | None = None
) -> Table:
    """All detections of a part's pictures, by picture and falling score (all ranks call it together).

    Pictures are looked at in the same batches whatever the number of processes: what a batch is padded to is seen by a network.
    """
    rank, world_size = ranks.rank_and_world_size()
    ranks.copy_buffers_from_main(detector)
    training = detector.training
    detector.eval()
    size = recipe.batch_size
    batches = [list(range(start, min(start + size, len(part)))) for start in range(0, len(part), size)]
    mine = batches[rank::world_size]
    found, done = [], 0
    for batch, pictures in zip(mine, examples(part, mine, 0, recipe.data.workers), strict=True):
        with autocast(device, recipe.mixed_precision):
            outputs = detector([picture.image.to(device, non_blocking=True) for picture in pictures])
        for index, output in zip(batch, outputs, strict=True):
            boxes, labels, scores = (output[name].float().cpu().numpy() for name in ("boxes", "labels", "scores"))
            found.append((index, boxes, labels.astype(np.int64) - 1, scores))
        done += len(batch)
        if progress and rank == 0:
            progress("evaluating", min(done * world_size, len(part)), len(part))
    detector.train(training)
    everything = sorted((each for of in ranks.all_gather_objects(found) for each in of), key=lambda each: each[0])
    return detections_table(everything)


def detections_table(found: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]) -> Table:
    """Detections as a table, from each picture's number, boxes [n, 4], labels [n] (from 0) and scores [n]."""
    image = np.repeat(np.asarray([each[0] for each in found]), [len(each[2]) for each in found])
    boxes, labels, scores = (np.concatenate([each[i] for each in found]) for i in (1, 2, 3))
    return Table(image.astype(np.int64), labels, boxes.astype(np.float64), scores.astype(np.float64))
