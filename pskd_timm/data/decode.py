"""Images decoded once into one uint8 tensor, cached on disk and mapped from there afterwards."""

import hashlib
import io
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import functional as tv

from ..cpus import num_cpus
from ..errors import InputError, reason
from ..files import warn
from ..fingerprint import digest
from ..ranks import warn_on_main
from .sources import Table

VERSION = 6  # of what a cached file holds; a change makes old files be decoded again
CHUNK = 512
SKIPS = "--data.damaged skip leaves such training images out"
ORIENTATION = 0x0112  # EXIF's tag of how the camera was held
UPRIGHT = {  # what turns an image of each orientation upright (EXIF 2.32, table of tag 0x0112)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DEPTHS = (8, 12, 16)  # bits that cameras and scanners fill in files of 16 bits a pixel
SAMPLED_BYTES = 2**28  # that are read of a streamed data set to fingerprint it


class Decoded(NamedTuple):
    """Images uint8 [N, 3, H, W], the rows [N] of the table's data set that they are, and a digest of what they came from."""

    images: Tensor
    rows: Tensor
    contents: str


class DamagedImage(InputError):
    """An image that cannot be decoded."""


def cache_folder(setting: str | None) -> Path:
    """Where decoded images are kept."""
    return Path(setting or os.environ.get("PSKD_TIMM_CACHE") or Path.home() / ".cache" / "pskd_timm").expanduser()


def decoded(
    table: Table, image_size: int | None, crop_pct: float, folder: Path, skip_damaged: bool = False, progress=None
) -> Decoded:
    """The images of `table`, from `folder` where they were decoded before. See `fit` for their size.

    All rows, unless `skip_damaged` leaves out those that cannot be decoded, which is said. `progress(done, total)` is
    called now and then while decoding.
    """
    settings = f"{table.image_column} {image_size} {crop_pct} {skip_damaged}"
    path = folder / f"{digest([f'{VERSION} {table.selected._fingerprint} {settings}'.encode()])}.safetensors"
    found = None
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Several runs or processes may start at once: one decodes, the others wait for its file.
            with FileLock(f"{path}.lock"):
                if not path.is_file():
                    _save(_decode(table, image_size, crop_pct, skip_damaged, progress), path)
        except OSError as error:
            warn(f"decoded images cannot be kept for the next run: {reason(error)}")
            found = _decode(table, image_size, crop_pct, skip_damaged, progress)
    if found is None:
        with safe_open(path, "pt") as file:
            found = Decoded(file.get_tensor("images"), file.get_tensor("rows"), file.metadata()["contents"])
    if missing := len(table) - len(found.rows):
        warn_on_main(f"data: {missing} of {len(table)} training images are damaged and left out")
    return found


def _save(found: Decoded, path: Path):
    """Write whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        tensors = {"images": found.images, "rows": found.rows}
        save_file(tensors, Path(temporary) / path.name, {"contents": found.contents})
        os.replace(Path(temporary) / path.name, path)


def _decode(table: Table, image_size: int | None, crop_pct: float, skip_damaged: bool, progress) -> Decoded:
    if len(table) == 0:
        raise InputError("data: a split has no images")
    images, kept, stamps = None, [], []
    column = table.encoded_images
    one = partial(_one, image_size=image_size, crop_pct=crop_pct, skip_damaged=skip_damaged)
    # PIL decodes outside the interpreter lock, so threads help.
    with ThreadPoolExecutor(num_cpus()) as pool:
        for rows in table.rows.split(CHUNK):
            rows = rows.tolist()
            stored = column[rows][table.image_column]
            for row, (image, stamp) in zip(rows, pool.map(one, rows, stored), strict=True):
                stamps.append(stamp)
                if image is None:
                    continue
                if images is None:
                    images = np.empty((len(table), *image.shape), np.uint8)
                if image.shape != images.shape[1:]:
                    first, this = ("×".join(map(str, s[:2])) for s in (images.shape[1:], image.shape))
                    raise InputError(
                        f"data: images differ in size ({first}, and {this} at sample {row}): set data.image_size"
                    )
                images[len(kept)] = image
                kept.append(row)
            if progress:
                progress(len(stamps), len(table))
    if not kept:
        raise InputError("data: every image of a split is damaged")
    images = torch.from_numpy(images[: len(kept)]).permute(0, 3, 1, 2).contiguous()
    sizes, hashes = zip(*stamps, strict=True)
    return Decoded(images, torch.tensor(kept), _contents(np.array(sizes, np.int64), hashes))


def _one(
    row: int, stored, image_size: int | None, crop_pct: float, skip_damaged: bool
) -> tuple[np.ndarray | None, tuple[int, bytes]]:
    """A stored image, None where it is damaged and left out, with its bytes and their hash."""
    stamp = _stamp(stored)
    try:
        image = open_image(stored, row)
    except InputError as error:
        if not skip_damaged:
            raise
        warn(f"{error}; left out")
        return None, stamp
    return np.asarray(image if image_size is None else fit(image, image_size, crop_pct)), stamp


def sampled_contents(table: Table) -> str:
    """A digest of what the images of a table hold, which reads no more than SAMPLED_BYTES of them.

    Of a larger table it takes every image's size in bytes, and whole images spread evenly over it. Neither the files' times
    nor their place count: data may be copied to a disk nearby. For a small one it is `Decoded.contents`.
    """
    sizes = _encoded_sizes(table)
    count = max(1, int(len(table) * min(1.0, SAMPLED_BYTES / max(1, sizes.sum()))))
    rows = table.rows[torch.linspace(0, len(table) - 1, count).long()]
    column, hashes = table.encoded_images, []
    for chunk in rows.split(CHUNK):
        hashes += [_stamp(stored)[1] for stored in column[chunk.tolist()][table.image_column]]
    return _contents(sizes, hashes)


def _contents(sizes: np.ndarray, hashes: Sequence[bytes]) -> str:
    return digest([sizes.tobytes(), *hashes])


def _encoded_sizes(table: Table) -> np.ndarray:
    """Bytes int64 [N] that each image of a table takes."""
    import datasets
    import pyarrow.compute as arrow

    if table.folder is not None:
        sizes = arrow.fill_null(table.dataset.data.column("bytes"), 0)
    elif isinstance(table.dataset.features[table.image_column], datasets.Image):
        stored = arrow.struct_field(table.dataset.data.column(table.image_column), "bytes")
        sizes = arrow.fill_null(arrow.binary_length(stored), 0)
    else:
        first = table.encoded_images[table.rows[:1].tolist()][table.image_column][0]
        return np.full(len(table), _stamp(first)[0], np.int64)
    return np.asarray(sizes, np.int64)[table.rows.numpy()]


def _stamp(stored) -> tuple[int, bytes]:
    """Bytes of a stored image and their SHA-256; of nothing where there is none."""
    try:
        encoded = _encoded(stored) if isinstance(stored, dict | bytes) else _pixels(stored).tobytes()
    except (OSError, ValueError, TypeError):  # a damaged image, which is named where it is decoded
        encoded = b""
    return len(encoded), hashlib.sha256(encoded).digest()


def open_image(stored, position: int) -> Image.Image:
    """A stored image decoded as RGB. `position` names it in errors."""
    with _named_in_errors(stored, position):
        image, deep, turn = _opened(stored)
        return _upright(_rgb(image, stored, deep), turn)


def open_box(stored, position: int, crop: Callable) -> Tensor:
    """The pixels uint8 [3, h, w] of a box of a stored image, as RGB. `position` names it in errors.

    `crop(size)` gives the box (left, top, right, bottom) of an image of `size` (W, H), and the side that it will be resized
    to: a JPEG is decoded at the smallest scale that has the pixels for it.
    """
    with _named_in_errors(stored, position):
        image, deep, turn = _opened(stored)
        if turn is not None:  # its box lies in the turned frame, where no reduced decoding is to be had
            image = _upright(_rgb(image, stored, deep), turn)
            return _channels_first(image.crop(crop(image.size)[0]))
        size = image.size
        box, side = crop(size)
        smaller = min(box[2] - box[0], box[3] - box[1]) // side
        if smaller <= 1 and (whole := _whole_jpeg(image, stored)) is not None:
            left, top, right, bottom = box
            return whole[:, top:bottom, left:right]
        if smaller > 1:
            image.draft("RGB", (size[0] // smaller, size[1] // smaller))
        scale = image.size[0] / size[0], image.size[1] / size[1]
        return _channels_first(
            _rgb(image, stored, deep).crop([round(edge * scale[i % 2]) for i, edge in enumerate(box)])
        )


@contextmanager
def _named_in_errors(stored, position: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each of Pillow's readers raises what it likes
        name = f" ({stored['path']})" if isinstance(stored, dict) and stored.get("path") else ""
        why = str(error)[:200] or type(error).__name__
        raise DamagedImage(f"data: image {position}{name} cannot be decoded: {why}") from None


def _opened(stored) -> tuple[Image.Image, list[str], Image.Transpose | None]:
    """A stored image before it is decoded, its `_sixteen_bit_modes`, and what turns it upright."""
    image = Image.open(_file(stored)) if isinstance(stored, dict | bytes) else Image.fromarray(_pixels(stored))
    deep = _sixteen_bit_modes(image)  # before EXIF, for which Pillow decodes a PNG
    return image, deep, UPRIGHT.get(_orientation(image))


def _upright(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


def _whole_jpeg(image: Image.Image, stored) -> Tensor | None:
    """The pixels uint8 [3, H, W] of a JPEG by torchvision's decoder: Pillow's values in three quarters of the time.

    None where it is no plain JPEG, or where torchvision refuses it: Pillow then reads it, or says why not.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    try:
        return decode_jpeg(torch.frombuffer(bytearray(_encoded(stored)), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError:
        return None


def _channels_first(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _orientation(image: Image.Image):
    """EXIF's orientation of an image, 1 to 8; 1 where there is none to be read."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # a broken block, for which Pillow raises what it likes: the pixels may be sound
        return 1


def _encoded(stored: dict | bytes) -> bytes:
    if isinstance(stored, bytes):
        return stored
    return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()


def _file(stored: dict | bytes):
    is_path = isinstance(stored, dict) and stored["bytes"] is None
    return stored["path"] if is_path else io.BytesIO(_encoded(stored))


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


def _rgb(image: Image.Image, stored, deep: list[str]) -> Image.Image:
    """`image`, which was opened from `stored`, as RGB; `deep` is what `_sixteen_bit_modes` says of it."""
    if deep:
        return Image.fromarray(_eight_bits(_sixteen_bits(image, stored, deep)))
    if image.mode.startswith("I"):  # 16 bits a pixel, which `convert` would cut off at 255
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns where a palette loses its transparency at once
    return image.convert("RGB")


def _sixteen_bit_modes(image: Image.Image) -> list[str]:
    """Pillow's names of how the parts of a colour image of 16 bits a channel are stored; none where it is another image."""
    tiles = getattr(image, "tile", []) if image.mode in ("RGB", "RGBA") else []
    modes = [tile.args[0] if isinstance(tile.args, tuple) else tile.args for tile in tiles]
    return modes if all(str(mode)[:-1] == f"{image.mode};16" for mode in modes) else []


def _sixteen_bits(image: Image.Image, stored, raw_modes: list[str]) -> np.ndarray:
    """The pixels [H, W, 3] of a colour image of 16 bits a channel, of which Pillow keeps the upper byte alone.

    Read once more as if its bytes stood the other way round, it gives the lower one.
    """
    swapped = Image.open(_file(stored))
    for place, (tile, mode) in enumerate(zip(swapped.tile, raw_modes, strict=True)):
        mode = mode[:-1] + ("L" if mode[-1] == "B" else "B")
        swapped.tile[place] = tile._replace(args=(mode, *tile.args[1:]) if isinstance(tile.args, tuple) else mode)
    upper, lower = (np.asarray(each)[..., :3].astype(np.int64) for each in (image, swapped))
    return 256 * upper + lower


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """uint8 of `pixels` of 16 bits, of which those of an image may fill 8 or 12 only: the fewest that hold its largest."""
    largest = pixels.max()
    depth = next((bits for bits in DEPTHS if largest < 2**bits), None)
    if depth is None:
        raise ValueError(f"its pixels of up to {largest} do not fit into 16 bits")
    return (pixels.clip(0).astype(np.int64) * 255 // (2**depth - 1)).astype(np.uint8)


def fit(image: Image.Image, size: int, crop_pct: float) -> Image.Image:
    """The centre square of `size` pixels, once the shorter side is resized to size/crop_pct: timm's transform for evaluation."""
    image = tv.resize(image, math.floor(size / crop_pct), tv.InterpolationMode.BICUBIC)
    return tv.center_crop(image, size)
