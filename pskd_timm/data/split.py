"""A data set as tensors: training, held-out and test parts."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .. import rng
from ..cpus import num_cpus
from ..errors import InputError
from ..fingerprint import digest
from ..recipe import Augment as AugmentSection
from ..recipe import Data as DataSection
from .decode import SKIPS, DamagedImage, cache_folder, decoded
from .shrunk import shrunk
from .sources import Table, open_tables
from .streaming import Job, StreamedSplit, policy
from .subsets import balanced_subset, stratified_split

FLIPPED, NEW_LABEL, NOISE = 2, 3, 4  # streams of data.seed beside those of subsets.py
MOST_WORKERS = 8  # processes that decode for one rank, where the recipe does not say
NOISE_ROWS = 1024  # images that get their noise at once: bounds memory


@dataclass
class Split:
    """Images uint8 [N, C, H, W], labels int64 [N] and the rows [N] that the samples have in the source's split.

    `table` is the one that the images were decoded from, None where they come from none, and `contents` a digest of it.
    """

    images: Tensor
    labels: Tensor
    source_id: Tensor
    table: Table | None = None
    contents: str = ""

    crops_itself = False  # a random resized crop is taken from whole images, after the stream

    def __len__(self):
        return len(self.labels)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return tuple(self.images.shape[-2:])

    @property
    def paths(self) -> list[str] | None:
        """The images' files, relative to data.path; None where they come from no folder of images."""
        return self.table.paths(self.source_id) if self.table else None

    @property
    def ids_device(self) -> torch.device:
        """Where the ids of a job are needed."""
        return self.images.device

    def take(self, rows: Tensor) -> "Split":
        return replace(self, images=self.images[rows], labels=self.labels[rows], source_id=self.source_id[rows])

    def to(self, device) -> "Split":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def stream(self, jobs: Iterable[Job]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """For each job its ids and each view's images, uint8 [B, C, H, W]."""
        for index, views in jobs:
            yield index, [self.images.index_select(0, samples) for samples, _ in views]


@dataclass
class Data:
    """The parts of a data set; `holdout` is None unless the recipe asks for one, `test` where it is not to be read."""

    train: Split | StreamedSplit
    test: Split | StreamedSplit | None
    holdout: Split | StreamedSplit | None
    class_names: list[str]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""
        return self.train.size

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Digests of the class names and of all parts' samples, labels and contents, for `fingerprint.changed`."""
        parts = [part for part in (self.train, self.holdout, self.test) if part]
        samples = ("\n".join(part.paths or ()).encode() for part in parts)
        return {
            "class_names": digest(f"{name}\n".encode() for name in self.class_names),
            "samples": digest([*(part.source_id.numpy().tobytes() for part in parts), *samples]),
            "labels": digest(part.labels.cpu().numpy().tobytes() for part in parts),
            "contents": digest([self.train.contents.encode()]),
            **({"test_contents": digest([self.test.contents.encode()])} if self.test else {}),
        }


def load_data(section: DataSection, augment: AugmentSection, progress=None) -> Data:
    """Open and split as a recipe's data section says; resident images are decoded, or mapped from the cache; on the CPU."""
    train_table, test_table = open_tables(section)
    class_names = train_table.class_names
    if len(class_names) < 2:
        raise InputError(f"data: a classifier needs two classes at least, the training split has {len(class_names)}")
    make = _streamed if section.loading == "streaming" else _resident
    train = make("train", train_table, class_names, section, augment, progress)
    test = make("test", test_table, class_names, section, augment, progress) if test_table else None
    if test and train.size != test.size:
        of_train, of_test = ("×".join(map(str, split.size)) for split in (train, test))
        raise InputError(f"data: training images are {of_train}, test images {of_test}: set data.image_size")
    framed = None
    if section.holdout_fraction and section.loading == "resident" and section.crop_pct < 1:
        # Held-out images are seen with the test images' crop; streaming gives each its own as they are read.
        framed = make("holdout", train_table, class_names, section, augment, progress)
        framed = _with_noise(_limited(framed, section.limit_train, section.seed), section, 0)
    train = _with_noise(_limited(train, section.limit_train, section.seed), section, 0)
    test = test and _with_noise(_limited(test, section.limit_test, section.seed), section, 1)
    if augment.cutout > min(train.size):
        raise InputError(
            f"augment.cutout {augment.cutout} is larger than the images of {train.size[0]}×{train.size[1]}"
        )
    train, holdout = _held_out(train, train if framed is None else framed, section, class_names)
    train = replace(train, labels=flip_labels(train.labels, len(class_names), section.label_noise, section.seed))
    return Data(train, test, holdout, class_names)


def _resident(name: str, table: Table, class_names, section: DataSection, augment: AugmentSection, progress) -> Split:
    labels = table.labels(name, class_names)
    report = (lambda done, total: progress(f"decoding {name}", done, total)) if progress else None
    crop_pct = 1.0 if name == "train" else section.crop_pct
    skip_damaged = name != "test" and section.damaged == "skip"
    folder = cache_folder(section.cache_dir)
    try:
        images, rows, contents = decoded(table, section.image_size, crop_pct, folder, skip_damaged, report)
    except DamagedImage as error:
        raise InputError(f"{error}; {'a test image is never left out' if name == 'test' else SKIPS}") from None
    # `rows` are some of the table's, in the same order.
    return Split(images, labels[torch.searchsorted(table.rows, rows)], rows, table, contents)


def _streamed(
    name: str, table: Table, class_names, section: DataSection, augment: AugmentSection, progress
) -> StreamedSplit:
    labels = table.labels(name, class_names)
    scale = augment.random_resized_crop if name == "train" else None
    workers = min(num_cpus(), MOST_WORKERS) if section.workers is None else section.workers
    size = section.image_size
    auto_augment = augment.auto_augment if name == "train" else None
    if auto_augment:
        policy(auto_augment, size)  # refused here, not in a worker
    skip_damaged = name == "train" and section.damaged == "skip"
    smaller = None
    if name == "train" and section.shrink_to:
        report = (lambda done, total: progress("shrinking train", done, total)) if progress else None
        smaller = shrunk(table, section.shrink_to, cache_folder(section.cache_dir), report)
    return StreamedSplit(
        table, size, labels, table.rows, workers, scale, section.crop_pct, auto_augment, skip_damaged, smaller
    )


def flip_labels(labels: Tensor, num_classes: int, fraction: float, seed: int) -> Tensor:
    """`labels` [N] with `round(fraction · N)` of them replaced by another class, drawn evenly; a function of `seed`."""
    if not fraction:
        return labels
    ids = torch.arange(len(labels))
    flipped = rng.bits(rng.derive_key(seed, FLIPPED), ids).argsort()[: round(fraction * len(labels))]
    shift = 1 + rng.integers(rng.derive_key(seed, NEW_LABEL), flipped, num_classes - 1)
    return labels.index_put((flipped,), (labels[flipped] + shift) % num_classes)


def gaussian_noise(images: Tensor, ids: Tensor, sigma: float, key: int) -> Tensor:
    """uint8 `images` [N, C, H, W] plus noise of `sigma` pixel ranges, clipped; a function of (key, sample id, channel, pixel)."""
    pixels = images[0].numel()
    noisy = torch.empty_like(images)
    for rows in torch.arange(len(images)).split(NOISE_ROWS):
        counters = ids[rows, None] * pixels + torch.arange(pixels)
        draws = rng.normal(key, counters).view_as(images[rows])
        noisy[rows] = (images[rows] + 255.0 * sigma * draws).round().clamp(0, 255).to(torch.uint8)
    return noisy


def _limited(split: Split, count: int | None, seed: int) -> Split:
    return split if count is None or count >= len(split) else split.take(balanced_subset(split.labels, count, seed))


def _with_noise(split: Split, section: DataSection, part: int) -> Split:
    if not section.gaussian_noise:
        return split
    key = rng.derive_key(section.seed, NOISE, part)
    return replace(split, images=gaussian_noise(split.images, split.source_id, section.gaussian_noise, key))


def _held_out(train: Split, framed: Split, section: DataSection, class_names: list[str]) -> tuple[Split, Split | None]:
    if not section.holdout_fraction:
        return train, None
    kept, taken = stratified_split("holdout_fraction", section, train.labels, class_names)
    return train.take(kept), framed.take(taken)
