"""Augmentation of whole batches on the device; every draw a function of (seed, epoch, sample), see rng.py."""

import random
from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import rng
from ..recipe import Augment

# One number for each thing that is drawn: a new draw takes a new number and leaves the others' values alone.
TOP, LEFT, FLIP, JITTER_ORDER, BRIGHTNESS, CONTRAST, SATURATION, LIGHTING, RESIZED_CROP = range(9)
AUTO_AUGMENT, CUT_DOWN, CUT_ACROSS, ERASE, ERASED_AREA, ERASED_RATIO, ERASE_DOWN, ERASE_ACROSS = range(9, 17)

ERASED = (0.02, 1 / 3)  # range of a random erasing's area, as a part of the image's (timm's default)
ERASED_RATIOS = (0.3, 1 / 0.3)  # range of its height over its width

TRIES = 10  # boxes drawn for a random resized crop before the centre is taken, as torchvision does
RATIO = (3 / 4, 4 / 3)  # range of a box's width over its height

GREY = (0.299, 0.587, 0.114)  # weights of red, green and blue (ITU-R BT.601)
ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
# Principal components of ImageNet's colours in units of the pixel range (Krizhevsky et al., NIPS 2012).
PCA_VALUES = (0.2175, 0.0188, 0.0045)
PCA_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


DRAW_ROWS = 2**16  # samples whose numbers are drawn at once: bounds the memory that this takes on the way


class Draws(NamedTuple):
    """What was drawn for the augmentation of n samples; None for what is not asked for. At most 88 bytes a sample."""

    affine: Tensor | None = None  # [n, 2, 3]: of the random resized crop, for affine_grid
    window: Tensor | None = None  # int64 [n]: where the crop begins, see `crop`
    jitter: Tensor | None = None  # [n, 3]: see `jitter_weights`
    lighting: Tensor | None = None  # [n, 3]: what is added to red, green and blue
    cutout: Tensor | None = None  # int32 [n, 4]: top, left, height and width of the box
    erasing: Tensor | None = None  # int32 [n, 4]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Draws":
        """`change` of every tensor."""
        return Draws(*(None if one is None else change(one) for one in self))

    def split(self, lengths: list[int]) -> list["Draws"]:
        """Consecutive parts of so many samples each."""
        columns = [[None] * len(lengths) if one is None else one.split(lengths) for one in self]
        return [Draws(*part) for part in zip(*columns, strict=True)]


def draw(section: Augment, index: Tensor, key: int, size: tuple[int, int], resized_crop: bool = True) -> Draws:
    """What the samples `index` [n] of images of `size` (H, W) draw; `key` names the epoch.

    A random resized crop is drawn where the section asks for one and `resized_crop` holds.
    """
    parts = [_draw(section, rows, key, size, resized_crop) for rows in index.split(DRAW_ROWS)]
    return Draws(*(None if one[0] is None else torch.cat(one) for one in zip(*parts, strict=True)))


def _draw(section: Augment, index: Tensor, key: int, size: tuple[int, int], resized_crop: bool) -> Draws:
    affine = window = jitter = shift = cut = erased = None
    if section.random_resized_crop and resized_crop:
        affine = affine_of_boxes(resized_crop_boxes(index, key, section.random_resized_crop, *size), *size)
    if section.crop_padding or section.hflip:
        window = draw_windows(section, index, key, size)
    if section.color_jitter:
        draws = [rng.uniform(rng.derive_key(key, number), index) for number in (BRIGHTNESS, CONTRAST, SATURATION)]
        factors = 1.0 + section.color_jitter * (2.0 * torch.stack(draws, dim=1) - 1.0)
        jitter = jitter_weights(factors, rng.integers(rng.derive_key(key, JITTER_ORDER), index, len(ORDERS)))
    if section.lighting:
        alpha = [rng.normal(rng.derive_key(key, LIGHTING, component), index) for component in range(3)]
        shift = lighting(section.lighting * torch.stack(alpha, dim=1))
    if section.cutout:
        cut = draw_cutout(index, key, section.cutout, size)
    if section.random_erasing:
        erased = draw_erasing(index, key, section.random_erasing, size)
    return Draws(affine, window, jitter, shift, cut, erased)


def draw_windows(section: Augment, index: Tensor, key: int, size: tuple[int, int]) -> Tensor:
    """Where the crop of each sample `index` [n] begins, int64 [n]: see `crop`."""
    padding = section.crop_padding
    top = left = mirrored = torch.zeros_like(index)
    if padding:
        top, left = (rng.integers(rng.derive_key(key, number), index, 2 * padding + 1) for number in (TOP, LEFT))
    if section.hflip:
        mirrored = (rng.uniform(rng.derive_key(key, FLIP), index) < section.hflip).long()
    return window_start(top, left, mirrored, padding, size)


def window_start(top: Tensor, left: Tensor, mirrored: Tensor, padding: int, size: tuple[int, int]) -> Tensor:
    """The number that `crop` takes for the window at (top, left) [n] of a padded image, left–right mirrored where it is 1."""
    height, width = size
    # In a mirrored image the same window begins as far from the left as it ends from the right in the image itself.
    left = torch.where(mirrored == 1, 2 * padding - left, left)
    return (mirrored * (height + 2 * padding) + top) * (width + 2 * padding) + left


def crop(images: Tensor, window: Tensor, padding: int) -> Tensor:
    """Windows of the size of `images` [B, C, H, W], padded by `padding` zeros a side; `window` [B]: see `window_start`.

    A padded channel and its mirror image lie one after the other in memory, where a window is H rows of W neighbours.
    """
    channels, height, width = images.shape[1:]
    padded = F.pad(images, [padding] * 4) if padding else images
    rows = torch.stack([padded, padded.flip(-1)], dim=2).view(-1).unfold(0, width, 1)
    places = _window_rows(len(images), channels, height, width, padding, images.device)
    return rows.index_select(0, (places + window.view(-1, 1)).view(-1)).view_as(images)


@lru_cache(maxsize=8)
def _window_rows(count: int, channels: int, height: int, width: int, padding: int, device: torch.device) -> Tensor:
    """Where the rows of windows at (0, 0) begin in `crop`'s memory, int64 [count, channels · height]."""
    stride = width + 2 * padding
    channel = torch.arange(count * channels, device=device)[:, None] * (2 * (height + 2 * padding) * stride)
    return (channel + torch.arange(height, device=device) * stride).view(count, -1)


def resized_crop_boxes(index: Tensor, key: int, scale, height: int, width: int) -> Tensor:
    """(left, top, width, height) [B, 4] of a random resized crop of each sample `index` [B]: see streaming.resized_crop_box."""
    counters = index[:, None] * (4 * TRIES) + torch.arange(4 * TRIES, device=index.device)
    draws = rng.uniform(rng.derive_key(key, RESIZED_CROP), counters).view(-1, TRIES, 4)
    area, ratio, across, down = draws.unbind(dim=2)
    area = height * width * (scale[0] + area * (scale[1] - scale[0]))
    ratio = RATIO[0] * (RATIO[1] / RATIO[0]) ** ratio
    wide, tall = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    left, top = (across * (width - wide + 1)).floor(), (down * (height - tall + 1)).floor()
    widest, tallest = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    centre = ((width - widest) // 2, (height - tallest) // 2, widest, tallest)
    boxes = torch.stack([left, top, wide, tall], dim=2)
    first = fits.int().argmax(dim=1)[:, None, None].expand(-1, 1, 4)
    chosen = boxes.gather(1, first).squeeze(1)
    return torch.where(fits.any(dim=1, keepdim=True), chosen, on_device(centre, index.device))


def affine_of_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """What `affine_grid` takes, [n, 2, 3], for the `boxes` (left, top, width, height) [n, 4] of images of H × W."""
    left, top, wide, tall = boxes.unbind(dim=1)
    zero = torch.zeros_like(left)
    across = torch.stack([wide / width, zero, (2 * left + wide) / width - 1], dim=1)
    down = torch.stack([zero, tall / height, (2 * top + tall) / height - 1], dim=1)
    return torch.stack([across, down], dim=1)


def resized_crop(images: Tensor, affine: Tensor) -> Tensor:
    """The boxes `affine` [B, 2, 3] of uint8 `images` [B, C, H, W], resized bilinearly to the images' size."""
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    resized = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return resized.round_().to(torch.uint8)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Float images from `images` [B, C, H, W] of 0 … 255; `mean` and `std` [C] are in units of the pixel range."""
    return (images - 255.0 * mean[:, None, None]).div_(255.0 * std[:, None, None])


def pixel_scale(mean, std, device) -> tuple[Tensor, Tensor]:
    """`mean` and `std` [C], in units of the pixel range, as `normalize_` takes them: [C, 1, 1], of 0 … 255."""
    return tuple(255.0 * torch.tensor(values, device=device)[:, None, None] for values in (mean, std))


def normalize_(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """`normalize` for a `pixel_scale`; float images are overwritten."""
    return images.float().sub_(mean).div_(std)


@cache
def on_device(values: tuple, device: torch.device) -> Tensor:
    """Constants as a tensor, brought to `device` once: at every step the copy would wait for it."""
    return torch.tensor(values, device=device)


def grey(images: Tensor) -> Tensor:
    """The grey image [B, 1, H, W] of RGB `images` [B, 3, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


def jitter_weights(factors: Tensor, turn: Tensor) -> Tensor:
    """What `color_jitter` takes, [n, 3], for `factors` [n, 3] of brightness, contrast and saturation in ORDERS[turn] [n].

    Brightness blends with black, contrast with the image's mean grey, saturation with its grey image. Each of them, and so
    any order of them, is a·image + b·grey + c·(mean of grey) with three numbers for each image: one pass instead of three.
    """
    a, b, c = torch.ones_like(factors[:, 0]), torch.zeros_like(factors[:, 0]), torch.zeros_like(factors[:, 0])
    for step in on_device(ORDERS, factors.device)[turn].unbind(dim=1):
        factor = factors.gather(1, step[:, None]).squeeze(1)
        rest = 1.0 - factor
        to_mean, to_grey = step == 1, step == 2  # the image's grey is now (a + b)·grey + c·mean
        c = torch.where(to_mean, c + rest * (a + b), torch.where(to_grey, c, factor * c))
        b = torch.where(to_grey, b + rest * a, factor * b)
        a = factor * a
    return torch.stack([a, b, c], dim=1)


def color_jitter_(images: Tensor, weights: Tensor) -> Tensor:
    """Brightness, contrast and saturation of `images` [B, 3, H, W] changed as `weights` [B, 3] say: see `jitter_weights`.

    Float images are overwritten.
    """
    images = images.float()
    shade = grey(images)
    a, b, c = weights[:, :, None, None, None].unbind(dim=1)
    constant = shade.mean(dim=(2, 3), keepdim=True).mul_(c)
    return images.mul_(a).add_(shade.mul_(b).add_(constant))


def lighting(alpha: Tensor) -> Tensor:
    """What AlexNet's noise adds to red, green and blue (of 0 … 255), [n, 3]: `alpha` [n, 3] along ImageNet's main colours."""
    values, vectors = on_device(PCA_VALUES, alpha.device), on_device(PCA_VECTORS, alpha.device)
    return 255.0 * ((alpha * values) @ vectors.T)


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """`images` [B, C, H, W] with zeros in the `boxes` (top, left, height, width) [B, 4], which may stick out."""
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    top, left, height, width = boxes[:, :, None].unbind(dim=1)
    down = (rows >= top) & (rows < top + height)
    across = (columns >= left) & (columns < left + width)
    return images.masked_fill((down[:, :, None] & across[:, None, :])[:, None], 0.0)


def draw_cutout(index: Tensor, key: int, side: int, size: tuple[int, int]) -> Tensor:
    """The box of `side` pixels around a pixel of each image (DeVries and Taylor, 2017): see `erase`."""
    down, across = (
        rng.integers(rng.derive_key(key, number), index, length)
        for number, length in zip((CUT_DOWN, CUT_ACROSS), size, strict=True)
    )
    sides = torch.full_like(down, side)
    return torch.stack([down - side // 2, across - side // 2, sides, sides], dim=1).int()


def draw_erasing(index: Tensor, key: int, probability: float, size: tuple[int, int]) -> Tensor:
    """A random box for each image with `probability`, else an empty one (Zhong et al., AAAI 2020): see `erase`."""
    height, width = size
    chosen, area, ratio, down, across = (
        rng.uniform(rng.derive_key(key, number), index)
        for number in (ERASE, ERASED_AREA, ERASED_RATIO, ERASE_DOWN, ERASE_ACROSS)
    )
    area = height * width * (ERASED[0] + area * (ERASED[1] - ERASED[0]))
    ratio = ERASED_RATIOS[0] * (ERASED_RATIOS[1] / ERASED_RATIOS[0]) ** ratio
    tall = (area * ratio).sqrt().round().clamp(1, height)
    wide = (area / ratio).sqrt().round().clamp(1, width)
    top, left = (down * (height - tall + 1)).floor(), (across * (width - wide + 1)).floor()
    return torch.stack([top, left, torch.where(chosen < probability, tall, 0.0), wide], dim=1).int()


def augment(images: Tensor, draws: Draws, padding: int, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised images from uint8 `images` [B, 3, H, W] as `draws` say; `padding` is that of the crop.

    Crops and flip on uint8, then colour jitter, lighting and normalisation in float32, nothing clipped in between; what is
    erased is zero, the mean colour. `mean` and `std`: see `pixel_scale`.
    """
    if draws.affine is not None:
        images = resized_crop(images, draws.affine)
    if draws.window is not None:
        images = crop(images, draws.window, padding)
    if draws.jitter is not None:
        images = color_jitter_(images, draws.jitter)
    if draws.lighting is not None:
        images = images + draws.lighting[:, :, None, None]
    images = normalize_(images, mean, std)
    for boxes in (draws.cutout, draws.erasing):
        if boxes is not None:
            images = erase(images, boxes)
    return images


class Mix(NamedTuple):
    """How a batch is mixed: mixup or cutmix, λ, and the box's centre (0 … 1 down, across)."""

    kind: str
    lam: float
    centre: tuple[float, float]


def draw_mix(section: Augment, key: int) -> Mix | None:
    """How the batch with this `key` is mixed: `mix_prob` of the batches are, with λ drawn from Beta(a, a)."""
    kinds = [kind for kind in ("mixup", "cutmix") if getattr(section, kind)]
    if not kinds:
        return None
    draws = random.Random(key)
    if draws.random() >= section.mix_prob:
        return None
    kind = draws.choice(kinds)
    a = getattr(section, kind)
    return Mix(kind, draws.betavariate(a, a), (draws.random(), draws.random()))


def mixup(images: Tensor, permutation: Tensor, lam: float) -> Tensor:
    """λ·images + (1 − λ)·images[permutation], for `images` [B, C, H, W], `permutation` [B] (Zhang et al., ICLR 2018)."""
    return torch.lerp(images[permutation], images, lam)


def cutmix(images: Tensor, permutation: Tensor, lam: float, centre: tuple[float, float]) -> tuple[Tensor, float]:
    """`images` [B, C, H, W] with a box of 1 − λ of their area, clipped at the edges, from images[permutation]; and λ as it is.

    Yun et al., ICCV 2019. The λ that is returned is the part of the area that is left after clipping.
    """
    bounds = []
    for middle, size in zip(centre, images.shape[-2:], strict=True):
        side = round(size * (1.0 - lam) ** 0.5)
        start = int(middle * size) - side // 2
        bounds.append(slice(max(start, 0), min(start + side, size)))
    down, across = bounds
    mixed = images.clone()
    mixed[..., down, across] = images[permutation][..., down, across]
    area = (down.stop - down.start) * (across.stop - across.start)
    return mixed, 1.0 - area / (images.shape[-2] * images.shape[-1])
