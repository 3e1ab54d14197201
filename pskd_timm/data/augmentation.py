"""Augmentation of whole batches on the device; every draw a function of (seed, epoch, sample), see rng.py."""

import random
from functools import cache
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


def crop(images: Tensor, top: Tensor, left: Tensor, padding: int) -> Tensor:
    """Windows of the size of `images` [B, C, H, W] at (top, left) [B] of the images padded by `padding` zeros a side."""
    height, width = images.shape[-2:]
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


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


def resized_crop(images: Tensor, boxes: Tensor) -> Tensor:
    """The `boxes` (left, top, width, height) [B, 4] of uint8 `images` [B, C, H, W], resized bilinearly to the images' size."""
    height, width = images.shape[-2:]
    left, top, wide, tall = boxes.unbind(dim=1)
    nought = torch.zeros_like(left)
    across = torch.stack([wide / width, nought, (2 * left + wide) / width - 1], dim=1)
    down = torch.stack([nought, tall / height, (2 * top + tall) / height - 1], dim=1)
    grid = F.affine_grid(torch.stack([across, down], dim=1), list(images.shape), align_corners=False)
    resized = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return resized.round_().to(torch.uint8)


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """`images` [B, C, H, W] with those left–right mirrored where `mirrored` [B] is true."""
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Float images from `images` [B, C, H, W] of 0 … 255; `mean` and `std` [C] are in units of the pixel range."""
    return (images - 255.0 * mean[:, None, None]).div_(255.0 * std[:, None, None])


@cache
def on_device(values: tuple, device: torch.device) -> Tensor:
    """Constants as a tensor, brought to `device` once: at every step the copy would wait for it."""
    return torch.tensor(values, device=device)


def grey(images: Tensor) -> Tensor:
    """The grey picture [B, 1, H, W] of RGB `images` [B, 3, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


def color_jitter(images: Tensor, factors: Tensor, turn: Tensor) -> Tensor:
    """Brightness, contrast and saturation of `images` [B, 3, H, W] times `factors` [B, 3], in the order ORDERS[turn] [B].

    Brightness blends with black, contrast with the picture's mean grey, saturation with its grey picture. Each of them,
    and so any order of them, is a·image + b·grey + c with three numbers for each image: one pass instead of three.
    """
    shade = grey(images)
    middle = shade.mean(dim=(1, 2, 3))
    a, b, c = torch.ones_like(middle), torch.zeros_like(middle), torch.zeros_like(middle)
    for step in on_device(ORDERS, images.device)[turn].unbind(dim=1):
        factor = factors.gather(1, step[:, None]).squeeze(1)
        rest = 1.0 - factor
        to_middle, to_shade = step == 1, step == 2  # the picture's grey is now (a + b)·shade + c
        c = torch.where(to_middle, c + rest * (a + b) * middle, torch.where(to_shade, c, factor * c))
        b = torch.where(to_shade, b + rest * a, factor * b)
        a = factor * a
    a, b, c = (number[:, None, None, None] for number in (a, b, c))
    return (images * a).add_(shade.mul_(b).add_(c))


def lighting(images: Tensor, alpha: Tensor) -> Tensor:
    """`images` [B, 3, H, W] of 0 … 255 moved along ImageNet's principal colours by `alpha` [B, 3] (AlexNet's noise)."""
    values, vectors = on_device(PCA_VALUES, images.device), on_device(PCA_VECTORS, images.device)
    return images + 255.0 * ((alpha * values) @ vectors.T)[:, :, None, None]


def erase(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """`images` [B, C, H, W] with zeros in the boxes of `height` × `width` [B] at (top, left) [B], which may stick out."""
    rows = torch.arange(images.shape[-2], device=images.device)
    columns = torch.arange(images.shape[-1], device=images.device)
    down = (rows >= top[:, None]) & (rows < (top + height)[:, None])
    across = (columns >= left[:, None]) & (columns < (left + width)[:, None])
    return images.masked_fill((down[:, :, None] & across[:, None, :])[:, None], 0.0)


def cutout(images: Tensor, index: Tensor, key: int, side: int) -> Tensor:
    """`images` [B, C, H, W] with a square of `side` pixels zero around a pixel of each (DeVries and Taylor, 2017)."""
    down, across = (
        rng.integers(rng.derive_key(key, draw), index, size)
        for draw, size in zip((CUT_DOWN, CUT_ACROSS), images.shape[-2:], strict=True)
    )
    sides = torch.full_like(down, side)
    return erase(images, down - side // 2, across - side // 2, sides, sides)


def random_erasing(images: Tensor, index: Tensor, key: int, probability: float) -> Tensor:
    """`images` [B, C, H, W], of which each has with `probability` a random box of zeros (Zhong et al., AAAI 2020)."""
    height, width = images.shape[-2:]
    chosen, area, ratio, down, across = (
        rng.uniform(rng.derive_key(key, draw), index)
        for draw in (ERASE, ERASED_AREA, ERASED_RATIO, ERASE_DOWN, ERASE_ACROSS)
    )
    area = height * width * (ERASED[0] + area * (ERASED[1] - ERASED[0]))
    ratio = ERASED_RATIOS[0] * (ERASED_RATIOS[1] / ERASED_RATIOS[0]) ** ratio
    tall = (area * ratio).sqrt().round().clamp(1, height)
    wide = (area / ratio).sqrt().round().clamp(1, width)
    top, left = (down * (height - tall + 1)).floor(), (across * (width - wide + 1)).floor()
    return erase(images, top, left, torch.where(chosen < probability, tall, 0.0), wide)


def augment(images: Tensor, index: Tensor, key: int, section: Augment, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised images of the samples `index` [B] from uint8 `images` [B, 3, H, W], as the section says; `key` names the epoch.

    Crop and flip on uint8, then colour jitter, lighting and normalisation in float32, nothing clipped in between; what is
    erased is zero, the mean colour.
    """
    if section.crop_padding:
        top, left = (
            rng.integers(rng.derive_key(key, draw), index, 2 * section.crop_padding + 1) for draw in (TOP, LEFT)
        )
        images = crop(images, top, left, section.crop_padding)
    if section.hflip:
        images = flip(images, rng.uniform(rng.derive_key(key, FLIP), index) < section.hflip)
    if section.color_jitter:
        draws = [rng.uniform(rng.derive_key(key, draw), index) for draw in (BRIGHTNESS, CONTRAST, SATURATION)]
        factors = 1.0 + section.color_jitter * (2.0 * torch.stack(draws, dim=1) - 1.0)
        images = color_jitter(images, factors, rng.integers(rng.derive_key(key, JITTER_ORDER), index, len(ORDERS)))
    if section.lighting:
        alpha = [rng.normal(rng.derive_key(key, LIGHTING, component), index) for component in range(3)]
        images = lighting(images, section.lighting * torch.stack(alpha, dim=1))
    images = normalize(images, mean, std)
    if section.cutout:
        images = cutout(images, index, key, section.cutout)
    if section.random_erasing:
        images = random_erasing(images, index, key, section.random_erasing)
    return images


class Mix(NamedTuple):
    """How a batch is mixed: mixup or cutmix, the share that is an image's own, and the box's centre (0 … 1 down, across)."""

    kind: str
    lam: float
    centre: tuple[float, float]


def drawn_mix(section: Augment, key: int) -> Mix | None:
    """How the batch with this `key` is mixed: `mix_prob` of the batches are, with the share drawn from Beta(a, a)."""
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

    Yun et al., ICCV 2019. The share that is returned is the one that is left after clipping.
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
