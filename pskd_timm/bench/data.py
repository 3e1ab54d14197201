"""Images a second of the two loaders, and of what training scripts usually do with the same images."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from ..data import Loader, load_data
from ..data.shrunk import shrunk
from ..data.split import Split
from ..data.streaming import StreamedSplit
from ..errors import InputError
from ..recipe import Augment
from ..recipe import Data as DataSection
from .rounds import ratio, rounds

TITLE = "images/s of the loaders over PIL + torchvision + DataLoader with the same transforms and images"
OPTIONS = ("images",)
BATCH, WORKERS = 128, 2
SMALL, SMALL_COUNT = 32, 12_800
LARGE, LARGE_COUNT, LARGE_BATCH, SHRUNK = 224, 256, 32, 256
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def measure(say, images: str | None = None) -> list[dict]:
    """Rows for resident 32×32 images and for streamed JPEGs: those in the folder `images`, else random ones of 500×375."""
    with tempfile.TemporaryDirectory() as folder:
        photographs = _photographs(Path(folder), images)
        return _resident(say) + _streaming(photographs, say)


class _Small(Dataset):
    """Small images in memory, each made a PIL image and transformed for itself, as torchvision's CIFAR100 does."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels
        steps = [transforms.RandomCrop(SMALL, padding=4), transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.pixels[i])), 0


def _resident(say) -> list[dict]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pixels = torch.randint(256, (SMALL_COUNT, 3, SMALL, SMALL), dtype=torch.uint8)
    split = Split(pixels, torch.zeros(SMALL_COUNT, dtype=torch.int64), torch.arange(SMALL_COUNT)).to(device)
    section = Augment(crop_padding=4, hflip=0.5)
    ours = Loader(split, 2, 10**6, BATCH, section, MEAN, STD, 0, 0, 1, partners="")
    epoch = iter(range(10**6))
    usual = DataLoader(
        _Small(pixels.permute(0, 2, 3, 1).contiguous().numpy()),
        BATCH,
        shuffle=True,
        num_workers=WORKERS,
        persistent_workers=True,
        pin_memory=device == "cuda",
    )

    def resident():
        now = next(epoch)
        for _ in ours.batches(ours.rank_batches(now), now):
            pass

    def usual_way():
        for images, _ in usual:
            images.to(device, non_blocking=True)

    def on_threads(count: int):
        def work():
            torch.set_num_threads(count)
            resident()

        return work

    threads = torch.get_num_threads()
    ways = {
        "usual": usual_way,
        "resident, 1 thread": on_threads(1),
        f"resident, {WORKERS} threads": on_threads(WORKERS),
    }
    found = rounds(ways, seconds=12.0)
    torch.set_num_threads(threads)
    return _rows(found, f"{SMALL}×{SMALL} resident", SMALL_COUNT, f"DataLoader, {WORKERS} workers", say)


def _streaming(folder: str, say) -> list[dict]:
    section = Augment(random_resized_crop=[0.08, 1.0], hflip=0.5, color_jitter=0.4)
    split = load_data(DataSection(path=folder, image_size=LARGE, loading="streaming", workers=0), section).train
    smaller = replace(split, smaller=shrunk(split.table, SHRUNK, Path(folder) / "smaller"))
    works = {
        "usual": _torchvisions_loader(folder),
        "timm": _timms_loader(folder),
        "streaming": _our_loader(split, section),
        f"streaming, shrink_to {SHRUNK}": _our_loader(smaller, section),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = _core_seconds(works, seconds=15.0)
    torch.set_num_threads(threads)
    return _rows(found, f"JPEG to {LARGE}×{LARGE} streaming", len(split), "DataLoader, a core's second", say)


# Each loads in the calling process: workers decode ahead, more or less of them, while another loader is measured.


def _our_loader(split: StreamedSplit, section: Augment) -> Callable[[], None]:
    loader = Loader(split, 2, 10**6, LARGE_BATCH, section, MEAN, STD, 0, 0, 1, partners="")
    epochs = iter(range(10**6))

    def work():
        now = next(epochs)
        for _ in loader.batches(loader.rank_batches(now), now):
            pass

    return work


def _torchvisions_loader(folder: str) -> Callable[[], None]:
    steps = [
        transforms.RandomResizedCrop(LARGE),
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.4, 0.4, 0.4),
    ]
    transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    loader = DataLoader(ImageFolder(f"{folder}/train", transform), LARGE_BATCH, shuffle=True)
    return lambda: _read_all(loader)


def _timms_loader(folder: str) -> Callable[[], None]:
    from timm.data import create_loader

    loader = create_loader(
        ImageFolder(f"{folder}/train"),
        (3, LARGE, LARGE),
        LARGE_BATCH,
        is_training=True,
        use_prefetcher=False,
        scale=(0.08, 1.0),
        hflip=0.5,
        color_jitter=0.4,
        interpolation="bilinear",
        num_workers=0,
        persistent_workers=False,
        mean=MEAN,
        std=STD,
    )
    return lambda: _read_all(loader)


def _read_all(loader: DataLoader):
    for _ in loader:
        pass


def _core_seconds(works: dict, seconds: float) -> dict[str, list[float]]:
    """As `rounds`, in seconds of processor time: other work on the machine counts less."""
    found = {name: [] for name in works}
    began = time.perf_counter()
    while len(found["usual"]) < 4 or time.perf_counter() - began < seconds:
        for name, work in works.items():
            start = time.process_time()
            work()
            found[name].append(time.process_time() - start)
    return {name: values[1:] for name, values in found.items()}


def _rows(found: dict, what: str, count: int, usual: str, say) -> list[dict]:
    rows = []
    for name in found:
        over = ratio(found, "usual", name)  # of times, so that more than 1 is faster
        row = {
            "what": what,
            "loader": usual if name == "usual" else name,
            "images_per_second": count / median(found[name]),
        }
        row |= {"faster": over["ratio"], "low": over["low"], "high": over["high"], "rounds": over["rounds"]}
        rows.append(row)
        say(
            f"  {what:<31} {row['loader']:<28} {row['images_per_second']:10,.0f} images/s   "
            f"{row['faster']:.2f} × ({row['low']:.2f} … {row['high']:.2f}, {row['rounds']} rounds)"
        )
    return rows


def _photographs(folder: Path, images: str | None) -> str:
    """A folder train/<class>/*.jpg, test/<class>/*.jpg: links to the JPEGs under `images`, or random images."""
    found = sorted(Path(images).rglob("*.[jJ][pP]*[gG]"))[: 4 * LARGE_COUNT] if images else []
    if images and len(found) < 2 * LARGE_BATCH:
        raise InputError(f"--images: {images} holds {len(found)} JPEG files; {2 * LARGE_BATCH} are needed at least")
    generator = np.random.default_rng(0)
    for i in range(len(found) or LARGE_COUNT):
        place = folder / "train" / f"c{i % 2}" / f"{i}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        if found:
            os.symlink(found[i].resolve(), place)
        else:
            # Noise at several scales: about as many bytes as a photograph of this size.
            coarse = [generator.integers(0, 256, (375 // s, 500 // s, 3), dtype=np.uint8) for s in (4, 16, 64)]
            layers = [
                np.asarray(Image.fromarray(c).resize((500, 375), Image.Resampling.BICUBIC), float) for c in coarse
            ]
            Image.fromarray(np.mean(layers, axis=0).astype(np.uint8)).save(place, quality=90)
    for k in range(2):
        (folder / "test" / f"c{k}").mkdir(parents=True)
        os.symlink(next((folder / "train" / f"c{k}").iterdir()).resolve(), folder / "test" / f"c{k}" / "0.jpg")
    return str(folder)
