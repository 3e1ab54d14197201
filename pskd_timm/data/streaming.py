"""A split whose images stay encoded: decoded anew for every batch, by worker processes."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .. import rng
from ..augment import RESIZED_CROP
from ..recipe import InputError
from .decode import fit, open_image, undecoded

TRIES = 10  # boxes drawn for a random resized crop before the centre is taken, as torchvision does
RATIO = (3 / 4, 4 / 3)  # range of a box's width over its height
PREFETCH = 4  # batches that each worker has ready


@dataclass
class StreamedSplit:
    """Labels int64 [N], the ids [N] that the samples have in the table, and how their images are shown.

    `scale` is the range of a random resized crop's area, None for the centre. `crop_pct` is, in evaluation, the part of
    the shorter side that is kept.
    """

    table: object
    image_size: int
    labels: Tensor
    source_id: Tensor
    workers: int
    scale: tuple[float, float] | None = None
    crop_pct: float = 1.0

    def __len__(self):
        return len(self.labels)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.image_size, self.image_size

    @property
    def ids_device(self) -> torch.device:
        """Where the ids of a job are needed."""
        return torch.device("cpu")

    def take(self, rows: Tensor) -> "StreamedSplit":
        return replace(self, labels=self.labels[rows], source_id=self.source_id[rows])

    def to(self, device) -> "StreamedSplit":
        return replace(self, labels=self.labels.to(device))

    def stream(self, jobs: Iterable) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """For each job (ids [B], views) the ids and each view's images, uint8 [B, 3, H, W], on the labels' device."""
        device = self.labels.device
        loader = DataLoader(
            _Pictures(self),
            batch_size=None,
            sampler=jobs,
            num_workers=self.workers,
            prefetch_factor=PREFETCH if self.workers else None,
            pin_memory=device.type == "cuda",
            # Of its own: the global generator, which the training step seeds, is not to be drawn from.
            generator=torch.Generator(),
        )
        for index, views, damage in loader:
            if damage:
                raise InputError(damage)
            yield index.to(device, non_blocking=True), [view.to(device, non_blocking=True) for view in views]


class _Pictures(Dataset):
    """What a worker does: a job in, its decoded images out. An error travels as text, since a raised one grows a traceback."""

    def __init__(self, split: StreamedSplit):
        self.split, self.column = split, undecoded(split.table)

    def __getitem__(self, job):
        index, views = job
        try:
            return index, [self._view(samples, index, key) for samples, key in views], ""
        except InputError as error:
            return index, [], str(error)

    def _view(self, samples: Tensor, drawn_for: Tensor, key: int | None) -> Tensor:
        split = self.split
        rows = split.source_id[samples].tolist()
        stored = self.column[rows][split.table.image_column]
        if key is not None and split.scale:
            counters = drawn_for[:, None] * (4 * TRIES) + torch.arange(4 * TRIES)
            draws = rng.uniform(rng.fold(key, RESIZED_CROP), counters).view(-1, TRIES, 4).tolist()
            pictures = [self._crop(item, row, d) for item, row, d in zip(stored, rows, draws, strict=True)]
        else:
            crop_pct = split.crop_pct if key is None else 1.0
            pictures = [
                np.asarray(fit(open_image(item, row)[0], split.image_size, crop_pct))
                for item, row in zip(stored, rows, strict=True)
            ]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()

    def _crop(self, stored, row: int, draws: list) -> np.ndarray:
        side = self.split.image_size
        image, box = open_image(stored, row, lambda size: (resized_crop_box(*size, self.split.scale, draws), side))
        return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=box))


def resized_crop_box(width: int, height: int, scale, draws: list) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random resized crop (Szegedy et al., CVPR 2015), from uniform `draws` [TRIES][4].

    Each try draws area (uniform in `scale`), ratio (log-uniform in RATIO) and place; where none fits, the largest
    centred box with an allowed ratio.
    """
    for area, ratio, across, down in draws:
        area = width * height * (scale[0] + area * (scale[1] - scale[0]))
        ratio = math.exp(math.log(RATIO[0]) + ratio * (math.log(RATIO[1]) - math.log(RATIO[0])))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = int(across * (width - box_width + 1)), int(down * (height - box_height + 1))
            return left, top, left + box_width, top + box_height
    box_width, box_height = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height
