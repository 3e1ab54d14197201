"""Images decoded once into one uint8 tensor, cached on disk and mapped from there afterwards."""

import hashlib
import io
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError
from ..files import warn
from .sources import Table

VERSION = 3  # of what a cached file holds; a change makes old files be decoded anew
CHUNK = 512
SKIPS = "--data.damaged skip leaves such training images out"
ORIENTATION = 0x0112  # EXIF's tag of how the camera was held


class DamagedImage(InputError):
    """An image that cannot be decoded."""


def cache_folder(setting: str | None) -> Path:
    """Where decoded images are kept."""
    return Path(setting or os.environ.get("PSKD_TIMM_CACHE") or Path.home() / ".cache" / "pskd_timm").expanduser()


def decoded(
    table: Table, image_size: int | None, crop_pct: float, folder: Path, skip_damaged: bool = False, progress=None
) -> tuple[Tensor, Tensor]:
    """The images of `table` as uint8 [N, 3, H, W] and their rows [N], from `folder` where they were decoded before.

    See `fit` for their size. All rows, unless `skip_damaged` leaves out those that cannot be decoded, which is told.
    `progress(done, total)` is called now and then while decoding.
    """
    key = f"{VERSION} {table.dataset._fingerprint} {table.image_column} {image_size} {crop_pct} {skip_damaged}"
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
    tensors = None
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Several runs or processes may start at once: one decodes, the others wait for its file.
            with FileLock(f"{path}.lock"):
                if not path.is_file():
                    _save(_decode(table, image_size, crop_pct, skip_damaged, progress), path)
        except OSError as error:
            warn(f"decoded images cannot be kept for the next run: {error}")
            tensors = _decode(table, image_size, crop_pct, skip_damaged, progress)
    if tensors is None:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
    images, rows = tensors["images"], tensors["rows"]
    if missing := len(table.dataset) - len(rows):
        warn(f"data: {missing} of {len(table.dataset)} training images are damaged and left out")
    return images, rows


def _save(tensors: dict[str, Tensor], path: Path):
    """Write whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        save_file(tensors, Path(temporary) / path.name)
        os.replace(Path(temporary) / path.name, path)


def undecoded(table: Table):
    """The table's images as an HF `Dataset` of one column that gives them encoded."""
    from datasets import Image as ImageFeature

    dataset = table.dataset.select_columns([table.image_column])
    if isinstance(dataset.features[table.image_column], ImageFeature):
        dataset = dataset.cast_column(table.image_column, ImageFeature(decode=False))
    return dataset


def _decode(table: Table, image_size: int | None, crop_pct: float, skip_damaged: bool, progress) -> dict[str, Tensor]:
    column = undecoded(table)
    total = len(column)
    if total == 0:
        raise InputError("data: a split has no images")
    images, kept = None, []
    # PIL decodes outside the interpreter lock, so threads help.
    with ThreadPoolExecutor() as pool:
        for start in range(0, total, CHUNK):
            rows = enumerate(column[start : start + CHUNK][table.image_column], start)
            for row, image in pool.map(lambda item: _one(*item, image_size, crop_pct, skip_damaged), rows):
                if image is None:
                    continue
                if images is None:
                    images = np.empty((total, *image.shape), np.uint8)
                if image.shape != images.shape[1:]:
                    first, this = ("×".join(map(str, s[:2])) for s in (images.shape[1:], image.shape))
                    raise InputError(
                        f"data: images differ in size ({first}, and {this} at sample {row}): set data.image_size"
                    )
                images[len(kept)] = image
                kept.append(row)
            if progress:
                progress(min(start + CHUNK, total), total)
    if not kept:
        raise InputError("data: every image of a split is damaged")
    images = torch.from_numpy(images[: len(kept)]).permute(0, 3, 1, 2).contiguous()
    return {"images": images, "rows": torch.tensor(kept)}


def _one(
    row: int, stored, image_size: int | None, crop_pct: float, skip_damaged: bool
) -> tuple[int, np.ndarray | None]:
    try:
        image = open_image(stored, row)[0]
    except InputError as error:
        if not skip_damaged:
            raise
        warn(f"{error}; left out")
        return row, None
    return row, np.asarray(image if image_size is None else fit(image, image_size, crop_pct))


def open_image(stored, position: int, crop=None) -> tuple[Image.Image, tuple | None]:
    """A stored image decoded as RGB. `position` names it in errors.

    `crop(size)` gives the box (left, top, right, bottom) that will be cut out of an image of `size` (W, H), and the side
    that it is resized to. The box is then returned too; a JPEG is decoded at the smallest scale that has the pixels for it.
    """
    try:
        if not isinstance(stored, dict | bytes):
            return Image.fromarray(_pixels(stored)).convert("RGB"), None
        image = Image.open(_file(stored))
        size = image.size
        # A turned picture's box lies in the turned frame, where no reduced decoding is to be had.
        turned = image.getexif().get(ORIENTATION, 1) != 1
        if crop is None or turned:
            image = _rgb(ImageOps.exif_transpose(image) if turned else image)
            return image, crop(image.size)[0] if crop else None
        box, side = crop(size)
        smaller = max(1, min(box[2] - box[0], box[3] - box[1]) // side)
        image.draft("RGB", (size[0] // smaller, size[1] // smaller))
        scale = image.size[0] / size[0], image.size[1] / size[1]
        return _rgb(image), tuple(edge * scale[i % 2] for i, edge in enumerate(box))
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        name = f" ({stored['path']})" if isinstance(stored, dict) and stored.get("path") else ""
        raise DamagedImage(f"data: image {position}{name} cannot be decoded: {str(error)[:200]}") from None


def _file(stored: dict | bytes):
    if isinstance(stored, bytes):
        return io.BytesIO(stored)
    return io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"]


def _pixels(stored) -> np.ndarray:
    """An array column's image as uint8 [H, W] or [H, W, C]."""
    if stored is None:
        raise ValueError("there is none")
    pixels = np.asarray(stored)
    if pixels.dtype.kind not in "ui" or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(f"its {pixels.dtype} values should be whole numbers from 0 to 255")
    if pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (1,), (3,), (4,)):
        raise ValueError(f"its shape {list(pixels.shape)} should be [H, W] or [H, W, 1, 3 or 4]")
    return np.squeeze(pixels.astype(np.uint8), axis=2) if pixels.shape[2:] == (1,) else pixels.astype(np.uint8)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which `convert` would cut off at 255
        return Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns where a palette loses its transparency at once
    return image.convert("RGB")


def fit(image: Image.Image, size: int, crop_pct: float) -> Image.Image:
    """The centre square of `size` pixels, once the shorter side is resized to size/crop_pct."""
    scale = round(size / crop_pct) / min(image.size)
    if scale != 1:
        image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))
