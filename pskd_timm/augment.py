"""Augmentation of whole batches on the device; every draw a function of (seed, epoch, sample), see rng.py."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import rng
from .recipe import Augment

# One number for each thing that is drawn: a new draw takes a new number and leaves the others' values alone.
TOP, LEFT, FLIP, JITTER_ORDER, BRIGHTNESS, CONTRAST, SATURATION, LIGHTING, RESIZED_CROP = range(9)

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


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """`images` [B, C, H, W] with those left–right mirrored where `mirrored` [B] is true."""
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Float images from `images` [B, C, H, W] of 0 … 255; `mean` and `std` [C] are in units of the pixel range."""
    return (images.float() - 255.0 * mean[:, None, None]) / (255.0 * std[:, None, None])


@cache
def on_device(values: tuple, device: torch.device) -> Tensor:
    """Constants as a tensor, brought to `device` once: at every step the copy would wait for it."""
    return torch.tensor(values, device=device)


def grey(images: Tensor) -> Tensor:
    """The grey picture [B, 1, H, W] of RGB `images` [B, 3, H, W]."""
    return (images * on_device(GREY, images.device)[:, None, None]).sum(dim=1, keepdim=True)


def color_jitter(images: Tensor, factors: Tensor, turn: Tensor) -> Tensor:
    """Brightness, contrast and saturation of float `images` [B, 3, H, W] times `factors` [B, 3], in the order ORDERS[turn] [B].

    Brightness blends with black, contrast with the picture's mean grey, saturation with its grey picture.
    """
    steps = on_device(ORDERS, images.device)[turn]
    for step in steps.unbind(dim=1):
        shade = grey(images)
        base = torch.zeros_like(shade)
        base = torch.where((step == 1)[:, None, None, None], shade.mean(dim=(2, 3), keepdim=True), base)
        base = torch.where((step == 2)[:, None, None, None], shade, base)
        factor = factors.gather(1, step[:, None]).squeeze(1)
        images = torch.lerp(base.expand_as(images), images, factor[:, None, None, None])
    return images


def lighting(images: Tensor, alpha: Tensor) -> Tensor:
    """Float `images` [B, 3, H, W] of 0 … 255 moved along ImageNet's principal colours by `alpha` [B, 3] (AlexNet's noise)."""
    values, vectors = on_device(PCA_VALUES, images.device), on_device(PCA_VECTORS, images.device)
    return images + 255.0 * ((alpha * values) @ vectors.T)[:, :, None, None]


def augment(images: Tensor, index: Tensor, key: int, section: Augment, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised images of the samples `index` [B] from uint8 `images` [B, 3, H, W], as the section says; `key` names the epoch.

    Crop and flip on uint8, then colour jitter, lighting and normalisation in float32, nothing clipped in between.
    """
    if section.crop_padding:
        top, left = (rng.integers(rng.fold(key, draw), index, 2 * section.crop_padding + 1) for draw in (TOP, LEFT))
        images = crop(images, top, left, section.crop_padding)
    if section.hflip:
        images = flip(images, rng.uniform(rng.fold(key, FLIP), index) < section.hflip)
    if section.color_jitter:
        draws = [rng.uniform(rng.fold(key, draw), index) for draw in (BRIGHTNESS, CONTRAST, SATURATION)]
        factors = 1.0 + section.color_jitter * (2.0 * torch.stack(draws, dim=1) - 1.0)
        images = color_jitter(images.float(), factors, rng.integers(rng.fold(key, JITTER_ORDER), index, len(ORDERS)))
    if section.lighting:
        alpha = [rng.normal(rng.fold(key, LIGHTING, component), index) for component in range(3)]
        images = lighting(images.float(), section.lighting * torch.stack(alpha, dim=1))
    return normalize(images, mean, std)
