"""A split whose images stay encoded: decoded again for every batch, by worker processes."""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as tv

from .. import rng
from ..cpus import WORKERS_START
from ..errors import InputError
from ..files import warn
from .augmentation import AUTO_AUGMENT, RATIO, RESIZED_CROP, TRIES
from .decode import SKIPS, DamagedImage, fit, open_box, open_image, sampled_contents
from .sources import Table

PREFETCH = 4  # batches that each worker has ready

Job = tuple[Tensor, list[tuple[Tensor, int | None]]]  # ids [B]; for each view the samples [B] and the key of its draws


@dataclass
class StreamedSplit:
    """Labels int64 [N], the rows [N] that the samples have in the source's split, and how their images are shown.

    `scale` is the range of a random resized crop's area, None for the centre. `crop_pct` is, in evaluation, the part of
    the shorter side that is kept. `auto_augment` names a policy of timm's. A training image that cannot be decoded is an
    error, unless `skip_damaged` leaves it out of its batch, which is said.
    `smaller` is a `Dataset` of a single column that training reads in place of the table's, evaluation never.
    """

    table: Table
    image_size: int
    labels: Tensor
    source_id: Tensor
    workers: int
    scale: tuple[float, float] | None = None
    crop_pct: float = 1.0
    auto_augment: str | None = None
    skip_damaged: bool = False
    smaller: object = None

    crops_itself = True  # a random resized crop is taken while decoding

    def __len__(self):
        return len(self.labels)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.image_size, self.image_size

    @property
    def paths(self) -> list[str] | None:
        """The images' files, relative to data.path; None where they come from no folder of images."""
        return self.table.paths(self.source_id)

    @property
    def contents(self) -> str:
        """A digest of what the table's images hold."""
        return sampled_contents(self.table)

    @property
    def ids_device(self) -> torch.device:
        """Where the ids of a job are needed."""
        return torch.device("cpu")

    def take(self, rows: Tensor) -> "StreamedSplit":
        return replace(self, labels=self.labels[rows], source_id=self.source_id[rows])

    def to(self, device) -> "StreamedSplit":
        return replace(self, labels=self.labels.to(device))

    def stream(self, jobs: Iterable[Job]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """For each job (ids [B], views) the ids and each view's images, uint8 [B, 3, H, W], on the labels' device."""
        device = self.labels.device
        loader = DataLoader(
            _Decoding(self.to("cpu")),  # labels on a GPU would make each worker that is not forked start CUDA
            batch_size=None,
            sampler=jobs,
            num_workers=self.workers,
            multiprocessing_context=WORKERS_START if self.workers else None,
            prefetch_factor=PREFETCH if self.workers else None,
            pin_memory=device.type == "cuda",
            # Of its own: the global generator, which the training step seeds, is not to be drawn from.
            generator=torch.Generator(),
        )
        warned = set()
        for index, views, damage in _ahead(loader, device):
            if damage and not views:
                raise DamagedImage(damage[0])
            for line in set(damage) - warned:
                warn(f"{line}; left out")
            warned.update(damage)
            yield index, views


def _ahead(loader: Iterable, device: torch.device) -> Iterator:
    """The batches of `loader` on `device`, each one's copy under way while the one before is at work."""
    if device.type != "cuda":
        yield from loader
        return
    stream = torch.cuda.Stream(device)  # of its own: on the default one a copy would wait for the step before it
    waiting = None
    for index, views, damage in loader:
        with torch.cuda.stream(stream):
            index, *views = (tensor.to(device, non_blocking=True) for tensor in (index, *views))
            copied = torch.cuda.current_stream().record_event()
        if waiting:
            yield _arrived(*waiting)
        waiting = (index, views, damage), copied
    if waiting:
        yield _arrived(*waiting)


def _arrived(batch: tuple, copied: torch.cuda.Event) -> tuple:
    # Not for the whole stream, where the next batch's copy is queued by now.
    torch.cuda.current_stream().wait_event(copied)
    for tensor in (batch[0], *batch[1]):
        tensor.record_stream(torch.cuda.current_stream())
    return batch


class _Decoding(Dataset):
    """What a worker does: a job in, its decoded images out. An error travels as text, since a raised one grows a traceback."""

    def __init__(self, split: StreamedSplit):
        self.split, self.stored = split, split.table.encoded_images
        self.shown = split.smaller or self.stored
        self.policy = policy(split.auto_augment, split.image_size) if split.auto_augment else None

    def __getitem__(self, job):
        index, views = job
        seen = [self._view(samples, index, key) for samples, key in views]
        damage = [str(image) for view in seen for image in view if isinstance(image, InputError)]
        if not damage:
            return index, [_stack(view) for view in seen], []
        whole = [i for i, row in enumerate(zip(*seen, strict=True)) if not any(isinstance(i, InputError) for i in row)]
        if views[0][1] is None:
            return index, [], [f"{damage[0]}; an image that is evaluated is never left out"]
        if not self.split.skip_damaged:
            return index, [], [f"{damage[0]}; {SKIPS}"]
        if not whole:
            return index, [], [f"{damage[0]}; every image of this batch is damaged"]
        return index[whole], [_stack([view[i] for i in whole]) for view in seen], damage

    def _view(self, samples: Tensor, drawn_for: Tensor, key: int | None) -> list[Tensor | InputError]:
        """The images uint8 [3, H, W] of the samples; the error instead of one that cannot be decoded."""
        rows = self.split.source_id[samples].tolist()
        stored = (self.stored if key is None else self.shown)[rows][self.split.table.image_column]
        draws, seeds = [None] * len(rows), [None] * len(rows)
        if key is not None and self.split.scale:
            counters = drawn_for[:, None] * (4 * TRIES) + torch.arange(4 * TRIES)
            draws = rng.uniform(rng.derive_key(key, RESIZED_CROP), counters).view(-1, TRIES, 4).tolist()
        if key is not None and self.policy:
            seeds = rng.integers(rng.derive_key(key, AUTO_AUGMENT), drawn_for, 2**31).tolist()
        crop_pct = self.split.crop_pct if key is None else 1.0
        return [self._image(*item, crop_pct) for item in zip(stored, rows, draws, seeds, strict=True)]

    def _image(self, stored, row: int, draws: list | None, seed: int | None, crop_pct: float) -> Tensor | InputError:
        try:
            if draws is None:
                image = tv.pil_to_tensor(fit(open_image(stored, row), self.split.image_size, crop_pct))
            else:
                image = self._crop(stored, row, draws)
        except InputError as error:
            return error
        return image if seed is None else tv.pil_to_tensor(_seeded(seed, self.policy, tv.to_pil_image(image)))

    def _crop(self, stored, row: int, draws: list) -> Tensor:
        side = self.split.image_size
        pixels = open_box(stored, row, lambda size: (resized_crop_box(*size, self.split.scale, draws), side))
        # Pillow's filter, on uint8: torch has it in vector instructions.
        return F.interpolate(pixels[None], (side, side), mode="bilinear", antialias=True)[0]


def _stack(images: list[Tensor]) -> Tensor:
    return torch.stack(images).contiguous()


def policy(name: str, image_size: int) -> Callable:
    """timm's augmentation policy `name` (`rand-m9-mstd0.5`, `augmix-m3`, `original`, …): an image in, an image out."""
    from timm.data import auto_augment as timms

    # timm ignores parts that have no number.
    ignored = [part for part in name.split("-")[1:] if not (any(c.isdigit() for c in part) or part.startswith("t"))]
    make = {"rand": timms.rand_augment_transform, "augmix": timms.augment_and_mix_transform}
    try:
        assert not ignored
        return make.get(name.split("-")[0], timms.auto_augment_transform)(
            name, {"translate_const": int(0.45 * image_size)}
        )
    except (AssertionError, ValueError, KeyError, IndexError):
        raise InputError(
            f"augment.auto_augment: timm has no policy {name!r}: try rand-m9-mstd0.5, augmix-m3 or original"
        ) from None


def _seeded(seed: int, transform: Callable, image: Image.Image) -> Image.Image:
    # timm's policies draw from Python's and numpy's global generators, which are put back as they were.
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        return transform(image)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


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
